package command

import (
	"errors"

	"github.com/spf13/cobra"
)

// portForwardCommand is port-forward. With overlay, ports are those of the node's address in the cluster's overlay
// network, as in the group cluster, else those of its loopback.
func (a *app) portForwardCommand(overlay bool) *cobra.Command {
	return &cobra.Command{
		Use:   "port-forward NODE [LOCAL:]REMOTE...",
		Short: "Reach ports of a node from here, through its agent",
		Example: `  nix-infra port-forward db1 5432
  nix-infra port-forward web1 8080:80`,
		RunE: func(*cobra.Command, []string) error { return errors.New("not there yet") },
	}
}
