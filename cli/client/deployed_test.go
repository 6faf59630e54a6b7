package client_test

import (
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

// What was deployed can be looked at, in pieces, and is not believed to be what its name doesn't say.
func TestWhatWasDeployed(t *testing.T) {
	f := fleettest.New(t)
	f.Register("web1")
	c := connect(t, f, "alice", protocol.Deployer)
	if doc, err := c.Manifest(t.Context(), "web1", ""); err != nil || doc != nil {
		t.Errorf("before anything was deployed: %q, %v", doc, err)
	}
	if _, err := c.Manifest(t.Context(), "web9", ""); err == nil || !strings.Contains(err.Error(), `there is no node "web9"`) {
		t.Errorf("of an unknown node: %v", err)
	}
	text := []byte(strings.Repeat("so many words, and hardly two alike: ", 3) + protocol.NewID() + protocol.NewID() + protocol.NewID())
	good, forged := protocol.Digest(text), protocol.Digest([]byte("good"))
	f.Forge(good, text)
	f.Forge(forged, []byte("evil"))
	if data, err := c.Blob(t.Context(), "web1", good, good); err != nil || string(data) != string(text) {
		t.Errorf("%q, %v", data, err)
	}
	if data, err := c.Blob(t.Context(), "web1", good, forged); err == nil || !strings.Contains(err.Error(), "another content than its name says") {
		t.Errorf("%q, %v", data, err)
	}
	f.Change("web1", func(n *protocol.NodeState) { n.Desired = &protocol.Desired{Digest: forged} })
	if doc, err := c.Manifest(t.Context(), "web1", ""); err == nil || !strings.Contains(err.Error(), "another content than its name says") {
		t.Errorf("%q, %v", doc, err)
	}
}

// An answer may say more than is known here, and one that can't be read is the node's failure alone.
func TestAskEach(t *testing.T) {
	f := fleettest.New(t)
	for name, body := range map[string]any{"good": map[string]any{"kept": 3, "news": true}, "bad": []string{"what"}} {
		f.Add(name).Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) { return body, nil }})
	}
	f.Register("off")
	c := connect(t, f, "alice", protocol.Deployer)
	kept, failed := map[string]int{}, map[string]error{}
	silent, err := client.AskEach(soon(t), c, []string{"good", "bad", "off"}, protocol.CollectGarbage, protocol.GarbageRequest{}, func(node string, r protocol.GarbageReport, err error) {
		kept[node], failed[node] = r.Kept, err
	})
	if err != nil || len(silent) != 1 || silent[0] != "off" || kept["good"] != 3 || failed["good"] != nil || failed["bad"] == nil {
		t.Errorf("silent %v, kept %v, failed %v, %v", silent, kept, failed, err)
	}
}
