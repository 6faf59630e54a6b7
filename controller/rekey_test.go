package controller

import (
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

// TestNodeGetsOtherKeys: a node's keys are replaced only by who says which ones those are, and nothing else of it changes.
func TestNodeGetsOtherKeys(t *testing.T) {
	r := startRig(t)
	admin, dora := r.person("anna", protocol.Admin), r.person("dora", protocol.Deployer)
	first := r.record("n1", r.signer("n1", protocol.Node))
	first.Tags = []string{"web"}
	before := asked[protocol.NodeRecord](t, admin, protocol.PutNode, first)
	asked[protocol.NodeRecord](t, dora, protocol.LockNode, protocol.LockRequest{Node: "n1", Reason: "wait"})
	second, third := r.record("n1", r.signer("n1", protocol.Node)), r.record("n1", r.signer("n1", protocol.Node))
	second.Tags, second.Enrolled = before.Tags, before.Enrolled

	_, err := admin.ask(protocol.PutNode, second)
	wantCode(t, err, protocol.Conflict)
	second.Replaces = third.Key
	_, err = admin.ask(protocol.PutNode, second)
	wantCode(t, err, protocol.Conflict)
	second.Replaces = first.Key
	unproven := second
	unproven.XKey = third.XKey
	_, err = admin.ask(protocol.PutNode, unproven)
	wantCode(t, err, protocol.Invalid)
	if _, err := dora.ask(protocol.PutNode, second); err == nil {
		t.Error("a deployer gave a node other keys")
	}

	asked[protocol.NodeRecord](t, admin, protocol.PutNode, second)
	now := asked[protocol.NodeRecord](t, admin, protocol.PutNode, second) // once more is the same
	if now.Key != second.Key || now.XKey != second.XKey || now.JWT != second.JWT || now.Replaces != "" {
		t.Errorf("the keys are %+v", now)
	}
	if len(now.Tags) != 1 || !now.Enrolled.Equal(before.Enrolled) || now.Lock == nil || now.Lock.Reason != "wait" {
		t.Errorf("something else changed: %+v", now)
	}
	// What was replaced can't come back by what was said then.
	_, err = admin.ask(protocol.PutNode, first)
	wantCode(t, err, protocol.Conflict)
}
