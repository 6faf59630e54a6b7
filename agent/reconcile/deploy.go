package reconcile

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	fetchTimeout = 15 * time.Minute
	logLines     = 60 // lines of the build log that a failed build's report keeps
	observeTries = 5
)

// superseded is why an attempt is given up in favour of a newer manifest.
type superseded struct{ by string }

func (s superseded) Error() string { return "superseded by deployment " + s.by }

// deploy takes a manifest as far as it goes. Where a newer one arrived before anything was switched, it
// is what comes next.
func (e *Engine) deploy(ctx context.Context, o *order) (next *order) {
	if !e.unstage(ctx, o) {
		return nil
	}
	a, err := e.accept(ctx, o)
	if err != nil {
		e.refuse.add(o.digest, time.Now().Add(unwrittenFor))
		e.setNotice(fmt.Sprintf("deployment %s can't be accepted: %v", o.m.Deployment, err))
		e.giveUp(o, "it can't be accepted: "+err.Error())
		return nil
	}
	return e.drive(ctx, a, o.m)
}

// giveUp ends an order that did not become an attempt.
func (e *Engine) giveUp(o *order, reason string) {
	e.recordEnd(o.by, o.m.Deployment, protocol.FailedPhase, reason)
	e.box.fail(o.m.Deployment, clip(reason, maxReason))
	e.followers.tell(o.m.Deployment, protocol.Event{Version: protocol.Version, Time: e.now(), Phase: protocol.FailedPhase, Reason: clip(reason, maxReason)})
}

// accept stores the manifest and makes it the attempt: from here on its serial is seen.
func (e *Engine) accept(ctx context.Context, o *order) (*attempt, error) {
	if err := e.write(filepath.Join(e.o.Dir, manifestsDir, o.digest), o.doc, 0o600); err != nil {
		return nil, fmt.Errorf("%w; free space in %s", err, e.o.Dir)
	}
	m := o.m
	a := &attempt{Digest: o.digest, Serial: m.Serial, Deployment: m.Deployment, Mode: m.Mode, Timeout: m.Timeout, Settle: m.Settle, Started: e.now(),
		User: o.by.Name, Role: o.by.Role, Rollback: m.Rollback != nil, Local: o.unsigned, Offline: o.local && !e.reached(ctx)}
	e.mu.Lock()
	seen, newest, before, staged := e.j.Seen, e.j.Newest, e.j.State, e.j.Attempt
	e.notice = ""
	e.mu.Unlock()
	a.Staged = staged // only a reboot finds one here
	err := e.move(a, protocol.Accepted, func() {
		e.j.Rotation = nil // one that could not be undone: what is deployed now counts
		if !o.unsigned {
			e.j.Seen, e.j.Newest = m.Serial, m.Deployment
		}
	})
	if err != nil {
		// Nothing was done for it yet, so it may as well not have come.
		_ = e.update("", func(j *journal) { j.Seen, j.Newest, j.State, j.Attempt = seen, newest, before, staged })
	}
	return a, err
}

// drive takes an attempt from its phase to its end, or to where ctx ends.
func (e *Engine) drive(ctx context.Context, a *attempt, m *protocol.Manifest) (next *order) {
	for ctx.Err() == nil {
		e.pulse.beat(string(a.Phase), a.stepTime(m))
		switch a.Phase {
		case protocol.Accepted:
			next = e.prepare(ctx, a, m)
		case protocol.Activating:
			if a.Mode == protocol.Boot {
				e.makeDefault(ctx, a)
			} else {
				e.activate(ctx, a)
			}
		case protocol.Rebooting:
			e.reboot(ctx, a)
		case protocol.Checking:
			e.check(ctx, a)
		case protocol.Confirming:
			e.confirm(ctx, a, m)
		case protocol.RollingBack:
			e.rollBack(ctx, a)
		default:
			return next
		}
	}
	return nil
}

// fail ends an attempt that switched nothing.
func (e *Engine) fail(a *attempt, reason error) {
	e.end(a, protocol.FailedPhase, reason.Error(), 0, func(*journal) { a.Log = buildTail(reason) })
}

// buildTail is the end of the log of a failed build, "" for other errors.
func buildTail(err error) string {
	var be *nix.RunError
	if !errors.As(err, &be) {
		return ""
	}
	return strings.Join(be.Tail[max(0, len(be.Tail)-logLines):], "\n")
}

// prepare goes from a manifest to a closure and decides what to do with it.
func (e *Engine) prepare(ctx context.Context, a *attempt, m *protocol.Manifest) (next *order) {
	obs, err := e.observe(ctx)
	switch {
	case err != nil:
	case a.Mode == protocol.Reboot:
		err = e.prepareReboot(a, obs)
	case a.Rollback:
		err = e.prepareRollback(ctx, a, m, obs)
	default:
		next, err = e.prepareNew(ctx, a, m, obs)
	}
	if err != nil && ctx.Err() == nil {
		e.fail(a, err)
	}
	return next
}

// prepareNew builds or substitutes the system.
func (e *Engine) prepareNew(ctx context.Context, a *attempt, m *protocol.Manifest, obs Observation) (next *order, err error) {
	if m.Closure != nil {
		if err := e.tryable(m.Closure.Path); err != nil {
			return nil, err
		}
	}
	asked, err := e.askSecrets(m)
	if err != nil {
		return nil, err
	}
	same, done, err := e.unchanged(ctx, a, m, obs, asked)
	if done || err != nil {
		return nil, err
	}
	if err := e.secrets.Deliver(asked.live, asked.set); err != nil {
		return nil, err
	}
	if err := e.move(a, protocol.Fetching, nil); err != nil {
		return nil, err
	}
	next, err = e.interruptible(ctx, fetchTimeout, "fetching", func(ctx context.Context) error {
		return e.fetchTree(ctx, a.Digest, m)
	})
	if err != nil {
		return next, err
	}
	if err := e.move(a, protocol.Building, nil); err != nil {
		return nil, err
	}
	closure := obs.Running
	if !same { // else it is the secrets alone that change
		next, err = e.interruptible(ctx, buildLimit(m), "building", func(ctx context.Context) (err error) {
			closure, err = e.bring(ctx, m)
			return err
		})
	}
	if err != nil {
		return next, err
	}
	return nil, e.decide(ctx, a, closure, m.Closure == nil && !same, func() (int, error) { return e.stageSecrets(ctx, asked) })
}

// prepareRollback finds the system to go back to, and the manifest that it was made of.
func (e *Engine) prepareRollback(ctx context.Context, a *attempt, m *protocol.Manifest, obs Observation) error {
	to, err := e.resolve(ctx, m.Rollback, obs)
	if err != nil {
		return err
	}
	live, boots := e.secrets.Standing()
	e.mu.Lock()
	last, _ := e.j.last()
	made, _ := e.j.newest(func(c Confirmation) bool { return c.Closure == to.closure && c.Digest != "" })
	e.mu.Unlock()
	if to.closure == "" {
		e.stays(a, obs, live.Number, boots)
		if last.Closure != obs.Running {
			last = Confirmation{}
		}
		e.confirmed(a, &Confirmation{Digest: last.Digest, Tree: last.Tree}, obs.Generation, "nothing to go back from: deployment "+m.Rollback.Before+" switched nothing here")
		return nil
	}
	if err := e.note("", func() { a.Source = made.Digest }); err != nil {
		return err
	}
	return e.decide(ctx, a, to.closure, false, func() (int, error) {
		if to.secrets == 0 { // nothing is known of them: they stay
			return live.Number, nil
		}
		return to.secrets, nil
	})
}

func buildLimit(m *protocol.Manifest) time.Duration {
	return time.Duration(m.BuildTimeout) * time.Second
}

// fetchTree stages the source tree, where the manifest has one.
func (e *Engine) fetchTree(ctx context.Context, digest string, m *protocol.Manifest) error {
	if len(m.Files) == 0 {
		return nil
	}
	s, err := e.newStage(ctx, m)
	if err != nil {
		return err
	}
	defer s.root.Close()
	return e.fetch(ctx, digest, m, s.put)
}

// unchanged confirms at once what was confirmed before and still runs: done. Where it has other secrets, it is only the
// same.
func (e *Engine) unchanged(ctx context.Context, a *attempt, m *protocol.Manifest, obs Observation, asked asked) (same, done bool, err error) {
	e.mu.Lock()
	c, ok := e.j.last()
	e.mu.Unlock()
	if !ok || c.Closure != obs.Running {
		return false, false, nil
	}
	if a.Mode != protocol.Test && (c.Mode == protocol.Test || obs.Profile != c.Closure) {
		return false, false, nil
	}
	key, err := e.treeKey(ctx, m)
	if err != nil || key != c.Tree {
		return false, false, err
	}
	if !asked.same || a.Mode != protocol.Test && asked.boots != asked.live.Number {
		return true, false, nil
	}
	e.stays(a, obs, asked.live.Number, asked.boots)
	e.confirmed(a, &Confirmation{Digest: a.Digest, Tree: key}, obs.Generation, "")
	return true, true, nil
}

// stays takes down that what runs is what is wanted. The journal has it with the end, which comes next.
func (e *Engine) stays(a *attempt, obs Observation, secrets, boots int) {
	e.mu.Lock()
	defer e.mu.Unlock()
	a.Old, a.New, a.Secrets, a.OldSecrets, a.BootSecrets = obs.Running, obs.Running, secrets, secrets, boots
}

// decide looks at the closure that is here now: is it another one, or has it other secrets, and may it be tried?
func (e *Engine) decide(ctx context.Context, a *attempt, closure string, built bool, secrets func() (int, error)) error {
	if err := nix.CheckStorePath(closure); err != nil {
		return fmt.Errorf("the new system: %w", err)
	}
	obs, err := e.observe(ctx)
	if err != nil {
		return err
	}
	if closure != obs.Running {
		if err := e.tryable(closure); err != nil {
			return err
		}
	}
	set, err := secrets()
	if err != nil {
		return err
	}
	live, boots := e.secrets.Standing()
	changed, loaders, err := e.different(ctx, live, set)
	if err != nil {
		return err
	}
	err = e.note("built", func() {
		a.Built, a.New, a.Old, a.OldProfile, a.BootID, a.Failed = built, closure, obs.Running, obs.Profile, obs.BootID, obs.Failed
		if a.OldProfile == "" {
			a.OldProfile = obs.Running
		}
		a.Secrets, a.OldSecrets, a.BootSecrets, a.Changed, a.Loaders = set, live.Number, boots, changed, loaders
		a.Spare = closure == obs.Running
	})
	if err != nil {
		return err
	}
	if closure == obs.Running && set == live.Number {
		return e.move(a, protocol.Confirming, func() { a.Default = a.Mode != protocol.Test })
	}
	if _, err := e.o.Host.Declared(closure); err != nil {
		return err // before anything is switched: it could never be proven
	}
	if err := errors.Join(nix.SetRoot(e.o.Roots, rootNew, a.New), nix.SetRoot(e.o.Roots, rootOld, a.Old)); err != nil {
		return err
	}
	return e.move(a, protocol.Activating, func() {
		a.Default = a.Mode == protocol.Boot
		e.setDeadline(a, obs)
	})
}

// setDeadline starts the time in which the closure has to be proven.
func (e *Engine) setDeadline(a *attempt, obs Observation) {
	timeout := time.Duration(a.Timeout) * time.Second
	a.BootID, a.Deadline = obs.BootID, (obs.Uptime + timeout).Milliseconds()
	a.DeadlineAt = time.Now().Add(timeout).UTC().Format(time.RFC3339)
}

// interruptible does work that switches nothing, within a time and until a newer manifest arrives.
func (e *Engine) interruptible(ctx context.Context, limit time.Duration, doing string, work func(context.Context) error) (next *order, err error) {
	late := fmt.Errorf("%s did not end in %v", doing, limit)
	outer := ctx
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	ctx, stop := context.WithTimeoutCause(ctx, limit, late)
	defer stop()
	done := make(chan error, 1)
	go func() { done <- work(ctx) }()
	wake := e.box.wake
	for {
		select {
		case err := <-done:
			if next != nil {
				return next, superseded{next.m.Deployment}
			}
			if cause := context.Cause(ctx); err != nil && cause != nil {
				return nil, cause
			}
			return nil, err
		case <-wake:
			l, ok := e.box.take(true)
			if !ok {
				continue
			}
			// Only a manifest that is verified and newer stops the one under way. What comes after it stops it in turn.
			if n := e.obtain(outer, l); n != nil && n.m.Mode != protocol.DryActivate {
				next, wake = n, nil
				cancel(superseded{n.m.Deployment})
			}
		}
	}
}

// observe asks the host, again where it can't tell: the bus may be on its way back.
func (e *Engine) observe(ctx context.Context) (obs Observation, err error) {
	err = retry(ctx, observeTries, func() error {
		obs, err = e.o.Host.Observe(ctx)
		return err
	})
	if err == nil {
		err = nix.CheckStorePath(obs.Running)
	}
	if err != nil {
		return obs, fmt.Errorf("can't tell what runs here: %w", err)
	}
	obs.Failed = slices.DeleteFunc(slices.Clone(obs.Failed), OwnUnit)
	return obs, nil
}
