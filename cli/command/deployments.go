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

// deploymentDocument is a deployment in --json; Count has "pending" for nodes that were not heard of.
type deploymentDocument struct {
	Deployment string         `json:"deployment"`
	By         string         `json:"by"`
	Created    time.Time      `json:"created"`
	Mode       protocol.Mode  `json:"mode"`
	Count      map[string]int `json:"count"`
}

// resultDocument is how a deployment ended, or stands, on one node.
type resultDocument struct {
	Deployment  string   `json:"deployment"`
	Node        string   `json:"node"`
	Outcome     string   `json:"outcome"`
	Serial      uint64   `json:"serial"`
	Reason      string   `json:"reason"`
	Before      string   `json:"before"`
	Closure     string   `json:"closure"`
	Generation  int      `json:"generation"`
	Built       bool     `json:"built"`
	Seconds     float64  `json:"seconds"`
	FailedUnits []string `json:"failed_units"`
	Superseded  string   `json:"superseded"`
	Log         string   `json:"log"`
}

// pending is the outcome of a node that was not heard of yet.
const pending = "pending"

func resultOf(deployment, node string, r protocol.NodeResult) resultDocument {
	d := resultDocument{Deployment: deployment, Node: node, Outcome: first(string(r.Phase), pending), Serial: r.Serial, Superseded: r.Superseded, FailedUnits: []string{}}
	if r.Superseded != "" {
		d.Outcome, d.Reason = "superseded", "deployment "+r.Superseded+" came after it"
	}
	if p := r.Report; p != nil {
		d.Outcome, d.Reason, d.Before, d.Closure, d.Generation, d.Built = string(p.Phase), p.Reason, p.Before, p.Closure, p.Generation, p.Built
		d.Seconds, d.FailedUnits, d.Log = p.Ended.Sub(p.Started).Seconds(), list(p.FailedUnits), p.Log
	}
	return d
}

func documentOfDeployment(d *protocol.Deployment) deploymentDocument {
	doc := deploymentDocument{d.ID, d.By, d.Created, d.Mode, map[string]int{}}
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
				rows = append(rows, ui.Text(d.Deployment, string(d.Mode), d.By, d.Created.Local().Format(time.DateTime), counts(d.Count)))
			}
			if !a.json {
				a.out.Table([]string{"DEPLOYMENT", "MODE", "BY", "CREATED", "NODES"}, rows)
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
		Example: `  nix-infra deployment show 20260102-150405-abcd`,
		Args:    unknownSubcommand,
		RunE:    func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	var log bool
	show := &cobra.Command{
		Use:   "show ID",
		Short: "Show how far a deployment is on each node, or how it ended",
		Example: `  nix-infra deployment show 20260102-150405-abcd
  nix-infra deployment show 20260102-150405-abcd --log`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			session, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer session.Close()
			d, err := session.Deployment(c.Context(), protocol.DeploymentQuery{ID: args[0], Brief: !log})
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
	summary := documentOfDeployment(d)
	if a.json {
		a.document(summary)
	} else {
		a.say("%s: %s by %s at %s: %s\n", ui.Clean(d.ID), ui.Clean(string(d.Mode)), ui.Clean(d.By), d.Created.Local().Format(time.DateTime), ui.Clean(counts(summary.Count)))
	}
	var rows [][]ui.Cell
	names := slices.Sorted(maps.Keys(d.Nodes))
	for _, n := range names {
		r := resultOf(d.ID, n, d.Nodes[n])
		if a.json {
			a.document(r)
			continue
		}
		took := ""
		if r.Seconds > 0 {
			took = (time.Duration(r.Seconds * float64(time.Second))).Round(100 * time.Millisecond).String()
		}
		row := ui.Text(n, r.Outcome, number(r.Serial), shortClosure(r.Closure), took, r.Reason, strings.Join(r.FailedUnits, " "))
		row[1].Colour, row[6].Colour = stateColour(r.Outcome), ui.Red
		if !log {
			row = row[:6]
		}
		rows = append(rows, row)
	}
	if a.json {
		return
	}
	heading := []string{"NODE", "OUTCOME", "SERIAL", "CLOSURE", "TOOK", "REASON", "FAILED UNITS"}
	if !log {
		heading = heading[:6]
	}
	a.out.Table(heading, rows)
	if log {
		for _, n := range names {
			if r := d.Nodes[n].Report; r != nil && r.Log != "" {
				a.say("\n%s\n", a.out.Paint(ui.Bold, ui.Clean(n)))
				a.printLog(strings.Split(strings.TrimRight(r.Log, "\n"), "\n"))
			}
		}
	}
}

// printLog prints lines that came from a node, set in.
func (a *app) printLog(lines []string) {
	for _, l := range lines {
		a.say("    %s\n", ui.Clean(l))
	}
}
