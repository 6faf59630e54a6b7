package command

import (
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

const template = "{ system.stateVersion = \"[%%nixVersion%%]\"; }\n"

func TestUpgradeNixOS(t *testing.T) {
	s, f := newFleet(t)
	s.write("configuration.nix", template)
	s.write("flake.nix", "nixos-[%%nixVersion%%]\n")
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"nodes: { web1: { tags: [ web ] } } # ours\n")
	resettle(t, s, func(p *project.Settings) { p.Defaults.NixOSVersion = "25.05" })
	for _, n := range []string{"web1", "web2"} {
		f.Add(n)
	}
	has := func(node, nixos, state string) {
		t.Helper()
		if tree := f.Tree(node); tree["flake.nix"] != "nixos-"+nixos+"\n" || tree["configuration.nix"] != "{ system.stateVersion = \""+state+"\"; }\n" {
			t.Errorf("%s has\n%s%s", node, tree["flake.nix"], tree["configuration.nix"])
		}
	}
	s.must("deploy", "all")
	has("web1", "25.05", "25.05")

	out := s.must("upgrade-nixos", "web1", "--nixos-version", "25.11")
	if !strings.Contains(out, "web1: NixOS 25.05 → 25.11, system.stateVersion stays 25.05\npinned in nix-infra.yaml: nixos_version of 1 node\n") || !strings.Contains(out, "1 confirmed") {
		t.Errorf("it says\n%s", out)
	}
	has("web1", "25.11", "25.05")
	if got := settings(t, s); got.Nodes["web1"].NixOSVersion != "25.11" || got.Nodes["web1"].StateVersion != "25.05" || got.Defaults.NixOSVersion != "25.05" || !strings.Contains(s.read("nix-infra.yaml"), "# ours") {
		t.Errorf("the settings are\n%s", s.read("nix-infra.yaml"))
	}

	out = s.must("upgrade-nixos", "all", "--nixos-version", "26.05", "--max-unavailable", "1")
	if !strings.Contains(out, "pinned in nix-infra.yaml: defaults.nixos_version\n") {
		t.Errorf("it says\n%s", out)
	}
	has("web1", "26.05", "25.05")
	has("web2", "26.05", "25.05")
	if got := strategyOf(t, f, f.Manifest("web1").Deployment); got.MaxUnavailable != "1" {
		t.Errorf("strategy %+v", got)
	}
	s.must("deploy", "all") // and it stays
	has("web1", "26.05", "25.05")

	s.expect(Refused, "web1 was new with NixOS 25.05 (its state_version in nix-infra.yaml), and can't have 24.11", "upgrade-nixos", "web1", "--nixos-version", "24.11")
	s.expect(Refused, "to which release?", "upgrade-nixos", "web1")
	s.expect(Refused, "upgrade which nodes?", "upgrade-nixos", "--nixos-version", "26.05")
	s.expect(Refused, `"26 05" is no NixOS version`, "upgrade-nixos", "web1", "--nixos-version", "26 05")
}

// resettle rewrites the settings.
func resettle(t *testing.T, s *shell, how func(*project.Settings)) {
	t.Helper()
	p := settings(t, s)
	how(&p)
	if err := project.WriteSettings(s.dir, p); err != nil {
		t.Fatal(err)
	}
}

// The pin is written once it is known what it leads to, and not before.
func TestUpgradeWritesThePinLast(t *testing.T) {
	s, f := newFleet(t)
	resettle(t, s, func(p *project.Settings) { p.Defaults.NixOSVersion = "25.05" })
	n := f.Add("web1")
	before := s.read("nix-infra.yaml")

	s.write("configuration.nix", "[%%nobody-knows%%]\n")
	s.expect(Refused, "web1: configuration.nix:1: unknown placeholder", "upgrade-nixos", "web1", "--nixos-version", "25.11")
	s.write("configuration.nix", template)
	s.must("upgrade-nixos", "web1", "--nixos-version", "25.11", "--mode", "dry-activate")
	if after := s.read("nix-infra.yaml"); after != before {
		t.Errorf("the settings became\n%s", after)
	}

	// Nodes that can't prove it keep it from nobody else: the pin stays, and it says how to go back.
	n.Script(fleettest.Script{Ends: func(*protocol.Manifest) protocol.Report {
		return protocol.Report{Phase: protocol.RolledBack, Reason: "web.service failed"}
	}})
	r := s.run("upgrade-nixos", "web1", "--nixos-version", "25.11", "--json")
	if r.status != SomeFailed || !strings.Contains(r.stderr, "nix-infra.yaml keeps the pin: the next deploy tries 25.11 again; to go back, run this again with --nixos-version and the version before") {
		t.Errorf("status %d: %s", r.status, r.stderr)
	}
	if got := settings(t, s); got.Defaults.NixOSVersion != "25.11" || got.Defaults.StateVersion != "25.05" {
		t.Errorf("%+v", got.Defaults)
	}
	docs := documents(t, r.out)
	if docs[0]["event"] != "upgrade" || docs[0]["pinned"] != "defaults" || docs[0]["nixos_version"] != "25.11" {
		t.Errorf("documents:\n%s", r.out)
	}
	n.Script(fleettest.Script{})
	s.must("upgrade-nixos", "web1", "--nixos-version", "25.05")
	if got := settings(t, s); got.Defaults.NixOSVersion != "25.05" || got.Defaults.StateVersion != "25.05" {
		t.Errorf("after going back: %+v", got.Defaults)
	}
}

// Where the settings don't say, what nodes run tells what they were new with.
func TestUpgradeOfWhatSettingsDontName(t *testing.T) {
	s, f := newFleet(t)
	s.write("configuration.nix", template)
	f.Add("web1")
	f.Change("web1", func(n *protocol.NodeState) { n.Beat.NixOS = "24.05.20240601.abcdef" })
	f.Register("web2")
	r := s.run("upgrade-nixos", "all", "--nixos-version", "25.11")
	if r.status != Unanswered || f.Tree("web1")["configuration.nix"] != "{ system.stateVersion = \"24.05\"; }\n" {
		t.Errorf("status %d\n%s\n%s", r.status, r.stderr, s.read("nix-infra.yaml"))
	}
	if got := settings(t, s); got.Nodes["web1"].StateVersion != "24.05" || got.Defaults.StateVersion != "" {
		t.Errorf("%+v", got)
	}
}

// A key that is made on the way stays, whatever becomes of the pin.
func TestUpgradeBuiltHere(t *testing.T) {
	s, f := newFleet(t)
	newCache(t, s)
	resettle(t, s, func(p *project.Settings) { p.Defaults.NixOSVersion = "25.05" })
	f.Add("web1").Script(fleettest.Script{Answers: hasOwnFiles})
	s.write("modules/broken.nix", "BROKEN\n")
	r := s.run("upgrade-nixos", "web1", "--nixos-version", "25.11", "--build=local")
	if got := settings(t, s); r.status != SomeFailed || got.Defaults.NixOSVersion != "25.05" || len(got.Cache.Keys) != 1 {
		t.Errorf("status %d: %s\n%s", r.status, r.stderr, s.read("nix-infra.yaml"))
	}
	s.write("modules/broken.nix", "{ }\n")
	s.must("upgrade-nixos", "web1", "--nixos-version", "25.11", "--build=local")
	got := settings(t, s)
	if m := f.Manifest("web1"); got.Defaults.NixOSVersion != "25.11" || m.Closure == nil || !slices.Equal(m.Closure.Keys, got.Cache.Keys) {
		t.Errorf("%+v\n%+v", got, m)
	}
}
