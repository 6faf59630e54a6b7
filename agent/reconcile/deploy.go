package reconcile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	fetchTimeout  = 15 * time.Minute
	eventLines    = 64
	eventInterval = 200 * time.Millisecond
	logLines      = 60 // lines of the build log that a failed build's report keeps
	observeTries  = 5
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
	a, err := e.accept(o)
	if err != nil {
		e.refuse.add(o.digest, time.Now().Add(unwrittenFor))
		e.setNotice(fmt.Sprintf("deployment %s can't be accepted: %v", o.m.Deployment, err))
		e.recordEnd(o.by, o.m.Deployment, protocol.FailedPhase, "it can't be accepted: "+err.Error())
		return nil
	}
	return e.drive(ctx, a, o.m)
}

// accept stores the manifest and makes it the attempt: from here on its serial is seen.
func (e *Engine) accept(o *order) (*attempt, error) {
	if err := e.write(filepath.Join(e.o.Dir, manifestsDir, o.digest), o.doc, 0o600); err != nil {
		return nil, fmt.Errorf("%w; free space in %s", err, e.o.Dir)
	}
	m := o.m
	a := &attempt{Digest: o.digest, Serial: m.Serial, Deployment: m.Deployment, Mode: m.Mode, Timeout: m.Timeout, Settle: m.Settle, Started: e.now(),
		User: o.by.Name, Role: o.by.Role}
	e.mu.Lock()
	seen, before := e.j.Seen, e.j.State
	e.notice = ""
	e.mu.Unlock()
	err := e.move(a, protocol.Accepted, func() { e.j.Seen = m.Serial })
	if err != nil {
		// Nothing was done for it yet, so it may as well not have come.
		_ = e.update("", func(j *journal) { j.Seen, j.State, j.Attempt = seen, before, nil })
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
	if err == nil {
		var done bool
		if done, err = e.unchanged(a, m, obs); done {
			return nil
		}
	}
	if err == nil {
		err = e.move(a, protocol.Fetching, nil)
	}
	if err == nil {
		next, err = e.interruptible(ctx, fetchTimeout, "fetching", func(ctx context.Context) error {
			return e.fetchTree(ctx, a.Digest, m)
		})
	}
	if err == nil {
		err = e.move(a, protocol.Building, nil)
	}
	var closure string
	if err == nil {
		next, err = e.interruptible(ctx, buildLimit(m), "building", func(ctx context.Context) (err error) {
			closure, err = e.build(ctx, m)
			return err
		})
	}
	if err == nil {
		err = e.decide(ctx, a, closure)
	}
	if err != nil && ctx.Err() == nil {
		e.fail(a, err)
	}
	return next
}

func buildLimit(m *protocol.Manifest) time.Duration {
	return time.Duration(m.BuildTimeout) * time.Second
}

// fetchTree stages the source tree.
func (e *Engine) fetchTree(ctx context.Context, digest string, m *protocol.Manifest) error {
	s, err := e.newStage(m)
	if err != nil {
		return err
	}
	defer s.root.Close()
	return e.fetch(ctx, digest, m, s.put)
}

// unchanged confirms at once what was confirmed before and still runs.
func (e *Engine) unchanged(a *attempt, m *protocol.Manifest, obs Observation) (bool, error) {
	e.mu.Lock()
	c := e.j.Current
	e.mu.Unlock()
	if c == nil || c.Closure != obs.Running {
		return false, nil
	}
	if a.Mode != protocol.Test && (c.Mode == protocol.Test || obs.Profile != c.Closure) {
		return false, nil
	}
	key, err := e.treeKey(m)
	if err != nil || key != c.Tree {
		return false, err
	}
	if err := e.note("", func() { a.Old, a.New = obs.Running, obs.Running }); err != nil {
		return false, err
	}
	e.confirmed(a, key, obs.Generation, "")
	return true, nil
}

// decide looks at the closure that was built: is it new, and may it be tried?
func (e *Engine) decide(ctx context.Context, a *attempt, closure string) error {
	if err := nix.CheckStorePath(closure); err != nil {
		return fmt.Errorf("the build: %w", err)
	}
	obs, err := e.observe(ctx)
	if err != nil {
		return err
	}
	err = e.note("built", func() {
		a.Built, a.New, a.Old, a.OldProfile, a.BootID, a.Failed = true, closure, obs.Running, obs.Profile, obs.BootID, obs.Failed
		if a.OldProfile == "" {
			a.OldProfile = obs.Running
		}
	})
	if err != nil {
		return err
	}
	if closure == obs.Running {
		return e.move(a, protocol.Confirming, func() { a.Default, a.Spare = a.Mode != protocol.Test, true })
	}
	e.mu.Lock()
	q, bad := e.j.Quarantine[closure]
	e.mu.Unlock()
	if bad {
		return fmt.Errorf("in quarantine: this closure was rolled back from in deployment %s (%s); `nix-infra node release %s` lets it be tried again",
			q.Deployment, clip(q.Reason, maxReason/2), e.o.Node)
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

// build runs the build and streams its log.
func (e *Engine) build(ctx context.Context, m *protocol.Manifest) (string, error) {
	if err := os.MkdirAll(e.o.Roots, 0o755); err != nil {
		return "", fmt.Errorf("can't make the folder of gc roots: %w", err)
	}
	log := e.startLog(m.Deployment, protocol.Building)
	defer log.stop()
	return e.o.Host.Build(ctx, Build{Dir: e.stagedTree(m.Deployment), Attr: m.Attr, Impure: m.Impure,
		OutLink: filepath.Join(e.o.Roots, rootBuilt), Log: log.add})
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
		case <-e.box.wake:
			l, ok := e.box.take(true)
			if !ok || next != nil && l.Serial <= next.m.Serial {
				continue
			}
			// Only a manifest that is verified and newer stops the one under way.
			if n := e.obtain(outer, l); n != nil && n.m.Mode != protocol.DryActivate {
				next = n
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

// buildLog hands lines on in batches.
type buildLog struct {
	lines chan string
	ended chan struct{}
	once  sync.Once
}

func (e *Engine) startLog(deployment string, phase protocol.Phase) *buildLog {
	l := &buildLog{lines: make(chan string, 4*eventLines), ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		tick := time.NewTicker(eventInterval)
		defer tick.Stop()
		var batch []string
		flush := func() {
			if len(batch) > 0 {
				e.o.Upstream.Event(deployment, protocol.Event{Version: protocol.Version, Time: e.now(), Phase: phase, Lines: batch})
				batch = nil
			}
		}
		for {
			select {
			case line, ok := <-l.lines:
				if !ok {
					flush()
					return
				}
				if batch = append(batch, line); len(batch) == eventLines {
					flush()
				}
			case <-tick.C:
				flush()
			}
		}
	}()
	return l
}

func (l *buildLog) add(line string) { l.lines <- line }

func (l *buildLog) stop() {
	l.once.Do(func() { close(l.lines) })
	<-l.ended
}
