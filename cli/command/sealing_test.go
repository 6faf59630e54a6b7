package command

import (
	"encoding/json"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

// unsealed are the secrets of a manifest, as its node reads them; pre-build ones with a star.
func unsealed(t *testing.T, f *fleettest.Fleet, m *protocol.Manifest) map[string]string {
	t.Helper()
	all := map[string]string{}
	for _, s := range m.Secrets {
		value, err := protocol.Unseal(s.Sealed, f.XKey(m.Node))
		if err != nil {
			t.Errorf("%s of %s: %v", s.Name, m.Node, err)
		}
		if s.PreBuild {
			s.Name += "*"
		}
		all[s.Name] = string(value)
	}
	return all
}

// clear tells which files below the project have some bytes.
func (s *shell) clear(text string) (found []string) {
	filepath.WalkDir(s.dir, func(path string, e fs.DirEntry, err error) error {
		if err == nil && e.Type().IsRegular() {
			if data, _ := os.ReadFile(path); strings.Contains(string(data), text) {
				found = append(found, path)
			}
		}
		return nil
	})
	return found
}

func TestDeploySecrets(t *testing.T) {
	s, f := newFleet(t)
	for _, n := range []string{"web1", "web2", "db1"} {
		f.Add(n, "some")
	}
	s.pipe("hunter2-marked", "secrets", "store", "plain")
	s.pipe("[%%localhost.hostname%%]@[%%db1.ipv4%%] of [%%web2.ipv4%%]", "secrets", "store", "filled")
	s.pipe("machine cache", "secrets", "store", "netrc")
	s.pipe("unused", "secrets", "store", "unused")
	s.write("nodes/web1.nix", "[%%secrets/plain%%] [%%secrets/filled%%] [%%pre-build-secrets/netrc%%]")
	s.write("nodes/web2.nix", "[%%secrets/app/filled%%] [%%secrets/netrc%%]")
	s.must("deploy", "@some")
	for node, want := range map[string]map[string]string{
		"web1": {"plain": "hunter2-marked", "filled": "web1@192.0.2.7 of 192.0.2.7", "netrc*": "machine cache"},
		"web2": {"filled": "web2@192.0.2.7 of 192.0.2.7", "netrc": "machine cache"},
		"db1":  {},
	} {
		if got := unsealed(t, f, f.Manifest(node)); len(got) != len(want) {
			t.Errorf("%s has %q", node, got)
		} else {
			for name, value := range want {
				if got[name] != value {
					t.Errorf("%s: %s is %q", node, name, got[name])
				}
			}
		}
	}
	// Nobody else can read them, not even another node.
	if _, err := protocol.Unseal(f.Manifest("web1").Secrets[0].Sealed, f.XKey("web2")); err == nil {
		t.Error("web2 reads what is web1's")
	}
	for path, content := range f.Tree("web1") {
		if strings.Contains(content, "hunter2-marked") {
			t.Errorf("%s has a secret in clear", path)
		}
	}
	if found := s.clear("hunter2-marked"); found != nil {
		t.Errorf("in clear in %q", found)
	}
	// The way back of a rollout, and a rollback, bring none: the system that they go back to has its own.
	s.must("deploy", "web1", "--on-failure", "rollback")
	s.must("rollback", "web1")
	if m := f.Manifest("web1"); m.Rollback == nil || len(m.Secrets) != 0 {
		t.Errorf("a rollback brings %d secrets", len(m.Secrets))
	}
}

func TestMissingSecret(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1", "web")
	f.Add("web2", "web")
	s.write("nodes/web1.nix", "{ }\n[%%secrets/none%%]\n")
	f.Requests()
	s.expect(Refused, "web1: nodes/web1.nix:2: there is no secret none (nix-infra secrets store none, or leave it out with --allow-missing)", "deploy", "@web")
	if requests := f.Requests(); !slices.Equal(requests, []protocol.Action{protocol.ListNodes}) {
		t.Errorf("the controller was asked for %v", requests)
	}
	s.write("nodes/web2.nix", "[%%pre-build-secrets/other%%]")
	r := s.run("deploy", "@web")
	if r.status != Refused || !strings.Contains(r.stderr, "2 nodes can't have their secrets; nothing was deployed:") || !strings.Contains(r.stderr, "web2: nodes/web2.nix:1: there is no secret other") {
		t.Errorf("%+v", r)
	}
	s.pipe("x", "secrets", "store", "other")
	r = s.run("deploy", "@web", "--allow-missing")
	if r.status != OK || !strings.Contains(r.stderr, "warning: nodes/web1.nix:2: secret not found, skipping: none") {
		t.Errorf("%+v", r)
	}
	if len(f.Manifest("web1").Secrets) != 0 || len(f.Manifest("web2").Secrets) != 1 {
		t.Error("it left out another one")
	}
	// What is there and does not open is not missing.
	s.write("secrets/none.age", "rubbish")
	s.expect(Refused, "none.age is damaged", "deploy", "@web", "--allow-missing")
	os.Remove(s.path("secrets/none.age"))
	// Placeholders in values.
	f.Add("db1")
	s.write("nodes/web1.nix", "[%%secrets/filled%%]")
	for value, says := range map[string]string{
		"[%%dp1.ipv4%%]":      "did you mean db1",
		"[%%secrets/other%%]": "no secret is filled in here",
	} {
		s.pipe(value, "secrets", "store", "filled")
		s.expect(Refused, "web1: nodes/web1.nix:1: the value of secret filled: placeholder", "deploy", "web1")
		s.expect(Refused, says, "deploy", "web1")
	}
	s.pipe("[%%what%%]", "secrets", "store", "filled")
	s.expect(Refused, "what", "deploy", "web1")
	s.must("deploy", "web1", "--allow-unknown-placeholders")
	if got := unsealed(t, f, f.Manifest("web1")); got["filled"] != "[%%what%%]" {
		t.Errorf("%q", got)
	}
	// The controller can't put another key in the place of a node's.
	other := f.Record("web2").JWT
	f.Change("web1", func(n *protocol.NodeState) { n.JWT = other })
	s.expect(Refused, "the controller has keys of web2 (node) for web1", "deploy", "web1", "--allow-unknown-placeholders")
	f.Change("web1", func(n *protocol.NodeState) { n.JWT = "" })
	s.expect(Refused, "enroll it again", "deploy", "web1", "--allow-unknown-placeholders")
}

// TestSecretsOfClosures: a system that is built elsewhere needs its secrets, too, though its manifest brings no files.
func TestSecretsOfClosures(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	s.pipe("x", "secrets", "store", "a")
	s.write("nodes/web1.nix", "[%%secrets/a%%]")
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"cache: {pull: ['https://cache.example.org'], keys: ['"+"k:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="+"']}\n")
	s.must("deploy", "web1", "--build=cache", system("web1"))
	if got := unsealed(t, f, f.Manifest("web1")); got["a"] != "x" {
		t.Errorf("%q", got)
	}
	os.Remove(s.path("secrets/a.age"))
	s.expect(Refused, "there is no secret a", "deploy", "web1", "--build=cache", system("web1"))
}

func TestSecretsInBundles(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	s.pipe("x", "secrets", "store", "a")
	s.write("nodes/web1.nix", "[%%secrets/a%%]")
	file := s.path("web1.bundle")
	s.must("deploy", "web1", "--out", file)
	if m, _ := readBundle(t, f, file, "web1"); unsealed(t, f, m)["a"] != "x" {
		t.Errorf("%+v", m.Secrets)
	}
	s.expect(Refused, "nix-infra/nodes does not have it", "deploy", "web1", "--out", file, "--offline", "--serial", "9")
	s.write("nix-infra/nodes/web1.jwt", f.Record("web1").JWT+"\n")
	f.Stop()
	s.must("deploy", "web1", "--out", file, "--offline", "--serial", "9")
	if m, _ := readBundle(t, f, file, "web1"); m.Serial != 9 || unsealed(t, f, m)["a"] != "x" {
		t.Errorf("offline: %+v", m.Secrets)
	}
	s.write("nix-infra/nodes/web1.jwt", "rubbish")
	s.expect(Refused, "web1", "deploy", "web1", "--out", file, "--offline", "--serial", "9")
}

func TestSecretsInDiffs(t *testing.T) {
	s, f := newFleet(t)
	web1 := f.Add("web1")
	for _, name := range []string{"a", "b"} {
		s.must("secrets", "store", name, "--generate", "32")
	}
	s.write("nodes/web1.nix", "[%%secrets/a%%] [%%pre-build-secrets/b%%]")
	if out := s.must("deploy", "web1", "--mode", "dry-activate"); !strings.Contains(out, "web1 would have the secrets a, b (also for builds)") {
		t.Errorf("dry run:\n%s", out)
	}
	s.must("deploy", "web1")
	if r := s.run("diff", "web1", "--exit-code"); r.status != OK {
		t.Errorf("the same: %+v", r)
	}
	s.must("secrets", "store", "c", "--generate", "32")
	s.write("nodes/web1.nix", "[%%secrets/a%%] [%%secrets/c%%]")
	deployed := f.Manifest("web1").Created
	stored := deployed.Add(time.Hour).Truncate(time.Second)
	s.write("secrets/.changed.json", string(protocol.Encode(map[string]time.Time{"a": stored})))
	got := func() map[string]string {
		all := map[string]string{}
		for line := range strings.Lines(s.run("diff", "web1", "--json").out) {
			var d secretDifference
			if err := json.Unmarshal([]byte(line), &d); err == nil && d.Event == "secret" {
				all[d.Name] = d.Change + " " + strings.Join(d.Nodes, " ")
			}
		}
		return all
	}
	if d := got(); d["a"] != "changed web1" || d["b"] != "removed web1" || d["c"] != "added web1" || len(d) != 3 {
		t.Errorf("it says %v", d)
	}
	if r := s.run("diff", "web1"); !strings.Contains(r.out, "secret c added on 1 node: web1\n") {
		t.Errorf("it says\n%s", r.out)
	}
	// A rotation brought it meanwhile.
	web1.Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
		return protocol.SecretList{Secrets: []protocol.HeldSecret{{Name: "a", Written: stored.Unix()}}}, nil
	}})
	if d := got(); d["a"] != "" || len(d) != 2 {
		t.Errorf("after a rotation it says %v", d)
	}
	s.write("nodes/web1.nix", "[%%secrets/a%%] [%%pre-build-secrets/b%%]")
	if r := s.run("diff", "web1", "--exit-code"); r.status != OK {
		t.Errorf("the same: %+v", r)
	}
}

// TestTrustedKeys: public keys of caches that the earlier tool kept among the secrets.
func TestTrustedKeys(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	s.pipe("cache-1:c2VjcmV0", "secrets", "store", "nix-store.trusted-public-keys-1")
	s.write("nodes/web1.nix", "[%%nix-store.trusted-public-keys%%]")
	s.must("deploy", "web1")
	if got := f.Tree("web1")["web1.nix"]; got != `[ "cache-1:c2VjcmV0" ]` {
		t.Errorf("%q", got)
	}
}
