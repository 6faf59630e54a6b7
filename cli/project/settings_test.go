package project

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestSettings(t *testing.T) {
	s, err := parseSettings([]byte(`
# our fleet
fleet: home
controllers:
  - tls://hub.example.org:4222
  - wss://[2001:db8::1]:443
defaults:
  nixos_version: 25.10 # no number: it must not become 25.1
  node_module: node_types/standalone_machine.nix
nodes:
  web1: { tags: [web, eu], ipv4: 192.0.2.1 }
  db1:
    arch: aarch64-linux
    nixos_version: "25.05"
  bare:
ssh_key: id_home
`))
	if err != nil {
		t.Fatal(err)
	}
	want := Settings{
		Fleet: "home", Controllers: []string{"tls://hub.example.org:4222", "wss://[2001:db8::1]:443"}, SSHKey: "id_home",
		Defaults: Defaults{NixOSVersion: "25.10", NodeModule: "node_types/standalone_machine.nix", Arch: DefaultArch},
		Nodes: map[string]NodeSettings{
			"web1": {Tags: []string{"web", "eu"}, IPv4: "192.0.2.1"}, "db1": {Arch: "aarch64-linux", NixOSVersion: "25.05"}, "bare": {},
		},
	}
	if !reflect.DeepEqual(s, want) {
		t.Errorf("got %+v\nwant %+v", s, want)
	}
	if got, want := s.Node("db1"), (NodeSettings{NixOSVersion: "25.05", NodeModule: "node_types/standalone_machine.nix", Arch: "aarch64-linux", CloseSSH: new(bool)}); !reflect.DeepEqual(got, want) {
		t.Errorf("db1: %+v", got)
	}
	if got := s.Node("nobody"); got.NixOSVersion != "25.10" || got.Arch != DefaultArch {
		t.Errorf("nobody: %+v", got)
	}
	if err := (Settings{Fleet: "home"}).Validate(); err != nil {
		t.Error(err)
	}
}

func TestSettingsMistakes(t *testing.T) {
	for text, want := range map[string][]string{
		"":                                {"nix-infra.yaml:1: fleet: missing"},
		"controllers: []":                 {"nix-infra.yaml:1: fleet: missing"},
		"\nfleet: My Fleet":               {`nix-infra.yaml:2: fleet: "My Fleet" is not a valid name`},
		"fleet: f\nfleets: g":             {`nix-infra.yaml:2: unknown key "fleets"`},
		"fleet: f\nagent: { module: us }": {`nix-infra.yaml:2: agent.module: "us"; use inject`},
		"fleet: f\nfleet: g":              {"nix-infra.yaml:2: "},
		"fleet: f\n\tx: g":                {"nix-infra.yaml:2: "},
		"fleet: [a]":                      {"nix-infra.yaml:1: a list stands where text is expected"},
		"fleet: f\ndefaults: { close_ssh: maybe }": {"nix-infra.yaml:2: maybe stands where true or false is expected"},
		"- a":                              {"nix-infra.yaml:1: a list stands where name: value is expected"},
		"fleet: f\n---\nfleet: g":          {"more than one document"},
		"fleet: f\ncontrollers: tls://h:1": {"nix-infra.yaml:2: tls://h:1 stands where a list is expected"},
		"fleet: f\ncontrollers:\n- tls://h:1\n- nats://h:1\n- tls://h:1": {
			`nix-infra.yaml:4: controllers.1: controller URL "nats://h:1"`, "nix-infra.yaml:5: controllers.2: tls://h:1 is listed twice"},
		"fleet: f\ndefaults:\n  arch: amd64\n  nixos_version: '2\"5'\n  node_module: ../x.nix\nssh_key: a/b": {
			":3: defaults.arch", ":4: defaults.nixos_version", ":5: defaults.node_module", ":6: ssh_key"},
		"fleet: f\nnodes:\n  n1:\n    ipv4: 300.1.1.1\n    tags: [a, B]\n  all: {}\n  n2: { ipv4: '::1', disk: 3 }": {`:7: unknown key "disk"`},
		"fleet: f\nnodes:\n  n1:\n    ipv4: 300.1.1.1\n    tags: [a, B]\n  all: {}\n  n2: { ipv4: '::1' }": {
			`:4: nodes.n1.ipv4: "300.1.1.1" is no IPv4 address`, ":5: nodes.n1.tags", ":6: nodes.all", ":7: nodes.n2.ipv4"},
	} {
		_, err := parseSettings([]byte(text))
		failsWith(t, err, want...)
	}
	if err := (Settings{Fleet: "f", Nodes: map[string]NodeSettings{"N": {}}}).Validate(); err == nil || !strings.HasPrefix(err.Error(), "nix-infra.yaml: nodes.N: ") {
		t.Errorf("Validate: %v", err)
	}
}

func TestWriteSettings(t *testing.T) {
	dir := t.TempDir()
	s := Settings{Fleet: "home", Defaults: Defaults{NixOSVersion: "25.10"}}
	if err := WriteSettings(dir, s); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, SettingsFile)
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(string(text), "# The settings of this nix-infra project.\n") || strings.Contains(string(text), "nodes:") {
		t.Errorf("wrote\n%s", text)
	}

	// What people add stays where it was when the program writes again.
	edited := strings.Replace(string(text), "fleet: home\n", "fleet: home # where it is\n\n# the way in\n", 1) +
		"# all of them\nnodes:\n  # the shop\n  web1: { tags: [web] } # soon two\n"
	if err := os.WriteFile(file, []byte(edited), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := Open(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	p.Settings.Nodes["db1"] = NodeSettings{Tags: []string{"db"}, IPv4: "192.0.2.7"}
	p.Settings.Controllers = []string{"tls://hub:4222"}
	if err := WriteSettings(dir, p.Settings); err != nil {
		t.Fatal(err)
	}
	text, err = os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, comment := range []string{"# The settings of this nix-infra project.\n", "fleet: home # where it is\n", "# the way in\ncontrollers:\n", "# all of them\nnodes:\n", "  # the shop\n  web1:", "# soon two"} {
		if strings.Count(string(text), comment) != 1 {
			t.Errorf("%q is not there once:\n%s", comment, text)
		}
	}
	again, err := Open(dir, "")
	if err != nil || !reflect.DeepEqual(again.Settings, p.Settings) {
		t.Errorf("%v\ngot  %+v\nwant %+v\n%s", err, again.Settings, p.Settings, text)
	}

	if err := WriteSettings(dir, Settings{Fleet: "NO"}); err == nil {
		t.Error("wrote a mistake")
	}
	after, _ := os.ReadFile(file)
	if entries, _ := os.ReadDir(dir); string(after) != string(text) || len(entries) != 1 {
		t.Errorf("%d files are left, the settings are\n%s", len(entries), after)
	}
}

func TestServers(t *testing.T) {
	servers, err := parseServers([]byte(`
servers:
  web1:
    ip: 192.0.2.1
    ssh_key: ssh/nixinfra
    id: 12
    colour: blue
  cloud1: { provider: hetzner, ssh_key: ssh/k, username: admin, description: in the cloud, metadata: { rack: 4, owner: [me] } }
  far1: { ip: far.example.org, ssh_key: /keys/far }
other: 1
`))
	if err != nil {
		t.Fatal(err)
	}
	want := []Server{
		{Name: "web1", IP: "192.0.2.1", SSHKey: "ssh/nixinfra", Username: "root", Line: 3},
		{Name: "cloud1", Provider: "hetzner", SSHKey: "ssh/k", Username: "admin", Description: "in the cloud", Metadata: map[string]any{"rack": 4, "owner": []any{"me"}}, Line: 8},
		{Name: "far1", IP: "far.example.org", SSHKey: "/keys/far", Username: "root", Line: 9},
	}
	if !reflect.DeepEqual(servers, want) {
		t.Errorf("got  %+v\nwant %+v", servers, want)
	}
	for text, want := range map[string][]string{
		"":                  {"servers.yaml:1: the key servers is missing"},
		"machines: {}":      {"servers.yaml:1: the key servers is missing"},
		"servers: [a]":      {"servers.yaml:1: servers: expected machines by name"},
		"- a":               {"servers.yaml:1: a list stands where name: value is expected"},
		"hello":             {"servers.yaml:1: hello stands where name: value is expected"},
		"servers:\n  a: 1":  {"servers.yaml:2: a: expected ip or provider"},
		"servers:\n  a: {}": {"servers.yaml:2: a: ip is missing", "servers.yaml:2: a: ssh_key is missing"},
		"servers: {\n":      {"servers.yaml:"},
		"servers:\n  a:\n    ip: 300.0.0.1\n    ssh_key: k\n  A: { ip: h, ssh_key: k }": {
			`servers.yaml:3: a: ip "300.0.0.1"`, `servers.yaml:5: A: "A" is not a valid name`},
		"servers:\n  a:\n    ip: 1.2.3.4\n    provider: hetzner\n    ssh_key: k":       {"servers.yaml:4: a: ip and provider are both there"},
		"servers:\n  a:\n    provider: aws\n    ssh_key:\n    username: -oProxy":       {":3: a: provider \"aws\"", ":4: a: ssh_key is missing", ":5: a: username"},
		"servers:\n  a: { ip: 1.2.3.4, ssh_key: k }\n  a: { ip: 1.2.3.5, ssh_key: k }": {"servers.yaml:3: a: listed before, at line 2"},
		"servers:\n  a:\n    ip: 192.0.2.1:22\n    ssh_key: k\n  b:\n    ip: http://h\n    ssh_key: k\n  c:\n    ip: a..b\n    ssh_key: k": {
			`:3: a: ip "192.0.2.1:22" is neither`, `:6: b: ip "http://h" is neither`, `:9: c: ip "a..b" is neither`},
		"servers:\n  flake: { ip: h, ssh_key: k }\n  all: { ip: h, ssh_key: k }":                              {":2: flake: ", ":3: all: "},
		"servers:\n  a: { ip: h, ssh_key: k, username: 'a b' }\n  b: { ip: h, ssh_key: k, username: 'me@h' }": {`:2: a: username "a b" is no user name`, `:3: b: username "me@h"`},
		"servers:\n  a: { ip: '', provider: '', ssh_key: '' }":                                                {":2: a: ip is missing, or provider", ":2: a: ssh_key is missing"},
		"servers:\n  a: { ip: h, ssh_key: k }\n\tb: 1":                                                        {"servers.yaml:"},
		"servers:\n  a:\n  b: { ip: h, ssh_key: k }":                                                          {":2: a: "},
		"servers:\n  a: { ip: h, ssh_key: k, metadata: [x], description: [y] }":                               {":2: ", ":2: "},
		"servers:\n  a:\n    ip: [1]\n    ssh_key: k\n    metadata: 3":                                        {"servers.yaml:3: a list stands where text is expected", "servers.yaml:5: 3 stands where name: value is expected"},
	} {
		_, err := parseServers([]byte(text))
		failsWith(t, err, want...)
	}
	if servers, err := parseServers([]byte("servers:\n")); err != nil || len(servers) != 0 {
		t.Errorf("none yet: %v, %v", servers, err)
	}
	shared := "x: &x { ssh_key: k, username: me }\nservers:\n  a: { <<: *x, ip: 1.2.3.4 }\n  b: *b\n"
	if _, err := parseServers([]byte(shared)); err == nil {
		t.Error("an unknown anchor is allowed")
	}
	servers, err = parseServers([]byte(strings.Replace(shared, "  b: *b\n", "", 1)))
	if err != nil || servers[0].Username != "me" || servers[0].SSHKey != "k" {
		t.Errorf("merged: %+v, %v", servers, err)
	}
}

func FuzzSettings(f *testing.F) {
	for _, s := range []string{"fleet: f\ncontrollers: [tls://h:1]\nnodes: {n1: {tags: [a]}}", "a: &a [*a]", "fleet: f\nnodes: {n1: }", "? [a]\n: b", "\x00", "---\n---"} {
		f.Add([]byte(s))
	}
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text []byte) {
		parseServers(text)
		s, err := parseSettings(text)
		if err != nil {
			return
		}
		// What was read can be written, over what it was read from, and reads the same.
		if err := os.WriteFile(filepath.Join(dir, SettingsFile), text, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := WriteSettings(dir, s); err != nil {
			t.Fatalf("%q: %v", text, err)
		}
		again, err := readSettings(dir)
		if err != nil || again.Fleet != s.Fleet || len(again.Nodes) != len(s.Nodes) || again.Defaults != s.Defaults {
			t.Errorf("%q: %+v became %+v, %v", text, s, again, err)
		}
	})
}
