package project

import (
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"
)

func TestUpgrade(t *testing.T) {
	runs := map[string]string{"web1": "24.05", "web2": "24.11"}
	for name, c := range map[string]struct {
		before Settings
		nodes  []string
		all    bool
		want   Settings
	}{
		"all": {
			Settings{Defaults: Defaults{NixOSVersion: "25.05"}}, []string{"web1", "web2"}, true,
			Settings{Defaults: Defaults{NixOSVersion: "25.11", StateVersion: "25.05"}, Nodes: map[string]NodeSettings{}}},
		"all, once more": {
			Settings{Defaults: Defaults{NixOSVersion: "25.05", StateVersion: "23.11"}}, []string{"web1"}, true,
			Settings{Defaults: Defaults{NixOSVersion: "25.11", StateVersion: "23.11"}, Nodes: map[string]NodeSettings{}}},
		"all, to what they have": {
			Settings{Defaults: Defaults{NixOSVersion: "25.11"}}, []string{"web1"}, true,
			Settings{Defaults: Defaults{NixOSVersion: "25.11"}, Nodes: map[string]NodeSettings{}}},
		"some": {
			Settings{Defaults: Defaults{NixOSVersion: "25.05"}, Nodes: map[string]NodeSettings{"web1": {Tags: []string{"web"}}}}, []string{"web1"}, false,
			Settings{Defaults: Defaults{NixOSVersion: "25.05"}, Nodes: map[string]NodeSettings{
				"web1": {NixOSVersion: "25.11", StateVersion: "25.05", Tags: []string{"web"}}}}},
		"all, of which some went before": {
			Settings{Defaults: Defaults{NixOSVersion: "25.05"}, Nodes: map[string]NodeSettings{"web1": {NixOSVersion: "25.11", StateVersion: "24.11"}}}, []string{"web1", "web2"}, true,
			Settings{Defaults: Defaults{NixOSVersion: "25.11", StateVersion: "25.05"}, Nodes: map[string]NodeSettings{"web1": {StateVersion: "24.11"}}}},
		"all, with one that was held back, and one that is not enrolled yet": {
			Settings{Defaults: Defaults{NixOSVersion: "25.05"}, Nodes: map[string]NodeSettings{"web1": {NixOSVersion: "24.11"}, "new": {NixOSVersion: "24.05"}}}, []string{"web1"}, true,
			Settings{Defaults: Defaults{NixOSVersion: "25.11", StateVersion: "25.05"}, Nodes: map[string]NodeSettings{
				"web1": {StateVersion: "24.11"}, "new": {NixOSVersion: "24.05", StateVersion: "24.05"}}}},
		"the settings say nothing": {
			Settings{}, []string{"web1", "web2", "new"}, true,
			Settings{Defaults: Defaults{NixOSVersion: "25.11"}, Nodes: map[string]NodeSettings{"web1": {StateVersion: "24.05"}, "web2": {StateVersion: "24.11"}}}},
	} {
		t.Run(name, func(t *testing.T) {
			state := map[string]string{}
			for _, n := range []string{"web1", "web2", "new", "other"} {
				state[n] = firstOf(c.before.StateVersion(n), runs[n])
			}
			got := c.before.Upgrade("25.11", c.nodes, c.all, runs)
			if !reflect.DeepEqual(got, c.want) {
				t.Errorf("got  %+v\nwant %+v", got, c.want)
			}
			for _, n := range c.nodes {
				if got.Node(n).NixOSVersion != "25.11" {
					t.Errorf("%s has %s", n, got.Node(n).NixOSVersion)
				}
				if state[n] != "" && got.StateVersion(n) != state[n] {
					t.Errorf("the state version of %s was %s and is %s", n, state[n], got.StateVersion(n))
				}
			}
		})
	}
}

// The projects that exist write system.stateVersion with the placeholder of the version: an upgrade must not reach it.
func TestStateVersionStays(t *testing.T) {
	for project, node := range map[string]string{"ha": "worker001", "fm": "node001"} {
		t.Run(project, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.CopyFS(dir, os.DirFS(filepath.Join("testdata", project))); err != nil {
				t.Fatal(err)
			}
			p := openFixture(t, dir)
			old := p.Settings.Defaults.NixOSVersion
			if err := WriteSettings(dir, p.Settings.Upgrade("26.05", []string{node}, true, nil)); err != nil {
				t.Fatal(err)
			}
			r := TreeRequest{Node: node, TrustedKeys: trusted, Nodes: []NodeFacts{{Name: "worker001", OverlayIP: "10.10.21.0"}, {Name: "service001", IPv4: "203.0.113.9", OverlayIP: "10.10.11.0"}}}
			has(t, openFixture(t, dir), r, `nixos-26.05"`, `system.stateVersion = "`+old+`"`)
			// Not by a version for a single deploy either, from where nothing was pinned yet.
			r.NixOSVersion = "26.11"
			has(t, openFixture(t, filepath.Join("testdata", project)), r, `nixos-26.11"`, `system.stateVersion = "`+old+`"`)
		})
	}
}

func has(t *testing.T, p *Project, r TreeRequest, flake, configuration string) {
	t.Helper()
	tree, err := p.Tree(r)
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range tree.Files {
		if want := map[string]string{"flake.nix": flake, "configuration.nix": configuration}[f.Path]; !strings.Contains(string(f.Data), want) {
			t.Errorf("%s has no %s:\n%s", f.Path, want, f.Data)
		}
	}
}

// Only the value of an attribute of that name is held back.
func TestWhereStateVersionIs(t *testing.T) {
	p := small(t, map[string]string{
		SettingsFile:        "fleet: f\ncontrollers: []\ndefaults: { nixos_version: '25.11', state_version: '23.05' }\n",
		"configuration.nix": "system.stateVersion =\n  \"[%%nixVersion%%]\"; system = { stateVersion=\"[%%nixVersion%%]\"; };\nhome.stateVersion = \"[%%nixVersion%%]\";\nmyStateVersion = \"[%%nixVersion%%]\"; x = \"stateVersion [%%nixVersion%%]\";\n",
	})
	tree, err := p.Tree(TreeRequest{Node: "n1"})
	if err != nil {
		t.Fatal(err)
	}
	want := "system.stateVersion =\n  \"23.05\"; system = { stateVersion=\"23.05\"; };\nhome.stateVersion = \"23.05\";\nmyStateVersion = \"25.11\"; x = \"stateVersion 25.11\";\n"
	for _, f := range tree.Files {
		if f.Path == "configuration.nix" && string(f.Data) != want {
			t.Errorf("got\n%s", f.Data)
		}
	}
}

func TestCacheSettings(t *testing.T) {
	key := "cache-1:" + strings.Repeat("A", 43) + "="
	s, err := parseSettings([]byte("fleet: f\ncache:\n  push: s3://bucket?region=eu\n  keys: [ '" + key + "' ]\n"))
	if err != nil || !reflect.DeepEqual(s.Cache, Cache{Push: "s3://bucket?region=eu", Keys: []string{key}}) {
		t.Fatalf("%+v, %v", s.Cache, err)
	}
	for _, c := range []struct {
		cache Cache
		want  []string
	}{
		{Cache{}, nil},
		{Cache{Push: "s3://bucket"}, []string{"s3://bucket"}},
		{Cache{Push: "file:///srv/cache"}, nil},
		{Cache{Push: "file:///srv/cache", Pull: []string{"https://cache"}}, []string{"https://cache"}},
	} {
		if got := c.cache.Pulls(); !reflect.DeepEqual(got, c.want) {
			t.Errorf("%+v: %v", c.cache, got)
		}
	}
	_, err = parseSettings([]byte("fleet: f\ncache:\n  push: cache\n  pull: [https://a:b@cache]\n  keys: [x]\n"))
	failsWith(t, err, "nix-infra.yaml:3: cache.push: ", ":4: cache.pull.0: ", ":5: cache.keys.0: ")
}
