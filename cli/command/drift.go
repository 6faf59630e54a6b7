package command

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
)

// driftDocument is a node that does not run what was deployed to it, in `drift --json`.
type driftDocument struct {
	Node       string `json:"node"`
	Drift      string `json:"drift"`
	Online     bool   `json:"online"`
	Deployment string `json:"deployment"`
	Closure    string `json:"closure"`
	Confirmed  string `json:"confirmed"`
	Profile    string `json:"profile"`
	Booted     string `json:"booted"`
	Generation int    `json:"generation"`
}

func (a *app) driftCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "drift [SELECTOR]...",
		Short: "Show which nodes don't run what was deployed to them, and why",
		Long: `Show which nodes don't run what was deployed to them, and why: the deployment was rolled back or failed,
somebody switched, rolled back or set the system profile on the node itself, or an older generation was
booted. Of a node that is away, the last that was heard counts; one that is in the middle of a deployment
does not drift.

The exit status is 1 if a node drifts.`,
		Example: `  nix-infra drift
  nix-infra drift @web
  nix-infra drift --json | jq -r .node | xargs nix-infra deploy`,
		RunE: func(c *cobra.Command, args []string) error {
			session, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer session.Close()
			all, err := a.selected(c.Context(), session.Client, args)
			if err != nil {
				return err
			}
			var rows [][]ui.Cell
			for i := range all {
				n := &all[i]
				why := n.Drift()
				if why == "" {
					continue
				}
				b := n.Beat
				if a.json {
					a.document(driftDocument{n.Name, why, n.Online, b.Deployment, b.Closure, first(b.Confirmed, b.Closure),
						first(b.Profile, b.Closure), first(b.Booted, b.Closure), b.Generation})
				}
				rows = append(rows, ui.Text(n.Name, shortClosure(b.Closure), b.Deployment, why))
			}
			if len(rows) == 0 {
				a.say("no drift on %s\n", nodes(len(all)))
				return nil
			}
			if !a.json {
				a.out.Table([]string{"NODE", "RUNS", "DEPLOYMENT", "DRIFT"}, rows)
			}
			return &outcome{SomeFailed, fmt.Errorf("%d of %s drift", len(rows), nodes(len(all)))}
		},
	}
}
