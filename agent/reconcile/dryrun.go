package reconcile

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	dryLines     = 1000 // of its output that are looked at: what an activation script says may be long
	packagesTime = time.Minute
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
	asked, err := e.askSecrets(m)
	if err != nil {
		return nil, err
	}
	if err := e.secrets.Deliver(asked.live, asked.set); err != nil {
		return nil, err
	}
	defer e.deliverSecrets()
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
	if _, err := e.o.Host.Declared(r.Closure); err != nil {
		return nil, err // as a switch to it would
	}
	if obs, err := e.observe(ctx); err == nil {
		r.Before, r.Generation = obs.Running, obs.Generation
	}
	if err := e.dryActivate(ctx, m, r); err != nil {
		return nil, err
	}
	return nil, e.planSecrets(ctx, m, asked, r.Plan)
}

// planSecrets adds the secrets that would change, and the units that would be restarted for that alone. A rollback
// brings none: which it would find is looked up.
func (e *Engine) planSecrets(ctx context.Context, m *protocol.Manifest, a asked, p *protocol.UnitPlan) error {
	if m.Rollback != nil {
		obs, err := e.observe(ctx)
		if err != nil {
			return err
		}
		to, err := e.resolve(ctx, m.Rollback, obs)
		if err != nil || to.secrets == 0 {
			return err
		}
		if a.set, err = e.secrets.Get(to.secrets); err != nil {
			return err
		}
	}
	p.Secrets, _ = e.secrets.Changed(a.live, a.set)
	units, err := e.loaders(ctx, p.Secrets, always)
	if err != nil {
		return err
	}
	for _, u := range units {
		if !slices.Contains(slices.Concat(p.Stop, p.Restart), u) {
			p.Restart = append(p.Restart, u)
		}
	}
	slices.Sort(p.Restart)
	return nil
}

func (e *Engine) dryActivate(ctx context.Context, m *protocol.Manifest, r *protocol.Report) error {
	j := Job{Unit: unitPrefix + "dry-" + m.Deployment + ".service", Closure: r.Closure, Action: "dry-activate", Timeout: dryTimeout, Forget: true}
	ctx, cancel := context.WithTimeout(ctx, dryTimeout+evidenceTime)
	defer cancel()
	out, err := e.o.Host.Run(ctx, j)
	if err != nil {
		return fmt.Errorf("the dry run can't be run: %w", err)
	}
	log, err := e.o.Host.Journal(ctx, j.Unit, dryLines)
	if err != nil {
		return fmt.Errorf("the dry run's output can't be read: %w", err)
	}
	r.Log = clipTail(log, protocol.MaxReportLog)
	if out.Exit != exitDone {
		return fmt.Errorf("the dry run failed (%v)", out)
	}
	r.Plan = planUnits(log)
	if err := e.planPackages(ctx, r); err != nil {
		r.Log = clipTail(fmt.Sprintf("%s\nwarning: what changes in packages can't be told: %v\n", strings.TrimSpace(log), err), protocol.MaxReportLog)
	}
	return nil
}

// planUnits reads what switch-to-configuration says in a dry run. A changed unit it either restarts, or stops before the
// activation and starts after it, which to everybody else is a restart, too.
func planUnits(log string) *protocol.UnitPlan {
	p := &protocol.UnitPlan{}
	for line := range strings.Lines(log) {
		verb, units, ok := strings.Cut(strings.TrimSpace(line), " the following units: ")
		if !ok {
			continue // also what would NOT be stopped or restarted
		}
		var list *[]string
		switch verb {
		case "would stop":
			list = &p.Stop
		case "would restart":
			list = &p.Restart
		case "would reload":
			list = &p.Reload
		case "would start":
			list = &p.Start
		default:
			continue
		}
		for unit := range strings.SplitSeq(units, ", ") {
			if unit != "" && !strings.ContainsAny(unit, " \t") {
				*list = append(*list, unit)
			}
		}
	}
	starts := func(unit string) bool { return slices.Contains(p.Start, unit) }
	for _, unit := range p.Stop {
		if starts(unit) {
			p.Restart = append(p.Restart, unit)
		}
	}
	p.Stop = slices.DeleteFunc(p.Stop, starts)
	p.Start = slices.DeleteFunc(p.Start, func(unit string) bool { return slices.Contains(p.Restart, unit) })
	for _, list := range []*[]string{&p.Stop, &p.Restart, &p.Reload, &p.Start} {
		slices.Sort(*list)
		*list = slices.Compact(*list)
	}
	return p
}

// planPackages adds what is in the new closure and not in the one that runs.
func (e *Engine) planPackages(ctx context.Context, r *protocol.Report) error {
	ctx, cancel := context.WithTimeout(ctx, packagesTime)
	defer cancel()
	after, err := e.o.Host.ClosureInfo(ctx, r.Closure)
	if err != nil {
		return err
	}
	before := after
	if r.Before != r.Closure {
		if before, err = e.o.Host.ClosureInfo(ctx, r.Before); err != nil {
			return err
		}
	}
	p := r.Plan
	p.Size = nix.ClosureSize(after)
	p.Growth = p.Size - nix.ClosureSize(before)
	changes := nix.DiffClosures(before, after)
	if more := len(changes) - protocol.MaxPackages; more > 0 {
		changes, p.More = changes[:protocol.MaxPackages], more
	}
	for _, c := range changes {
		p.Packages = append(p.Packages, protocol.PackageChange(c))
	}
	return nil
}
