package command

import "github.com/spf13/cobra"

// runCommands are the commands that have nodes run something, and the groups in which the earlier tool had them.
func (a *app) runCommands() []*cobra.Command {
	return []*cobra.Command{a.execCommand(), a.actionCommand(), a.etcdCommand(), a.group("fleet", false), a.group("cluster", true)}
}

// group has the commands that the earlier tool had once for fleets and once for clusters, with its options: scripts go on as
// they are. Each is the command of its name outside of the group; only what a node writes to stderr goes to stdout, too,
// as such scripts expect it.
func (a *app) group(name string, cluster bool) *cobra.Command {
	var key string
	g := &cobra.Command{
		Use:    name,
		Hidden: true,
		Short:  "Commands in the words of the earlier tool",
		Long: `Commands in the words of the earlier tool, for scripts that have them. Each is the command of the same name without
the group (nix-infra cmd is nix-infra exec), takes its options, and names its nodes by --target.`,
		Example: `  nix-infra ` + name + ` cmd --target="node001 node002" "systemctl status nginx"
  nix-infra ` + name + ` action --target=node001 --app-module=mongodb --cmd="status"`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	g.PersistentFlags().StringVar(&key, "ssh-key", "", "key below ssh/, for those that use SSH")
	run := a.execCommand()
	run.Use, run.Aliases = "cmd [flags] --target=NODE... TEXT", nil
	action := a.actionCommand()
	for _, c := range []*cobra.Command{run, action} {
		merge := c.Flags().Lookup("merge")
		merge.DefValue = "true"
		_ = merge.Value.Set(merge.DefValue) // a bool takes it
	}
	g.AddCommand(run, action, a.sshCommand(), a.portForwardCommand(cluster), a.uploadCommand(), a.gcCommand(), a.rollbackCommand(), a.upgradeCommand())
	if cluster {
		g.AddCommand(a.etcdCommand())
	}
	return g
}
