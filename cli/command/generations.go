package command

import (
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// generationDocument is a generation of a node in --json. Number 0 is a system that is none, but runs or is in
// quarantine.
type generationDocument struct {
	Node       string    `json:"node"`
	Generation int       `json:"generation"`
	Closure    string    `json:"closure"`
	Created    time.Time `json:"created"`
	NixOS      string    `json:"nixos"`
	Running    bool      `json:"running"`
	Booted     bool      `json:"booted"`
	Current    bool      `json:"current"`
	Deployment string    `json:"deployment"`
	Quarantine string    `json:"quarantine"`
}

func documentOfGeneration(node string, g protocol.Generation) generationDocument {
	return generationDocument{node, g.Number, g.Closure, g.Created.UTC(), g.NixOS, g.Running, g.Booted, g.Current, g.Deployment, g.Quarantine}
}

func (a *app) generationsCommand() *cobra.Command {
	var timeout time.Duration
	c := &cobra.Command{
		Use:   "generations SELECTOR...",
		Short: "List the generations that nodes have, the newest first",
		Long: `List the generations of the system profile that nodes have, the newest first, and after them systems that
are no generation but run or are in quarantine.

STATE is runs, booted, boots next, and quarantined for what the node rolled back from. DEPLOYMENT is the
last one that confirmed this system. rollback --to takes a number of GEN or a store path.`,
		Example: `  nix-infra generations web1
  nix-infra generations all --json | jq -r 'select(.quarantine != "") | .node'`,
		Args: someNodes("list the generations of which nodes?", "generations"),
		RunE: func(c *cobra.Command, args []string) error {
			session, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer session.Close()
			chosen, err := a.selected(c.Context(), session.Client, args)
			if err != nil {
				return err
			}
			lists := map[string][]protocol.Generation{}
			r, err := ask(c.Context(), session, namesOf(chosen), protocol.ListGenerations, nil, timeout, func(node string, l protocol.GenerationList) {
				lists[node] = l.Generations
			})
			if err != nil {
				return err
			}
			a.showGenerations(namesOf(chosen), lists)
			return r.outcome()
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", answerTime, "how long to wait for answers")
	return c
}

func (a *app) showGenerations(names []string, lists map[string][]protocol.Generation) {
	var rows [][]ui.Cell
	for _, node := range names {
		for _, g := range lists[node] {
			if a.json {
				a.document(documentOfGeneration(node, g))
				continue
			}
			created := ""
			if !g.Created.IsZero() {
				created = g.Created.Local().Format(time.DateTime)
			}
			row := ui.Text(node, number(uint64(g.Number)), generationState(g), g.NixOS, created, g.Deployment, g.Closure, g.Quarantine)
			if row[2].Colour = ui.Green; g.Quarantine != "" {
				row[2].Colour = ui.Red
			}
			rows = append(rows, row)
		}
	}
	if len(rows) > 0 {
		a.out.Table([]string{"NODE", "GEN", "STATE", "NIXOS", "CREATED", "DEPLOYMENT", "CLOSURE", "QUARANTINE"}, rows)
	}
}

// generationState is what a system is to its node, in a few words.
func generationState(g protocol.Generation) string {
	var words []string
	for _, w := range []struct {
		is   bool
		word string
	}{{g.Running, "runs"}, {g.Booted, "booted"}, {g.Current, "boots next"}, {g.Quarantine != "", "quarantined"}} {
		if w.is {
			words = append(words, w.word)
		}
	}
	return strings.Join(words, ", ")
}
