package provision

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/cli/project"
)

// Phase is one of the steps that bring a machine in. What is done is asked of the machine itself, so that a run that was
// ended anywhere is finished by the next.
type Phase string

// The phases, in their order.
const (
	PhaseCreate     Phase = "create"     // at its provider
	PhaseReach      Phase = "reach"      // by SSH; its host key is pinned
	PhaseLook       Phase = "look"       // at what runs there
	PhaseConvert    Phase = "convert"    // to NixOS
	PhaseReboot     Phase = "reboot"     // into it
	PhaseVerify     Phase = "verify"     // that NixOS runs
	PhaseController Phase = "controller" // is installed, where it is to be one
	PhaseAgent      Phase = "agent"      // is installed and started
	PhaseHeartbeat  Phase = "heartbeat"  // of the agent: the first one is waited for
)

// PhaseError is a phase that failed.
type PhaseError struct {
	Phase Phase
	Log   []string // the last lines of its log, where it has one
	Err   error
}

func (e *PhaseError) Error() string { return string(e.Phase) + ": " + e.Err.Error() }

func (e *PhaseError) Unwrap() error { return e.Err }

// ErrOwnReboot is a machine that was converted by a script that leaves the reboot to its owner.
var ErrOwnReboot = errors.New("converted; reboot it, and run this again")

// How long machines are waited for.
const (
	reachTime  = time.Minute      // one that is there
	freshTime  = 5 * time.Minute  // one that was made a moment ago
	rebootTime = 10 * time.Minute // the first boot of a system that another one left a disk full of files
	keysTime   = 30 * time.Second
)

// Arrival is one machine on its way to NixOS.
type Arrival struct {
	Name       string
	Ways       []Target // in, from the most wanted: the user that it has now, and root, who is the only one after a conversion
	Fresh      bool     // it was made a moment ago, and need not be there yet
	Conversion Conversion
	Journal    *Journal
	Step       func(phase Phase, what string) // says what is being done
	Log        func(line string)              // is told the last line of a log, every now and then
}

// Begin notes that a phase begins.
func (a *Arrival) Begin(p Phase, what string) error {
	a.Journal.Phase, a.Journal.Error, a.Journal.Log = p, "", nil
	if err := a.Journal.Save(); err != nil {
		return err
	}
	a.Step(p, what)
	return nil
}

// Fail notes that the phase which was begun last failed, unless it was interrupted.
func (a *Arrival) Fail(ctx context.Context, err error, log []string) error {
	if ctx.Err() != nil {
		return context.Cause(ctx)
	}
	a.Journal.Error, a.Journal.Log = err.Error(), log
	return errors.Join(&PhaseError{a.Journal.Phase, log, err}, a.Journal.Save())
}

// NixOS brings the machine to where it runs NixOS, and gives a connection to it.
func (a *Arrival) NixOS(ctx context.Context) (*Machine, error) {
	phase, patience := PhaseReach, Patience{Reach: reachTime}
	switch {
	case a.Journal.Phase == PhaseReboot: // an earlier run ended then, and the machine may be at it still
		phase, patience = PhaseReboot, Patience{rebootTime, keysTime}
	case a.Fresh:
		patience = Patience{freshTime, keysTime}
	}
	if err := a.Begin(phase, "connect to "+a.Ways[0].Address()); err != nil {
		return nil, err
	}
	m, err := a.reach(ctx, patience)
	if err != nil {
		return nil, a.Fail(ctx, err, nil)
	}
	if err := a.Begin(PhaseLook, "look at the machine"); err != nil {
		m.Close()
		return nil, err
	}
	facts, err := Look(ctx, m)
	switch {
	case err == nil && facts.NixOS:
		return m, nil
	case err == nil:
		err = a.convertible(facts)
	}
	if err != nil {
		m.Close()
		return nil, a.Fail(ctx, err, nil)
	}
	return a.toNixOS(ctx, m, facts)
}

// convertible tells why a machine that does not run NixOS can't be made to.
func (a *Arrival) convertible(f Facts) error {
	switch {
	case !f.Debian:
		return fmt.Errorf("it runs %s; machines with NixOS, Debian, or what is made of Debian (such as Ubuntu) can be brought in", f.OS)
	case a.Conversion.Method == project.MethodNone:
		return fmt.Errorf("it runs %s, and method none converts nothing: install NixOS on it, or use another --method", f.OS)
	case a.Conversion.Missing != nil:
		return a.Conversion.Missing
	case a.Conversion.Method == project.MethodInfect && !a.Conversion.Mutation:
		return a.losable(f)
	}
	return nil
}

// toNixOS converts a machine, whose boot is before's.
func (a *Arrival) toNixOS(ctx context.Context, m *Machine, before Facts) (*Machine, error) {
	if err := a.Begin(PhaseConvert, "convert "+before.OS+" to NixOS"); err != nil {
		m.Close()
		return nil, err
	}
	var err error
	if a.Conversion.Method == project.MethodAnywhere {
		err = a.anywhere(ctx, m)
	} else {
		m, err = a.infect(ctx, m, before)
	}
	if err != nil {
		return nil, err
	}
	m, facts, err := a.reboot(ctx, m, before)
	if err != nil {
		return nil, err
	}
	err = a.Begin(PhaseVerify, "see that NixOS runs")
	if err == nil && !facts.NixOS {
		err = a.Fail(ctx, fmt.Errorf("it was rebooted and runs %s still: the conversion did not last; run this again to convert it once more", facts.OS), conversionLog(ctx, m))
	}
	if err != nil {
		m.Close()
		return nil, err
	}
	return m, nil
}

func (a *Arrival) reach(ctx context.Context, p Patience) (*Machine, error) {
	phase := a.Journal.Phase
	return Reach(ctx, a.Ways, p, func(why error) { a.Step(phase, "wait: "+why.Error()) })
}

// reboot boots the machine, unless nixos-anywhere has, and waits for its next boot, which has to show the same host
// key: it is pinned.
func (a *Arrival) reboot(ctx context.Context, m *Machine, before Facts) (*Machine, Facts, error) {
	done := a.Conversion.Method == project.MethodAnywhere
	if err := a.Begin(PhaseReboot, "reboot"); err != nil {
		m.Close()
		return nil, Facts{}, err
	}
	if !done {
		_, err := run(ctx, stepTime, m, nil, "systemctl", "reboot")
		m.Close()
		// All else is the connection's end, or that of systemctl itself, which goes down with the machine.
		var refused *ssh.ExitError
		if errors.As(err, &refused) && refused.ExitStatus() < signalled {
			return nil, Facts{}, a.Fail(ctx, err, nil)
		}
	}
	limit, cancel := context.WithTimeoutCause(ctx, rebootTime, fmt.Errorf("it did not come back within %s: look at its console, whether NixOS boots there and has its address", rebootTime))
	defer cancel()
	for {
		m, err := a.reach(limit, Patience{rebootTime, keysTime})
		if err != nil {
			if limit.Err() != nil {
				err = context.Cause(limit)
			}
			return nil, Facts{}, a.Fail(ctx, err, nil)
		}
		facts, err := Look(limit, m)
		if err == nil && facts.BootID != before.BootID && (facts.NixOS || !done) {
			return m, facts, nil
		}
		m.Close() // it goes down still, or came up a moment ago, or is the installer
		if err := pause(limit, retryEvery); err != nil {
			return nil, Facts{}, a.Fail(ctx, err, nil)
		}
	}
}

// signalled is where the exit statuses begin of what a signal ended.
const signalled = 128

// tail gives the last lines of a log, cut to what can be shown.
func tail(text string, n int) []string {
	lines := strings.Split(strings.TrimSpace(text), "\n")
	lines = lines[max(0, len(lines)-n):]
	for i, l := range lines {
		lines[i] = l[:min(len(l), 300)]
	}
	return lines
}
