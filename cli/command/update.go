package command

import (
	"context"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// The commands by which the earlier tool brought files to nodes, each of them some. Here a deployment is one thing, and always
// all of a node's configuration: what these commands say about nodes is recorded in the settings, so that every later
// deployment has it, too; and with --no-rebuild nothing is deployed for now.

// recordedDocument says what is recorded of a node, in --json.
type recordedDocument struct {
	Event         string   `json:"event"` // recorded
	Node          string   `json:"node"`
	NodeModule    string   `json:"node_module"`
	NixOSVersion  string   `json:"nixos_version"`
	TestDir       string   `json:"test_dir"`
	ClusterUUID   string   `json:"cluster_uuid"`
	ControlNodes  []string `json:"control_nodes"`
	ServiceGroups []string `json:"service_groups"`
	Deployed      bool     `json:"deployed"` // false: the next deployment takes it
}

// updateOptions are what these commands have in common.
type updateOptions struct {
	deployOptions // node module, NixOS version and test folder are recorded, not for this time only
	rebuild       bool

	// record is what else a command records of the chosen nodes.
	record func(p *project.Project, after *project.Settings, nodes []string) error
}

// flags adds those that all of them have. rebuild is what holds where neither --rebuild nor --no-rebuild is given.
func (u *updateOptions) flags(a *app, c *cobra.Command, rebuild bool) {
	f := c.Flags()
	f.StringArrayVar(&u.targets, "target", nil, targetUsage)
	u.mode = string(protocol.Switch)
	f.BoolVar(&u.rebuild, "rebuild", rebuild, "deploy to the nodes, too; with --no-rebuild it is only checked and recorded, and the next deployment takes it")
	f.BoolVar(&u.allowUnknownPlaceholders, "allow-unknown-placeholders", false, "leave placeholders that nobody knows as they are")
	f.BoolVar(&u.allowMissing, "allow-missing", false, "leave out secrets that are not in the project, with a warning: a node that has one of before loses it")
	f.BoolVar(&u.impure, "impure", false, "let the evaluation see the environment of the machine that builds")
	f.String("ssh-key", "", "accepted for scripts of the earlier tool; no key is needed")
	u.buildFlags.register(f)
	u.rolloutFlags.register(f, &a.batch)
}

func (u *updateOptions) moduleFlags(c *cobra.Command) {
	f := c.Flags()
	f.StringVar(&u.nodeModule, "node-module", "", "their node type from now on, such as node_types/standalone_machine.nix or its bare name")
	f.StringVar(&u.nixosVersion, "nixos-version", "", "their NixOS version from now on")
}

// command gives a command its arguments.
func (u *updateOptions) command(a *app, c *cobra.Command) *cobra.Command {
	c.RunE = func(c *cobra.Command, args []string) error {
		u.targets = append(u.targets, args...)
		if err := someNodes(c.Name()+" which nodes?", c.Name())(c, u.targets); err != nil {
			return err
		}
		return a.update(c.Context(), u)
	}
	return c
}

func (a *app) updateCommand(rebuild bool) *cobra.Command {
	u := &updateOptions{}
	c := &cobra.Command{
		Use:   "update SELECTOR...",
		Short: "Give nodes another node type or NixOS version, and deploy",
		Long: `Give nodes another node type or NixOS version, and deploy to them. Both are recorded in nix-infra.yaml
(nodes.NAME.node_module and .nixos_version), so that every later deployment has them, too; system.stateVersion stays
what it was, as with upgrade-nixos. Without either, it is nix-infra deploy.

A deployment is one thing: it brings all of a node's configuration, its app modules and its secrets. With --no-rebuild
everything is composed and checked and the settings are recorded, but nothing is deployed: the next deployment takes it.`,
		Example: `  nix-infra update web1 --node-module standalone_machine
  nix-infra update --target="web1 web2" --nixos-version=25.11 --node-module=node_types/standalone_machine.nix --no-rebuild`,
	}
	u.moduleFlags(c)
	u.flags(a, c, rebuild)
	return u.command(a, c)
}

func (a *app) deployAppsCommand(rebuild bool) *cobra.Command {
	u := &updateOptions{}
	c := &cobra.Command{
		Use:   "deploy-apps SELECTOR...",
		Short: "Deploy to nodes, or to a test's nodes",
		Long: `Deploy to nodes: it is nix-infra deploy, but that a test's folder stays. With --test-dir, the nodes have their own files
from the folder's nodes/ instead of the project's, from now on (nodes.NAME.test_dir in nix-infra.yaml); without it, they
have the project's again.

A deployment is one thing: it brings all of a node's configuration, its app modules and its secrets. With --no-rebuild
everything is composed and checked and the test's folder is recorded, but nothing is deployed: the next deployment takes it.`,
		Example: `  nix-infra deploy-apps web1 web2
  nix-infra deploy-apps --target=testnode001 --test-dir=__test__/nginx
  nix-infra deploy-apps testnode001                  # the test is over`,
	}
	var dir string
	c.Flags().StringVar(&dir, "test-dir", "", "`folder` of a test, whose nodes/ takes the place of the project's from now on")
	u.flags(a, c, rebuild)
	u.record = func(p *project.Project, after *project.Settings, nodes []string) error {
		recorded := belowProject(p.Dir, dir)
		for _, name := range nodes {
			if n := after.Nodes[name]; n.TestDir != recorded {
				n.TestDir = recorded
				after.Nodes[name] = n
			}
		}
		return nil
	}
	return u.command(a, c)
}

// belowProject is a path that was given, as the settings have it: they may be moved with the project, and read elsewhere
// than here.
func belowProject(dir, path string) string {
	if path == "" {
		return ""
	}
	if !filepath.IsAbs(path) {
		here, err := filepath.Abs(path)
		if _, below := os.Stat(filepath.Join(dir, path)); below == nil || err != nil {
			return path
		} else if _, err := os.Stat(here); err != nil {
			return path // that it is nowhere is said when it is looked into
		}
		path = here
	}
	for _, root := range []string{dir, resolved(dir)} {
		if rel, err := filepath.Rel(root, path); err == nil && filepath.IsLocal(rel) {
			return rel
		}
	}
	return filepath.Clean(path)
}

func resolved(dir string) string {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return dir
	}
	return real
}

func (a *app) update(ctx context.Context, u *updateOptions) error {
	if err := u.check(); err != nil {
		return err
	}
	me, err := a.identity()
	if err != nil {
		return err
	}
	order, err := u.order(me.project.Settings, protocol.Switch)
	if err != nil {
		return err
	}
	s, err := a.connectAs(ctx, me)
	if err != nil {
		return err
	}
	defer s.Close()
	chosen, all, err := a.choose(ctx, s, u.targets, order.mode)
	if err != nil {
		return err
	}
	after, err := u.settings(me.project, chosen)
	if err != nil {
		return err
	}
	me.project.Settings = after
	if !u.rebuild {
		u.where = onNode // what is only checked is not built
	}
	from, err := a.sourceFor(ctx, me, s, &u.deployOptions, chosen, all)
	if err != nil {
		return err
	}
	p, err := makePlan(me.signer, order, chosen, from, time.Now())
	if err != nil {
		return err
	}
	changed, err := a.changeSettings(func(now *project.Project) (project.Settings, error) { return u.settings(now, chosen) })
	if err != nil {
		return err
	}
	a.tellRecorded(u, after, namesOf(chosen), changed)
	if u.rebuild {
		return a.carryOut(ctx, s, p, &u.rolloutFlags)
	}
	for _, w := range p.warnings {
		a.note("warning: %s", w)
	}
	return nil
}

// settings are the project's with what is to be recorded.
func (u *updateOptions) settings(p *project.Project, chosen []protocol.NodeState) (project.Settings, error) {
	after := p.Settings
	if after.Nodes = maps.Clone(after.Nodes); after.Nodes == nil {
		after.Nodes = map[string]project.NodeSettings{}
	}
	after.Cluster.ServiceGroups = maps.Clone(after.Cluster.ServiceGroups)
	names := namesOf(chosen)
	if u.nixosVersion != "" {
		var other []string
		for _, name := range names {
			if after.Node(name).NixOSVersion != u.nixosVersion {
				other = append(other, name)
			}
		}
		after = after.Upgrade(u.nixosVersion, other, false, releases(chosen))
		if err := checkUpgrade(after, u.nixosVersion, chosen); err != nil {
			return after, err
		}
	}
	if u.nodeModule != "" {
		for _, name := range names {
			if n := after.Nodes[name]; n.NodeModule != u.nodeModule && after.Node(name).NodeModule != u.nodeModule {
				n.NodeModule = u.nodeModule
				after.Nodes[name] = n
			}
		}
	}
	if u.record != nil {
		if err := u.record(p, &after, names); err != nil {
			return after, err
		}
	}
	return after, after.Validate()
}

func (a *app) tellRecorded(u *updateOptions, after project.Settings, names []string, changed bool) {
	if a.json {
		for _, name := range names {
			n := after.Node(name)
			a.document(recordedDocument{"recorded", name, n.NodeModule, n.NixOSVersion, n.TestDir, after.Cluster.UUID,
				list(after.Cluster.ControlNodes), list(after.Cluster.ServiceGroups[name]), u.rebuild})
		}
		return
	}
	if changed {
		a.say("recorded in %s what is new about %s\n", project.SettingsFile, some(names))
	}
	if !u.rebuild {
		a.say("%s can be composed; the next deployment takes it (nix-infra deploy %s)\n", nodes(len(names)), strings.Join(names, " "))
	}
}
