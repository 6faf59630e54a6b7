package agent

import (
	"context"

	"github.com/nix-infra/nix-infra/agent/facts"
	"github.com/nix-infra/nix-infra/agent/policy"
	"github.com/nix-infra/nix-infra/agent/query"
	"github.com/nix-infra/nix-infra/agent/query/files"
	"github.com/nix-infra/nix-infra/agent/query/journal"
	"github.com/nix-infra/nix-infra/agent/query/stats"
	"github.com/nix-infra/nix-infra/agent/query/units"
	"github.com/nix-infra/nix-infra/protocol"
)

// runningSystem is the link to the system that runs, whose policy counts.
const runningSystem = "/run/current-system"

// answered makes a handler of a function from a question to its answer.
func answered[Q, A any](answer func(context.Context, Q) (A, error)) query.Handler {
	return func(ctx context.Context, r *protocol.Verified) (any, error) {
		q, err := protocol.Decode[Q](r.Payload)
		if err != nil {
			return nil, protocol.Refuse(protocol.Malformed, "%v", err)
		}
		return answer(ctx, q)
	}
}

func (a *agent) listUnits(ctx context.Context, q protocol.UnitsQuery) (protocol.UnitList, error) {
	bus, err := units.Dial(ctx)
	if err != nil {
		return protocol.UnitList{}, err
	}
	defer bus.Close()
	return units.List(ctx, bus, q)
}

func (a *agent) showUnit(ctx context.Context, q protocol.UnitQuery) (*protocol.UnitStatus, error) {
	bus, err := units.Dial(ctx)
	if err != nil {
		return nil, err
	}
	defer bus.Close()
	return units.Show(ctx, bus, journal.Reader{}.Read, q)
}

func (a *agent) followJournal(ctx context.Context, r *protocol.Verified, send func(any) error) error {
	q, err := protocol.Decode[protocol.JournalQuery](r.Payload)
	if err != nil {
		return protocol.Refuse(protocol.Malformed, "%v", err)
	}
	return journal.Reader{}.Follow(ctx, q, func(p protocol.JournalPart) error { return send(p) })
}

func (a *agent) readStats(ctx context.Context, q protocol.StatsQuery) (*protocol.Stats, error) {
	return stats.Machine{}.Read(ctx, q)
}

func (a *agent) readFiles(ctx context.Context, q protocol.FilesQuery) (*protocol.FileAnswer, error) {
	allowed, err := policy.Load(a.system)
	if err != nil {
		return nil, err
	}
	return fileReader(a.o.Dir, allowed).Read(ctx, q)
}

// fileReader reads what a policy allows, and never what is the agent's of a folder, or a controller's on the same machine.
func fileReader(dir string, allowed policy.Policy) files.Reader {
	reader := files.Default()
	reader.Whole = allowed.Files.Roots
	reader.Hidden = append(reader.Hidden, dir, RunDir(dir), facts.DefaultController)
	return reader
}
