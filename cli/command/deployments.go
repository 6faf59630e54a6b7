package command

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// deploymentDocument is a deployment and its rollout in --json; Count has "pending" for nodes that were not heard of.
type deploymentDocument struct {
	Deployment  string                `json:"deployment"`
	By          string                `json:"by"`
	Created     time.Time             `json:"created"`
	Mode        protocol.Mode         `json:"mode"`
	Undoes      string                `json:"undoes"`
	Count       map[string]int        `json:"count"`
	State       protocol.RolloutState `json:"state"`
	Reason      string                `json:"reason"`
	SteeredBy   string                `json:"steered_by"`
	Since       time.Time             `json:"since"`
	Next        *time.Time            `json:"next"`
	Wave        int                   `json:"wave"`
	Waves       []int                 `json:"waves"`
	Released    int                   `json:"released"`
	Unavailable int                   `json:"unavailable"`
	Failures    int                   `json:"failures"`
	MaxFailures int                   `json:"max_failures"`
	Back        string                `json:"back"`
	Strategy    protocol.Strategy     `json:"strategy"`
}

// resultDocument is how a deployment ended, or stands, on one node.
type resultDocument struct {
	Deployment  string                 `json:"deployment"`
	Node        string                 `json:"node"`
	Wave        int                    `json:"wave"`
	Outcome     string                 `json:"outcome"`
	Released    bool                   `json:"released"`
	Failed      bool                   `json:"failed"`
	Serial      uint64                 `json:"serial"`
	Reason      string                 `json:"reason"`
	Before      string                 `json:"before"`
	Closure     string                 `json:"closure"`
	Generation  int                    `json:"generation"`
	Built       bool                   `json:"built"`
	Seconds     float64                `json:"seconds"`
	FailedUnits []string               `json:"failed_units"`
	Superseded  string                 `json:"superseded"`
	Log         string                 `json:"log"`
	Checks      []protocol.CheckResult `json:"checks"`
	Plan        *protocol.UnitPlan     `json:"plan"`
}

// Outcomes that are no phase.
const (
	pending    = "pending"  // it was not heard of yet
	leftOut    = "left-out" // the rollout ended before the node's turn
	superseded = "superseded"
)

func resultOf(deployment, node string, r protocol.NodeResult) resultDocument {
	d := resultDocument{
		Deployment: deployment, Node: node, Outcome: first(string(r.Phase), pending), Serial: r.Serial, Superseded: r.Superseded, FailedUnits: []string{},
		Wave: r.Wave, Released: r.Released, Failed: r.Failed, Reason: r.Note, Checks: []protocol.CheckResult{},
	}
	if r.Superseded != "" {
		d.Outcome, d.Reason = superseded, "deployment "+r.Superseded+" came after it"
	}
	if p := r.Report; p != nil {
		d.Outcome, d.Before, d.Closure, d.Generation, d.Built = string(p.Phase), p.Before, p.Closure, p.Generation, p.Built
		d.Reason = first(p.Reason, r.Note)
		d.Seconds, d.FailedUnits, d.Log, d.Plan = p.Ended.Sub(p.Started).Seconds(), list(p.FailedUnits), p.Log, p.Plan
		if p.Checks != nil {
			d.Checks = p.Checks
		}
	}
	return d
}

// resultIn is resultOf in a deployment that may have ended before the node's turn.
func resultIn(d *protocol.Deployment, node string) resultDocument {
	r := resultOf(d.ID, node, d.Nodes[node])
	if r.Outcome == pending && !r.Released && d.Rollout.State.Ended() {
		r.Outcome = leftOut
	}
	return r
}

func documentOfDeployment(d *protocol.Deployment) deploymentDocument {
	r := &d.Rollout
	doc := deploymentDocument{
		Deployment: d.ID, By: d.By, Created: d.Created, Mode: d.Mode, Undoes: d.Undoes, Count: map[string]int{}, State: r.State, Reason: r.Reason,
		SteeredBy: r.By, Since: r.Since, Wave: r.Wave, Waves: r.Waves, Released: r.Released, Unavailable: r.Unavailable, Failures: r.Failures,
		MaxFailures: r.MaxFailures, Back: r.Back, Strategy: d.Strategy,
	}
	if doc.Waves == nil {
		doc.Waves = []int{}
	}
	if !r.Next.IsZero() {
		doc.Next = &r.Next
	}
	for phase, n := range d.Count {
		doc.Count[first(string(phase), pending)] += n
	}
	return doc
}

// counts is "3 confirmed, 1 failed".
func counts(count map[string]int) string {
	var parts []string
	for _, outcome := range slices.Sorted(maps.Keys(count)) {
		if count[outcome] > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", count[outcome], outcome))
		}
	}
	return strings.Join(parts, ", ")
}

func (a *app) deploymentsCommand() *cobra.Command {
	var limit int
	c := &cobra.Command{
		Use:   "deployments",
		Short: "List deployments, the newest first",
		Example: `  nix-infra deployments
  nix-infra deployments --limit 100`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if limit < 0 {
				return fmt.Errorf("--limit %d: use 0 (all) or more", limit)
			}
			session, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer session.Close()
			all, err := session.Deployments(c.Context(), limit)
			if err != nil {
				return err
			}
			var rows [][]ui.Cell
			for i := range all {
				d := documentOfDeployment(&all[i])
				if a.json {
					a.document(d)
				}
				rows = append(rows, ui.Text(d.Deployment, string(d.Mode), d.By, d.Created.Local().Format(time.DateTime), counts(d.Count), string(d.State)))
			}
			if !a.json {
				a.out.Table([]string{"DEPLOYMENT", "MODE", "BY", "CREATED", "NODES", "ROLLOUT"}, rows)
			}
			return nil
		},
	}
	c.Flags().IntVar(&limit, "limit", 20, "how many, 0 for all")
	return c
}

func (a *app) deploymentCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "deployment",
		Short:   "Show one deployment",
		Example: `  nix-infra deployment show last`,
		Args:    unknownSubcommand,
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	var log bool
	show := &cobra.Command{
		Use:   "show ID",
		Short: "Show how far a deployment is on each node, or how it ended",
		Long: `Show how far a deployment is on each node, or how it ended. ID may be the beginning of one, or last for
the newest.`,
		Example: `  nix-infra deployment show last
  nix-infra deployment show 20260102-150405-abcd --log`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			session, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer session.Close()
			d, err := session.FindDeployment(c.Context(), args[0], func(*protocol.Deployment) bool { return true })
			if err != nil {
				return err
			}
			d, err = session.Deployment(c.Context(), protocol.DeploymentQuery{ID: d.ID, Brief: !log})
			if err != nil {
				return err
			}
			a.showDeployment(d, log)
			return nil
		},
	}
	show.Flags().BoolVar(&log, "log", false, "print the failed units and the end of each node's log, too")
	c.AddCommand(show)
	return c
}

func (a *app) showDeployment(d *protocol.Deployment, log bool) {
	if a.json {
		a.printDeployment(d)
		return
	}
	summary := documentOfDeployment(d)
	a.say("%s: %s by %s at %s: %s\n", ui.Clean(d.ID), ui.Clean(string(d.Mode)), ui.Clean(d.By), d.Created.Local().Format(time.DateTime), ui.Clean(counts(summary.Count)))
	var rows [][]ui.Cell
	names := slices.Sorted(maps.Keys(d.Nodes))
	for _, n := range names {
		r := resultIn(d, n)
		row := ui.Text(n, r.Outcome, number(r.Serial), shortClosure(r.Closure), took(r.Seconds), r.Reason, strings.Join(r.FailedUnits, " "))
		row[1].Colour, row[6].Colour = stateColour(r.Outcome), ui.Red
		if !log {
			row = row[:6]
		}
		rows = append(rows, row)
	}
	heading := []string{"NODE", "OUTCOME", "SERIAL", "CLOSURE", "TOOK", "REASON", "FAILED UNITS"}
	if !log {
		heading = heading[:6]
	}
	a.out.Table(heading, rows)
	if !log {
		return
	}
	for _, n := range names {
		if r := d.Nodes[n].Report; r != nil && (r.Log != "" || len(r.Checks) > 0) {
			a.say("\n%s\n", a.out.Paint(ui.Bold, ui.Clean(n)))
			a.printChecks(r.Checks)
			if r.Log != "" {
				a.printLog(strings.Split(strings.TrimRight(r.Log, "\n"), "\n"))
			}
		}
	}
}

// printDeployment prints a deployment's document, and one for each node.
func (a *app) printDeployment(d *protocol.Deployment) {
	a.document(documentOfDeployment(d))
	for _, n := range slices.Sorted(maps.Keys(d.Nodes)) {
		a.document(resultIn(d, n))
	}
}

// took is how long something took, for people; "" where it is not known.
func took(seconds float64) string {
	if seconds <= 0 {
		return ""
	}
	return time.Duration(seconds * float64(time.Second)).Round(100 * time.Millisecond).String()
}

// printChecks prints how the health checks went that a node declares.
func (a *app) printChecks(checks []protocol.CheckResult) {
	for _, c := range checks {
		took := (time.Duration(c.Millis) * time.Millisecond).Round(100 * time.Millisecond)
		if c.Passed {
			a.say("    check %s (%s) passed after %s\n", ui.Clean(c.Name), ui.Clean(c.Kind), took)
			continue
		}
		a.say("    check %s (%s) %s after %s and %d tries: %s\n", ui.Clean(c.Name), ui.Clean(c.Kind), a.out.Paint(ui.Red, "failed"), took, c.Tries, ui.Clean(c.Reason))
	}
}

// printLog prints lines that came from a node, set in.
func (a *app) printLog(lines []string) {
	for _, l := range lines {
		a.say("    %s\n", ui.Clean(l))
	}
}
