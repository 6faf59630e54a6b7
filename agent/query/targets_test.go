package query

import (
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// A grant that does not cover this node is worth nothing here: asked alone, the node says so; a broadcast was not meant
// for it, and it only keeps a record.
func TestRestrictedGrant(t *testing.T) {
	s := serve(t)
	restricted := func(name string, targets ...string) *asker {
		creds, err := s.fleet.Keys.Credentials(name, protocol.Deployer, time.Time{}, targets...)
		if err != nil {
			t.Fatal(err)
		}
		a := s.asker(name, protocol.Deployer)
		if a.signer, _, err = protocol.ParseCredentials(creds); err != nil {
			t.Fatal(err)
		}
		return a
	}
	here, elsewhere := restricted("rita", node[:1]+"*"), restricted("otto", "elsewhere")
	for _, target := range []string{node, protocol.Everyone} {
		h := header(protocol.Ping, target)
		if _, r := here.send(protocol.RequestSubject(target, protocol.Ping), protocol.Encode(here.sign(h, nil)), h.ID); r.Refused != nil {
			t.Errorf("to %s, of a grant that covers it: %v", target, r.Refused)
		}
	}
	s.effects()

	h := header(protocol.Ping, node)
	if _, r := elsewhere.send(protocol.RequestSubject(node, protocol.Ping), protocol.Encode(elsewhere.sign(h, nil)), h.ID); r.Refused == nil || r.Refused.Code != protocol.OffTarget {
		t.Errorf("answered %+v", r)
	}
	all := header(protocol.Ping, protocol.Everyone)
	if err := elsewhere.nc.Publish(protocol.RequestSubject(protocol.Everyone, protocol.Ping), protocol.Encode(elsewhere.sign(all, nil))); err != nil {
		t.Fatal(err)
	}
	// What comes next is answered after it.
	after := header(protocol.Ping, node)
	if subject, _ := elsewhere.send(protocol.RequestSubject(node, protocol.Ping), protocol.Encode(elsewhere.sign(after, nil)), after.ID); subject != protocol.ReplySubject("otto", after.ID, node) {
		t.Errorf("the broadcast was answered, on %s", subject)
	}
	ran, records := s.effects()
	if len(ran) > 0 || len(records) != 3 {
		t.Fatalf("ran %v, on record are %+v", ran, records)
	}
	for i, id := range []string{h.ID, all.ID, after.ID} {
		if r := records[i]; r.Request != id || r.User != "otto" || r.Outcome != string(protocol.OffTarget) {
			t.Errorf("record %d is %+v", i, r)
		}
	}
}
