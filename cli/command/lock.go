package command

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

func (a *app) nodeLockCommand() *cobra.Command {
	var reason string
	c := &cobra.Command{
		Use:   "lock SELECTOR...",
		Short: "Keep deployments from nodes",
		Long: `Keep deployments from nodes until nix-infra node unlock: a deployment that names a locked node is refused, with
the reason, and rollouts that are under way pass it over. What a node got already goes on. A dry-activate is
allowed.`,
		Example: `  nix-infra node lock db1 --reason "migration, ask bob"
  nix-infra node lock @db --reason "end of the quarter"`,
		Args: someNodes("lock which nodes?", "node lock"),
		RunE: func(c *cobra.Command, args []string) error {
			if strings.TrimSpace(reason) == "" {
				return errors.New("say why by --reason: whoever is refused is told")
			}
			if err := (&protocol.LockRequest{Node: "any", Reason: reason}).Validate(); err != nil {
				return fmt.Errorf("--reason: %w", err)
			}
			return a.lock(c.Context(), args, reason, "is locked: "+reason)
		},
	}
	c.Flags().StringVar(&reason, "reason", "", "why, in one line")
	return c
}

func (a *app) nodeUnlockCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "unlock SELECTOR...",
		Short: "Let nodes be deployed to again",
		Example: `  nix-infra node unlock db1
  nix-infra node unlock locked=true`,
		Args: someNodes("unlock which nodes?", "node unlock"),
		RunE: func(c *cobra.Command, args []string) error {
			return a.lock(c.Context(), args, "", "may be deployed to")
		},
	}
}

// lock locks nodes or, without a reason, unlocks them.
func (a *app) lock(ctx context.Context, selectors []string, reason, done string) error {
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	chosen, err := a.selected(ctx, s.Client, selectors)
	if err != nil {
		return err
	}
	if len(chosen) == 0 {
		return errors.New("this names no node; nix-infra nodes lists them")
	}
	for i := range chosen {
		if err := s.Controller(ctx, protocol.LockNode, protocol.LockRequest{Node: chosen[i].Name, Reason: reason}, nil); err != nil {
			return fmt.Errorf("%s: %w", chosen[i].Name, err)
		}
		a.say("%s %s\n", chosen[i].Name, ui.Clean(done))
	}
	return nil
}
