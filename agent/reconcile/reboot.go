package reconcile

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const rebootTries = 3

// boots tells whether the attempt's system is proven after a boot: there is no timer, and the way back is
// another boot.
func (a *attempt) boots() bool { return a.Mode == protocol.Boot || a.Mode == protocol.Reboot }

// backless tells whether there is no way back: a reboot that brought no other system.
func (a *attempt) backless() bool { return a.Mode == protocol.Reboot && a.Staged == nil }

// prepareReboot sees to it that the reboot brings what is expected of it: the system that runs or, where
// one is staged, that one. A staged attempt is taken over, and ends with this one.
func (e *Engine) prepareReboot(a *attempt, obs Observation) error {
	boots := obs.Profile
	if boots == "" {
		boots = obs.Running
	}
	expected := obs.Running
	if a.Staged != nil {
		expected = a.Staged.New
	}
	if boots != expected {
		return fmt.Errorf("not rebooted: %s would boot, and %s is expected to; deploy or roll back first", boots, expected)
	}
	live, found := e.secrets.Standing()
	if a.Staged == nil && live.Number != found {
		return errors.New("not rebooted: a boot would bring other secrets back than were tested last; deploy or roll back first")
	}
	return e.move(a, protocol.Rebooting, func() {
		a.New, a.Old, a.OldProfile, a.Failed, a.BootSet = obs.Running, obs.Running, boots, obs.Failed, true
		a.BootID, a.Deadline = obs.BootID, (obs.Uptime + rebootTime).Milliseconds()
		a.Secrets, a.OldSecrets, a.BootSecrets = live.Number, live.Number, found
		if s := a.Staged; s != nil {
			a.New, a.Old, a.OldProfile, a.Default, a.Built, a.Source = s.New, s.Old, s.OldProfile, s.Default, s.Built, s.Source
			a.Secrets, a.OldSecrets, a.BootSecrets, a.Spare = s.Secrets, s.OldSecrets, s.BootSecrets, s.Spare
			if !s.Rollback {
				a.Source = s.Digest
			}
			if obs.Running == s.New { // booted by itself meanwhile: what fails now is its own
				a.Failed = s.Failed
			}
			e.j.Reports = append(e.j.Reports, s.report(protocol.Staged, superseded{a.Deployment}.Error()+", which reboots into it", obs.Generation, e.now()))
		}
	})
}

// reboot orders the reboot and waits for it: it ends with the machine. One that doesn't come fails, and
// what was staged waits for a boot as before.
func (e *Engine) reboot(ctx context.Context, a *attempt) {
	obs, err := e.observe(ctx)
	left := time.Duration(a.Deadline)*time.Millisecond - obs.Uptime
	if err == nil && left > 0 {
		err = retry(ctx, rebootTries, func() error { return e.o.Host.Reboot(ctx) })
		if err == nil && !sleep(ctx, left) {
			return
		}
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		err = fmt.Errorf("the machine can't be rebooted: %w", err)
	} else {
		err = fmt.Errorf("a reboot was ordered and did not come within %v; `systemctl list-jobs` on the node shows what holds it up", rebootTime)
	}
	e.fail(a, err)
}

// failWithout ends a reboot that was not proven and has nothing to go back to.
func (e *Engine) failWithout(a *attempt, reason string, units []string, log string) {
	e.end(a, protocol.FailedPhase, reason+"; no other system was staged, so there is nothing to go back to", 0, func(*journal) {
		a.NewUnits, a.Log = units[:min(len(units), maxUnits)], log
	})
}
