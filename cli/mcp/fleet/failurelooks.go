package fleet

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// What is looked at to explain a failure: the node's deployments, its units and its journal.

// readHistory reads what was deployed to the node, and how it ended.
func (e *explanation) readHistory(ctx context.Context) (err error) {
	if e.newest, err = e.s.Deployments(ctx, historyOf); err != nil {
		return err
	}
	all := make([]past, len(e.newest))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(comparedAtOnce)
	for i := range e.newest {
		if e.newest[i].Mode == protocol.DryActivate {
			continue
		}
		g.Go(func() error {
			d, err := e.s.Deployment(ctx, protocol.DeploymentQuery{ID: e.newest[i].ID, Names: []string{e.node.Name}})
			if err != nil {
				return err
			}
			if r, ok := d.Nodes[e.node.Name]; ok && r.Report != nil {
				all[i] = past{&e.newest[i], r}
			}
			return nil
		})
	}
	err = g.Wait()
	e.history = slices.DeleteFunc(all, func(p past) bool { return p.deployment == nil })
	return err
}

// readUnits reads the units that failed, or the one that was asked about.
func (e *explanation) readUnits(ctx context.Context) error {
	names := []string{e.asked}
	if e.asked == "" {
		answers, err := ask[protocol.UnitList](ctx, e.s, []string{e.node.Name}, protocol.ListUnits, protocol.UnitsQuery{States: []string{"failed"}})
		if err != nil {
			return err
		}
		if answers[0].err != nil {
			e.notes = append(e.notes, "Its units could not be looked at: "+failure(answers[0].err)+".")
			return nil
		}
		names = nil
		for _, u := range answers[0].said.Units {
			names = append(names, u.Name)
		}
		if more := len(names) - maxFailedUnits; more > 0 {
			e.notes = append(e.notes, fmt.Sprintf("%d more units failed: %s.", more, some(mcp.Names(names[maxFailedUnits:]))))
			names = names[:maxFailedUnits]
		}
	}
	for _, name := range names {
		if err := e.readUnit(ctx, name); err != nil {
			return err
		}
	}
	return nil
}

func (e *explanation) readUnit(ctx context.Context, name string) error {
	statuses, err := ask[protocol.UnitStatus](ctx, e.s, []string{e.node.Name}, protocol.ShowUnit, protocol.UnitQuery{Name: name})
	if err != nil {
		return err
	}
	journals, err := ask[protocol.JournalPart](ctx, e.s, []string{e.node.Name}, protocol.ReadJournal, protocol.JournalQuery{Units: []string{name}, Identifiers: []string{"systemd"}, Lines: 500})
	if err != nil {
		return err
	}
	if statuses[0].err != nil {
		e.notes = append(e.notes, mcp.Name(name)+" could not be looked at: "+failure(statuses[0].err)+".")
		return nil
	}
	u := unitFailure{status: statuses[0].said}
	u.healthy, u.first = firstFailure(journals[0].said.Entries)
	if u.first.IsZero() && u.status.Active == "failed" && u.status.Since != nil {
		u.first = *u.status.Since
	}
	e.units = append(e.units, u)
	return nil
}

// inQuestion are the units whose log is looked at: those that failed or were asked about or, where a node went back to a system in
// which they don't, those for which it did.
func (e *explanation) inQuestion() (names []string) {
	for i := range e.units {
		names = append(names, e.units[i].status.Name)
	}
	if len(names) > 0 || len(e.history) == 0 {
		return names
	}
	for _, name := range e.history[0].result.Report.FailedUnits {
		if (&protocol.UnitQuery{Name: name}).Validate() == nil && !strings.HasPrefix(name, "-") && len(names) < maxFailedUnits {
			names = append(names, name)
		}
	}
	return names
}

// logs are what the journal has around the failure: what units in question said, and what else was a warning or worse.
func (e *explanation) logs(ctx context.Context) (parts []mcp.Part[findingRow]) {
	if e.failed.IsZero() || !e.node.Online {
		return nil
	}
	names := e.inQuestion()
	warning := 4
	span := protocol.JournalQuery{Since: e.failed.Add(-around).UnixMicro(), Until: e.failed.Add(around).UnixMicro(), Lines: loggedLines}
	of, all := span, span
	of.Units, all.Priority = names, &warning
	queries := []struct {
		head  string
		query protocol.JournalQuery
	}{{"log of " + some(mcp.Names(names)), of}, {"warnings and errors of the machine", all}}
	if len(names) == 0 {
		queries = queries[1:]
	}
	for _, q := range queries {
		answers, err := ask[protocol.JournalPart](ctx, e.s, []string{e.node.Name}, protocol.ReadJournal, q.query)
		if err == nil {
			err = answers[0].err
		}
		if err != nil {
			e.notes = append(e.notes, "The journal could not be read: "+failure(err)+".")
			continue
		}
		for _, entry := range answers[0].said.Entries {
			at := entry.Time
			text := shorten(entryText(&entry)+"\n", 2<<10)
			parts = append(parts, mcp.Part[findingRow]{Head: q.head, Text: text, Untrusted: true, Row: &findingRow{Kind: "log", At: &at, Unit: entry.Unit, Text: strings.TrimSpace(text)}})
		}
	}
	return parts
}
