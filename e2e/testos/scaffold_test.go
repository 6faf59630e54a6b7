//go:build linux

package testos_test

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/e2e/testos"
	"github.com/nix-infra/nix-infra/examples"
	"github.com/nix-infra/nix-infra/protocol"
)

// scaffold writes a template as a project and says which nodes it has.
func scaffold(t *testing.T, template string) (*project.Project, []string) {
	t.Helper()
	dir := t.TempDir()
	files, err := examples.Files(template)
	must(t, err)
	for _, f := range files {
		path := filepath.Join(dir, filepath.FromSlash(f.Path))
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, f.Data, f.Mode))
	}
	must(t, os.MkdirAll(filepath.Join(dir, "ssh"), 0o700))
	must(t, os.WriteFile(filepath.Join(dir, "ssh/nixinfra.pub"), []byte("ssh-ed25519 AAAA test\n"), 0o644))
	p, err := project.Open(dir, "")
	if err == nil || p == nil {
		t.Fatalf("a template has settings: %v", err)
	}
	p.Env.Process = func(string) string { return "" }
	p.Settings.Fleet = "f"
	p.Settings.ApplyTemplate(template)
	nodes, err := p.NodeFiles()
	must(t, err)
	return p, nodes
}

// TestScaffolds: each node of each template has a tree that is a manifest, all its placeholders are filled in, and, where
// there is Nix, here or on a node, its system evaluates, with the agent in it and with its port of SSH closed.
func TestScaffolds(t *testing.T) {
	e := newEvaluator(t)
	for _, template := range examples.Names {
		p, nodes := scaffold(t, template)
		if len(nodes) == 0 {
			t.Fatalf("%s has no nodes", template)
		}
		for _, node := range append(nodes, "unknown") {
			t.Run(template+"/"+node, func(t *testing.T) {
				system := e.evaluate(t, node, compose(t, p, node, nodes))
				if system == nil {
					return
				}
				if !system.Closed {
					t.Error("the port of SSH is open")
				}
				if controls := slices.Contains(p.ControlNodes(), node); system.Controller != controls {
					t.Errorf("the controller is in its system: %v", system.Controller)
				}
			})
		}
	}
	t.Run("foreign", func(t *testing.T) { testForeign(t, e) })
}

// testForeign: a project that knows nothing of us has the agent in its nodes' systems.
func testForeign(t *testing.T, e *evaluator) {
	p, nodes := scaffold(t, "fleet")
	path := filepath.Join(p.Dir, "configuration.nix")
	text, err := os.ReadFile(path)
	must(t, err)
	foreign := strings.Replace(string(text), " ./nix-infra ", " ", 1)
	foreign = strings.Replace(foreign, "networking.firewall.enable = true;", "networking.firewall.allowedTCPPorts = [ 22 ];", 1)
	must(t, os.WriteFile(path, []byte(foreign), 0o644))
	for _, file := range []string{"modules/default.nix", "app_modules/default.nix", "nodes/node001.nix"} {
		must(t, os.WriteFile(filepath.Join(p.Dir, file), []byte("{ }\n"), 0o644))
	}
	p.Settings.Defaults.CloseSSH = false
	if system := e.evaluate(t, "node001", compose(t, p, "node001", nodes)); system != nil && system.Closed {
		t.Error("the port of SSH is closed, which nobody asked for")
	}
}

// compose is a node's tree, which has to be one that the node would take.
func compose(t *testing.T, p *project.Project, node string, nodes []string) []project.File {
	t.Helper()
	r := project.TreeRequest{Node: node, ClusterUUID: p.ClusterUUID()}
	for i, name := range nodes {
		facts := project.NodeFacts{Name: name, IPv4: fmt.Sprintf("192.0.2.%d", i+1), OverlayIP: fmt.Sprintf("10.10.%d.0", i+1)}
		r.Nodes = append(r.Nodes, facts)
		if slices.Contains(p.ControlNodes(), name) {
			r.ControlNodes = append(r.ControlNodes, facts)
			r.Control = r.Control || name == node
		}
	}
	tree, err := p.Tree(r)
	must(t, err)
	if len(tree.Warnings) > 0 {
		t.Errorf("warnings %q", tree.Warnings)
	}
	m := protocol.Manifest{Version: protocol.Version, Node: node, Serial: 1, Deployment: "d1", Mode: protocol.Switch, Attr: protocol.SystemAttr(node), Timeout: 60, BuildTimeout: 60}
	for _, f := range tree.Files {
		if strings.HasSuffix(f.Path, ".nix") && !strings.Contains(f.Path, "/") && strings.Contains(string(f.Data), "[%%") {
			t.Errorf("%s has a placeholder that was not filled in", f.Path)
		}
		m.Files = append(m.Files, protocol.File{Path: f.Path, SHA256: protocol.Digest(f.Data), Size: int64(len(f.Data))})
	}
	must(t, m.Validate())
	return tree.Files
}

// evaluator evaluates systems with the stand-in of nixpkgs: with the Nix of this machine, or else of a node.
type evaluator struct {
	nix     string    // program; "": the node's
	node    *lab.Node // nil: there is none
	nixpkgs string    // folder
}

func newEvaluator(t *testing.T) *evaluator {
	t.Helper()
	if nix, err := exec.LookPath("nix-instantiate"); err == nil {
		e := &evaluator{nix: nix, nixpkgs: t.TempDir()}
		must(t, testos.WriteNixpkgs(e.nixpkgs))
		return e
	}
	if err := lab.Available(); err != nil {
		if os.Getenv("CI") != "" {
			t.Fatal(err)
		}
		t.Logf("trees are composed, and not evaluated: there is no nix-instantiate here, and no lab, because %v", err)
		return &evaluator{}
	}
	l, err := lab.Open(t.Context(), lab.Options{Name: fmt.Sprintf("t%d-scaffolds", os.Getpid()), Log: t.Output(), OwnerPID: os.Getpid()})
	must(t, err)
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	nodes, err := l.Start(t.Context(), "n1")
	must(t, err)
	return &evaluator{node: nodes[0], nixpkgs: testos.NixpkgsPath}
}

// command is nix-instantiate with an expression that reads dir, which is brought to where it runs.
func (e *evaluator) command(t *testing.T, dir, expression string) *exec.Cmd {
	args := []string{"--eval", "--json", "--strict", "-E", expression}
	if e.node == nil {
		return exec.CommandContext(t.Context(), e.nix, args...)
	}
	files, err := exec.CommandContext(t.Context(), "tar", "-c", "-C", dir, ".").Output()
	must(t, err)
	unpack := e.node.Command(t.Context(), "sh", "-c", `mkdir -p "$1" && tar -x -C "$1"`, "sh", dir)
	unpack.Stdin = bytes.NewReader(files)
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return e.node.Command(t.Context(), append([]string{"nix-instantiate"}, args...)...)
}

// evaluated is what a system has of us.
type evaluated struct {
	System     string
	Agent      string // what its unit runs
	Controller bool
	Closed     bool
	Failed     []string // assertions
}

// evaluate evaluates a node's tree as the node would; nil where there is no Nix. The agent has to be in it.
func (e *evaluator) evaluate(t *testing.T, node string, tree []project.File) *evaluated {
	t.Helper()
	if e.nix == "" && e.node == nil {
		return nil
	}
	dir := t.TempDir()
	hash := "sha256:" + strings.Repeat("0", 52)
	facts := protocol.NodeFacts{Version: protocol.Version, Node: node, System: "x86_64-linux", Agent: &protocol.StoredProgram{Name: "nix-infra-agent", Hash: hash}}
	if strings.HasPrefix(node, "etcd") {
		facts.Controller = &protocol.StoredProgram{Name: "nix-infra-controller", Hash: hash}
	}
	for _, f := range append(tree, project.File{Path: protocol.FactsFile, Data: protocol.Encode(facts)}, project.File{Path: "hardware-configuration.nix", Data: []byte("{ }\n")}) {
		path := filepath.Join(dir, filepath.FromSlash(f.Path))
		must(t, os.MkdirAll(filepath.Dir(path), 0o755))
		must(t, os.WriteFile(path, f.Data, 0o644))
	}
	var problems bytes.Buffer
	cmd := e.command(t, dir, fmt.Sprintf(`
		let
		  nixpkgs = (import %s/flake.nix).outputs { self = nixpkgs; };
		  flake = (import %s/flake.nix).outputs { self = flake; inherit nixpkgs; };
		  config = flake.nixosConfigurations.%q.config;
		in {
		  system = config.system.build.toplevel.drvPath;
		  agent = config.systemd.services.nix-infra-agent.serviceConfig.ExecStart;
		  controller = config.systemd.services ? nix-infra-controller;
		  closed = config.services.nix-infra-agent.closeSSH && !config.services.openssh.openFirewall;
		  failed = map (a: a.message) (builtins.filter (a: !a.assertion) config.assertions);
		}`, e.nixpkgs, dir, node))
	cmd.Stderr = &problems
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s", err, problems.Bytes())
	}
	var system evaluated
	must(t, json.Unmarshal(out, &system))
	if len(system.Failed) > 0 {
		t.Errorf("failed assertions: %q", system.Failed)
	}
	if !strings.HasSuffix(system.Agent, "-nix-infra-agent/bin/nix-infra-agent run") || !strings.HasSuffix(system.System, ".drv") {
		t.Errorf("%+v", system)
	}
	return &system
}
