package agent

import (
	"context"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// garbageTime bounds a garbage collection: a big store on a slow disk takes long, and deployments wait for it.
const garbageTime = time.Hour

func (a *agent) listGenerations(ctx context.Context, _ *protocol.Verified) (any, error) {
	s, err := a.systems(ctx)
	if err != nil {
		return nil, err
	}
	return protocol.GenerationList{Generations: s.list()}, nil
}

func (a *agent) collectGarbage(ctx context.Context, r *protocol.Verified) (any, error) {
	q, err := protocol.Decode[protocol.GarbageRequest](r.Payload)
	if err != nil {
		return nil, protocol.Refuse(protocol.Malformed, "%v", err)
	}
	report := protocol.GarbageReport{Removed: []protocol.Generation{}}
	collect := func(ctx context.Context) error {
		s, err := a.systems(ctx)
		if err != nil {
			return err
		}
		keep, err := a.engine.Keep(ctx)
		if err != nil {
			return err
		}
		var numbers []int
		for _, g := range s.garbage(keep, q, time.Now()) {
			report.Removed = append(report.Removed, s.describe(g))
			numbers = append(numbers, g.Number)
		}
		report.Kept = len(s.generations) - len(numbers)
		if !q.DryRun {
			report.Paths, report.Freed, err = a.engine.CollectGarbage(ctx, numbers)
		}
		return err
	}
	if q.DryRun {
		err = collect(ctx)
	} else {
		err = a.engine.Idle(ctx, collect)
		a.settle()
	}
	if err != nil {
		return nil, err
	}
	return report, nil
}

// systems are those of a machine, and what is known of them.
type systems struct {
	generations []nix.Generation // newest first
	reconcile.Observation
	history    []reconcile.Confirmation // newest first
	quarantine map[string]reconcile.Quarantine
}

func (a *agent) systems(ctx context.Context) (systems, error) {
	s := systems{history: a.engine.History(), quarantine: a.engine.Quarantined()}
	var err error
	if s.generations, err = a.host.Generations(ctx); err != nil {
		return s, err
	}
	s.Observation, err = a.host.Observe(ctx)
	return s, err
}

func (s *systems) describe(g nix.Generation) protocol.Generation {
	d := protocol.Generation{Number: g.Number, Closure: g.Closure, Created: g.Created, NixOS: nix.NixOSVersion(g.Closure),
		Running: g.Closure == s.Running, Booted: g.Closure == s.Booted, Current: g.Number != 0 && g.Number == s.Generation,
		Quarantine: s.quarantine[g.Closure].Reason}
	for _, c := range s.history {
		if c.Closure == g.Closure {
			d.Deployment = c.Deployment
			break
		}
	}
	return d
}

// list is all of them, those that are no generation (any more) at the end.
func (s *systems) list() []protocol.Generation {
	all := []protocol.Generation{}
	listed := map[string]bool{}
	for _, g := range s.generations {
		all = append(all, s.describe(g))
		listed[g.Closure] = true
	}
	others := []string{s.Running}
	for closure := range s.quarantine {
		others = append(others, closure)
	}
	slices.SortFunc(others[1:], strings.Compare)
	for _, closure := range others {
		if closure != "" && !listed[closure] {
			all = append(all, s.describe(nix.Generation{Closure: closure}))
			listed[closure] = true
		}
	}
	return all
}

// garbage is which generations go: those that neither the request nor, by its closure, the machine needs.
func (s *systems) garbage(keep map[string]string, q protocol.GarbageRequest, now time.Time) []nix.Generation {
	var gone []nix.Generation
	for i, g := range s.generations {
		young := q.OlderThan > 0 && now.Sub(g.Created) < time.Duration(q.OlderThan)*time.Second
		_, evidence := s.quarantine[g.Closure]
		if i >= q.Keep && !young && !evidence && keep[g.Closure] == "" && g.Number != s.Generation {
			gone = append(gone, g)
		}
	}
	return gone
}
