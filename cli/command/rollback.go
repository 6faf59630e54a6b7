package command

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

func (a *app) rollbackCommand() *cobra.Command {
	var to string
	var expect []string
	flags := rolloutFlags{back: true}
	c := &cobra.Command{
		Use:   "rollback SELECTOR...",
		Short: "Have nodes go back to a system that they ran before",
		Long: `Have nodes go back to a system that they ran before: the one that was proven before the one that runs or,
with --to, a generation of theirs (nix-infra generations lists them) or a store path. They have it already:
nothing is built and nothing fetched.

It is a deployment like any other: each node proves the system and, where it can't, returns to the one
that it came from. A system that a node rolled back from is refused until nix-infra node release lets it
be tried again. The files of the project stay as they are: the next deploy brings them again.`,
		Example: `  nix-infra rollback web1
  nix-infra rollback @web --max-unavailable 1
  nix-infra rollback web1 --to 41
  nix-infra rollback web1 --to /nix/store/3c2k…-nixos-system-web1-25.11
  nix-infra rollback web1 --expect /nix/store/9x1f…-nixos-system-web1-25.11`,
		Args: someNodes("roll which nodes back?", "rollback"),
		RunE: func(c *cobra.Command, args []string) error {
			target, err := rollbackTarget(to)
			if err != nil {
				return err
			}
			return a.orderNodes(c.Context(), args, protocol.Switch, &flags, rollbackTo(target), expect)
		},
	}
	c.Flags().StringVar(&to, "to", "", "generation or store path (default: what was proven before)")
	registerExpect(c.Flags(), &expect)
	flags.register(c.Flags(), &a.batch)
	return withTarget(c)
}

// rollbackTarget reads what --to says.
func rollbackTarget(to string) (protocol.Rollback, error) {
	if to == "" {
		return protocol.Rollback{}, nil
	}
	if strings.HasPrefix(to, "/") {
		if !protocol.IsStorePath(to) {
			return protocol.Rollback{}, fmt.Errorf("--to %q is not the path of a store object; nix-infra generations lists those of a node", to)
		}
		return protocol.Rollback{Path: to}, nil
	}
	n, err := strconv.Atoi(to)
	if err != nil || n < 1 {
		return protocol.Rollback{}, fmt.Errorf("--to %q: use the number of a generation or a store path; nix-infra generations lists them", to)
	}
	return protocol.Rollback{Generation: n}, nil
}

func (a *app) rebootCommand() *cobra.Command {
	var expect []string
	flags := rolloutFlags{}
	flags.MaxUnavailable = "1"
	c := &cobra.Command{
		Use:   "reboot SELECTOR...",
		Short: "Reboot nodes, one after the other, and watch them come back",
		Long: `Reboot nodes, and watch them come back: each one has to show a new boot and prove its system, as after a
deploy. A system that deploy --mode boot staged is the one that is booted; if it can't be proven, the node
goes back to the one before.

At most --max-unavailable nodes are away at once: 1, unless it or the project's settings say another number.
The next one is told only when one before it is back, and none any more when one did not come back.`,
		Example: `  nix-infra reboot web1
  nix-infra reboot reboot_needed=true --max-unavailable 10%
  nix-infra reboot all --order db,web --max-failures 1`,
		Args: someNodes("reboot which nodes?", "reboot"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.orderNodes(c.Context(), args, protocol.Reboot, &flags, noSource, expect)
		},
	}
	registerExpect(c.Flags(), &expect)
	flags.register(c.Flags(), &a.batch)
	return c
}

func registerExpect(f *pflag.FlagSet, expect *[]string) {
	f.StringSliceVar(expect, "expect", nil, "only if each of the nodes runs one of these `store paths` (status --json has them), and else nothing is done")
}

// orderNodes deploys what needs nothing of the project's files. Where something is expected, each node has to run one of these store
// paths.
func (a *app) orderNodes(ctx context.Context, targets []string, mode protocol.Mode, flags *rolloutFlags, from source, expect []string) error {
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	o, err := flags.order(s.me.project.Settings, mode)
	if err != nil {
		return err
	}
	chosen, _, err := a.choose(ctx, s, targets, mode)
	if err != nil {
		return err
	}
	if err := expectRunning(chosen, expect); err != nil {
		return err
	}
	p, err := makePlan(s.me.signer, o, chosen, from, time.Now())
	if err != nil {
		return err
	}
	return a.carryOut(ctx, s, p, flags)
}

// expectRunning is an error where a node runs something else than was expected; nothing expects nothing. What is deployed to a node from here on
// makes the controller refuse the plan: it has the serial that comes after what was seen here.
func expectRunning(chosen []protocol.NodeState, expect []string) error {
	if len(expect) == 0 {
		return nil
	}
	var others []error
	for i := range chosen {
		switch n := &chosen[i]; {
		case n.Beat == nil || n.Beat.Closure == "":
			others = append(others, fmt.Errorf("what %s runs is not known, so that it can't be what --expect says", n.Name))
		case !slices.Contains(expect, n.Beat.Closure):
			others = append(others, fmt.Errorf("%s runs %s, which is not what --expect says", n.Name, ui.Clean(n.Beat.Closure)))
		}
	}
	if len(others) == 0 {
		return nil
	}
	return several("run something else; nothing was done", others)
}
