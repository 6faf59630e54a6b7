package command

import (
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

// A system that has the agent in it is built here only with the very programs that the node has in its own store.
func TestBuildHereWithAgent(t *testing.T) {
	needsFakeNix(t)
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, program := range []string{"nix-infra-agent", "nix-infra-controller"} {
		file := filepath.Join(filepath.Dir(self), program+"-linux-amd64")
		elf := "\x7fELF" + strings.Repeat("\x00", 14) + "\x3e\x00"
		if err := os.WriteFile(file, []byte(elf), 0o755); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.Remove(file) })
	}
	facts := func(agent, controller string) []byte {
		f := protocol.NodeFacts{Version: protocol.Version, Node: "web1", System: "x86_64-linux", Agent: &protocol.StoredProgram{Name: "nix-infra-agent", Hash: "sha256:" + agent}}
		if controller != "" {
			f.Controller = &protocol.StoredProgram{Name: "nix-infra-controller", Hash: "sha256:" + controller}
		}
		return protocol.Encode(f)
	}
	other := strings.Repeat("b", 52)
	for name, c := range map[string]struct {
		facts []byte
		says  string
	}{
		"the same agent":     {facts(agentHash, ""), ""},
		"both":               {facts(agentHash, controllerHash), ""},
		"another agent":      {facts(other, ""), "web1: the node has another nix-infra-agent than"},
		"another controller": {facts(agentHash, other), "web1: the node has another nix-infra-controller than"},
		"no facts":           {nil, "web1: its agent tells no facts"},
		"hostile facts":      {[]byte(`{"v":1,"agent":{"name":"../../etc/passwd","hash":"x"}}`), "is not nix-infra-agent"},
		"broken facts":       {[]byte("{"), "web1: its facts: "},
	} {
		t.Run(name, func(t *testing.T) {
			s, f := lonelyFleet(t)
			newCache(t, s)
			s.write("flake.nix", "{ outputs = { nixpkgs, ... }: nixpkgs.lib.nixosSystem { }; }\n")
			s.write("configuration.nix", "{ imports = [ ./nix-infra ]; }\n")
			f.Add("web1").Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) {
				files := map[string][]byte{"hardware-configuration.nix": []byte("{ }\n")}
				if c.facts != nil {
					files[protocol.FactsFile] = c.facts
				}
				return protocol.FileList{Files: files}, nil
			}})
			r := s.run("deploy", "web1", "--build=local")
			if c.says != "" {
				if r.status != SomeFailed || !strings.Contains(r.stderr, c.says) {
					t.Errorf("status %d, %s", r.status, r.stderr)
				}
				return
			}
			if r.status != OK {
				t.Fatalf("status %d, %s", r.status, r.stderr)
			}
			if tree := f.Tree("web1"); tree[protocol.FactsFile] != "" || !json.Valid([]byte(tree["nix-infra/settings.json"])) {
				t.Errorf("the facts are in the manifest, or the settings are not: %q", tree)
			}
		})
	}
}
