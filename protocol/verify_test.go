package protocol

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

var now = time.Date(2026, 11, 23, 12, 0, 0, 0, time.UTC)

// fleet is a fleet with one signer per role, and a verifier that pins it.
type fleet struct {
	keys     *FleetKeys
	public   *Public
	verifier *Verifier
}

func newFleet(t testing.TB) *fleet {
	t.Helper()
	keys, err := NewFleet("test")
	must(t, err)
	public, err := keys.Publish(nil)
	must(t, err)
	v, err := NewVerifier(public.Operator, public.AccountJWT)
	must(t, err)
	return &fleet{keys, public, v}
}

func (f *fleet) signer(t testing.TB, name string, r Role, expires time.Time) *Signer {
	t.Helper()
	creds, err := f.keys.Credentials(name, r, expires)
	must(t, err)
	s, _, err := ParseCredentials(creds)
	must(t, err)
	return s
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

type seenMap map[string]bool

func (s seenMap) Add(id string, _ time.Time) (bool, error) {
	known := s[id]
	s[id] = true
	return known, nil
}

func TestVerifyRequest(t *testing.T) {
	f, stranger := newFleet(t), newFleet(t)
	viewer := f.signer(t, "vera", Viewer, time.Time{})
	deployer := f.signer(t, "dora", Deployer, time.Time{})
	resign := func(s *Signer, change func(*Header)) *Signed {
		h := Header{Version: Version, Kind: KindRequest, ID: NewID(), Action: Ping, Target: "n1",
			NotBefore: now.Unix(), Expires: now.Add(RequestLifetime).Unix()}
		change(&h)
		signed, err := s.Sign(h, []byte(`{}`))
		must(t, err)
		return signed
	}
	good := func() *Signed { return resign(viewer, func(*Header) {}) }
	change := func(f func(*Signed)) *Signed { s := good(); f(s); return s }
	expired := f.signer(t, "erna", Viewer, now.Add(-time.Minute))
	node := f.signer(t, "n2", Node, time.Time{})

	for name, c := range map[string]struct {
		signed *Signed
		want   Code // "" is accepted
	}{
		"good":              {good(), ""},
		"to everyone":       {resign(viewer, func(h *Header) { h.Target = Everyone }), ""},
		"no signature":      {change(func(s *Signed) { s.Signature = nil }), Unsigned},
		"no user":           {change(func(s *Signed) { s.User = "" }), Unsigned},
		"bit in signature":  {change(func(s *Signed) { s.Signature[3] ^= 1 }), Forged},
		"another's jwt":     {change(func(s *Signed) { s.User = deployer.User }), Forged},
		"header changed":    {change(func(s *Signed) { s.Header = []byte(strings.Replace(string(s.Header), "n1", "n3", 1)) }), Forged},
		"payload changed":   {change(func(s *Signed) { s.Payload = []byte(`{"a":1}`) }), Tampered},
		"other fleet":       {resign(stranger.signer(t, "vera", Admin, time.Time{}), func(*Header) {}), Untrusted},
		"no jwt":            {change(func(s *Signed) { s.User = "x.y.z" }), Untrusted},
		"jwt bit":           {change(func(s *Signed) { s.User = flip(s.User) }), Untrusted},
		"other node":        {resign(viewer, func(h *Header) { h.Target = "n3" }), Misaddressed},
		"to the controller": {resign(viewer, func(h *Header) { h.Target = ControllerName }), Misaddressed},
		"over role":         {resign(viewer, func(h *Header) { h.Action = Release }), OverRole},
		"unknown action":    {resign(deployer, func(h *Header) { h.Action = "no-such-action" }), OverRole},
		"a node orders":     {resign(node, func(*Header) {}), OverRole},
		"expired":           {resign(viewer, func(h *Header) { h.NotBefore -= 300; h.Expires = now.Unix() - 31 }), Expired},
		"expired user":      {resign(expired, func(*Header) {}), Expired},
		"not yet":           {resign(viewer, func(h *Header) { h.NotBefore = now.Unix() + 31 }), NotYet},
		"valid for ever":    {resign(viewer, func(h *Header) { h.Expires = now.Unix() + 3600 }), Invalid},
		"never expires":     {resign(viewer, func(h *Header) { h.Expires = 0 }), Expired},
		"a manifest":        {resign(deployer, func(h *Header) { h.Kind = KindManifest; h.Action = Deploy }), Malformed},
		"next version":      {resign(viewer, func(h *Header) { h.Version = 2 }), OtherVersion},
		"no id":             {resign(viewer, func(h *Header) { h.ID = "" }), Malformed},
		"long id":           {resign(viewer, func(h *Header) { h.ID = strings.Repeat("a", 65) }), Malformed},
		"id of two tokens":  {resign(viewer, func(h *Header) { h.ID = "a.b" }), Malformed},
		"wildcard id":       {resign(viewer, func(h *Header) { h.ID = ">" }), Malformed},
		"id of two lines":   {resign(viewer, func(h *Header) { h.ID = "a\r\nPUB b 0" }), Malformed},
		"no target":         {resign(viewer, func(h *Header) { h.Target = "" }), Malformed},
		"long target":       {resign(viewer, func(h *Header) { h.Target = strings.Repeat("a", 1<<16) }), Malformed},
		"wild target":       {resign(viewer, func(h *Header) { h.Target = "n1.>" }), Malformed},
		"header not json":   {change(func(s *Signed) { s.Header = []byte("{") }), Malformed},
	} {
		t.Run(name, func(t *testing.T) {
			seen := seenMap{}
			expect := Expect{Kind: KindRequest, Targets: []string{"n1", Everyone}, Now: now}
			v, _, err := f.verifier.Verify(c.signed, expect, seen)
			if c.want == "" {
				must(t, err)
				if v.Sender.Name != "vera" || v.Sender.Role != Viewer {
					t.Fatalf("sender %+v", v.Sender)
				}
				_, _, err = f.verifier.Verify(c.signed, expect, seen)
				c.want = Replayed
			} else if len(seen) != 0 {
				t.Error("a refused request was remembered")
			}
			if !errors.Is(err, &Refusal{Code: c.want}) {
				t.Fatalf("got %v, want %s", err, c.want)
			}
		})
	}
}

// untilMap forgets as receivers do.
type untilMap map[string]time.Time

func (s untilMap) Add(id string, until time.Time) (bool, error) {
	_, known := s[id]
	s[id] = until
	return known, nil
}

// As long as a request would be taken, its id is remembered.
func TestReplayAtTheEnd(t *testing.T) {
	f := newFleet(t)
	s, id, err := f.signer(t, "vera", Viewer, time.Time{}).Request(Ping, "n1", nil, now)
	must(t, err)
	seen := untilMap{}
	at := func(when time.Time) error {
		_, _, err := f.verifier.Verify(s, Expect{Kind: KindRequest, Targets: []string{"n1"}, Now: when}, seen)
		return err
	}
	must(t, at(now))
	until := seen[id]
	for ms := range 3000 {
		when := now.Add(RequestLifetime + ClockSkew + time.Duration(ms-1000)*time.Millisecond)
		if when.After(until) {
			delete(seen, id)
		}
		if err := at(when); err == nil {
			t.Fatalf("it is taken again %s after it was signed, and was remembered for %s", when.Sub(now), until.Sub(now))
		}
	}
}

func TestOwnSubjects(t *testing.T) {
	for reply, want := range map[string]bool{
		"ni.v1.node.n1.down.abc.1": true, "ni.v2.node.n1.down.abc": true,
		"ni.v1.node.n1.down": false, "ni.v1.node.n1.down.": false, "ni.v1.node.n1.down..a": false, "ni..node.n1.down.a": false,
		"ni.v1.node.n2.down.a": false, "ni.v1.node.n1.downx.a": false, "ni.v1.node.n1.down.*": false, "ni.v1.node.n1.down.>": false,
		"ni.v1.node.n1.down.a b": false, "ni.v1.node.n1.down.a\r\nPUB x 0": false, "ni.v1.node.n1.down.a\x00": false,
		"ni.v1.node.n1.down.\xff": false, "ni.v1.node.n1.down.ü": false, "": false,
	} {
		if OwnInbox("n1", reply) != want {
			t.Errorf("%q is n1's own inbox: %v", reply, !want)
		}
	}
	for reply, want := range map[string]bool{
		"ni.v1.reply.vera.x.n1": true, "ni.v1.reply.vera.x.n2": false, "ni.v1.reply..x.n1": false, "ni.v1.reply.vera..n1": false,
		"ni.v1.reply.*.x.n1": false, "ni.v1.reply.vera.\t.n1": false, "ni.v1.reply.vera.x\n.n1": false, "ni.v1.reply.vera.x.y.n1": false, "": false,
	} {
		if OwnReply("n1", reply) != want {
			t.Errorf("n1 may answer on %q: %v", reply, !want)
		}
	}
}

// flip changes a letter in the middle of a JWT's claims.
func flip(token string) string {
	parts := strings.Split(token, ".")
	i, b := len(parts[1])/2, []byte(parts[1])
	if b[i] == 'A' {
		b[i] = 'B'
	} else {
		b[i] = 'A'
	}
	return parts[0] + "." + string(b) + "." + parts[2]
}

func TestRevocation(t *testing.T) {
	f := newFleet(t)
	v := f.signer(t, "vera", Viewer, time.Time{})
	ask := func() error {
		s, _, err := v.Request(Ping, "n1", nil, now)
		must(t, err)
		_, _, err = f.verifier.Verify(s, Expect{Kind: KindRequest, Targets: []string{"n1"}, Now: now}, seenMap{})
		return err
	}
	must(t, ask())
	pub, _ := v.Key.PublicKey()
	newer, err := f.keys.Publish(map[string]time.Time{pub: time.Now().Add(time.Second)})
	must(t, err)
	changed, err := f.verifier.SetAccount(newer.AccountJWT)
	if err != nil || !changed {
		t.Fatalf("changed=%v, %v", changed, err)
	}
	if err := ask(); !errors.Is(err, &Refusal{Code: Revoked}) {
		t.Fatalf("got %v", err)
	}
}

func TestSetAccountRefuses(t *testing.T) {
	f, other := newFleet(t), newFleet(t)
	operator, _, err := pairOf(f.keys.Operator)
	must(t, err)
	ac, err := f.keys.account(nil)
	must(t, err)
	selfSigner, _, err := pairOf(f.keys.Account)
	must(t, err)
	self, err := ac.Encode(selfSigner)
	must(t, err)
	foreign := jwt.NewAccountClaims(mustKey(t, nkeys.CreateAccount))
	foreignToken, err := foreign.Encode(operator)
	must(t, err)
	for name, token := range map[string]string{
		"another operator's": other.public.AccountJWT, "self-signed": self, "another account": foreignToken, "garbage": "a.b.c", "empty": "",
	} {
		if _, err := f.verifier.SetAccount(token); err == nil {
			t.Errorf("%s was taken over", name)
		}
	}
	if f.verifier.Account() != f.public.AccountJWT {
		t.Error("the account changed")
	}
}

func mustKey(t testing.TB, create func() (nkeys.KeyPair, error)) string {
	t.Helper()
	k, err := create()
	must(t, err)
	p, err := k.PublicKey()
	must(t, err)
	return p
}

// Every role's permissions must exist, and no role of people may publish to JetStream or another
// user's replies.
func TestPermissions(t *testing.T) {
	for _, r := range Roles {
		p, err := Permissions(r)
		must(t, err)
		for _, s := range p.Pub.Allow {
			if r != Controller && (strings.HasPrefix(s, "$") || s == ">" || strings.HasPrefix(s, "_INBOX")) {
				t.Errorf("%s may publish %s", r, s)
			}
		}
	}
	if _, err := Permissions("king"); err == nil {
		t.Error("a role that does not exist has permissions")
	}
}

func TestRoleOrder(t *testing.T) {
	for i, r := range people {
		for j, least := range people {
			if r.AtLeast(least) != (i >= j) {
				t.Errorf("%s at least %s", r, least)
			}
		}
	}
	for _, r := range []Role{Node, Controller, "", "king"} {
		if r.AtLeast(Viewer) {
			t.Errorf("%q may ask", r)
		}
	}
	if LeastRole("an action of tomorrow") != Admin {
		t.Error("an action without a row does not need admin")
	}
}
