package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/ui"
)

// phaseDocument is a step of a machine that is being brought in, in --json.
type phaseDocument struct {
	Event string          `json:"event"` // step
	Name  string          `json:"name"`
	Phase provision.Phase `json:"phase"`
	Step  string          `json:"step"`
}

// machineDocument says how a machine ended that was to be brought in, in --json.
type machineDocument struct {
	Event   string          `json:"event"` // machine
	Name    string          `json:"name"`
	State   string          `json:"state"` // enrolled, already (it was before), failed or reboot (its owner's to do)
	Host    string          `json:"host,omitempty"`
	Phase   provision.Phase `json:"phase,omitempty"` // that failed
	Error   string          `json:"error,omitempty"`
	Log     []string        `json:"log,omitempty"`
	Lasting bool            `json:"lasting"`
	Millis  int64           `json:"ms"`
}

// print prints a document, those of several machines one after the other.
func (b *bringIn) print(document any) {
	b.printing.Lock()
	defer b.printing.Unlock()
	b.document(document)
}

// step shows what is being done with a machine. What is said again and again, while it is waited for, is shown once.
func (b *bringIn) step(m *incoming, p provision.Phase, what string) {
	if m.phase == p && m.said == what {
		return
	}
	m.phase, m.said = p, what
	if b.json {
		b.print(phaseDocument{"step", m.name, p, what})
		return
	}
	b.live.Set(m.name, string(p)+": "+what, ui.Active)
}

// logged shows the last line of a log, where it can be replaced by the next.
func (b *bringIn) logged(m *incoming, line string) {
	if !b.json && b.out.Interactive() {
		b.live.Set(m.name, string(m.phase)+": "+line, ui.Active)
	}
}

// settled shows how a machine ended.
func (b *bringIn) settled(ctx context.Context, m *incoming) {
	took := time.Since(m.began).Round(100 * time.Millisecond)
	if b.json {
		d := machineDocument{Event: "machine", Name: m.name, State: "enrolled", Host: m.server.Host, Lasting: m.lasting, Millis: took.Milliseconds()}
		var failed *provision.PhaseError
		switch {
		case m.already:
			d.State = "already"
		case errors.Is(m.err, provision.ErrOwnReboot):
			d.State = "reboot"
		case m.err != nil:
			d.State, d.Error = "failed", message(m.err)
		}
		if errors.As(m.err, &failed) {
			d.Phase, d.Log = failed.Phase, failed.Log
		}
		b.print(d)
		return
	}
	switch {
	case m.already:
		b.live.Set(m.name, "enrolled before", ui.Good)
	case errors.Is(m.err, provision.ErrOwnReboot):
		b.live.Set(m.name, provision.ErrOwnReboot.Error(), ui.Waiting)
	case ctx.Err() != nil && m.err != nil:
		b.live.Set(m.name, "interrupted", ui.Bad)
	case m.err != nil:
		b.live.Set(m.name, "failed: "+message(m.err), ui.Bad)
	default:
		b.live.Set(m.name, fmt.Sprintf("enrolled in %s", took), ui.Good)
	}
}

// tell says how it went in all, and with which lines those ended that failed.
func (b *bringIn) tell(ctx context.Context, took time.Duration) (in []string, err error) {
	var failed []error
	var passing []string
	reboots := 0
	for _, m := range b.machines {
		switch {
		case m.err == nil:
			in = append(in, m.name)
			if !m.already && !m.lasting {
				passing = append(passing, m.name)
			}
			continue
		case errors.Is(m.err, provision.ErrOwnReboot):
			reboots++
		}
		failed = append(failed, fmt.Errorf("%s: %w", m.name, m.err))
		var e *provision.PhaseError
		if errors.As(m.err, &e) && len(e.Log) > 0 && !errors.Is(m.err, provision.ErrOwnReboot) && ctx.Err() == nil {
			b.say("the log of %s ended with:\n", m.name)
			b.printLog(e.Log)
		}
	}
	os.Remove(b.own(journalDir)) // stays while a machine is not in
	if len(failed) == 0 {
		b.say("%s in, after %s\n", machinesAre(len(in)), took.Round(100*time.Millisecond))
		if len(passing) > 0 && !b.o.deploy {
			b.say("until their configuration is deployed, the agent lasts until the next boot on %s\n", some(passing))
		}
		return in, nil
	}
	status := SomeFailed
	if reboots == len(failed) {
		status = Unanswered
	}
	if len(failed) == 1 {
		return in, &outcome{status, fmt.Errorf("%w; run the same command again, it goes on where this ended", failed[0])}
	}
	return in, &outcome{status, &errorList{machinesAre(len(failed)) + " not in; run the same command again, it goes on where this ended:", failed}}
}

// machinesAre is "1 machine is" or "2 machines are".
func machinesAre(n int) string {
	if n == 1 {
		return "1 machine is"
	}
	return fmt.Sprintf("%d machines are", n)
}
