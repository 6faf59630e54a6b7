package command

import (
	"slices"

	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// treeFlags say how trees are composed, for all that composes some.
type treeFlags struct {
	nodeModule, nixosVersion string
	testDir                  string
	allowUnknownPlaceholders bool
	impure                   bool
}

func (t *treeFlags) register(f *pflag.FlagSet) {
	f.StringVar(&t.nodeModule, "node-module", "", "node type for all of them, such as node_types/standalone_machine.nix")
	f.StringVar(&t.nixosVersion, "nixos-version", "", "NixOS version for all of them, this time")
	f.StringVar(&t.testDir, "test-dir", "", "folder of a test whose nodes and app modules come on top")
	f.BoolVar(&t.allowUnknownPlaceholders, "allow-unknown-placeholders", false, "leave placeholders that nobody knows as they are")
	f.BoolVar(&t.impure, "impure", false, "let the evaluation see the environment of the machine that builds")
}

// trees composes what goes to the nodes of a fleet.
type trees struct {
	treeFlags
	project *project.Project
	known   []project.NodeFacts
	control []string
}

func newTrees(p *project.Project, f treeFlags, all []protocol.NodeState) *trees {
	return &trees{f, p, nodeFacts(all), p.ControlNodes()}
}

func (t *trees) of(node string) (*project.Tree, error) {
	return t.project.Tree(project.TreeRequest{
		Node: node, NodeModule: t.nodeModule, NixOSVersion: t.nixosVersion, TestDir: t.testDir,
		Control: slices.Contains(t.control, node), ControlNodes: pick(t.known, t.control), ClusterUUID: t.project.Env.Get("CLUSTER_UUID"),
		Nodes: t.known, AllowUnknownPlaceholders: t.allowUnknownPlaceholders,
	})
}

// source has each node build its tree.
func (t *trees) source(p *plan, m *protocol.Manifest) error {
	tree, err := t.of(m.Node)
	if err != nil {
		return err
	}
	p.addTree(m, tree)
	m.Impure = t.impure
	return nil
}

// nodeFacts are what placeholders may ask of every node of the fleet.
func nodeFacts(all []protocol.NodeState) []project.NodeFacts {
	known := make([]project.NodeFacts, len(all))
	for i := range all {
		d := documentOf(&all[i])
		known[i] = project.NodeFacts{Name: d.Node, IPv4: d.IPv4, Arch: d.System}
	}
	return known
}

// pick gives the facts of the named nodes, in the names' order; of one that nobody knows, the name.
func pick(known []project.NodeFacts, names []string) []project.NodeFacts {
	var some []project.NodeFacts
	for _, name := range names {
		i := slices.IndexFunc(known, func(f project.NodeFacts) bool { return f.Name == name })
		if i < 0 {
			some = append(some, project.NodeFacts{Name: name})
			continue
		}
		some = append(some, known[i])
	}
	return some
}
