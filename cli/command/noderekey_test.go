package command

import (
	"errors"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// keeper is a node that keeps an identity, and gives itself other keys as an agent does.
type keeper struct {
	t    *testing.T
	f    *fleettest.Fleet
	node *fleettest.Node
	home machine.Home

	mu    sync.Mutex
	m     *machine.Machine
	reply func(o *protocol.RekeyOrder, r *protocol.RekeyReply) error // what becomes of an answer; nil: it is given
}

func newKeeper(t *testing.T, f *fleettest.Fleet, name string) *keeper {
	t.Helper()
	k := &keeper{t: t, f: f, node: f.Add(name), home: machine.Home{Dir: t.TempDir(), Role: protocol.Node}}
	r, err := k.home.Request(name)
	k.must(err)
	a, err := f.Authority.Sign(r, nil, time.Now())
	k.must(err)
	_, err = k.home.Load(protocol.Encode(a))
	k.must(err)
	k.m, err = k.home.Open()
	k.must(err)
	f.Change(name, func(n *protocol.NodeState) { n.Key, n.XKey, n.JWT = r.Key, r.XKey, a.User })
	k.node.Script(fleettest.Script{Answers: k.answers})
	return k
}

func (k *keeper) must(err error) {
	k.t.Helper()
	if err != nil {
		k.t.Fatal(err)
	}
}

func (k *keeper) answers(o *protocol.Verified) (any, error) {
	if o.Action != protocol.Rekey {
		return protocol.Pong{}, nil
	}
	order, err := protocol.Decode[protocol.RekeyOrder](o.Payload)
	if err != nil {
		return nil, err
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	next, err := k.home.Replacement()
	if err != nil {
		return nil, err
	}
	reply := &protocol.RekeyReply{Nonce: order.Nonce, User: k.m.Answer.User, Request: next.Request}
	if order.User != "" {
		if err := k.home.Replace(order.User); err != nil {
			return nil, err
		}
		if k.m, err = k.home.Resume(); err != nil {
			return nil, err
		}
		reply = &protocol.RekeyReply{Nonce: order.Nonce, User: order.User}
	}
	if err := reply.Prove(k.m.Key); err != nil {
		return nil, err
	}
	if k.reply != nil {
		err = k.reply(&order, reply)
	}
	return reply, err
}

func (k *keeper) does(reply func(*protocol.RekeyOrder, *protocol.RekeyReply) error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.reply = reply
}

// signer is the node's identity, and its public nkey.
func (k *keeper) signer() (*protocol.Signer, string) {
	k.t.Helper()
	k.mu.Lock()
	defer k.mu.Unlock()
	key, err := k.m.Key.PublicKey()
	k.must(err)
	return k.m.Signer(), key
}

// comesIn tells whether the broker takes an identity.
func (k *keeper) comesIn(s *protocol.Signer) bool {
	k.t.Helper()
	nc, err := connect.To{URLs: []string{k.f.URL}, CA: k.f.Authority.CA.Public(), Signer: s, Name: "x", InboxPrefix: "unused"}.Dial()
	if errors.Is(err, nats.ErrAuthRevoked) || errors.Is(err, nats.ErrAuthorization) {
		return false
	}
	k.must(err)
	nc.Close()
	return true
}

func (k *keeper) revoked(key string) bool {
	k.t.Helper()
	void, err := protocol.Revocations(k.f.Account())
	k.must(err)
	return !void[key].IsZero()
}

func TestNodeRekey(t *testing.T) {
	s, f := newFleet(t)
	web1, web2 := newKeeper(t, f, "web1"), newKeeper(t, f, "web2")
	f.Change("web1", func(n *protocol.NodeState) {
		n.Tags, n.Desired = []string{"web"}, &protocol.Desired{Serial: 9, Deployment: "d-9"}
	})
	old1, key1 := web1.signer()
	old2, key2 := web2.signer()
	r := s.run("node", "rekey", "web1", "web2", "--json")
	if r.status != OK || !strings.Contains(r.stderr, "web1 has not accepted deployment d-9") {
		t.Fatalf("%+v", r)
	}
	docs := documents(t, r.out)
	new1, next1 := web1.signer()
	if len(docs) != 2 || docs[0]["node"] != "web1" || docs[0]["state"] != "rekeyed" || docs[0]["key"] != next1 || docs[0]["pending"] != true || docs[1]["pending"] != false {
		t.Errorf("%v", docs)
	}
	if n := f.Record("web1"); n.Key != next1 || n.JWT != new1.User || len(n.Tags) != 1 || n.Replaces != "" {
		t.Errorf("the controller has %+v", n.NodeRecord)
	}
	if !web1.revoked(key1) || !web2.revoked(key2) || web1.revoked(next1) || web1.comesIn(old1) || web2.comesIn(old2) || !web1.comesIn(new1) {
		t.Error("it is not the old keys that are void, and no others")
	}
	if data, err := os.ReadFile(s.path("nix-infra/nodes/web1.jwt")); err != nil || strings.TrimSpace(string(data)) != new1.User {
		t.Errorf("the project has %.20s, %v", data, err)
	}
	s.must("node", "rekey", "web1")
	if _, third := web1.signer(); third == next1 || !web1.revoked(next1) || web1.revoked(third) {
		t.Error("it can't be done twice")
	}
}

// TestNodeRekeyIsBrokenOff: a node whose answer was lost has its new keys, and nobody but it knows. The next run voids
// all that it had before.
func TestNodeRekeyIsBrokenOff(t *testing.T) {
	s, f := newFleet(t)
	web1 := newKeeper(t, f, "web1")
	_, first := web1.signer()
	web1.does(func(o *protocol.RekeyOrder, _ *protocol.RekeyReply) error {
		if o.User != "" {
			web1.node.Silence()
		}
		return nil
	})
	s.expect(Unanswered, "it may have its new keys or not", "node", "rekey", "web1", "--timeout", "5s")
	_, second := web1.signer()
	if second == first || web1.revoked(first) {
		t.Error("the keys of a node that proved nothing were revoked")
	}
	web1.does(nil)
	web1.node.Return()
	s.must("node", "rekey", "web1")
	if _, third := web1.signer(); third == second || !web1.revoked(first) || !web1.revoked(second) || web1.revoked(third) || f.Record("web1").Key != third {
		t.Error("old keys are good still")
	}
	f.Register("web2")
	s.expect(Unanswered, "web2 is not connected", "node", "rekey", "web2")
}

func TestNodeRekeyIsRefused(t *testing.T) {
	s, f := newFleet(t)
	web1, eve := newKeeper(t, f, "web1"), newKeeper(t, f, "eve")
	_, key := web1.signer()
	for what, c := range map[string]struct {
		reply func(*protocol.RekeyOrder, *protocol.RekeyReply) error
		says  string
	}{
		"somebody else's keys": {func(_ *protocol.RekeyOrder, r *protocol.RekeyReply) error {
			next, err := eve.home.Replacement()
			r.Request = next.Request
			return err
		}, "is not its own"},
		"another node's answer": {func(_ *protocol.RekeyOrder, r *protocol.RekeyReply) error {
			r.User = eve.m.Answer.User
			return r.Prove(eve.m.Key)
		}, "eve (node) answers for web1"},
		"an old answer": {func(_ *protocol.RekeyOrder, r *protocol.RekeyReply) error {
			r.Nonce = make([]byte, 32)
			return r.Prove(web1.m.Key)
		}, "is not its own"},
	} {
		web1.does(c.reply)
		s.expect(SomeFailed, c.says, "node", "rekey", "web1")
		if n := f.Record("web1"); n.Key != key || web1.revoked(key) {
			t.Errorf("%s: the keys changed", what)
		}
	}
	web1.node.Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) {
		return nil, protocol.Refuse(protocol.Conflict, "web1 is busy with deployment d1")
	}})
	s.expect(SomeFailed, "web1 is busy with deployment d1", "node", "rekey", "web1")
	s.expect(Refused, "give other keys to which nodes?", "node", "rekey")
	if f.Record("web1").Key != key || web1.revoked(key) {
		t.Error("the keys changed")
	}
}
