package agent_test

import (
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

// TestRekey: a node makes other keys, takes them by the operator's JWT for them and by nothing else, and is there again
// with them alone.
func TestRekey(t *testing.T) {
	f := testfleet.New(t)
	c := control(t, f)
	dir := enrolled(t, f)
	before, err := agent.Home(dir).Open()
	if err != nil {
		t.Fatal(err)
	}
	r := start(t, dir)
	beats := func(more int) {
		t.Helper()
		_, from := c.lastBeat()
		testfleet.Eventually(t, "beats", func() bool { _, n := c.lastBeat(); return n >= from+more })
	}
	beats(1)
	ann := f.User("ann", protocol.Admin)
	v, err := protocol.NewVerifier(f.Public.Operator, f.Public.AccountJWT)
	if err != nil {
		t.Fatal(err)
	}
	order := func(nonce byte, user string) *protocol.RekeyOrder {
		return &protocol.RekeyOrder{Nonce: append(make([]byte, 31), nonce), User: user}
	}
	prove := func(o *protocol.RekeyOrder) (protocol.Identity, *protocol.RekeyReply) {
		t.Helper()
		reply := answer[protocol.RekeyReply](t, f, ann, protocol.Rekey, o)
		id, err := v.ProveRekey(node, o, &reply, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return id, &reply
	}
	_, first := prove(order(1, ""))
	id, offer := prove(order(2, ""))
	if old, err := before.Key.PublicKey(); err != nil || id.Key != old || first.Request.Key != offer.Request.Key || first.Request.XKey != offer.Request.XKey {
		t.Errorf("it is %s and offers %s, then %s", id.Key, first.Request.Key, offer.Request.Key)
	}
	issue := func(name, key, xkey string) string {
		t.Helper()
		token, err := f.Keys.IssueNode(name, key, xkey)
		if err != nil {
			t.Fatal(err)
		}
		return token
	}
	other := testfleet.New(t)
	foreign, err := other.Keys.IssueNode(node, offer.Request.Key, offer.Request.XKey)
	if err != nil {
		t.Fatal(err)
	}
	asViewer, err := f.Keys.Issue(node, protocol.Viewer, offer.Request.Key, time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	for what, c := range map[string]struct {
		order *protocol.RekeyOrder
		code  protocol.Code
	}{
		"another fleet's":   {order(3, foreign), protocol.Untrusted},
		"another node's":    {order(4, issue("web-2", offer.Request.Key, offer.Request.XKey)), protocol.Invalid},
		"another role's":    {order(5, asViewer), protocol.Invalid},
		"another curve key": {order(6, issue(node, offer.Request.Key, id.XKey)), protocol.Invalid},
		"the old keys'":     {order(7, before.Answer.User), protocol.Invalid},
		"no nonce":          {&protocol.RekeyOrder{}, protocol.Malformed},
	} {
		reply := ask(t, f, ann, "ann", protocol.Rekey, c.order)
		if reply.Refused == nil || reply.Refused.Code != c.code {
			t.Errorf("%s: %+v, want %s", what, reply.Refused, c.code)
		}
	}
	if id, _ := prove(order(8, "")); id.XKey == offer.Request.XKey {
		t.Fatal("it took keys by a wrong JWT")
	}

	id, _ = prove(order(9, issue(node, offer.Request.Key, offer.Request.XKey)))
	if id.Key != offer.Request.Key || id.XKey != offer.Request.XKey {
		t.Errorf("it says that it has %+v", id)
	}
	select {
	case err := <-r.done:
		if err != nil {
			t.Errorf("the agent ended with %v", err)
		}
		r.cancel = nil
	case <-time.After(30 * time.Second):
		t.Fatal("the agent with the old keys goes on")
	}
	old, err := before.Key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	f.Revoke(old)
	start(t, dir)
	beats(1)
	if id, again := prove(order(10, "")); id.Key != offer.Request.Key || again.Request.Key == id.Key {
		t.Errorf("after it, it is %s", id.Key)
	}
	_, err = connect.To{URLs: f.URLs()[:1], CA: f.CA, Signer: before.Signer(), Name: node, InboxPrefix: protocol.InboxPrefix(node)}.Dial()
	if !errors.Is(err, nats.ErrAuthorization) && !errors.Is(err, nats.ErrAuthRevoked) {
		t.Errorf("with the old keys one comes in: %v", err)
	}
}
