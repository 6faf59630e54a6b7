package command

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
)

// notYet is what the commands of clusters leave to others, in their help.
const notYet = `

What it does not do: it makes no certificates for etcd (/root/certs), and registers nothing there. Modules that need
these need them from where they are made now.`

func (a *app) initControlCommand(rebuild bool) *cobra.Command {
	return a.controlCommand(rebuild, "init-ctrl", "Make nodes the control nodes of a cluster", `Make nodes the control nodes of a cluster, and deploy to them: node_types/control_node.nix then is part of what they
get, and [%%etcdCluster%%] names them to all nodes of the cluster. They are recorded in nix-infra.yaml
(cluster.control_nodes and .uuid). More control nodes may be added to those that are there, under the same id.`, true)
}

func (a *app) updateControlCommand(rebuild bool) *cobra.Command {
	return a.controlCommand(rebuild, "update-ctrl", "Deploy to control nodes, or record those that a cluster has already", `Deploy to the control nodes of a cluster. In a project whose cluster the earlier tool made, it records them in
nix-infra.yaml (cluster.control_nodes and .uuid); from then on, other nodes are refused as such.`, false)
}

// controlCommand is about control nodes. adds tells whether it takes more to those that are recorded.
func (a *app) controlCommand(rebuild bool, name, short, long string, adds bool) *cobra.Command {
	u := &updateOptions{}
	var uuid string
	c := &cobra.Command{
		Use:   name + " SELECTOR...",
		Short: short,
		Long: long + `

The machines have to be enrolled (nix-infra provision, init-machine). Their systems are built with --impure, as the control
nodes of the earlier tool's templates need it; --impure=false says otherwise.` + notYet,
		Example: `  nix-infra ` + name + ` etcd001 --cluster-uuid d6b76143-bcfa-490a-8f38-91d79be62fab
  nix-infra ` + name + ` --target="etcd001 etcd002 etcd003" --cluster-uuid=d6b76143-bcfa-490a-8f38-91d79be62fab --nixos-version=25.11`,
	}
	f := c.Flags()
	f.StringVar(&uuid, "cluster-uuid", "", "tells this etcd cluster from others (default: the recorded one, else $CLUSTER_UUID)")
	f.StringVar(&u.nixosVersion, "nixos-version", "", "their NixOS version from now on")
	u.flags(a, c, rebuild)
	impure := f.Lookup("impure")
	impure.DefValue = "true"
	_ = impure.Value.Set(impure.DefValue) // a bool takes it
	u.record = func(p *project.Project, after *project.Settings, nodes []string) error {
		is := &after.Cluster
		id := first(uuid, p.ClusterUUID())
		switch {
		case id == "":
			return errors.New("which cluster is it? Give it an id: --cluster-uuid, such as uuidgen prints")
		case is.UUID != "" && id != is.UUID:
			return fmt.Errorf("--cluster-uuid %s: this project's cluster is %s (cluster.uuid in %s), and a control node can't change to another", id, is.UUID, project.SettingsFile)
		}
		if err := after.CheckControlNodes(nodes); err != nil && !errors.Is(err, project.ErrNoCluster) && !adds {
			return fmt.Errorf("%w; nix-infra init-ctrl adds one", err)
		}
		is.UUID, is.ControlNodes = id, slices.Clone(is.ControlNodes)
		for _, name := range nodes {
			if !slices.Contains(is.ControlNodes, name) {
				is.ControlNodes = append(is.ControlNodes, name)
			}
		}
		return nil
	}
	return u.command(a, c)
}

func (a *app) initNodeCommand(rebuild bool) *cobra.Command {
	return a.memberCommand(rebuild, "init-node", "Make nodes members of a cluster", `Make nodes members of a cluster, and deploy to them. Their node type, their NixOS version and their service groups are
recorded in nix-infra.yaml, so that every later deployment has them, too.`)
}

func (a *app) updateNodeCommand(rebuild bool) *cobra.Command {
	return a.memberCommand(rebuild, "update-node", "Give nodes of a cluster another node type or NixOS version", `Give nodes of a cluster another node type or NixOS version, or other service groups. They are recorded in
nix-infra.yaml, so that every later deployment has them, too; in the group "cluster", as with the earlier tool, nothing is
deployed without --rebuild.`)
}

func (a *app) memberCommand(rebuild bool, name, short, long string) *cobra.Command {
	u := &updateOptions{}
	var control, groups string
	c := &cobra.Command{
		Use:   name + " SELECTOR...",
		Short: short,
		Long: long + `

The machines have to be enrolled (nix-infra provision, init-machine). The control nodes of their cluster are those that
init-ctrl recorded: --ctrl-nodes, or CTRL_NODES, may say them again, and is refused where it names others, since nodes
that were told so would lose their cluster.` + notYet,
		Example: `  nix-infra ` + name + ` service001 --node-module cluster_node --service-group "services backends"
  nix-infra ` + name + ` --target="service001 service002" --node-module=node_types/cluster_node.nix --ctrl-nodes="etcd001" --nixos-version=25.11`,
	}
	f := c.Flags()
	f.StringVar(&control, "ctrl-nodes", "", "the control `nodes` of the cluster, which must be the recorded ones (default $CTRL_NODES)")
	f.StringVar(&groups, "service-group", "", "the `groups` of services that they are in, such as \"services backends\"; recorded")
	u.moduleFlags(c)
	u.flags(a, c, rebuild)
	u.record = func(p *project.Project, after *project.Settings, nodes []string) error {
		if err := after.CheckControlNodes(nodeList(first(control, p.Env.Get("CTRL_NODES")))); errors.Is(err, project.ErrNoCluster) {
			return fmt.Errorf(`%w: nix-infra init-ctrl makes some, and update-ctrl --target="etcd001" --cluster-uuid=… records those that a cluster has already`, err)
		} else if err != nil {
			return fmt.Errorf("--ctrl-nodes or CTRL_NODES: %w", err)
		}
		if c.Flags().Changed("service-group") {
			for _, name := range nodes {
				recordGroups(&after.Cluster, name, nodeList(groups))
			}
		}
		return nil
	}
	return u.command(a, c)
}

// recordGroups records the service groups of a node, none as nothing.
func recordGroups(c *project.Cluster, node string, groups []string) {
	switch {
	case len(groups) == 0:
		delete(c.ServiceGroups, node)
		return
	case c.ServiceGroups == nil:
		c.ServiceGroups = map[string][]string{}
	}
	c.ServiceGroups[node] = groups
}

// nodeList takes a list of names in one text apart, whatever stands between them.
func nodeList(text string) []string {
	return strings.FieldsFunc(text, func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) })
}
