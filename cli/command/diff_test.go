package command

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

func TestDiff(t *testing.T) {
	s, f := newFleet(t)
	s.write("configuration.nix", "{\n  networking.hostName = \"[%%nodeName%%]\";\n\n\n\n\n  a = 1;\n}\n")
	for _, n := range []string{"web1", "web2", "db1"} {
		f.Add(n)
	}
	s.must("deploy", "web1", "web2")
	out := s.must("diff", "web1", "web2", "--exit-code")
	if out != "2 nodes would get the same files: web1 web2\n" {
		t.Errorf("nothing changed, and it says\n%s", out)
	}

	s.write("configuration.nix", strings.Replace(s.read("configuration.nix"), "a = 1", "a = 2", 1))
	s.write("nodes/web2.nix", "")
	s.write("modules/new.nix", "{ }\n")
	f.Requests()
	out = s.must("diff", "all")
	for _, want := range []string{
		// The files of the two differ by their names; what changes in them doesn't.
		"configuration.nix changed on 2 nodes: web1 web2\n--- deployed/configuration.nix\n+++ project/configuration.nix\n@@ -4,5 +4,5 @@\n \n \n \n-  a = 1;\n+  a = 2;\n }\n",
		"web2.nix changed on 1 node: web2\n",
		"modules/new.nix added on 2 nodes: web1 web2\n--- /dev/null\n+++ project/modules/new.nix\n@@ -0,0 +1 @@\n+{ }\n",
		"2 nodes would get other files: web1 web2\n", "1 node had no deployment yet: all files are new: db1\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if slices.Contains(f.Requests(), protocol.Deploy) {
		t.Error("a diff deployed")
	}
	if out = s.must("diff", "web1", "--stat"); !strings.Contains(out, "configuration.nix  changed  +1 -1  on 1 node: web1\n") || strings.Contains(out, "@@") {
		t.Errorf("--stat:\n%s", out)
	}
	r := s.run("diff", "web1", "db1", "--exit-code", "--json")
	if r.status != SomeFailed || r.stderr != "" {
		t.Errorf("status %d: %s", r.status, r.stderr)
	}
	docs := documents(t, r.out)
	if len(docs) != 5 || docs[0]["node"] != "db1" || docs[0]["deployment"] != "" || docs[0]["added"].(float64) < 4 ||
		docs[1]["node"] != "web1" || docs[1]["changed"] != 1.0 || docs[1]["added"] != 1.0 || docs[2]["path"] != "configuration.nix" || docs[2]["added"] != 1.0 {
		t.Errorf("documents:\n%s", r.out)
	}
	s.expect(Refused, "what would a deploy to which nodes change?", "diff")
}

// deploy --expect deploys what a diff showed, or nothing: not where a file, a node or a secret is another one meanwhile.
func TestDeployExpects(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	f.Add("web2")
	s.pipe("one", "secrets", "store", "token")
	s.write("nodes/web1.nix", `{ a = "[%%secrets/token%%]"; }`)
	digest := func(selectors ...string) string {
		t.Helper()
		docs := documents(t, s.must(append([]string{"diff", "--json"}, selectors...)...))
		last := docs[len(docs)-1]
		if last["event"] != "content" {
			t.Fatalf("the last document is %v", last)
		}
		return last["digest"].(string)
	}
	both, one := digest("all"), digest("web1")
	if both == one || both != digest("web2", "web1") {
		t.Errorf("the digests are %s of both and %s of one", both, one)
	}
	const other = "not what --expect says"
	s.expect(Refused, other, "deploy", "web1", "--expect", both)
	s.expect(Refused, "--expect takes the digest", "deploy", "web1", "--expect", "x")
	s.expect(Refused, "--expect takes the digest", "deploy", "web1", "--expect", one, "--out", "x")
	s.write("configuration.nix", "{ other = true; }\n")
	s.expect(Refused, other, "deploy", "web1", "--expect", one)
	one = digest("web1")
	if err := os.Chmod(s.path("configuration.nix"), 0o755); err != nil {
		t.Fatal(err)
	}
	s.expect(Refused, other, "deploy", "web1", "--expect", one)
	one = digest("web1")
	s.pipe("two", "secrets", "store", "token")
	s.expect(Refused, other, "deploy", "web1", "--expect", one)
	if slices.Contains(f.Requests(), protocol.Deploy) {
		t.Error("it was deployed")
	}
	s.must("deploy", "web1", "--expect", digest("web1"))
}

// The controller's word for what was deployed is not taken.
func TestDiffVerifies(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	f.Add("web2")
	s.must("deploy", "all")
	other := f.Record("web2").Desired.Digest
	f.Change("web1", func(n *protocol.NodeState) { n.Desired.Digest = other })
	s.expect(Refused, "web1: what the controller says was deployed: signed for web2, not for web1", "diff", "web1")
}

// After a reboot or a way back, the files are compared with those of the deployment that brought what runs.
func TestDiffAfterWaysWithoutFiles(t *testing.T) {
	s, f := newFleet(t)
	old, young := system("old"), system("young")
	n := f.Add("web1")
	runs := func(closure string) {
		n.Script(fleettest.Script{Ends: func(*protocol.Manifest) protocol.Report {
			return protocol.Report{Phase: protocol.Confirmed, Closure: closure}
		}})
	}
	runs(old)
	s.must("deploy", "web1")
	first := f.Record("web1").Desired.Deployment
	before := s.read("configuration.nix")
	s.write("configuration.nix", "{ a = 2; }\n")
	runs(young)
	s.must("deploy", "web1")
	s.must("reboot", "web1")
	if out := s.must("diff", "web1"); !strings.Contains(out, "would get the same files") {
		t.Errorf("after a reboot:\n%s", out)
	}
	runs(old)
	s.must("rollback", "web1")
	out := s.must("diff", "web1")
	if !strings.Contains(out, "-"+strings.TrimSpace(before)+"\n+{ a = 2; }\n") {
		t.Errorf("after a rollback:\n%s", out)
	}
	if docs := documents(t, s.must("diff", "web1", "--json")); docs[0]["deployment"] != first {
		t.Errorf("compared with %v, want %s", docs[0]["deployment"], first)
	}
	runs(system("elsewhere"))
	s.must("rollback", "web1")
	s.expect(SomeFailed, "can't be compared: web1", "diff", "web1")
}

// A lock that Nix made, here or on the node, is not the project's to lose.
func TestDiffLeavesLocksAlone(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	s.write("flake.lock", "{}\n")
	s.must("deploy", "web1")
	if err := os.Remove(s.path("flake.lock")); err != nil {
		t.Fatal(err)
	}
	if out := s.must("diff", "web1"); !strings.Contains(out, "would get the same files") {
		t.Errorf("a lock that is gone:\n%s", out)
	}
	s.write("flake.lock", "{ }\n")
	if out := s.must("diff", "web1", "--stat"); !strings.Contains(out, "flake.lock  changed") {
		t.Errorf("a lock that is another one:\n%s", out)
	}
}

func TestUnify(t *testing.T) {
	file := func(data string, exec bool) *protocol.File {
		return &protocol.File{SHA256: protocol.Digest([]byte(data)), Exec: exec}
	}
	for name, c := range map[string]struct {
		before, after string
		had, has      bool
		kind, says    string
		added, gone   int
	}{
		"changed":           {"a\nb\n", "a\nc\n", true, true, "changed", "-b\n+c\n", 1, 1},
		"added":             {"", "a\nb\n", false, true, "added", "--- /dev/null\n", 2, 0},
		"removed":           {"a\n", "", true, false, "removed", "+++ /dev/null\n", 0, 1},
		"no newline at end": {"a", "a\n", true, true, "changed", "\\ No newline at end of file", 1, 1},
		"binary":            {"a\x00", "b\x00", true, true, "changed", "Not compared line by line: 2 B before, 2 B after\n", 0, 0},
		"not UTF-8":         {"a\xff", "b", true, true, "changed", "Not compared", 0, 0},
		"large":             {strings.Repeat("a\n", maxCompared), "b", true, true, "changed", "Not compared line by line: 2.0 MiB before", 0, 0},
		"a mode":            {"a", "a", true, true, "mode", "", 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			ch := change{path: "x"}
			if c.had {
				ch.before = file(c.before, false)
			}
			if c.has {
				ch.after = file(c.after, name == "a mode")
			}
			if err := ch.unify([]byte(c.before), []byte(c.after)); err != nil {
				t.Fatal(err)
			}
			if ch.kind() != c.kind || !strings.Contains(ch.unified, c.says) || (c.says == "") != (ch.unified == "") || ch.added != c.added || ch.gone != c.gone {
				t.Errorf("%s, +%d -%d:\n%s", ch.kind(), ch.added, ch.gone, ch.unified)
			}
		})
	}
}

// What a file holds can't reach the terminal as anything but text.
func TestDiffIsClean(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	s.must("deploy", "web1")
	s.write("configuration.nix", "{ } # \x1b[2Jgone\n")
	if out := s.must("diff", "web1"); strings.Contains(out, "\x1b") || !strings.Contains(out, "+{ } # gone\n") {
		t.Errorf("%q", out)
	}
}

func TestDiffClosure(t *testing.T) {
	s, f := newFleet(t)
	for i, n := range []string{"web1", "web2"} {
		f.Add(n).Script(fleettest.Script{Ends: func(m *protocol.Manifest) protocol.Report {
			if m.Mode != protocol.DryActivate || m.Serial != 0 {
				t.Errorf("mode %s, serial %d", m.Mode, m.Serial)
			}
			return protocol.Report{Phase: protocol.Confirmed, Plan: &protocol.UnitPlan{Restart: []string{"web.service"}, Size: int64(i) + 10, Growth: 5,
				Packages: []protocol.PackageChange{{Name: "curl", Before: []string{"8.1"}, After: []string{"8.2"}, Growth: 5}}}}
		}})
	}
	out := s.must("diff", "all", "--closure")
	for _, want := range []string{
		"2 nodes had no deployment yet", "\nweb1 would:\n    restart web.service\n    ~ curl 8.1 → 8.2 (+5 B)\n    have a system of 10 B (+5 B)\n",
		"\nin sum, 2 nodes would:\n    restart web.service (2)\n    ~ curl 8.1 → 8.2 (+10 B) on 2 nodes\n    have systems that are larger by +10 B\n",
	} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if f.Record("web1").Desired != nil {
		t.Error("a diff is wanted of a node")
	}
}
