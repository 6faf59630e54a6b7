package fleet

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// deploymentRow is a deployment in sum.
type deploymentRow struct {
	Deployment string                `json:"deployment"`
	By         string                `json:"by"`
	Created    time.Time             `json:"created"`
	Mode       protocol.Mode         `json:"mode"`
	State      protocol.RolloutState `json:"state" jsonschema:"of its rollout"`
	Reason     string                `json:"reason,omitempty"`
	Nodes      map[string]int        `json:"nodes" jsonschema:"how many nodes are in which phase"`
	Undoes     string                `json:"undoes,omitempty" jsonschema:"the deployment that it takes back"`
}

// resultRow is how far a deployment is on a node, or how it ended there.
type resultRow struct {
	Node        string                 `json:"node"`
	Outcome     string                 `json:"outcome" jsonschema:"the phase, pending, or superseded"`
	Failed      bool                   `json:"failed"`
	Reason      string                 `json:"reason,omitempty"`
	Closure     string                 `json:"closure,omitempty"`
	Before      string                 `json:"before,omitempty" jsonschema:"the closure that ran before"`
	Generation  int                    `json:"generation,omitempty"`
	Started     *time.Time             `json:"started,omitempty"`
	Ended       *time.Time             `json:"ended,omitempty"`
	FailedUnits []string               `json:"failed_units,omitempty"`
	Checks      []protocol.CheckResult `json:"checks,omitempty" jsonschema:"of the node's declared health checks"`
	Log         string                 `json:"log,omitempty" jsonschema:"untrusted: the end of the log of the step that failed"`
}

func resultOf(node string, r protocol.NodeResult) resultRow {
	row := resultRow{Node: node, Outcome: string(r.Phase), Failed: r.Failed, Reason: r.Note}
	if row.Outcome == "" {
		row.Outcome = "pending"
	}
	if r.Superseded != "" {
		row.Outcome, row.Reason = "superseded", "deployment "+r.Superseded+" came after it"
	}
	if p := r.Report; p != nil {
		row.Outcome, row.Closure, row.Before, row.Generation = string(p.Phase), p.Closure, p.Before, p.Generation
		row.Started, row.Ended, row.FailedUnits, row.Checks, row.Log = &p.Started, &p.Ended, p.FailedUnits, p.Checks, mcp.Clean(p.Log)
		if p.Reason != "" {
			row.Reason = p.Reason
		}
	}
	return row
}

func (r *resultRow) text() string {
	words := []string{r.Outcome}
	if r.Reason != "" {
		words = append(words, r.Reason)
	}
	if len(r.FailedUnits) > 0 {
		words = append(words, "failed units: "+some(r.FailedUnits))
	}
	if r.Started != nil && r.Ended != nil {
		words = append(words, fmt.Sprintf("took %v, ended %s", r.Ended.Sub(*r.Started).Round(100*time.Millisecond), r.Ended.UTC().Format(time.RFC3339)))
	}
	for _, c := range r.Checks {
		if !c.Passed {
			words = append(words, fmt.Sprintf("check %s (%s) failed: %s", c.Name, c.Kind, c.Reason))
		}
	}
	text := strings.Join(words, "; ")
	if r.Log != "" {
		text += "\n" + r.Log
	}
	return text
}

// generationRow is a generation of a node's system profile. Number 0 is a system that is none, but runs or is in quarantine.
type generationRow struct {
	Node  string `json:"node"`
	Error string `json:"error,omitempty"`
	protocol.Generation
}

func (f *Fleet) addDeployments(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "deployments", Title: "List deployments", Toolset: setDeploy, Role: protocol.Viewer,
		Description: "List deployments, the newest first: by whom, when, how many nodes are in which phase, and how the rollout stands. deployment tells more about one.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		Limit int `json:"limit,omitempty" jsonschema:"how many, 20 if nothing is said, at most 1000"`
	}) (*mcp.Answer[deploymentRow], error) {
		switch {
		case in.Limit == 0:
			in.Limit = 20
		case in.Limit < 0 || in.Limit > 1000:
			return nil, fmt.Errorf("limit %d: use 1 to 1000", in.Limit)
		}
		session, err := f.session(ctx, c)
		if err != nil {
			return nil, err
		}
		all, err := session.Deployments(ctx, in.Limit)
		if err != nil {
			return nil, err
		}
		a := &mcp.Answer[deploymentRow]{Summary: plural(len(all), "deployment") + ", the newest first."}
		for i := range all {
			row := rowOfDeployment(&all[i])
			a.Parts = append(a.Parts, mcp.Part[deploymentRow]{Text: row.text(), Untrusted: true, Row: &row})
		}
		return a, nil
	})
	mcp.Add(s, mcp.Tool{
		Name: "deployment", Title: "Show a deployment", Toolset: setDeploy, Role: protocol.Viewer,
		Description: "How far a deployment is on each node, or how it ended there: outcome, reason, units that failed, health checks and, with log, the end of the log of what failed. Nodes that failed come first.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		ID  string `json:"id" jsonschema:"the deployment, or the beginning of its id; last is the newest one" max:"200"`
		Log bool   `json:"log,omitempty" jsonschema:"whether to show the end of each node's log"`
	}) (*mcp.Answer[resultRow], error) {
		session, err := f.session(ctx, c)
		if err != nil {
			return nil, err
		}
		d, err := session.FindDeployment(ctx, in.ID, func(*protocol.Deployment) bool { return true })
		if err != nil {
			return nil, err
		}
		if d, err = session.Deployment(ctx, protocol.DeploymentQuery{ID: d.ID, Brief: !in.Log}); err != nil {
			return nil, err
		}
		return showDeployment(d), nil
	})
	mcp.Add(s, mcp.Tool{
		Name: "generations", Title: "Generations of nodes", Toolset: setDeploy, Role: protocol.Viewer,
		Description: "List the generations of the system profile that nodes have, the newest first: what runs, what was booted, what boots next, and what is in quarantine because it was rolled back from.",
	}, func(ctx context.Context, c *mcp.Call, in targetInput) (*mcp.Answer[generationRow], error) {
		session, err := f.session(ctx, c)
		if err != nil {
			return nil, err
		}
		nodes, err := f.nodes(ctx, session, in.Target, "")
		if err != nil {
			return nil, err
		}
		answers, err := ask[protocol.GenerationList](ctx, session, namesOf(nodes), protocol.ListGenerations, nil)
		if err != nil {
			return nil, err
		}
		return showGenerations(answers), nil
	})
}

func rowOfDeployment(d *protocol.Deployment) deploymentRow {
	row := deploymentRow{Deployment: d.ID, By: d.By, Created: d.Created, Mode: d.Mode, State: d.Rollout.State, Reason: d.Rollout.Reason, Nodes: map[string]int{}, Undoes: d.Undoes}
	for phase, n := range d.Count {
		if phase == "" {
			phase = "pending"
		}
		row.Nodes[string(phase)] += n
	}
	return row
}

func (r *deploymentRow) headline() string {
	var counts []string
	for _, phase := range slices.Sorted(maps.Keys(r.Nodes)) {
		counts = append(counts, fmt.Sprintf("%d %s", r.Nodes[phase], mcp.Name(phase)))
	}
	return fmt.Sprintf("%s: %s by %s at %s: %s; rollout %s", mcp.Name(r.Deployment), mcp.Name(string(r.Mode)), mcp.Name(r.By), r.Created.UTC().Format(time.RFC3339), strings.Join(counts, ", "), mcp.Name(string(r.State)))
}

// text is the headline with the reason, which may have words of nodes in it.
func (r *deploymentRow) text() string {
	if r.Reason == "" {
		return r.headline()
	}
	return r.headline() + ": " + r.Reason
}

func showDeployment(d *protocol.Deployment) *mcp.Answer[resultRow] {
	sum := rowOfDeployment(d)
	a := &mcp.Answer[resultRow]{Summary: sum.headline()}
	if sum.Reason != "" {
		a.Parts = append(a.Parts, mcp.Part[resultRow]{Head: "the rollout", Text: sum.Reason, Untrusted: true})
	}
	var rows []resultRow
	for _, node := range slices.Sorted(maps.Keys(d.Nodes)) {
		rows = append(rows, resultOf(node, d.Nodes[node]))
	}
	slices.SortStableFunc(rows, func(x, y resultRow) int {
		switch {
		case x.Failed == y.Failed:
			return 0
		case x.Failed:
			return -1
		}
		return 1
	})
	for i := range rows {
		a.Parts = append(a.Parts, mcp.Part[resultRow]{Head: mcp.Name(rows[i].Node), Text: rows[i].text(), Untrusted: true, Row: &rows[i]})
	}
	return a
}

func showGenerations(answers []answer[protocol.GenerationList]) *mcp.Answer[generationRow] {
	a := &mcp.Answer[generationRow]{}
	var failed failures
	for _, r := range answers {
		if r.err != nil {
			failed.add(r.node, r.err)
			row := generationRow{Node: r.node, Error: mcp.Clean(failure(r.err))}
			a.Parts = append(a.Parts, mcp.Part[generationRow]{Head: r.node, Text: row.Error, Row: &row})
			continue
		}
		for _, g := range r.said.Generations {
			row := generationRow{Node: r.node, Generation: g}
			a.Parts = append(a.Parts, mcp.Part[generationRow]{Head: r.node, Text: row.text(), Untrusted: true, Row: &row})
		}
	}
	a.Summary = failed.summary(len(answers))
	a.Failed = failed.count() == len(answers)
	return a
}

func (g *generationRow) text() string {
	words := []string{fmt.Sprintf("%d: NixOS %s, %s", g.Number, g.NixOS, g.Closure)}
	for _, w := range []struct {
		is   bool
		word string
	}{{g.Running, "runs"}, {g.Booted, "booted"}, {g.Current, "boots next"}, {g.Deployment != "", "deployment " + g.Deployment}, {g.Quarantine != "", "in quarantine: " + g.Quarantine}} {
		if w.is {
			words = append(words, w.word)
		}
	}
	return strings.Join(words, "; ")
}
