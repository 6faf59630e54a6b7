package command

import (
	"context"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// nodeDocument is a node in --json, described in docs/json.md.
type nodeDocument struct {
	Node              string           `json:"node"`
	State             string           `json:"state"`
	Generation        int              `json:"generation"`
	Closure           string           `json:"closure"`
	Deployment        string           `json:"deployment"`
	Serial            uint64           `json:"serial"`
	DesiredDeployment string           `json:"desired_deployment"`
	DesiredSerial     uint64           `json:"desired_serial"`
	Phase             protocol.Phase   `json:"phase"`
	Reason            string           `json:"reason"`
	Online            bool             `json:"online"`
	LastSeen          *time.Time       `json:"last_seen"`
	FailedUnits       []string         `json:"failed_units"`
	Lock              *protocol.Lock   `json:"lock"`
	Drift             string           `json:"drift"`
	RebootNeeded      bool             `json:"reboot_needed"`
	Tags              []string         `json:"tags"`
	IPv4              string           `json:"ipv4"`
	OverlayIP         string           `json:"overlay_ip"`
	System            string           `json:"system"`
	NixOS             string           `json:"nixos"`
	Kernel            string           `json:"kernel"`
	Agent             string           `json:"agent"`
	BootID            string           `json:"boot_id"`
	Vitals            *protocol.Vitals `json:"vitals"`
	Key               string           `json:"key"`
	XKey              string           `json:"xkey"`
	Enrolled          time.Time        `json:"enrolled"`
	By                string           `json:"by"`
}

func documentOf(n *protocol.NodeState) nodeDocument {
	d := nodeDocument{
		Node: n.Name, State: n.State(), Online: n.Online, LastSeen: n.LastSeen, Tags: list(n.Tags), FailedUnits: []string{},
		IPv4: n.IPv4, System: n.System, Key: n.Key, XKey: n.XKey, Enrolled: n.Enrolled, By: n.By,
		Lock: n.Lock, Drift: n.Drift(),
	}
	if n.Desired != nil {
		d.DesiredDeployment, d.DesiredSerial = n.Desired.Deployment, n.Desired.Serial
	}
	if b := n.Beat; b != nil {
		d.Generation, d.Closure, d.Deployment, d.Serial, d.Phase, d.Reason = b.Generation, b.Closure, b.Deployment, b.Serial, b.Phase, b.Reason
		d.FailedUnits, d.RebootNeeded, d.NixOS, d.Kernel, d.Agent, d.BootID = list(b.FailedUnits), b.RebootNeeded, b.NixOS, b.Kernel, b.Agent, b.BootID
		d.System, d.IPv4, d.Vitals = first(b.System, d.System), first(d.IPv4, b.IPv4), &b.Vitals
		d.OverlayIP = b.OverlayIP
	}
	return d
}

// list makes a nil slice an empty one, which JSON tells apart.
func list(s []string) []string {
	if s == nil {
		return []string{}
	}
	return s
}

func first(s, otherwise string) string {
	if s != "" {
		return s
	}
	return otherwise
}

// shortClosure is a store path as people tell paths apart: the start of its hash.
func shortClosure(path string) string {
	hash, _, _ := strings.Cut(strings.TrimPrefix(path, "/nix/store/"), "-")
	if len(hash) > 8 {
		hash = hash[:8]
	}
	return hash
}

func stateColour(state string) ui.Colour {
	switch state {
	case "confirmed", "staged", "idle":
		return ui.Green
	case "lost", "failed", "rolled-back":
		return ui.Red
	case "new", "pending":
		return ui.Yellow
	}
	return ui.Cyan
}

const refresh = 2 * time.Second

func (a *app) statusCommand() *cobra.Command {
	var watch bool
	c := &cobra.Command{
		Use:   "status [SELECTOR]...",
		Short: "Show what every node runs and how it is",
		Long: `Show what every node runs and how it is, or only the selected ones.

STATE is new (never seen), lost (its heartbeats stopped), pending (it has not accepted what it should
have), idle (nothing was deployed yet), or how far it is with its last deployment: accepted, fetching,
building, activating, checking, confirming, rebooting, confirmed, staged, rolling-back, rolled-back or
failed. LOCKED and DRIFT are there where some node is locked, or runs something else than what was deployed.`,
		Example: `  nix-infra status
  nix-infra status @web state=rolled-back
  nix-infra status --watch
  nix-infra status --json | jq -r 'select(.failed_units != []) | .node'`,
		RunE: func(c *cobra.Command, args []string) error {
			session, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer session.Close()
			if watch {
				return a.watchStatus(c.Context(), session.Client, args)
			}
			nodes, err := a.selected(c.Context(), session.Client, args)
			if err != nil {
				return err
			}
			a.showStatus(nodes)
			return nil
		},
	}
	c.Flags().BoolVarP(&watch, "watch", "w", false, "show it again every two seconds; with --json, what changed")
	return c
}

func (a *app) showStatus(nodes []protocol.NodeState) {
	if a.json {
		for i := range nodes {
			a.document(documentOf(&nodes[i]))
		}
		return
	}
	if len(nodes) == 0 {
		a.say("no nodes yet; nix-infra enroll brings one in\n")
		return
	}
	var rows [][]ui.Cell
	now := time.Now()
	for i := range nodes {
		d := documentOf(&nodes[i])
		row := ui.Text(d.Node, d.State, number(uint64(d.Generation)), shortClosure(d.Closure), d.Deployment, number(d.Serial), ago(d.LastSeen, now),
			strings.Join(d.FailedUnits, " "), lockText(d.Lock), d.Drift, d.Reason)
		row[1].Colour, row[7].Colour, row[8].Colour, row[9].Colour = stateColour(d.State), ui.Red, ui.Yellow, ui.Red
		rows = append(rows, row)
	}
	a.out.Table(withoutEmpty([]string{"NODE", "STATE", "GEN", "CLOSURE", "DEPLOYMENT", "SERIAL", "SEEN", "FAILED UNITS", "LOCKED", "DRIFT", "REASON"}, rows, 9, 8))
}

// withoutEmpty leaves the given columns of a table out, the last one first, in which no row has anything.
func withoutEmpty(headings []string, rows [][]ui.Cell, columns ...int) ([]string, [][]ui.Cell) {
	for _, c := range columns {
		if slices.ContainsFunc(rows, func(row []ui.Cell) bool { return row[c].Text != "" }) {
			continue
		}
		headings = slices.Delete(headings, c, c+1)
		for i := range rows {
			rows[i] = slices.Delete(rows[i], c, c+1)
		}
	}
	return headings, rows
}

// lockText says by whom a node is locked, and why; "" where it is not.
func lockText(l *protocol.Lock) string {
	if l == nil {
		return ""
	}
	return "by " + l.By + ": " + l.Reason
}

func number(n uint64) string {
	if n == 0 {
		return "-"
	}
	return strconv.FormatUint(n, 10)
}

func (a *app) watchStatus(ctx context.Context, c *client.Client, selectors []string) error {
	ticker := time.NewTicker(refresh)
	defer ticker.Stop()
	before := map[string]string{}
	for {
		nodes, err := a.selected(ctx, c, selectors)
		if err != nil {
			return err
		}
		if a.json || !a.out.Interactive() {
			nodes = changed(nodes, before)
		} else {
			a.out.Clear()
		}
		if len(nodes) > 0 || a.out.Interactive() {
			a.showStatus(nodes)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-ticker.C:
		}
	}
}

// changed keeps the nodes of which something other than the time and the vitals is new.
func changed(nodes []protocol.NodeState, before map[string]string) []protocol.NodeState {
	var some []protocol.NodeState
	for i := range nodes {
		d := documentOf(&nodes[i])
		d.LastSeen, d.Vitals = nil, nil
		now := string(protocol.Encode(d))
		if before[d.Node] != now {
			before[d.Node] = now
			some = append(some, nodes[i])
		}
	}
	return some
}
