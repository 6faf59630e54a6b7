package reconcile

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/agent/health"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	renewTries = 3
	renewTime  = 30 * time.Second // from the order to restart the agent to its end
)

// number names the attempt's units.
func (a *attempt) number() uint64 {
	if a.Local {
		return uint64(a.Started.Unix())
	}
	return a.Serial
}

// revert is the way back: to what ran or, where the system is proven after a boot, to what would have booted.
func (e *Engine) revert(a *attempt) Revert {
	r := Revert{Number: a.number(), Old: a.Old, Timeout: time.Duration(a.Timeout) * time.Second}
	if a.boots() {
		r.Old = a.OldProfile
	} else if a.Secrets != a.OldSecrets {
		r.Secrets, r.Loaders = e.secrets.Place(a.OldSecrets), a.Loaders
	}
	return r
}

func (a *attempt) activation() Job {
	// systemd's own limit is only there for the case that neither timer nor agent is.
	return Job{Unit: unitName("activate", a.number(), "service"), Closure: a.New, Action: "test",
		Timeout: time.Duration(a.Timeout+60) * time.Second}
}

func (a *attempt) bootJob() Job {
	return Job{Unit: unitName("boot", a.number(), "service"), Closure: a.New, Action: "boot", Timeout: bootTimeout}
}

// left is the time until the attempt has to be proven. A little of it is kept for the confirming.
func (a *attempt) left(obs Observation) time.Duration {
	reserve := min(time.Second, time.Duration(a.Timeout)*time.Second/10)
	return time.Duration(a.Deadline)*time.Millisecond - obs.Uptime - reserve
}

// activate arms the revert, puts the new system's secrets in place and runs its activation.
func (e *Engine) activate(ctx context.Context, a *attempt) {
	err := e.readySecrets(ctx, a)
	if err == nil {
		err = e.o.Host.Arm(ctx, e.revert(a))
	}
	if err != nil {
		err = fmt.Errorf("the revert can't be armed, so nothing was activated: %w", err)
	} else {
		err = e.note("armed", func() { a.Armed = true })
	}
	if err != nil {
		if ctx.Err() == nil {
			e.disarmQuietly(ctx, a)
			e.unreadySecrets(ctx, a)
			e.fail(a, err)
		}
		return
	}
	obs, err := e.observe(ctx)
	if err != nil || a.left(obs) <= 0 {
		// The machine slept, or this process did: the timer may have fired.
		e.toRollback(ctx, a, fmt.Sprintf("the deadline of %d s passed before the activation started", a.Timeout), nil)
		return
	}
	if err := e.newSecrets(ctx, a); err != nil {
		e.toRollback(ctx, a, err.Error(), nil)
		return
	}
	e.awaitActivation(ctx, a, a.activation())
}

// awaitActivation runs the activation, or waits for the one that was started before.
func (e *Engine) awaitActivation(ctx context.Context, a *attempt, j Job) {
	obs, err := e.observe(ctx)
	if err != nil {
		e.toRollback(ctx, a, err.Error(), nil)
		return
	}
	limited, cancel := context.WithTimeout(ctx, max(a.left(obs), time.Millisecond))
	defer cancel()
	out, err := e.o.Host.Run(limited, j)
	switch {
	case ctx.Err() != nil:
	case errors.Is(err, context.DeadlineExceeded):
		e.toRollback(ctx, a, fmt.Sprintf("the activation did not end within the deadline of %d s", a.Timeout), nil)
	case err != nil:
		e.toRollback(ctx, a, fmt.Sprintf("the activation can't be run: %v", err), nil)
	case !out.Found:
		e.neverStarted(ctx, a)
	case out.Exit == exitDone:
		e.activated(limited, ctx, a)
	case out.Exit == exitUnitsFailed:
		obs, err := e.observe(ctx)
		units := health.NewlyFailed(a.Failed, obs.Failed)
		if err == nil && len(units) == 0 {
			e.activated(limited, ctx, a)
			return
		}
		e.toRollback(ctx, a, health.FailedUnits(units).Reason, units)
	default:
		e.toRollback(ctx, a, fmt.Sprintf("the activation failed (%v)", out), nil)
	}
}

// activated restarts what has to load other secrets, and begins the proof. The first context ends at the deadline.
func (e *Engine) activated(limited, ctx context.Context, a *attempt) {
	failed, err := e.loadSecrets(limited, a)
	switch {
	case ctx.Err() != nil:
	case err != nil:
		e.toRollback(ctx, a, fmt.Sprintf("what loads the new secrets can't be restarted: %v", err), nil)
	case len(failed) > 0:
		e.toRollback(ctx, a, fmt.Sprintf("does not start with the new secrets: %s", strings.Join(failed, ", ")), failed)
	default:
		e.toChecking(ctx, a)
	}
}

// toChecking begins the proof. A system is proven with the agent that it brings: where the activation
// left this one running, as it does where the old system had no unit of that name, that one takes over.
// An agent that begins in this phase was started after the activation, so it need not ask.
func (e *Engine) toChecking(ctx context.Context, a *attempt) {
	_ = e.move(a, protocol.Checking, nil)
	var renewed bool
	err := retry(ctx, renewTries, func() (err error) {
		renewed, err = e.o.Host.Renew(ctx)
		return err
	})
	if renewed && err == nil && sleep(ctx, renewTime) {
		err = errors.New("systemd did not end the agent before")
	}
	if err != nil {
		e.toRollback(ctx, a, fmt.Sprintf("the new system's agent can't be started: %v", err), nil)
	}
}

// check proves the activated system, or starts the way back.
func (e *Engine) check(ctx context.Context, a *attempt) {
	obs, err := e.observe(ctx)
	switch {
	case ctx.Err() != nil:
		return
	case err != nil:
		e.toRollback(ctx, a, err.Error(), nil)
		return
	case a.left(obs) <= 0:
		e.toRollback(ctx, a, fmt.Sprintf("not proven within the deadline of %d s", a.Timeout), nil)
		return
	case obs.Running != a.New || !e.hasSecrets(a):
		e.toRollback(ctx, a, "the new system does not run any more: the revert came first, or somebody switched by hand", nil)
		return
	}
	declared, err := e.o.Host.Declared(a.New)
	if err != nil {
		e.toRollback(ctx, a, err.Error(), nil)
		return
	}
	limited, cancel := context.WithTimeout(ctx, a.left(obs))
	defer cancel()
	results, err := health.Check(limited, health.Checks{
		Failed: e.failed, Before: a.Failed, Probe: e.probe(a), Settle: time.Duration(a.Settle) * time.Second,
		Declared: declared, UnitState: e.o.Host.UnitState,
	})
	if len(results) > 0 && ctx.Err() == nil {
		_ = e.note("", func() { a.Checks = results })
	}
	var failure *health.Failure
	switch {
	case ctx.Err() != nil:
	case errors.As(err, &failure):
		e.toRollback(ctx, a, failure.Reason, failure.Units)
	case err != nil:
		e.toRollback(ctx, a, err.Error(), nil)
	default:
		// What can't be journalled can't be finished after a crash, so it is not begun.
		if err := e.move(a, protocol.Confirming, func() { a.Default = a.Default || a.Mode != protocol.Test }); err != nil {
			e.toRollback(ctx, a, err.Error(), nil)
		}
	}
}

// failed are the units that are failed now, without ours.
func (e *Engine) failed(ctx context.Context) ([]string, error) {
	now, err := e.o.Host.Observe(ctx)
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(slices.Clone(now.Failed), OwnUnit), nil
}

// confirm makes a proven system the boot default and takes the way back away. Each step may be
// repeated after a crash.
func (e *Engine) confirm(ctx context.Context, a *attempt, m *protocol.Manifest) {
	obs, err := e.observe(ctx)
	if err == nil && (obs.Running != a.New || obs.BootID == a.BootID && !e.hasSecrets(a)) {
		err = errors.New("the revert came before the new system was confirmed")
	}
	if err == nil && !a.Disarmed {
		if err = e.secure(ctx, a, obs); err == nil {
			_ = e.note("disarmed", func() { a.Disarmed = true })
		}
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		e.toRollback(ctx, a, err.Error(), nil)
		return
	}
	c, reason := e.settled(ctx, a, m)
	if obs, err = e.observe(ctx); err != nil {
		e.o.Log.Warn("confirmed, and the generation is unknown", "error", err)
	}
	if ctx.Err() != nil {
		return
	}
	e.confirmed(a, c, obs.Generation, reason)
}

// settled brings the node's source tree up to date and makes the entry of the history, nil where nothing was
// deployed: a reboot that brought no other system. The reason says what is not as it should be.
func (e *Engine) settled(ctx context.Context, a *attempt, m *protocol.Manifest) (c *Confirmation, reason string) {
	if a.backless() {
		return nil, ""
	}
	made, digest := e.madeOf(a, m)
	if a.Mode != protocol.Test {
		reason = e.show(ctx, a, made)
	}
	c = &Confirmation{Digest: digest, Back: a.Rollback}
	switch {
	case made == nil || reason != "":
	case a.Rollback:
		// The node's own files may be others than when it was built.
		e.mu.Lock()
		before, _ := e.j.newest(func(b Confirmation) bool { return b.Digest == digest && b.Closure == a.New })
		e.mu.Unlock()
		c.Tree = before.Tree
	default:
		var err error
		if c.Tree, err = e.treeKey(ctx, made); err != nil {
			e.o.Log.Warn("the next deploy has to build again", "error", err)
		}
	}
	return c, reason
}

// secure sets the profile and the boot default and disarms the revert. An error means: go back.
func (e *Engine) secure(ctx context.Context, a *attempt, obs Observation) error {
	if a.Mode != protocol.Test && !a.BootSet {
		if obs.Profile != a.New {
			if err := e.o.Host.SetProfile(ctx, a.New); err != nil {
				return err
			}
		}
		_ = e.note("profile", func() {})
		if obs.Profile != a.New || a.Armed {
			if err := e.runBoot(ctx, a.bootJob()); err != nil {
				return err
			}
		}
		_ = e.note("boot-default", func() { a.BootSet = true })
	}
	if err := e.keepSecrets(ctx, a); err != nil {
		return err
	}
	if !a.Armed {
		return nil
	}
	started, err := e.o.Host.Disarm(ctx, e.revert(a))
	if err != nil {
		return fmt.Errorf("the revert can't be disarmed: %w", err)
	}
	if started {
		return fmt.Errorf("the deadline of %d s passed while the new system was being confirmed", a.Timeout)
	}
	return nil
}

func (e *Engine) runBoot(ctx context.Context, j Job) error {
	out, err := e.o.Host.Run(ctx, j)
	if err == nil && out.Exit != exitDone {
		err = errors.New(out.String())
	}
	if err != nil {
		return fmt.Errorf("the boot default can't be set: %w", err)
	}
	return nil
}

// installedManifest is the one whose files are in the node's source tree, nil where there is none.
func (e *Engine) installedManifest() *protocol.Manifest {
	e.mu.Lock()
	digest := e.j.Installed
	e.mu.Unlock()
	if digest == "" {
		return nil
	}
	m, err := stored(e.o.Dir, digest)
	if err != nil {
		e.o.Log.Warn("files of the manifest before can't be removed", "error", err)
		return nil
	}
	return m
}

// confirmed ends an attempt that was proven. c has what the node's source tree shows.
func (e *Engine) confirmed(a *attempt, c *Confirmation, generation int, reason string) {
	e.end(a, protocol.Confirmed, reason, generation, func(j *journal) {
		if a.BootID != "" { // else nothing was done
			j.Baseline = slices.Sorted(slices.Values(a.Failed))
			if j.Baseline == nil {
				j.Baseline = []string{}
			}
		}
		if c == nil {
			return
		}
		c.Serial, c.Deployment, c.Mode, c.Closure, c.Before, c.Time = a.Serial, a.Deployment, a.Mode, a.New, a.Old, e.now()
		c.Secrets, c.BeforeSecrets = a.Secrets, a.OldSecrets
		j.remember(*c)
		if a.Mode != protocol.Test && reason == "" && c.Digest != "" {
			j.Installed = c.Digest
		}
	})
	e.keepRoots(a.New)
}

func (e *Engine) disarmQuietly(ctx context.Context, a *attempt) {
	if _, err := e.o.Host.Disarm(ctx, e.revert(a)); err != nil {
		e.o.Log.Warn("the revert can't be disarmed; it runs what runs already", "error", err)
	}
}

// toRollback keeps the evidence and starts the way back. A journal that can't be written does not stop
// it: whoever resumes sees what runs.
func (e *Engine) toRollback(ctx context.Context, a *attempt, reason string, units []string) {
	if ctx.Err() != nil {
		return
	}
	log := e.evidence(ctx, a, units)
	if a.backless() {
		e.failWithout(a, reason, units, log)
		return
	}
	_ = e.move(a, protocol.RollingBack, func() {
		a.Reason, a.NewUnits, a.Log = clip(reason, maxReason), units[:min(len(units), maxUnits)], log
	})
}
