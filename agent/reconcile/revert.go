package reconcile

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	revertFirst = 2 * time.Second
	revertLast  = time.Minute
	rebootTime  = 5 * time.Minute // a reboot that did not come by then is ordered again
)

var errRebooting = errors.New("the machine reboots into its old system")

// rollBack goes back to the old system and stays at it until that succeeded: there is no other end.
func (e *Engine) rollBack(ctx context.Context, a *attempt) {
	wait := revertFirst
	for try := 1; ; try++ {
		e.pulse.beat(string(a.Phase), goBackTime)
		err := e.goBack(ctx, a, try > 1)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			break
		}
		if errors.Is(err, errRebooting) {
			if !sleep(ctx, rebootTime) {
				return
			}
			continue
		}
		e.loud(a, fmt.Sprintf("%s; going back failed %d times and is tried again: %v", a.Reason, try, err))
		if !sleep(ctx, jitter(wait)) {
			return
		}
		wait = min(2*wait, revertLast)
	}
	obs, err := e.observe(ctx)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		e.o.Log.Warn("rolled back, and the generation is unknown", "error", err)
	}
	e.disarmQuietly(ctx, a)
	e.end(a, protocol.RolledBack, a.Reason, obs.Generation, func(j *journal) {
		if !a.Spare && a.New != "" {
			j.Quarantine[a.New] = Quarantine{Reason: a.Reason, Deployment: a.Deployment, Time: e.now()}
		}
	})
	e.keepRoots(e.revert(a).Old)
}

// loud tells why the machine is still between two systems.
func (e *Engine) loud(a *attempt, reason string) {
	e.o.Log.Error("the old system does not run yet", "deployment", a.Deployment, "old", a.Old, "reason", reason)
	_ = e.update("", func(j *journal) { j.State.Reason = clip(reason, maxReason) })
	e.tell(a.Deployment, protocol.RollingBack, reason)
}

// goBack is one try. Each of its steps may be repeated after a crash.
func (e *Engine) goBack(ctx context.Context, a *attempt, again bool) error {
	obs, err := e.observe(ctx)
	if err != nil {
		return err
	}
	if a.boots() {
		return e.goBackByBoot(ctx, a, obs, again)
	}
	if !a.Reverted {
		// The service does the same, for the case that there is no agent.
		changed, err := e.oldSecrets(ctx, a)
		if err != nil {
			e.o.Log.Warn("the revert has to take the secrets back", "error", err)
		}
		// After a reboot the old system runs by itself. In the same boot the service runs even where the
		// old path does already: an activation that broke off has stopped units before it came that far.
		if obs.Running != a.Old || a.Armed && obs.BootID == a.BootID {
			if err := e.runRevert(ctx, a, again); err != nil {
				return err
			}
		}
		e.loadAgain(ctx, changed, a.saw(obs)) // what the service has restarted is younger
		_ = e.note("reverted", func() { a.Reverted = true })
	}
	if err := e.restoreDefault(ctx, a, obs); err != nil {
		return err
	}
	return e.secretsBefore(ctx, a)
}

// goBackByBoot sets the boot default back and, where the new system runs, reboots once.
func (e *Engine) goBackByBoot(ctx context.Context, a *attempt, obs Observation, again bool) error {
	if err := e.restoreDefault(ctx, a, obs); err != nil {
		return err
	}
	if obs.Running != a.New || a.New == a.OldProfile {
		return e.bootSecretsBefore(ctx, a)
	}
	if a.Rebooted == "" || a.Rebooted == obs.BootID {
		if err := e.note("rebooting", func() { a.Rebooted = obs.BootID }); err != nil {
			return err // unremembered, it might reboot for ever
		}
		if err := e.bootFinds(ctx, a.BootSecrets); err != nil {
			return err
		}
		if err := e.o.Host.Reboot(ctx); err != nil {
			return fmt.Errorf("the machine can't be rebooted: %w", err)
		}
		return errRebooting
	}
	if err := e.runRevert(ctx, a, again); err != nil {
		return err
	}
	return e.bootSecretsBefore(ctx, a)
}

// runRevert runs the revert service, or waits for it where the timer was first.
func (e *Engine) runRevert(ctx context.Context, a *attempt, again bool) error {
	limited, cancel := context.WithTimeout(ctx, revertTimeout+time.Minute)
	defer cancel()
	r := e.revert(a)
	j := r.Job()
	j.Again = again
	out, err := e.o.Host.Run(limited, j)
	if err != nil {
		return fmt.Errorf("the revert can't be run: %w", err)
	}
	obs, err := e.observe(ctx)
	if err != nil {
		return err
	}
	if obs.Running != r.Old || out.Exit != exitDone && out.Exit != exitUnitsFailed {
		return fmt.Errorf("the revert ended with %v and %s runs; run %s/bin/switch-to-configuration test here", out, obs.Running, r.Old)
	}
	return nil
}

// restoreDefault sets profile and boot default back where they may name the new system.
func (e *Engine) restoreDefault(ctx context.Context, a *attempt, obs Observation) error {
	if !a.Default {
		return nil
	}
	if obs.Profile != a.OldProfile {
		if err := e.o.Host.SetProfile(ctx, a.OldProfile); err != nil {
			return err
		}
	}
	j := Job{Unit: unitName("restore", a.number(), "service"), Closure: a.OldProfile, Action: "boot", Timeout: bootTimeout}
	if err := e.runBoot(ctx, j); err != nil {
		return err
	}
	_ = e.note("restored", func() { a.Default = false })
	return nil
}
