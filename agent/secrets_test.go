package agent_test

import (
	"testing"

	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

// TestSecretRequests: a node says which secrets it holds, and takes a new value only of one of those, in form.
func TestSecretRequests(t *testing.T) {
	f := testfleet.New(t)
	c := control(t, f)
	start(t, enrolled(t, f))
	testfleet.Eventually(t, "a beat", func() bool { _, n := c.lastBeat(); return n > 0 })
	ann, dora := f.User("ann", protocol.Viewer), f.User("dora", protocol.Deployer)
	if list := answer[protocol.SecretList](t, f, ann, protocol.ListSecrets, struct{}{}); list.Secrets == nil || len(list.Secrets) != 0 {
		t.Errorf("%+v", list)
	}
	order := protocol.RotateOrder{Secret: protocol.SealedSecret{Name: "db", Sealed: make([]byte, 200)}, Timeout: 10, Settle: 1}
	hurried := order
	hurried.Timeout = 0
	for _, c := range []struct {
		what any
		code protocol.Code
	}{
		{order, protocol.Unknown}, {hurried, protocol.Malformed}, {"db", protocol.Malformed},
	} {
		reply := ask(t, f, dora, "dora", protocol.RotateSecret, c.what)
		if reply.Refused == nil || reply.Refused.Code != c.code {
			t.Errorf("%+v: %+v; want %s", c.what, reply.Refused, c.code)
		}
	}
}
