package command

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

func (a *app) factsCommand() *cobra.Command {
	var o asking
	c := &cobra.Command{
		Use:   "facts [SELECTOR]...",
		Short: "Ask nodes themselves for what status shows of them",
		Long: `Ask nodes (all, if none is selected) themselves for what status and node show tell of them: the answer is of this
moment, where theirs is of the last heartbeat. With --json it is the same document.`,
		Example: `  nix-infra facts web1
  nix-infra facts @db --json | jq '{node, kernel, reboot_needed}'`,
		RunE: func(c *cobra.Command, args []string) error {
			q, err := a.question(c.Context(), args, o)
			if err != nil {
				return err
			}
			defer q.session.Close()
			known := map[string]protocol.NodeState{}
			for _, n := range q.nodes {
				known[n.Name] = n
			}
			return put(c.Context(), q, protocol.Facts, nil, func(node string, _ int, b protocol.Beat) {
				n, now := known[node], time.Now().UTC()
				n.Online, n.LastSeen, n.Beat = true, &now, &b
				d := documentOf(&n)
				if a.json {
					a.document(d)
					return
				}
				q.print(node, q.columns(nodeRows(d))...)
			})
		},
	}
	o.flags(c)
	return c
}

// nodeRows are all that is known of a node, by name.
func nodeRows(d nodeDocument) [][]ui.Cell {
	var rows [][]ui.Cell
	eachFact(d, func(name, value string) { rows = append(rows, []ui.Cell{{Text: name, Colour: ui.Bold}, {Text: value}}) })
	return rows
}
