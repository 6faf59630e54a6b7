package command

import (
	"errors"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
)

func (a *app) initMachineCommand() *cobra.Command {
	o := &provisionOptions{deploy: true}
	var targets []string
	c := &cobra.Command{
		Use:   "init-machine NAME...",
		Short: "Enroll machines that run NixOS, say what they are, and deploy to them",
		Long: `Enroll those of the machines that are not nodes yet, over SSH, record their node module and NixOS version in
nix-infra.yaml, and deploy to them: one deployment for all. They have to run NixOS; nix-infra provision makes machines,
and converts others.`,
		Example: `  nix-infra init-machine web1 web2 --node-module standalone_machine --nixos-version 25.11
  nix-infra init-machine --target="node001 node002" --nixos-version=25.11 --node-module=node_types/standalone_machine.nix`,
		RunE: func(c *cobra.Command, args []string) error {
			o.names = append(args, nodeList(strings.Join(targets, " "))...)
			if len(o.names) == 0 {
				return errors.New("which machines? Name them (nix-infra init-machine web1 web2)")
			}
			o.method = string(project.MethodNone)
			return a.provision(c.Context(), o)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&targets, "target", nil, "the `machines`, in place of NAME...; repeatable")
	f.StringVar(&o.nodeModule, "node-module", "", "their node type from now on, such as node_types/standalone_machine.nix or its bare name")
	f.StringVar(&o.nixosVersion, "nixos-version", "", "their NixOS version from now on")
	f.StringVar(&o.provider, "provider", "", "where the machines are: "+strings.Join(project.Providers, " or ")+" (default: servers.yaml, else HCLOUD_TOKEN)")
	o.enrolmentFlags(f)
	return c
}
