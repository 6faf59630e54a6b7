package fleet

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// findingRow is one thing that is known of a failure.
type findingRow struct {
	Kind       string     `json:"kind" jsonschema:"node, deployment, check, change, unit or log"`
	At         *time.Time `json:"at,omitempty"`
	Deployment string     `json:"deployment,omitempty"`
	Unit       string     `json:"unit,omitempty"`
	Path       string     `json:"path,omitempty" jsonschema:"of the file that changed"`
	Text       string     `json:"text" jsonschema:"untrusted: what is known, or was written"`
}

// Bounds of what is looked at for one failure (failurelooks.go).
const (
	maxFailedUnits = 5
	historyOf      = 30 // deployments
	around         = time.Minute
	loggedLines    = 60
)

func (f *Fleet) addFailures(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "explain-failure", Title: "What led to a failure", Toolset: setInspect, Role: protocol.Viewer, Timeout: maxRun,
		Description: "What changed on a node between its last healthy moment and its first failure: the deployments in between and the files that they changed, the units that failed with their state, " +
			"and what the journal has around the moment. Start here when a node is said to be broken.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		Node string `json:"node" jsonschema:"the node's name" max:"63"`
		Unit string `json:"unit,omitempty" jsonschema:"the unit that is in question; those that failed if nothing is said" max:"255"`
	}) (*mcp.Answer[findingRow], error) {
		session, err := f.session(ctx, c)
		if err != nil {
			return nil, err
		}
		node, err := f.node(ctx, session, strings.TrimSpace(in.Node))
		if err != nil {
			return nil, err
		}
		e := &explanation{s: session, node: node}
		if in.Unit != "" {
			if e.asked = in.Unit; !strings.Contains(e.asked, ".") {
				e.asked += ".service"
			}
			if err := (&protocol.UnitQuery{Name: e.asked}).Validate(); err != nil || strings.HasPrefix(e.asked, "-") {
				return nil, fmt.Errorf("unit: %.80q is no unit's name, such as nginx.service", in.Unit)
			}
		}
		return e.explain(ctx)
	})
}

// explanation is a failure that is looked into.
type explanation struct {
	s     *Session
	node  *protocol.NodeState
	asked string // unit

	newest  []protocol.Deployment
	history []past // of the node, the newest first
	units   []unitFailure
	healthy time.Time // when all was well for the last time, as far as is known; zero: it is not known
	failed  time.Time // when it first was not; zero: nothing failed
	notes   []string  // what could not be found out
}

// past is a deployment that a node took part in.
type past struct {
	deployment *protocol.Deployment
	result     protocol.NodeResult
}

// unitFailure is a unit that failed, and since when.
type unitFailure struct {
	status         protocol.UnitStatus
	healthy, first time.Time
}

func (e *explanation) explain(ctx context.Context) (*mcp.Answer[findingRow], error) {
	if err := e.readHistory(ctx); err != nil {
		return nil, err
	}
	if e.node.Online {
		if err := e.readUnits(ctx); err != nil {
			return nil, err
		}
	} else {
		e.notes = append(e.notes, "The node is not there, so that its units and journal could not be looked at.")
	}
	e.locate()
	row := rowOf(e.node)
	a := &mcp.Answer[findingRow]{Parts: []mcp.Part[findingRow]{{Head: "node " + row.Node, Text: row.State + "; " + row.words(), Untrusted: true,
		Row: &findingRow{Kind: "node", At: row.LastSeen, Text: row.State + "; " + row.words()}}}}
	suspects := e.suspects()
	for i := range suspects {
		a.Parts = append(a.Parts, e.tellDeployment(&suspects[i])...)
	}
	changes, err := e.changes(ctx, suspects)
	if err != nil {
		e.notes = append(e.notes, "What the deployments changed could not be compared: "+failure(err))
	}
	for _, change := range changes {
		text := change.Diff
		if text == "" {
			text = change.Path + " " + change.Change
		}
		a.Parts = append(a.Parts, mcp.Part[findingRow]{Head: "changed: " + mcp.Name(change.Path), Text: text, Untrusted: true, Row: &findingRow{Kind: "change", Path: change.Path, Text: text}})
	}
	for i := range e.units {
		a.Parts = append(a.Parts, e.units[i].tell())
	}
	a.Parts = append(a.Parts, e.logs(ctx)...)
	a.Summary = e.summary(suspects, changes)
	return a, nil
}

// stable is for how long a unit has to run to count as healthy.
const stable = time.Minute

// firstFailure finds in what systemd said of a unit, oldest first, when it first failed of the last row of failures, and when it
// was healthy for the last time before that. Restarts that failed at once belong to the row.
func firstFailure(entries []protocol.JournalEntry) (healthy, first time.Time) {
	var started time.Time
	for _, e := range entries {
		switch m := e.Message; {
		case strings.Contains(m, "Failed with result"), strings.HasPrefix(m, "Failed to start"), strings.Contains(m, "Main process exited"):
			ran := !started.IsZero() && e.Time.Sub(started) >= stable
			if ran {
				healthy = e.Time
			}
			if ran || first.IsZero() {
				first = e.Time
			}
			started = time.Time{}
		case strings.HasPrefix(m, "Started "), strings.HasPrefix(m, "Finished "), strings.HasPrefix(m, "Reloaded "):
			started = e.Time
		}
	}
	return healthy, first
}

// locate finds the last healthy moment and the first failure of all that is known.
func (e *explanation) locate() {
	for i := range e.units {
		u := &e.units[i]
		if !u.first.IsZero() && (e.failed.IsZero() || u.first.Before(e.failed)) {
			e.failed, e.healthy = u.first, u.healthy
		}
	}
	if e.failed.IsZero() && len(e.history) > 0 && !e.history[0].result.Report.Phase.Succeeded() {
		e.failed = e.history[0].result.Report.Ended
	}
	if e.failed.IsZero() {
		return
	}
	// A deployment that was proven before is a healthy moment, too: the newest one, unless a unit ran well even later.
	for _, p := range e.history {
		r := p.result.Report
		if r.Phase == protocol.Confirmed && !r.Ended.After(e.failed) {
			if r.Ended.After(e.healthy) {
				e.healthy = r.Ended
			}
			return
		}
	}
}

// suspects are the deployments that were under way between the healthy moment and the failure, or else the last one before it:
// a change may show long after it was made.
func (e *explanation) suspects() []past {
	if e.failed.IsZero() {
		return e.history[:min(1, len(e.history))]
	}
	var suspects []past
	for _, p := range e.history {
		r := p.result.Report
		if r.Started.After(e.failed.Add(stable)) {
			continue
		}
		before := !r.Ended.After(e.healthy)
		if !before || len(suspects) == 0 {
			suspects = append(suspects, p)
		}
		if before {
			break
		}
	}
	return suspects
}

// changes are the files that the suspects changed.
func (e *explanation) changes(ctx context.Context, suspects []past) ([]change, error) {
	var all []change
	for _, p := range suspects {
		after, err := manifest(ctx, e.s, e.node.Name, p.deployment.ID)
		if err != nil || after == nil {
			return all, err
		}
		before, err := predecessor(ctx, e.s, e.node.Name, after, e.newest)
		if err != nil || before == nil {
			return all, err
		}
		changes, err := compare(ctx, e.s, e.node.Name, before, after)
		if err != nil {
			return all, err
		}
		all = append(all, changes...)
	}
	return all, nil
}

func (e *explanation) tellDeployment(p *past) []mcp.Part[findingRow] {
	row := resultOf(e.node.Name, p.result)
	d := rowOfDeployment(p.deployment)
	text := fmt.Sprintf("%s by %s at %s: %s", d.Mode, d.By, d.Created.UTC().Format(time.RFC3339), row.text())
	parts := []mcp.Part[findingRow]{{Head: "deployment " + mcp.Name(d.Deployment), Text: text, Untrusted: true,
		Row: &findingRow{Kind: "deployment", At: row.Ended, Deployment: d.Deployment, Text: text}}}
	for _, c := range row.Checks {
		if !c.Passed {
			parts = append(parts, mcp.Part[findingRow]{Row: &findingRow{Kind: "check", Deployment: d.Deployment, Text: fmt.Sprintf("%s (%s): %s", c.Name, c.Kind, c.Reason)}})
		}
	}
	return parts
}

func (u *unitFailure) tell() mcp.Part[findingRow] {
	s := &u.status
	text := fmt.Sprintf("%s: %s (%s), result %s", s.Name, s.Active, s.Sub, s.Result)
	if s.Since != nil {
		text += ", since " + ago(s.Since)
	}
	if s.ExitCode != 0 {
		text += fmt.Sprintf(", exit code %d", s.ExitCode)
	}
	if s.Restarts > 0 {
		text += fmt.Sprintf(", restarted %d times by itself", s.Restarts)
	}
	if !u.first.IsZero() {
		text += "; failed first " + ago(&u.first)
	}
	row := &findingRow{Kind: "unit", Unit: s.Name, Text: text}
	if !u.first.IsZero() {
		row.At = &u.first
	}
	return mcp.Part[findingRow]{Head: "units", Text: text, Untrusted: true, Row: row}
}

func (e *explanation) summary(suspects []past, changes []change) string {
	row := rowOf(e.node)
	lines := []string{fmt.Sprintf("%s: %s.", row.Node, row.State)}
	switch {
	case e.failed.IsZero():
		lines = append(lines, "Nothing that failed was found. What was deployed last is below.")
	case e.healthy.IsZero():
		lines = append(lines, fmt.Sprintf("It failed first at %s; no healthy moment before that is known.", ago(&e.failed)))
	default:
		lines = append(lines, fmt.Sprintf("Last healthy at %s; failed first at %s.", ago(&e.healthy), ago(&e.failed)))
	}
	for _, p := range suspects {
		r := p.result.Report
		lines = append(lines, fmt.Sprintf("Deployment %s by %s ended on it as %s at %s.", mcp.Name(p.deployment.ID), mcp.Name(p.deployment.By), mcp.Name(string(r.Phase)), r.Ended.UTC().Format(time.RFC3339)))
	}
	var paths []string
	for _, c := range changes {
		paths = append(paths, mcp.Name(c.Path))
	}
	switch {
	case len(paths) > 0:
		lines = append(lines, fmt.Sprintf("%s changed by it: %s.", plural(len(paths), "file"), some(paths)))
	case len(suspects) > 0:
		lines = append(lines, "No file is known to have been changed by it.")
	}
	return strings.Join(append(lines, e.notes...), "\n")
}
