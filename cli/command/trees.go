package command

import (
	"slices"
	"strings"
	"sync"

	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

// treeFlags say how trees are composed, for all that composes some.
type treeFlags struct {
	nodeModule, nixosVersion string
	testDir                  string
	allowUnknownPlaceholders bool
	impure                   bool
	allowMissing             bool
}

func (t *treeFlags) register(f *pflag.FlagSet) {
	f.StringVar(&t.nodeModule, "node-module", "", "node type for all of them, such as node_types/standalone_machine.nix")
	f.StringVar(&t.nixosVersion, "nixos-version", "", "NixOS version for all of them, this time")
	f.StringVar(&t.testDir, "test-dir", "", "`folder` of a test, whose nodes/ takes the place of the project's")
	f.BoolVar(&t.allowUnknownPlaceholders, "allow-unknown-placeholders", false, "leave placeholders that nobody knows as they are")
	f.BoolVar(&t.allowMissing, "allow-missing", false, "leave out secrets that are not in the project, with a warning: a node that has one of before loses it")
	f.BoolVar(&t.impure, "impure", false, "let the evaluation see the environment of the machine that builds")
}

// trees composes what goes to the nodes of a fleet.
type trees struct {
	treeFlags
	project *project.Project
	secrets *vault.Secrets
	known   []project.NodeFacts
	control []string

	once    sync.Once // reads the public keys of binary caches
	trusted []string
	wrong   error
}

func (a *app) newTrees(p *project.Project, f treeFlags, all []protocol.NodeState) *trees {
	return &trees{treeFlags: f, project: p, secrets: a.secretStore(p), known: nodeFacts(all), control: p.ControlNodes()}
}

func (t *trees) of(node string) (*project.Tree, error) { return t.project.Tree(t.request(node)) }

func (t *trees) request(node string) project.TreeRequest {
	return project.TreeRequest{
		Node: node, NodeModule: t.nodeModule, NixOSVersion: t.nixosVersion, TestDir: t.testDir,
		Control: slices.Contains(t.control, node), ControlNodes: pick(t.known, t.control), ClusterUUID: t.project.ClusterUUID(),
		Nodes: t.known, TrustedKeys: t.trustedKeys, AllowUnknownPlaceholders: t.allowUnknownPlaceholders,
	}
}

// trustedKeys are the public keys of binary caches, which the earlier tool kept among the secrets.
func (t *trees) trustedKeys() ([]string, error) {
	t.once.Do(func() { t.trusted, t.wrong = t.readTrustedKeys() })
	return t.trusted, t.wrong
}

func (t *trees) readTrustedKeys() ([]string, error) {
	names, err := t.secrets.Names()
	if err != nil {
		return nil, err
	}
	var keys []string
	for _, name := range names {
		if !strings.HasPrefix(name, project.TrustedKeysPrefix) {
			continue
		}
		key, err := t.secrets.Get(name)
		if err != nil {
			return nil, err
		}
		keys = append(keys, string(key))
	}
	return keys, nil
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
		known[i] = project.NodeFacts{Name: d.Node, IPv4: d.IPv4, OverlayIP: d.OverlayIP, Arch: d.System}
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
