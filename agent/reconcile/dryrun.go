package reconcile

import (
	"context"
	"fmt"

	"github.com/nix-infra/nix-infra/protocol"
)

// dryRun builds and says what would change. Nothing of it is journalled but its report.
func (e *Engine) dryRun(ctx context.Context, o *order) (next *order) {
	e.refuse.add(o.digest, e.now().Add(refusedFor)) // another look at it does not run it again
	m := o.m
	r := protocol.Report{Version: protocol.Version, Deployment: m.Deployment, Mode: m.Mode, Phase: protocol.Confirmed, Started: e.now()}
	next, err := e.dryRunInto(ctx, o, &r)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		r.Phase, r.Reason = protocol.FailedPhase, clip(err.Error(), maxReason)
		if r.Log == "" {
			r.Log = clipTail(buildTail(err), protocol.MaxReportLog)
		}
	}
	r.Ended = e.now()
	e.recordEnd(o.by, m.Deployment, r.Phase, r.Reason)
	e.o.Upstream.Event(m.Deployment, protocol.Event{Version: protocol.Version, Time: r.Ended, Phase: r.Phase, Reason: r.Reason})
	e.report(r)
	e.prune()
	return next
}

func (e *Engine) dryRunInto(ctx context.Context, o *order, r *protocol.Report) (next *order, err error) {
	m := o.m
	event := func(p protocol.Phase) {
		e.o.Upstream.Event(m.Deployment, protocol.Event{Version: protocol.Version, Time: e.now(), Phase: p})
	}
	event(protocol.Fetching)
	next, err = e.interruptible(ctx, fetchTimeout, "fetching", func(ctx context.Context) error {
		return e.fetchTree(ctx, o.digest, m)
	})
	if err != nil {
		return next, err
	}
	event(protocol.Building)
	next, err = e.interruptible(ctx, buildLimit(m), "building", func(ctx context.Context) (err error) {
		r.Closure, err = e.bring(ctx, m)
		return err
	})
	if err != nil {
		return next, err
	}
	r.Built = m.Closure == nil && m.Rollback == nil
	if obs, err := e.observe(ctx); err == nil {
		r.Before, r.Generation = obs.Running, obs.Generation
	}
	return nil, e.dryActivate(ctx, m, r)
}

func (e *Engine) dryActivate(ctx context.Context, m *protocol.Manifest, r *protocol.Report) error {
	j := Job{Unit: unitPrefix + "dry-" + m.Deployment + ".service", Closure: r.Closure, Action: "dry-activate", Timeout: dryTimeout}
	ctx, cancel := context.WithTimeout(ctx, dryTimeout+evidenceTime)
	defer cancel()
	out, err := e.o.Host.Run(ctx, j)
	if err != nil {
		return fmt.Errorf("the dry run can't be run: %w", err)
	}
	log, err := e.o.Host.Journal(ctx, j.Unit, 2*activateLines)
	if err != nil {
		return fmt.Errorf("the dry run's output can't be read: %w", err)
	}
	r.Log = clipTail(log, protocol.MaxReportLog)
	if out.Exit != exitDone {
		return fmt.Errorf("the dry run failed (%v)", out)
	}
	return nil
}
