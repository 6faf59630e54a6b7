package command

import "github.com/spf13/cobra"

// group has the commands that the earlier tool had once for fleets and once for clusters, with its options: scripts go on as
// they are. Each is the command of its name outside of the group, but for what its help says.
func (a *app) group(name string, cluster bool) *cobra.Command {
	var key string
	g := &cobra.Command{
		Use:    name,
		Hidden: true,
		Short:  "Commands in the words of the earlier tool",
		Long: `Commands in the words of the earlier tool, for scripts that have them. Each is the command of the same name without
the group (nix-infra cmd is nix-infra exec), takes its options, and names its nodes by --target. What differs:

  - what nodes write to stderr goes to stdout, too;
  - cmd "nixos-rebuild switch" [--fast] [--impure] is nix-infra deploy, and with --rollback it is nix-infra rollback: on the
    node itself, it would build the files of the last deployment and prove nothing;
  - provision deploys nothing: init-machine, init-ctrl and init-node do;
  - in the group "cluster", deploy-apps, update-node and update-ctrl deploy only with --rebuild; else they check and record
    what they were told, and the next deployment takes it.`,
		Example: `  nix-infra ` + name + ` cmd --target="node001 node002" "systemctl status nginx"
  nix-infra ` + name + ` action --target=node001 --app-module=mongodb --cmd="status"`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	g.PersistentFlags().StringVar(&key, "ssh-key", "", "key below ssh/, for those that use SSH")
	run := a.commandCommand(true)
	run.Use, run.Aliases = "cmd [flags] --target=NODE... TEXT", nil
	action := a.actionCommand()
	for _, c := range []*cobra.Command{run, action} {
		merge := c.Flags().Lookup("merge")
		merge.DefValue = "true"
		_ = merge.Value.Set(merge.DefValue) // a bool takes it
	}
	g.AddCommand(run, action, a.sshCommand(), a.portForwardCommand(cluster), a.uploadCommand(), a.gcCommand(), a.rollbackCommand(), a.upgradeCommand())
	g.AddCommand(a.deployAppsCommand(!cluster), a.provisionCommand(false), a.initMachineCommand(), a.destroyCommand())
	if cluster {
		g.AddCommand(a.etcdCommand(), a.initControlCommand(true), a.updateControlCommand(false), a.initNodeCommand(true), a.updateNodeCommand(false))
	} else {
		g.AddCommand(a.updateCommand(true))
	}
	return g
}
