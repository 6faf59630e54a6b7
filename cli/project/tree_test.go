package project

import (
	"flag"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"

	nixosmodule "github.com/nix-infra/nix-infra/nixos-module"
	"github.com/nix-infra/nix-infra/protocol"
)

var update = flag.Bool("update", false, "write the golden files anew")

func openFixture(t testing.TB, dir string) *Project {
	t.Helper()
	p, err := Open(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	p.Env.Process = func(string) string { return "" }
	return p
}

var control = []NodeFacts{{Name: "etcd001"}, {Name: "etcd002", IPv4: "192.0.2.2"}}

// TestGolden renders projects of the three shapes that exist, and compares file sets, paths, modes and
// every byte.
func TestGolden(t *testing.T) {
	overlay := []NodeFacts{{Name: "worker001", OverlayIP: "10.10.21.0"}, {Name: "service001", IPv4: "203.0.113.9", OverlayIP: "10.10.11.0"}}
	for name, c := range map[string]struct {
		dir string
		r   TreeRequest
	}{
		"ha-worker":  {"ha", TreeRequest{Node: "worker001", ControlNodes: control, Nodes: overlay, TrustedKeys: trusted}},
		"ha-control": {"ha", TreeRequest{Node: "etcd001", Control: true, ControlNodes: control, ClusterUUID: "d9e2-42"}},
		"ha-test":    {"ha", TreeRequest{Node: "worker001", ControlNodes: control, TestDir: "__test__/mesh", NixOSVersion: "24.11"}},
		"fm":         {"fm", TreeRequest{Node: "node001"}},
		"fm-other":   {"fm", TreeRequest{Node: "node002", NodeModule: "node_types/standalone_machine.nix", NixOSVersion: "25.05"}},
		"nt-registry": {"nt", TreeRequest{Node: "registry001", NodeModule: "cluster_node.nix", NixOSVersion: "24.05",
			ControlNodes: []NodeFacts{{Name: "etcd001", IPv4: "192.0.2.1"}}}},
	} {
		t.Run(name, func(t *testing.T) {
			p := openFixture(t, filepath.Join("testdata", c.dir))
			tree, err := p.Tree(c.r)
			if err != nil {
				t.Fatal(err)
			}
			secrets, err := p.Secrets(c.r.Node, c.r.TestDir)
			if err != nil {
				t.Fatal(err)
			}
			got := printed(tree, secrets)
			golden := filepath.Join("testdata", "golden", name+".txt")
			if *update {
				if err := os.WriteFile(golden, []byte(got), 0o644); err != nil {
					t.Fatal(err)
				}
			}
			want, err := os.ReadFile(golden)
			if err != nil {
				t.Fatal(err)
			}
			if got != string(want) {
				t.Errorf("the tree differs from %s; look at `go test -run Golden -update` and git diff\n%s", golden, got)
			}
			validManifest(t, c.r.Node, tree)
		})
	}
}

func trusted() ([]string, error) { return []string{"cache.example.org-1:c2VjcmV0+/=\n"}, nil }

func printed(tree *Tree, secrets []SecretUse) string {
	var b strings.Builder
	all, preBuild := []string{}, []string{}
	for _, s := range secrets {
		if all = append(all, s.Name); s.PreBuild {
			preBuild = append(preBuild, s.Name)
		}
	}
	fmt.Fprintf(&b, "secrets %q\npre-build %q\nwarnings %q\n", all, preBuild, tree.Warnings)
	for _, f := range tree.Files {
		if name, ok := strings.CutPrefix(f.Path, "nix-infra/"); ok && nixosmodule.Injected[name] != nil {
			continue // TestAgentModule compares them
		}
		fmt.Fprintf(&b, "== %s %o\n%s", f.Path, f.Mode, f.Data)
	}
	return b.String()
}

// validManifest checks that a tree is one that a node would take.
func validManifest(t *testing.T, node string, tree *Tree) {
	t.Helper()
	m := protocol.Manifest{Version: protocol.Version, Node: node, Serial: 1, Deployment: "d1", Mode: protocol.Switch, Attr: protocol.SystemAttr(node), Timeout: 60, BuildTimeout: 60}
	for _, f := range tree.Files {
		m.Files = append(m.Files, protocol.File{Path: f.Path, SHA256: protocol.Digest(f.Data), Size: int64(len(f.Data)), Exec: f.Mode&0o100 != 0})
	}
	if err := m.Validate(); err != nil {
		t.Error(err)
	}
}

// small writes a project of the least files, with others over them; "" removes one.
func small(t testing.TB, files map[string]string) *Project {
	t.Helper()
	dir := t.TempDir()
	all := map[string]string{
		"configuration.nix": "{ }\n", "flake.nix": "{ }\n", "modules/default.nix": "{ }\n",
		SettingsFile: "fleet: f\ncontrollers: []\nnodes: { n1: { ipv4: 192.0.2.1 }, n2: { } }\n",
	}
	for name, text := range files {
		all[name] = text
	}
	for name, text := range all {
		if text == "" {
			continue
		}
		file := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return openFixture(t, dir)
}

// failsWith checks an error line by line: each of want is in a line of its own, in any order.
func failsWith(t *testing.T, err error, want ...string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want %q", want)
	}
	lines := strings.Split(err.Error(), "\n")
	if len(lines) != len(want) {
		t.Errorf("%d lines, want %d:\n%v", len(lines), len(want), err)
	}
	for _, w := range want {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("no line has %q:\n%v", w, err)
		}
	}
}

func TestTreeErrors(t *testing.T) {
	for name, c := range map[string]struct {
		files map[string]string
		r     TreeRequest
		want  []string
	}{
		"missing files": {map[string]string{"configuration.nix": "", "flake.nix": "", "modules/default.nix": ""}, TreeRequest{},
			[]string{"configuration.nix is missing in", "flake.nix is missing in", "modules/ is missing in"}},
		"a file for a folder": {map[string]string{"modules/default.nix": "", "modules": "x"}, TreeRequest{}, []string{"modules: a file stands"}},
		"a folder for a file": {map[string]string{"flake.nix": "", "flake.nix/x": "x"}, TreeRequest{}, []string{"flake.nix: a folder stands"}},
		"unknown": {map[string]string{"nodes/n1.nix": "{\n\n[%%localhost.ipv%%]\n}"}, TreeRequest{},
			[]string{"nodes/n1.nix:3: unknown placeholder [%%localhost.ipv%%]: nothing is filled in under this name; did you mean localhost.ipv4?"}},
		"unknown, not near": {map[string]string{"nodes/n1.nix": "[%%$(hostname)%%]"}, TreeRequest{},
			[]string{"nodes/n1.nix:1: unknown placeholder [%%$(hostname)%%]: nothing is filled in under this name; the names: localhost.hostname"}},
		"all together": {map[string]string{"nodes/n1.nix": "[%%a%%] [%%b%%]\n[%%c%%]", "configuration.nix": "[%%d%%]"}, TreeRequest{},
			[]string{"configuration.nix:1: ", "[%%a%%]", "[%%b%%]", "nodes/n1.nix:2: "}},
		"elsewhere":         {map[string]string{"nodes/n1.nix": "[%%nodeName%%]"}, TreeRequest{}, []string{"it is filled in in configuration.nix and flake.nix only"}},
		"secret elsewhere":  {map[string]string{"configuration.nix": "[%%secrets/a%%]"}, TreeRequest{}, []string{"it is filled in in nodes/*.nix only"}},
		"address elsewhere": {map[string]string{"flake.nix": "[%%n1.ipv4%%]"}, TreeRequest{}, []string{"it is filled in in nodes/*.nix only"}},
		"unknown node":      {map[string]string{"nodes/n1.nix": "[%%db9.ipv4%%]"}, TreeRequest{}, []string{"no node db9 is known; the nodes: n1, n2"}},
		"near node":         {map[string]string{"nodes/n1.nix": "[%%n3.overlayIp%%]"}, TreeRequest{}, []string{"no node n3 is known; did you mean n1?"}},
		"no address":        {map[string]string{"nodes/n1.nix": "[%%n2.ipv4%%]"}, TreeRequest{}, []string{"the IPv4 address of n2 is not known"}},
		"no overlay":        {map[string]string{"nodes/n1.nix": "[%%localhost.overlayIp%%]"}, TreeRequest{}, []string{"the overlay address of n1 is not known: its agent tells it once"}},
		"bad address":       {map[string]string{"nodes/n1.nix": "[%%n2.ipv4%%]"}, TreeRequest{Nodes: []NodeFacts{{Name: "n2", IPv4: `1"; x = "`}}}, []string{"is no IPv4 address"}},
		"no version":        {map[string]string{"flake.nix": "[%%nixVersion%%]"}, TreeRequest{}, []string{"no NixOS version is known"}},
		"no ssh key":        {map[string]string{"configuration.nix": "[%%sshKey%%]"}, TreeRequest{}, []string{"ssh/nixinfra.pub is missing"}},
		"two ssh keys":      {map[string]string{"configuration.nix": "[%%sshKey%%]", "ssh/nixinfra.pub": "a\nb\n"}, TreeRequest{}, []string{"not one line"}},
		"a sly ssh key":     {map[string]string{"configuration.nix": "[%%sshKey%%]", "ssh/nixinfra.pub": "a ${b}\n"}, TreeRequest{}, []string{"break out"}},
		"no secret":         {map[string]string{"nodes/n1.nix": "[%%secrets/a/%%]\n[%%secrets/%%]\n[%%pre-build-secrets/..%%]"}, TreeRequest{}, []string{":1: ", ":2: ", ":3: "}},
		"no token":          {map[string]string{"node_types/control_node.nix": "[%%etcdClusterToken%%] [%%etcdCluster%%]"}, TreeRequest{Control: true}, []string{"no cluster id is known; nix-infra init-ctrl records it", "no control nodes are known"}},
		"no control node":   {nil, TreeRequest{Control: true}, []string{"node_types/control_node.nix is missing"}},
		"bad control node":  {map[string]string{"node_types/a.nix": "[%%etcdCluster%%]"}, TreeRequest{NodeModule: "a", ControlNodes: []NodeFacts{{Name: `e"`, IPv4: "192.0.2.1"}}}, []string{"not a valid name"}},
		"no module":         {map[string]string{"node_types/cluster_node.nix": "x"}, TreeRequest{NodeModule: "cluster-node"}, []string{"node module cluster-node does not exist; did you mean cluster_node?"}},
		"module outside":    {nil, TreeRequest{NodeModule: "../x.nix"}, []string{"no path below the project"}},
		"no test folder":    {nil, TreeRequest{TestDir: "__test__/a"}, []string{"test folder __test__/a does not exist"}},
		"a bad name":        {nil, TreeRequest{Node: "N1"}, []string{"not a valid name"}},
		"a taken name":      {nil, TreeRequest{Node: "networking"}, []string{"would stand in the way"}},
		"a key not trusted": {map[string]string{"nodes/n1.nix": "[%%nix-store.trusted-public-keys%%]"}, TreeRequest{TrustedKeys: func() ([]string, error) { return []string{`a:b" evil`}, nil }}, []string{"no public key"}},
		"keys in secrets":   {map[string]string{"nodes/n1.nix": "[%%nix-store.trusted-public-keys%%]", "secrets/nix-store.trusted-public-keys-a": "x"}, TreeRequest{}, []string{"does not read secrets"}},
		"bad servers":       {map[string]string{"servers.yaml": "servers:\n  a: {}\n"}, TreeRequest{}, []string{"servers.yaml:2: a: ip is missing", "ssh_key is missing"}},
		"too large":         {map[string]string{"modules/big": strings.Repeat("x", protocol.MaxFileSize+1)}, TreeRequest{}, []string{"modules/big: 16 MiB are too many"}},
		"an odd name":       {map[string]string{"modules/a\nb": "x"}, TreeRequest{}, []string{`"modules/a\nb": a file can't be deployed under this name`}},
		"terminal escapes":  {map[string]string{"nodes/n1.nix": "[%%\x1b[2J%%]"}, TreeRequest{}, []string{`[%%"\x1b[2J"%%]`}},
	} {
		t.Run(name, func(t *testing.T) {
			c.r.Node = firstOf(c.r.Node, "n1")
			_, err := small(t, c.files).Tree(c.r)
			failsWith(t, err, c.want...)
		})
	}
}

func TestTreeAllows(t *testing.T) {
	p := small(t, map[string]string{
		"nodes/n1.nix":    "[%%what%%]\n[%%secrets/a%%] [%%secrets/x/b%%] [%%secrets/a%%] [%%pre-build-secrets/c%%] [%%nix-store.trusted-public-keys%%]",
		"modules/.git/x":  "x",
		"modules/.a.swp":  "x",
		"modules/.#a":     "x",
		"modules/#a#":     "x",
		"modules/a~":      "x",
		"modules/b/x.nix": "x",
	})
	tree, err := p.Tree(TreeRequest{Node: "n1", AllowUnknownPlaceholders: true})
	if err != nil {
		t.Fatal(err)
	}
	want := "[%%what%%]\na b a c [ ]"
	if got := string(tree.Files[4].Data); tree.Files[4].Path != "n1.nix" || got != want {
		t.Errorf("%s: %q", tree.Files[4].Path, got)
	}
	secrets, err := p.Secrets("n1", "")
	if want := []SecretUse{{"a", false, "nodes/n1.nix:2"}, {"b", false, "nodes/n1.nix:2"}, {"c", true, "nodes/n1.nix:2"}}; err != nil || !reflect.DeepEqual(secrets, want) {
		t.Errorf("secrets %v, %v", secrets, err)
	}
	if len(tree.Warnings) != 1 || !strings.HasPrefix(tree.Warnings[0], "nodes/n1.nix:1: unknown placeholder [%%what%%] left in place") {
		t.Errorf("warnings %q", tree.Warnings)
	}
	var paths []string
	for _, f := range tree.Files {
		paths = append(paths, f.Path)
	}
	if got := strings.Join(paths, " "); got != "configuration.nix flake.nix modules/b/x.nix modules/default.nix n1.nix" {
		t.Errorf("files %s", got)
	}
	other, err := p.Tree(TreeRequest{Node: "n2"})
	if err != nil || len(other.Files) != 4 {
		t.Errorf("a node without a file of its own: %v, %v", other, err)
	}
}

func TestLinksAndSpecialFiles(t *testing.T) {
	outside := t.TempDir()
	if err := os.WriteFile(filepath.Join(outside, "x.nix"), []byte("x"), 0o644); err != nil {
		t.Fatal(err)
	}
	link := func(target, name string) func(*testing.T, string) {
		return func(t *testing.T, dir string) {
			if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		make func(*testing.T, string)
		want string // error, or the path of a file
	}{
		"a file inside":       {link("../shared/a.nix", "modules/l.nix"), "modules/l.nix"},
		"absolute, inside":    {func(t *testing.T, dir string) { link(filepath.Join(dir, "shared/a.nix"), "modules/l.nix")(t, dir) }, "modules/l.nix"},
		"a folder inside":     {link("../shared", "modules/l"), "modules/l/a.nix"},
		"the folder itself":   {link("shared", "app_modules"), "app_modules/a.nix"},
		"a public key":        {link("../ssh/k.pub", "modules/k.pub"), "modules/k.pub"},
		"outside":             {link(filepath.Join(outside, "x.nix"), "modules/l.nix"), "modules/l.nix: a symlink to " + outside},
		"outside, relative":   {link("../../../../../etc/hostname", "modules/l.nix"), "modules/l.nix: a symlink to"},
		"a folder outside":    {link(outside, "app_modules"), "app_modules: a symlink to " + outside},
		"the node's own file": {link(outside+"/x.nix", "nodes/n1.nix"), "nodes/n1.nix: a symlink to " + outside},
		"dangling":            {link("nothing", "modules/l.nix"), "modules/l.nix: a symlink to something that does not exist"},
		"dangling lock":       {link("nothing", "flake.lock"), "flake.lock: a symlink to something that does not exist"},
		"itself":              {link("l.nix", "modules/l.nix"), "modules/l.nix: "},
		"a circle":            {link(".", "modules/l"), "modules/l: this link leads back"},
		"the project":         {link("..", "modules/l"), "modules/l: a symlink to the whole project"},
		"a private key":       {link("../ssh/k", "modules/k"), "which no node may get"},
		"all keys":            {link("../ssh", "modules/k"), "which no node may get"},
		"credentials":         {link("../nix-infra/mcp.creds", "modules/k"), "which no node may get"},
		"others":              {link("../ops.creds", "modules/k"), "which no node may get"},
		"an environment":      {link("../.env.production", "modules/k"), "which no node may get"},
		"named pipe": {func(t *testing.T, dir string) {
			if err := syscall.Mkfifo(filepath.Join(dir, "modules/p"), 0o644); err != nil {
				t.Fatal(err)
			}
		}, "modules/p: a named pipe can't be deployed"},
		"socket": {func(t *testing.T, dir string) {
			t.Chdir(dir) // the path of a socket has to be short
			l, err := net.Listen("unix", "modules/s")
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { l.Close() })
		}, "modules/s: a socket can't be deployed"},
	} {
		t.Run(name, func(t *testing.T) {
			p := small(t, map[string]string{"shared/a.nix": "a", "ssh/k": "private", "ssh/k.pub": "public", "nodes/n2.nix": "x",
				"nix-infra/mcp.creds": "a seed", "ops.creds": "a seed", ".env.production": "A=secret"})
			c.make(t, p.Dir)
			tree, err := p.Tree(TreeRequest{Node: "n1"})
			if err != nil {
				failsWith(t, err, c.want)
				return
			}
			for _, f := range tree.Files {
				if f.Path == c.want {
					return
				}
			}
			t.Errorf("no error and no file %s", c.want)
		})
	}
}

// TestTestDirOutside: the folder of a test may be anywhere; links may not lead out of it.
func TestTestDirOutside(t *testing.T) {
	p := small(t, nil)
	test := t.TempDir()
	if err := os.Mkdir(filepath.Join(test, "nodes"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(test, "nodes/n1.nix"), []byte("[%%x%%]"), 0o644); err != nil {
		t.Fatal(err)
	}
	_, err := p.Tree(TreeRequest{Node: "n1", TestDir: test})
	failsWith(t, err, test+"/nodes/n1.nix:1: unknown")
	if err := os.Symlink("/etc/hostname", filepath.Join(test, "nodes/n2.nix")); err != nil {
		t.Fatal(err)
	}
	_, err = p.Tree(TreeRequest{Node: "n2", TestDir: test})
	failsWith(t, err, "n2.nix: a symlink to /etc/hostname")
}

func TestSettingsFillTheRequest(t *testing.T) {
	p := small(t, map[string]string{
		SettingsFile:       "fleet: f\ncontrollers: []\ndefaults: { nixos_version: 25.10, node_module: a }\nnodes: { n1: { arch: aarch64-linux, nixos_version: 24.05 }, n2: { node_module: b } }\n",
		"flake.nix":        "[%%nixVersion%%] [%%hwArch%%]",
		"node_types/a.nix": "a", "node_types/b.nix": "b", "node_types/control_node.nix": "c",
	})
	for want, r := range map[string]TreeRequest{
		"24.05 aarch64-linux a":  {Node: "n1"},
		"25.10 x86_64-linux b":   {Node: "n2"},
		"25.10 riscv64-linux a":  {Node: "n3", Nodes: []NodeFacts{{Name: "n3", Arch: "riscv64-linux"}}},
		"25.11 i686-linux b":     {Node: "n1", NixOSVersion: "25.11", Arch: "i686-linux", NodeModule: "node_types/b.nix"},
		"25.10 x86_64-linux c":   {Node: "n4", Control: true},
		"25.10 x86_64-linux a c": {Node: "n5", Control: true, NodeModule: "a"},
	} {
		tree, err := p.Tree(r)
		if err != nil {
			t.Error(err)
			continue
		}
		got := map[string]string{}
		for _, f := range tree.Files {
			got[f.Path] = string(f.Data)
		}
		text := strings.Join(strings.Fields(got["flake.nix"]+" "+got["cluster_node.nix"]+" "+got["control_node.nix"]), " ")
		if text != want {
			t.Errorf("%+v: %s, want %s", r, text, want)
		}
	}
}

func TestModes(t *testing.T) {
	p := small(t, map[string]string{"app_modules/a/action.sh": "x", "app_modules/a/default.nix": "x"})
	if err := os.Chmod(filepath.Join(p.Dir, "app_modules/a/action.sh"), 0o700); err != nil {
		t.Fatal(err)
	}
	tree, err := p.Tree(TreeRequest{Node: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	got := map[string]fs.FileMode{}
	for _, f := range tree.Files {
		got[f.Path] = f.Mode
	}
	if got["app_modules/a/action.sh"] != 0o755 || got["app_modules/a/default.nix"] != 0o644 {
		t.Errorf("modes %v", got)
	}
}

// BenchmarkTree is what a node costs in a deploy of 1,000.
func BenchmarkTree(b *testing.B) {
	p := openFixture(b, "testdata/fm")
	r := TreeRequest{Node: "node001"}
	for n := range 1000 {
		r.Nodes = append(r.Nodes, NodeFacts{Name: fmt.Sprintf("n%d", n), IPv4: "192.0.2.1"})
	}
	for b.Loop() {
		if _, err := p.Tree(r); err != nil {
			b.Fatal(err)
		}
	}
}
