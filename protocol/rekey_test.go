package protocol

import (
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nkeys"
)

// rekeyKeys are a node's.
type rekeyKeys struct {
	key, xkey     nkeys.KeyPair
	public, curve string
	user          string
}

func newRekeyKeys(t *testing.T, k *FleetKeys, name string) rekeyKeys {
	t.Helper()
	var r rekeyKeys
	var err error
	check := func() {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	r.key, err = nkeys.CreateUser()
	check()
	r.xkey, err = nkeys.CreateCurveKeys()
	check()
	r.public, err = r.key.PublicKey()
	check()
	r.curve, err = r.xkey.PublicKey()
	check()
	r.user, err = k.IssueNode(name, r.public, r.curve)
	check()
	return r
}

func (r rekeyKeys) request(t *testing.T, name string) *EnrolRequest {
	t.Helper()
	q := &EnrolRequest{Version: Version, Role: Node, Name: name, Key: r.public, XKey: r.curve, System: "x86_64-linux"}
	if err := q.Prove(r.key); err != nil {
		t.Fatal(err)
	}
	return q
}

// TestProveRekey: whoever is between a node and the operator can't slip in keys, nor say again what was said.
func TestProveRekey(t *testing.T) {
	k, err := NewFleet("test")
	if err != nil {
		t.Fatal(err)
	}
	foreign, err := NewFleet("test")
	if err != nil {
		t.Fatal(err)
	}
	old, next, other, eve := newRekeyKeys(t, k, "n1"), newRekeyKeys(t, k, "n1"), newRekeyKeys(t, k, "n2"), newRekeyKeys(t, foreign, "n1")
	revoked := newRekeyKeys(t, k, "n1")
	public, err := k.Publish(map[string]time.Time{revoked.public: time.Now().Add(time.Minute)})
	if err != nil {
		t.Fatal(err)
	}
	v, err := NewVerifier(public.Operator, public.AccountJWT)
	if err != nil {
		t.Fatal(err)
	}
	order := &RekeyOrder{Nonce: make([]byte, 32)}
	signed := func(by rekeyKeys, change func(*RekeyReply)) *RekeyReply {
		r := &RekeyReply{Nonce: order.Nonce, User: by.user, Request: next.request(t, "n1")}
		if change != nil {
			change(r)
		}
		if err := r.Prove(by.key); err != nil {
			t.Fatal(err)
		}
		return r
	}
	id, err := v.ProveRekey("n1", order, signed(old, nil), time.Now())
	if err != nil || id.Key != old.public || id.XKey != old.curve {
		t.Fatalf("%+v, %v", id, err)
	}
	swapped := signed(old, nil)
	swapped.Request = eve.request(t, "n1")
	mixed := signed(old, func(r *RekeyReply) { r.Request.XKey = eve.curve })
	for what, c := range map[string]struct {
		reply *RekeyReply
		code  Code
	}{
		"other keys slipped in":      {swapped, Forged},
		"another curve key":          {mixed, Forged},
		"of another fleet":           {signed(eve, nil), Untrusted},
		"by another node":            {signed(other, nil), Forged},
		"by a key that was revoked":  {signed(revoked, nil), Revoked},
		"another's JWT":              {signed(old, func(r *RekeyReply) { r.User = next.user }), Forged},
		"an answer to another order": {signed(old, func(r *RekeyReply) { r.Nonce = make([]byte, 31) }), Forged},
		"keys of another name":       {signed(old, func(r *RekeyReply) { r.Request = next.request(t, "n2") }), Forged},
		"the key that it has":        {signed(old, func(r *RekeyReply) { r.Request = old.request(t, "n1") }), Forged},
		"nobody's":                   {&RekeyReply{Nonce: order.Nonce}, Untrusted},
	} {
		if _, err := v.ProveRekey("n1", order, c.reply, time.Now()); !errors.Is(err, &Refusal{Code: c.code}) {
			t.Errorf("%s: %v, want %s", what, err, c.code)
		}
	}
}
