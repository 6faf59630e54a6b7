package command

import (
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// olderProject is a project in the shape of the earlier tool's templates, cluster and fleet in one, with a fleet that runs.
func olderProject(t *testing.T) (*shell, *fleettest.Fleet) {
	s, f := newFleet(t)
	s.write("flake.nix", "# [%%nixVersion%%]\n")
	s.write("configuration.nix", "# stateVersion = \"[%%nixVersion%%]\"\n")
	for _, module := range []string{"cluster_node", "standalone_machine", "control_node"} {
		s.write("node_types/"+module+".nix", "# "+module+"\n")
	}
	s.write("node_types/mesh_node.nix", "# mesh [%%etcdCluster%%]\n")
	s.write("node_types/control_node.nix", "# control [%%etcdClusterToken%%] [%%etcdCluster%%]\n")
	s.write("__test__/shop/nodes/web1.nix", "# web1 under test\n")
	s.write("old.env", "SECRETS_PWD='correct horse'\n")
	for _, name := range []string{"web1", "web2", "db1", "etcd1"} {
		f.Add(name)
		if name == "db1" {
			f.Change(name, func(n *protocol.NodeState) { n.IPv4 = "192.0.2.8" })
		}
	}
	return s, f
}

func (s *shell) settings() project.Settings {
	s.t.Helper()
	p, err := project.Open(s.dir, "")
	if err != nil {
		s.t.Fatal(err)
	}
	return p.Settings
}

// deployed is what the deployments since the last time were to, one after the other: "web1+web2 db1".
func deployed(f *fleettest.Fleet, seen *int) string {
	var all []string
	list := f.Deployments()
	for _, d := range list[:len(list)-*seen] { // the newest come first
		all = append(all, strings.Join(slices.Sorted(maps.Keys(d.Nodes)), "+"))
	}
	*seen = len(list)
	slices.Reverse(all)
	return strings.Join(all, " ")
}

// TestOlderDeployments makes the calls of the earlier tool that bring files to nodes, word by word and in several spellings,
// and looks at what was recorded, who was deployed to, and what they got.
func TestOlderDeployments(t *testing.T) {
	s, f := olderProject(t)
	w, e := "-d="+s.dir, "--env=old.env"
	absolute := s.path("__test__", "shop")
	seen := 0
	for _, c := range []struct {
		args     []string
		deployed string            // whom to
		has      map[string]string // file of web1, and its text
		recorded string            // node module, NixOS version and test folder of web1
		cluster  string            // id, control nodes, and service groups of web1
	}{
		// C22: FM's `cli update`, and other spellings of it
		{args: []string{"fleet", "update", "-d", s.dir, e, "--batch", "--nixos-version=25.11", "--target=web1  web2", "--node-module=node_types/standalone_machine.nix", "--no-rebuild"},
			recorded: "node_types/standalone_machine.nix 25.11 "},
		{args: []string{"fleet", "update", w, e, "--batch", "--ssh-key=k", "--debug", "--target", "web1", "--node-module", "cluster_node", "--nixos-version", "25.11", "--rebuild"},
			deployed: "web1", recorded: "cluster_node 25.11 ", has: map[string]string{"cluster_node.nix": "# cluster_node\n", "flake.nix": "# 25.11\n"}},
		{args: []string{"fleet", "--ssh-key=k", "update", "web1", "web2", "-d", s.dir, "--batch", e, "--node-module=standalone_machine"},
			deployed: "web1+web2", recorded: "standalone_machine 25.11 ", has: map[string]string{"cluster_node.nix": "# standalone_machine\n"}},
		{args: []string{"update", "--batch", "--ssh-key", "k", "web1", e, "--rebuild", "--no-rebuild", "--node-module=cluster_node"}, recorded: "cluster_node 25.11 "},
		{args: []string{"update", "web1", "--no-rebuild=false", e}, deployed: "web1", recorded: "cluster_node 25.11 "},
		// C8 and C23
		{args: []string{"fleet", "deploy-apps", "-d", s.dir, "--batch", e, "--debug", "--test-dir=" + absolute, "--target=web1"},
			deployed: "web1", recorded: "cluster_node 25.11 __test__/shop", has: map[string]string{"web1.nix": "# web1 under test\n"}},
		{args: []string{"fleet", "cmd", "-d", s.dir, e, "--target=web1", "nixos-rebuild switch --fast"},
			deployed: "web1", recorded: "cluster_node 25.11 __test__/shop", has: map[string]string{"web1.nix": "# web1 under test\n"}},
		{args: []string{"fleet", "deploy-apps", w, "--no-rebuild", "--batch", e, "--target= web1 "}, recorded: "cluster_node 25.11 "},
		{args: []string{"fleet", "cmd", w, e, "--target=web1 web2", "nixos-rebuild", "switch"}, deployed: "web1+web2", recorded: "cluster_node 25.11 ",
			has: map[string]string{"web1.nix": s.read("nodes/web1.nix")}},
		{args: []string{"cluster", "deploy-apps", "-d", s.dir, "--batch", e, "--test-dir=__test__/shop", "--target=web1"}, recorded: "cluster_node 25.11 __test__/shop"},
		{args: []string{"cluster", "cmd", "-d", s.dir, e, "--target=web1", " nixos-rebuild switch --fast --impure"}, deployed: "web1", recorded: "cluster_node 25.11 __test__/shop",
			has: map[string]string{"web1.nix": "# web1 under test\n"}},
		{args: []string{"cluster", "deploy-apps", "--target", "web1", "--rebuild", e}, deployed: "web1", recorded: "cluster_node 25.11 "},
		{args: []string{"deploy-apps", "web1", e, "--batch"}, deployed: "web1", recorded: "cluster_node 25.11 "},
		// C5, C6 and C7
		{args: []string{"cluster", "init-ctrl", "-d", s.dir, "--batch", e, "--nixos-version=25.11", "--cluster-uuid=d9e2", "--target=etcd1"}, deployed: "etcd1", recorded: "cluster_node 25.11 ",
			cluster: "d9e2 [etcd1] []"},
		{args: []string{"cluster", "init-ctrl", "db1", "--nixos-version", "25.11", "--no-rebuild", e}, recorded: "cluster_node 25.11 ", cluster: "d9e2 [etcd1 db1] []"},
		{args: []string{"cluster", "update-ctrl", w, "--batch", e, "--nixos-version=25.11", "--cluster-uuid", "d9e2", "--target=db1  etcd1", "--rebuild"}, deployed: "db1+etcd1",
			recorded: "cluster_node 25.11 ", cluster: "d9e2 [etcd1 db1] []"},
		{args: []string{"cluster", "update-ctrl", "etcd1", e}, recorded: "cluster_node 25.11 ", cluster: "d9e2 [etcd1 db1] []"},
		{args: []string{"cluster", "init-node", "-d", s.dir, "--batch", e, "--nixos-version=25.11", "--target=web1 web2", "--node-module=node_types/mesh_node.nix", "--service-group=services  backends",
			"--ctrl-nodes=etcd1"}, deployed: "web1+web2", recorded: "node_types/mesh_node.nix 25.11 ", cluster: "d9e2 [etcd1 db1] [services backends]",
			has: map[string]string{"cluster_node.nix": `# mesh { name = "etcd1"; ip = "192.0.2.7"; } { name = "db1"; ip = "192.0.2.8"; }` + "\n"}},
		{args: []string{"cluster", "init-node", w, e, "--target=web1", "--node-module=cluster_node", "--service-group=", "--ctrl-nodes", "db1 etcd1", "--no-rebuild"},
			recorded: "cluster_node 25.11 ", cluster: "d9e2 [etcd1 db1] []"},
		{args: []string{"cluster", "update-node", "-d", s.dir, "--batch", e, "--nixos-version=25.11", "--node-module=node_types/mesh_node.nix", "--ctrl-nodes=etcd1", "--target=web1"},
			recorded: "node_types/mesh_node.nix 25.11 ", cluster: "d9e2 [etcd1 db1] []"},
		{args: []string{"cluster", "update-node", "--target=web1", e, "--rebuild", "--ssh-key", "k"}, deployed: "web1", recorded: "node_types/mesh_node.nix 25.11 ", cluster: "d9e2 [etcd1 db1] []"},
		{args: []string{"update-node", "web1", "--service-group", "backends", e}, deployed: "web1", recorded: "node_types/mesh_node.nix 25.11 ", cluster: "d9e2 [etcd1 db1] [backends]"},
	} {
		t.Run(strings.ReplaceAll(strings.Join(c.args, " "), s.dir, "DIR"), func(t *testing.T) {
			s.t = t
			s.must(c.args...)
			if got := deployed(f, &seen); got != c.deployed {
				t.Errorf("deployed to %q, want %q", got, c.deployed)
			}
			settings := s.settings()
			n := settings.Node("web1")
			if got := fmt.Sprint(n.NodeModule, " ", n.NixOSVersion, " ", n.TestDir); got != c.recorded {
				t.Errorf("recorded %q, want %q", got, c.recorded)
			}
			if got := fmt.Sprint(settings.Cluster.UUID, " ", settings.Cluster.ControlNodes, " ", settings.Cluster.ServiceGroups["web1"]); c.cluster != "" && got != c.cluster {
				t.Errorf("recorded of the cluster %q, want %q", got, c.cluster)
			}
			if c.deployed == "" {
				return
			}
			tree := f.Tree("web1")
			for path, want := range c.has {
				if tree[path] != want {
					t.Errorf("web1 has the %s %q, want %q", path, tree[path], want)
				}
			}
		})
	}
	s.t = t
	if got := f.Tree("etcd1")["control_node.nix"]; got != `# control d9e2 { name = "etcd1"; ip = "192.0.2.7"; } { name = "db1"; ip = "192.0.2.8"; }`+"\n" {
		t.Errorf("etcd1's control_node.nix: %q", got)
	}
	if m := f.Manifest("etcd1"); !m.Impure {
		t.Error("a control node is built without --impure")
	}
}

// What is refused changes nothing: neither the settings nor any node.
func TestOlderDeploymentsRefused(t *testing.T) {
	s, f := olderProject(t)
	s.write("wrong.env", "SECRETS_PASS='correct horse'\nCTRL_NODES=web1\n")
	node := func(more ...string) []string {
		return append([]string{"cluster", "update-node", "--batch", "--target=web1", "--node-module=cluster_node"}, more...)
	}
	s.expect(Refused, "no control nodes are recorded in nix-infra.yaml: nix-infra init-ctrl makes some", node("--ctrl-nodes=etcd1")...)
	s.expect(Refused, "which cluster is it? Give it an id: --cluster-uuid", "cluster", "init-ctrl", "etcd1")
	s.must("cluster", "update-ctrl", "--target=etcd1", "--cluster-uuid=d9e2", "--nixos-version=25.11") // one that is there already
	before, deployments := s.read("nix-infra.yaml"), len(f.Deployments())
	for _, c := range []struct {
		says string
		args []string
	}{
		{"web1: no control node of this cluster; those in nix-infra.yaml (cluster.control_nodes) are etcd1", node("--ctrl-nodes=web1")},
		{"web2: no control node", node("--ctrl-nodes=etcd1  web2")},
		{"--ctrl-nodes or CTRL_NODES: web1: no control node", node("--env=wrong.env")},
		{"web1: no control node of this cluster; those in nix-infra.yaml (cluster.control_nodes) are etcd1; nix-infra init-ctrl adds one", []string{"cluster", "update-ctrl", "web1"}},
		{"can't change to another", []string{"cluster", "init-ctrl", "web1", "--cluster-uuid=other"}},
		{"is no name of a service group", node("--service-group=a/b")},
		{"node module nope does not exist", []string{"fleet", "update", "web1", "--node-module=nope"}},
		{"no path below the project", []string{"fleet", "update", "web1", "--node-module=../x.nix"}},
		{"is no NixOS version", []string{"fleet", "update", "web1", "--nixos-version=a b"}},
		{"test folder __test__/nope does not exist", []string{"fleet", "deploy-apps", "--target=web1", "--test-dir=__test__/nope"}},
		{"target web9 matches no node", []string{"fleet", "deploy-apps", "--target=web1 web9"}},
		{"update which nodes?", []string{"fleet", "update", "--target= "}},
		{`invalid argument "x" for "--no-rebuild"`, []string{"fleet", "update", "web1", "--no-rebuild=x"}},
		{`unknown command "update" for "nix-infra cluster"`, []string{"cluster", "update", "web1"}},
		{`unknown command "init-node" for "nix-infra fleet"`, []string{"fleet", "init-node", "web1"}},
		{"unknown flag: --service-group", []string{"fleet", "update", "web1", "--service-group=x"}},
	} {
		s.expect(Refused, c.says, c.args...)
		if s.read("nix-infra.yaml") != before || len(f.Deployments()) != deployments {
			t.Errorf("%q: something was changed all the same", c.args)
			before, deployments = s.read("nix-infra.yaml"), len(f.Deployments())
		}
	}
}

// The release with which a machine was new stays, also where an older call brings another one.
func TestUpdateKeepsStateVersion(t *testing.T) {
	s, f := olderProject(t)
	f.Change("web1", func(n *protocol.NodeState) { n.Beat.NixOS = "25.05.20260101.abc" })
	s.must("fleet", "update", "--target=web1", "--nixos-version=25.05", "--node-module=cluster_node")
	s.must("fleet", "update", "--target=web1", "--nixos-version=25.11")
	if tree := f.Tree("web1"); tree["flake.nix"] != "# 25.11\n" || tree["configuration.nix"] != "# stateVersion = \"25.05\"\n" {
		t.Errorf("%q %q", tree["flake.nix"], tree["configuration.nix"])
	}
	s.expect(Refused, "was new with NixOS 25.05", "fleet", "update", "--target=web1", "--nixos-version=24.11")
}

// TestRecordedAtOnce: what the scripts' several calls at once record is all there afterwards.
func TestRecordedAtOnce(t *testing.T) {
	s, _ := olderProject(t)
	s.must("cluster", "init-ctrl", "etcd1", "--cluster-uuid=d9e2", "--nixos-version=25.11")
	var calls sync.WaitGroup
	for _, node := range []string{"web1", "web2", "db1", "etcd1"} {
		calls.Go(func() {
			if r := s.run("cluster", "init-node", "--target="+node, "--service-group=of-"+node, "--node-module=mesh_node", "--ctrl-nodes=etcd1", "--nixos-version=25.11"); r.status != OK {
				t.Errorf("%+v", r)
			}
		})
	}
	calls.Wait()
	settings := s.settings()
	for _, node := range []string{"web1", "web2", "db1", "etcd1"} {
		if groups := settings.Cluster.ServiceGroups[node]; len(groups) != 1 || groups[0] != "of-"+node || settings.Node(node).NodeModule != "mesh_node" {
			t.Errorf("of %s is recorded: %v %q", node, groups, settings.Node(node).NodeModule)
		}
	}
}

// A test's folder that is given as seen from the current folder is found again from anywhere.
func TestRecordedTestFolder(t *testing.T) {
	project, elsewhere := t.TempDir(), t.TempDir()
	for _, dir := range []string{filepath.Join(project, "a/nodes"), filepath.Join(elsewhere, "b/nodes")} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	t.Chdir(elsewhere)
	for given, want := range map[string]string{
		"": "", "a": "a", "b": filepath.Join(elsewhere, "b"), "nowhere": "nowhere",
		filepath.Join(project, "a"): "a", filepath.Join(elsewhere, "b"): filepath.Join(elsewhere, "b"),
	} {
		if got := belowProject(project, given); got != want {
			t.Errorf("%q is recorded as %q, want %q", given, got, want)
		}
	}
	t.Chdir(filepath.Dir(project))
	if got := belowProject(project, filepath.Join(filepath.Base(project), "a")); got != "a" {
		t.Errorf("a folder below the project, seen from beside it, is recorded as %q", got)
	}
}

func TestRecordedJSON(t *testing.T) {
	s, _ := olderProject(t)
	s.must("cluster", "init-ctrl", "etcd1", "--cluster-uuid=d9e2", "--nixos-version=25.11")
	docs := documents(t, s.must("cluster", "update-node", "web1", "web2", "--node-module=mesh_node", "--service-group=backends", "--nixos-version=25.11", "--json"))
	want := `map[cluster_uuid:d9e2 control_nodes:[etcd1] deployed:false event:recorded nixos_version:25.11 node:web1 node_module:mesh_node service_groups:[backends] test_dir:]`
	if len(docs) != 2 || fmt.Sprint(docs[0]) != want || docs[1]["node"] != "web2" {
		t.Errorf("%v", docs)
	}
}

// Only what is nothing but a rebuild is taken for one: a text with more in it is run as it stands.
func TestParseRebuild(t *testing.T) {
	for text, want := range map[string]string{
		"nixos-rebuild switch":                        "false false",
		"  nixos-rebuild   switch --fast\n":           "false false",
		"nixos-rebuild switch --impure --fast":        "true false",
		"nixos-rebuild switch --rollback":             "false true",
		"nixos-rebuild boot":                          "",
		"nixos-rebuild":                               "",
		"nixos-rebuild switch --flake /x":             "",
		"nixos-rebuild switch --fast; reboot":         "",
		"nixos-rebuild switch --fast && x":            "",
		"nixos-rebuild switch $(id)":                  "",
		"echo nixos-rebuild switch":                   "",
		"nixos-rebuild switch --upgrade":              "",
		"nixos-rebuild --fast switch":                 "",
		"sudo nixos-rebuild switch --fast":            "",
		"nixos-rebuild switch --fast | tail -n 1":     "",
		"nixos-rebuild switch --fast --impure --fast": "true false",
	} {
		got := ""
		if r, ok := parseRebuild(text); ok {
			got = fmt.Sprint(r.impure, r.back)
		}
		if got != want {
			t.Errorf("%q: %q, want %q", text, got, want)
		}
	}
}

// C24: the rollback in the words of the templates' scripts.
func TestOlderRollback(t *testing.T) {
	s, f := olderProject(t)
	r := s.run("fleet", "cmd", "--target=web1 web2", "nixos-rebuild switch --rollback")
	if r.status != OK || !strings.Contains(r.stderr, "nix-infra rollback here") {
		t.Errorf("%+v", r)
	}
	if m := f.Manifest("web2"); m == nil || m.Rollback == nil || len(m.Files) != 0 {
		t.Errorf("manifest %+v", m)
	}
}

// TestForeignProjects: folders of the earlier tool's three shapes open as they are. init adds what is ours, and leaves every
// byte of theirs alone; what they deploy is composed from their files.
func TestForeignProjects(t *testing.T) {
	t.Parallel()
	for _, c := range []struct {
		shape, node, env string
		init             []string
		has              map[string]string // of the node's tree, and a part of its text
	}{
		{"ha", "worker001", "SECRETS_PWD='correct horse'\nSSH_KEY=nixinfra\nSSH_EMAIL=me@example.org\nCA_PASS=x\nINTERMEDIATE_CA_PASS=y\n",
			[]string{"init", "-d", "DIR", "--env=DIR/.env", "--batch"}, map[string]string{"worker001.nix": "", "modules/sub/etcd.nix": "", "app_modules/shop/action.sh": ""}},
		{"fm", "node001", "SECRETS_PWD='correct horse'\nSSH_KEY=nixinfra-machine\n",
			[]string{"init", "-d", "DIR", "--no-cert-auth", "--batch"}, map[string]string{"node001.nix": "", "app_modules/_unstable/crowdsec/default.nix": ""}},
		{"nt", "registry001", "SECRETS_PASS='correct horse'\n", []string{"init", "-d=DIR", "--batch"}, map[string]string{"registry001.nix": ""}},
	} {
		t.Run(c.shape, func(t *testing.T) {
			s := newShell(t)
			delete(s.env, "SECRETS_PASS")
			if err := os.CopyFS(s.dir, os.DirFS("../project/testdata/"+c.shape)); err != nil {
				t.Fatal(err)
			}
			if err := os.Remove(s.path("nix-infra.yaml")); err != nil { // theirs has none
				t.Fatal(err)
			}
			s.write(".env", c.env)
			s.write(".gitignore", ".env\nsecrets/*\nssh/*\nca/*\n")
			s.write("ca/index.txt", "V\n")
			s.write("secrets/old.token", "cGxhaW4K\n") // as the earlier tool left it: no encryption at all
			before := s.snapshot()
			args := slices.Clone(c.init)
			for i := range args {
				args[i] = strings.ReplaceAll(args[i], "DIR", s.dir)
			}
			s.must(args...)
			after := s.snapshot()
			for path, digest := range before {
				if after[path] != digest {
					t.Errorf("init changed %s", path)
				}
				delete(after, path)
			}
			for path := range after {
				if rel := strings.TrimPrefix(path, s.dir+"/"); rel != "nix-infra.yaml" && !strings.HasPrefix(rel, "nix-infra/") && !strings.HasPrefix(rel, "ssh/") {
					t.Errorf("init made %s", rel)
				}
			}
			again := s.must(args...)
			if strings.Contains(again, "made") {
				t.Errorf("the second time it made something:\n%s", again)
			}
			p, err := project.Open(s.dir, "")
			if err != nil {
				t.Fatal(err)
			}
			control := []project.NodeFacts{{Name: "etcd001", IPv4: "192.0.2.1"}}
			if c.shape == "fm" {
				control = nil
			}
			trusted := func() ([]string, error) { return nil, nil }
			tree, err := p.Tree(project.TreeRequest{Node: c.node, NixOSVersion: "25.05", ControlNodes: control, TrustedKeys: trusted,
				Nodes: []project.NodeFacts{{Name: c.node, IPv4: "192.0.2.9", OverlayIP: "10.10.1.0"}, {Name: "service001", IPv4: "192.0.2.8", OverlayIP: "10.10.2.0"}, {Name: "registry001", IPv4: "192.0.2.7", OverlayIP: "10.10.3.0"}}})
			if err != nil {
				t.Fatal(err)
			}
			files := map[string]string{}
			for _, f := range tree.Files {
				files[f.Path] = string(f.Data)
			}
			for path := range c.has {
				if _, ok := files[path]; !ok {
					t.Errorf("%s is not in the tree of %s", path, c.node)
				}
			}
			if value, err := s.secretStoreOf("correct horse").Get("old.token"); err != nil || string(value) != "plain" {
				t.Errorf("the legacy secret reads %q, %v", value, err)
			}
		})
	}
}
