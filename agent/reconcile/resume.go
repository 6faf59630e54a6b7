package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

const reasonRebooted = "rebooted before the new system was proven"

// resume goes on with the attempt that the journal tells of. What it finds may be anything between the
// journal's last step and the one after it, so it looks at the machine before it acts.
func (e *Engine) resume(ctx context.Context) (next *order) {
	e.undoLeftRotation(ctx)
	e.deliverSecrets() // a boot has emptied the folder, and what is resumed may build
	e.mu.Lock()
	a := e.j.Attempt
	e.mu.Unlock()
	if a == nil || a.Phase == protocol.Staged {
		// The agent may have been stopped between an end and the tidying up after it.
		if obs, err := e.observe(ctx); err == nil {
			e.keepRoots(obs.Running)
		}
	}
	if a == nil {
		e.prune()
		return nil
	}
	e.o.Log.Info("resuming", "deployment", a.Deployment, "phase", a.Phase)
	m, err := stored(e.o.Dir, a.Digest)
	if err != nil {
		err = fmt.Errorf("the stored manifest can't be read: %w", err)
	}
	if slices.Contains(startsOver, a.Phase) {
		if err != nil {
			e.fail(a, err)
			return nil
		}
		e.startOver(a)
		return e.drive(ctx, a, m)
	}
	if err != nil && a.Phase != protocol.RollingBack {
		e.toRollback(ctx, a, err.Error(), nil)
		return e.drive(ctx, a, m)
	}
	obs, err := e.observe(ctx)
	if err != nil {
		// Without knowing what runs nothing can be decided: the revert's own retries go on asking.
		if a.Phase != protocol.RollingBack {
			e.toRollback(ctx, a, err.Error(), nil)
		}
		return e.drive(ctx, a, m)
	}
	if a.boots() {
		e.resumeBoot(ctx, a, obs)
	} else {
		e.resumeSwitch(ctx, a, obs)
	}
	return e.drive(ctx, a, m)
}

// resumeSwitch brings an attempt of mode switch or test to a phase that can be driven on.
func (e *Engine) resumeSwitch(ctx context.Context, a *attempt, obs Observation) {
	rebooted := obs.BootID != a.BootID
	switch a.Phase {
	case protocol.Activating:
		switch {
		case !a.Armed:
			e.neverStarted(ctx, a)
		case rebooted:
			e.toRollback(ctx, a, reasonRebooted, nil)
		case a.left(obs) <= 0:
			e.toRollback(ctx, a, fmt.Sprintf("not proven within the deadline of %d s", a.Timeout), nil)
		default:
			j := a.activation()
			j.Attach = true
			e.awaitActivation(ctx, a, j)
		}
	case protocol.Checking:
		if rebooted {
			e.toRollback(ctx, a, reasonRebooted, nil)
		}
	case protocol.Confirming:
		if rebooted && obs.Running != a.New {
			e.toRollback(ctx, a, "rebooted before the new system was the boot default", nil)
		}
	}
}

// neverStarted begins again where the agent was stopped before it started the activation. Where that is
// not certain, it goes back.
func (e *Engine) neverStarted(ctx context.Context, a *attempt) {
	reverted, err := e.o.Host.Disarm(ctx, e.revert(a))
	changed, err2 := e.oldSecrets(ctx, a)
	err2 = errors.Join(err2, e.secretsBefore(ctx, a))
	obs, err3 := e.observe(ctx)
	if ctx.Err() != nil {
		return
	}
	if err == nil && err2 == nil && err3 == nil && !reverted && obs.Running == a.Old {
		e.loadAgain(ctx, changed, a.saw(obs))
		e.startOver(a)
		return
	}
	e.spare(a)
	e.toRollback(ctx, a, "the agent was stopped before the activation started", nil)
}

// startOver forgets all of an attempt but its manifest: nothing was switched.
func (e *Engine) startOver(a *attempt) {
	_ = e.update(string(protocol.Accepted), func(j *journal) {
		*a = attempt{Digest: a.Digest, Serial: a.Serial, Deployment: a.Deployment, Mode: a.Mode, Timeout: a.Timeout, Settle: a.Settle,
			Phase: protocol.Accepted, Started: a.Started, User: a.User, Role: a.Role,
			Rollback: a.Rollback, Local: a.Local, Offline: a.Offline, Staged: a.Staged}
		j.stand(a, a.Phase, "")
	})
}

func (e *Engine) spare(a *attempt) { _ = e.note("", func() { a.Spare = true }) }
