package command

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// recordDocument is a node as `nodes --json` has it: what does not change by itself.
type recordDocument struct {
	Node     string         `json:"node"`
	Tags     []string       `json:"tags"`
	IPv4     string         `json:"ipv4"`
	System   string         `json:"system"`
	Key      string         `json:"key"`
	XKey     string         `json:"xkey"`
	Enrolled time.Time      `json:"enrolled"`
	By       string         `json:"by"`
	Lock     *protocol.Lock `json:"lock"`
}

func (a *app) nodesCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "nodes [SELECTOR]...",
		Short: "List the enrolled nodes",
		Example: `  nix-infra nodes
  nix-infra nodes not @web
  nix-infra nodes --json | jq -r .node`,
		RunE: func(c *cobra.Command, args []string) error {
			session, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer session.Close()
			nodes, err := a.selected(c.Context(), session.Client, args)
			if err != nil {
				return err
			}
			var rows [][]ui.Cell
			for i := range nodes {
				n := documentOf(&nodes[i])
				if a.json {
					a.document(recordDocument{n.Node, n.Tags, n.IPv4, n.System, n.Key, n.XKey, n.Enrolled, n.By, n.Lock})
				}
				rows = append(rows, ui.Text(n.Node, strings.Join(n.Tags, " "), n.IPv4, n.System, n.Enrolled.Format(time.DateOnly), n.Key, lockText(n.Lock)))
			}
			if !a.json {
				a.out.Table(withoutEmpty([]string{"NODE", "TAGS", "IPV4", "SYSTEM", "ENROLLED", "KEY", "LOCKED"}, rows, 6))
			}
			return nil
		},
	}
}

func (a *app) nodeCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "node",
		Short: "Show or change one node",
		Example: `  nix-infra node show web1
  nix-infra node tag web1 web eu
  nix-infra node lock web1 --reason "migration, ask bob"
  nix-infra node rekey web1`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.nodeShowCommand(), a.nodeTagCommand(), a.nodeRemoveCommand(), a.nodeReleaseCommand(), a.nodeRekeyCommand(), a.nodeLockCommand(), a.nodeUnlockCommand())
	return c
}

func (a *app) nodeShowCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "show NAME",
		Short:   "Show all that is known of a node",
		Example: `  nix-infra node show web1`,
		Args:    cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			session, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer session.Close()
			n, err := session.Node(c.Context(), args[0])
			if err != nil {
				return err
			}
			if a.json {
				a.document(documentOf(n))
				return nil
			}
			a.showNode(documentOf(n))
			return nil
		},
	}
}

func (a *app) showNode(d nodeDocument) {
	eachFact(d, func(name, value string) {
		a.out.Printf("%s %s\n", a.out.Paint(ui.Bold, fmt.Sprintf("%-14s", name)), ui.Clean(value))
	})
}

// eachFact hands on all that is known of a node, for people.
func eachFact(d nodeDocument, each func(name, value string)) {
	row := func(name, value string) {
		if value != "" {
			each(name, value)
		}
	}
	deployment := func(id string, serial uint64) string {
		if id == "" {
			return ""
		}
		return fmt.Sprintf("%s, serial %d", id, serial)
	}
	row("node", d.Node)
	row("state", d.State)
	row("reason", d.Reason)
	row("drift", d.Drift)
	if d.Lock != nil {
		row("locked", lockText(d.Lock)+" (since "+d.Lock.At.Local().Format(time.DateTime)+")")
	}
	row("last seen", ago(d.LastSeen, time.Now()))
	row("deployment", deployment(d.Deployment, d.Serial))
	row("desired", deployment(d.DesiredDeployment, d.DesiredSerial))
	row("closure", d.Closure)
	row("generation", number(uint64(d.Generation)))
	row("failed units", strings.Join(d.FailedUnits, " "))
	if d.RebootNeeded {
		row("reboot", "needed")
	}
	row("tags", strings.Join(d.Tags, " "))
	row("ipv4", d.IPv4)
	row("overlay ip", d.OverlayIP)
	row("system", d.System)
	row("nixos", d.NixOS)
	row("kernel", d.Kernel)
	row("agent", d.Agent)
	if v := d.Vitals; v != nil {
		row("up", (time.Duration(v.Uptime) * time.Second).String())
		row("load", fmt.Sprintf("%.2f %.2f %.2f", v.Load[0], v.Load[1], v.Load[2]))
		row("memory", fmt.Sprintf("%s available of %s", size(v.MemAvailable), size(v.MemTotal)))
		row("disk", fmt.Sprintf("%s free of %s", size(v.DiskFree), size(v.DiskTotal)))
	}
	row("key", d.Key)
	row("enrolled", d.Enrolled.Format(time.RFC3339)+" by "+d.By)
}

// size is a number of bytes for people.
func size(n int64) string {
	units := []string{"B", "KiB", "MiB", "GiB", "TiB"}
	f, i := float64(n), 0
	for f >= 1024 && i < len(units)-1 {
		f, i = f/1024, i+1
	}
	if i == 0 {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, units[i])
}

func (a *app) nodeTagCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "tag NAME [TAG]...",
		Short: "Give a node tags, in place of the ones that it had",
		Example: `  nix-infra node tag web1 web eu
  nix-infra node tag web1            # none`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			r := protocol.TagsRequest{Node: args[0], Tags: args[1:]}
			if err := r.Validate(); err != nil {
				return err
			}
			return a.order(c.Context(), protocol.TagNode, r, fmt.Sprintf("%s is tagged %s", args[0], first(strings.Join(args[1:], " "), "with nothing")))
		},
	}
}

func (a *app) nodeRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME",
		Short: "Take a node out of the fleet",
		Long: `Take a node out of the fleet: its credentials are revoked, so that it can't connect any more, and the controller
forgets it. Nothing is changed on the machine, which goes on running what it has. Enrolling it again brings it back, with
the same keys or with new ones.`,
		Example: `  nix-infra node remove web1`,
		Args:    cobra.ExactArgs(1),
		RunE:    func(c *cobra.Command, args []string) error { return a.removeNode(c.Context(), args[0]) },
	}
}

func (a *app) removeNode(ctx context.Context, name string) error {
	e, err := a.openEnrolment()
	if err != nil {
		return err
	}
	s, err := a.connectAs(ctx, e.me)
	if err != nil {
		return err
	}
	defer s.Close()
	n, err := s.Node(ctx, name)
	if err != nil {
		return err
	}
	if err := a.unregister(ctx, e, s, *n); err != nil {
		return err
	}
	a.say("%s is no longer in the fleet\n", name)
	return nil
}

// unregister revokes nodes first: one that is revoked and still known can be removed by the same command once more, one
// that is forgotten could not be named any more.
func (a *app) unregister(ctx context.Context, e *enrolment, s *session, nodes ...protocol.NodeState) error {
	var grants []grant
	for _, n := range nodes {
		grants = append(grants, grant{Name: n.Name, Role: protocol.Node, Key: n.Key})
	}
	if err := a.revoke(ctx, e, grants...); err != nil {
		return err
	}
	for _, n := range nodes {
		if err := s.Controller(ctx, protocol.RemoveNode, protocol.NameRequest{Name: n.Name}, nil); err != nil {
			return err
		}
	}
	return nil
}

// order has the controller do something and says what is so from then on.
func (a *app) order(ctx context.Context, action protocol.Action, request any, done string) error {
	session, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer session.Close()
	if err := session.Controller(ctx, action, request, nil); err != nil {
		return err
	}
	a.say("%s\n", ui.Clean(done))
	return nil
}

// answerTime is how long a node may take to answer something that it only has to look up.
const answerTime = 10 * time.Second

func (a *app) nodeReleaseCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "release NAME [CLOSURE]",
		Short: "Let a node try a quarantined closure again",
		Long: `Let a node try a closure again that it rolled back from: the named store path, or all that it holds
in quarantine. Deploy it again after that.`,
		Example: `  nix-infra node release web1
  nix-infra node release web1 /nix/store/3c2k…-nixos-system-web1-25.11`,
		Args: cobra.RangeArgs(1, 2),
		RunE: func(c *cobra.Command, args []string) error {
			session, err := a.connect(c.Context())
			if err != nil {
				return err
			}
			defer session.Close()
			if _, err := session.Node(c.Context(), args[0]); err != nil {
				return err
			}
			request := protocol.NameRequest{}
			if len(args) == 2 {
				request.Name = args[1]
			}
			ctx, cancel := context.WithTimeout(c.Context(), answerTime)
			defer cancel()
			if _, err := session.Ask(ctx, args[0], protocol.Release, request); err != nil {
				return err
			}
			a.say("%s may try it again\n", args[0])
			return nil
		},
	}
}
