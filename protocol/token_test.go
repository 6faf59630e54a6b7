package protocol

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"
)

func testCA(t testing.TB) []byte {
	t.Helper()
	public, private, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, public, private)
	must(t, err)
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func (f *fleet) token(t testing.TB, node string, ends time.Time) (*Token, string) {
	t.Helper()
	token, key, err := f.keys.NewToken(node, ends, f.public.Operator, testCA(t), []string{"tls://c:4222", "wss://c:443"})
	must(t, err)
	return token, key
}

// machineRequest is what a machine says of itself to become a node.
func machineRequest(t testing.TB, name string, change func(*EnrolRequest)) *EnrolRequest {
	t.Helper()
	key, err := nkeys.CreateUser()
	must(t, err)
	r := &EnrolRequest{Version: Version, Role: Node, Name: name, XKey: mustKey(t, nkeys.CreateCurveKeys), Hostname: "h", System: "x86_64-linux", Created: now}
	r.Key, err = key.PublicKey()
	must(t, err)
	if change != nil {
		change(r)
	}
	must(t, r.Prove(key))
	return r
}

func TestTokenText(t *testing.T) {
	f, other := newFleet(t), newFleet(t)
	ends := now.Add(time.Hour)
	token, key := f.token(t, "web1", ends)
	foreign, _ := other.token(t, "web1", ends)
	text := token.String()
	if strings.ContainsAny(text, " \n\"'$") || len(text) > MaxToken/4 {
		t.Errorf("a token of %d bytes that can't be pasted anywhere: %s", len(text), text)
	}
	again, err := ParseToken(" " + text + "\r\n")
	must(t, err)
	if _, k, err := again.Signer(); err != nil || k != key || again.Node != "web1" || !again.Ends().Equal(ends) || again.Operator != f.public.Operator || len(again.Controllers) != 2 {
		t.Errorf("%+v, key %s, want %s: %v", again, k, key, err)
	}
	mixed := func(change func(*Token)) string {
		c := *token
		change(&c)
		return c.String()
	}
	for name, c := range map[string]struct{ text, want string }{
		"nothing":           {"", "begins with"},
		"something else":    {"U" + text, "begins with"},
		"another version":   {strings.Replace(text, "token-1", "token-2", 1), `version "2"`},
		"cut off":           {text[:len(text)-100], "damaged"},
		"without its end":   {text[:strings.LastIndex(text, ".")], "damaged"},
		"a letter off":      {text[:60] + string(text[60]^1) + text[61:], "damaged"},
		"too long":          {tokenPrefix + strings.Repeat("A", MaxToken), "at most"},
		"another's seed":    {mixed(func(c *Token) { c.Seed = foreign.Seed }), "don't belong together"},
		"another name":      {mixed(func(c *Token) { c.Node = "db1" }), `about "web1"`},
		"no seed":           {mixed(func(c *Token) { c.Seed = "SUNO" }), "seed"},
		"no operator":       {mixed(func(c *Token) { c.Operator = "O" }), "operator"},
		"no CA":             {mixed(func(c *Token) { c.CA = []byte("x") }), "CA"},
		"plain connections": {mixed(func(c *Token) { c.Controllers = []string{"nats://c:4222"} }), "controller URL"},
		"nowhere to go":     {mixed(func(c *Token) { c.Controllers = nil }), "no controller"},
	} {
		if _, err := ParseToken(c.text); err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
	}
	long, _ := f.token(t, "web1", time.Now().Add(24*time.Hour))
	if life := long.Life(); life < 24*time.Hour-time.Minute || life > 24*time.Hour {
		t.Errorf("a token for a day is good for %s", life)
	}
	if _, _, err := f.keys.NewToken("web1", time.Time{}, f.public.Operator, testCA(t), token.Controllers); err == nil {
		t.Error("a token that never ends was made")
	}
}

func TestProveJoin(t *testing.T) {
	f, stranger := newFleet(t), newFleet(t)
	token, key := f.token(t, "web1", now.Add(time.Hour))
	second, _ := f.token(t, "web1", now.Add(time.Hour))
	ended, _ := f.token(t, "web1", now.Add(-time.Minute))
	long, _ := f.token(t, "web1", now.Add(MaxTokenLife+time.Hour))
	foreign, _ := stranger.token(t, "web1", now.Add(time.Hour))
	machine := machineRequest(t, "web1", nil)
	join := func(token *Token, r *EnrolRequest) *JoinRequest {
		j, err := token.Join(r)
		must(t, err)
		return j
	}
	changed := func(change func(*JoinRequest)) *JoinRequest {
		j := join(token, machine)
		change(j)
		return j
	}
	// Credentials of another role in a token's place.
	viewer := f.signer(t, "web1", Viewer, now.Add(time.Hour))
	seed, err := viewer.Key.Seed()
	must(t, err)
	asViewer := join(&Token{Seed: string(seed), User: viewer.User}, machine)

	id, r, err := f.verifier.ProveJoin(join(token, machine), "web1", now)
	if err != nil || id.Key != key || !r.Same(machine) {
		t.Fatalf("%+v, %+v: %v", id, r, err)
	}
	for name, c := range map[string]struct {
		join *JoinRequest
		node string
		want Code
	}{
		"ended":                       {join(ended, machine), "web1", Expired},
		"good for too long":           {join(long, machine), "web1", Untrusted},
		"another fleet's":             {join(foreign, machine), "web1", Untrusted},
		"no token":                    {asViewer, "web1", Untrusted},
		"said for another node":       {join(token, machine), "db1", Misaddressed},
		"a machine of another name":   {join(token, machineRequest(t, "db1", nil)), "web1", Misaddressed},
		"a controller":                {join(token, machineRequest(t, "web1", func(r *EnrolRequest) { r.Role = Controller })), "web1", Invalid},
		"signed by another token":     {changed(func(j *JoinRequest) { j.Proof = join(second, machine).Proof }), "web1", Forged},
		"with another token's JWT":    {changed(func(j *JoinRequest) { j.User = second.User }), "web1", Forged},
		"about another machine":       {changed(func(j *JoinRequest) { j.Request = Encode(machineRequest(t, "web1", nil)) }), "web1", Forged},
		"a machine without its proof": {join(token, func() *EnrolRequest { r := *machine; r.IPv4 = "192.0.2.1"; return &r }()), "web1", Malformed},
		"a long tale":                 {join(token, machineRequest(t, "web1", func(r *EnrolRequest) { r.Hostname = strings.Repeat("x", 1000) })), "web1", Malformed},
		"a tale of two lines":         {join(token, machineRequest(t, "web1", func(r *EnrolRequest) { r.Hostname = "h\nweb2 asks" })), "web1", Malformed},
		"no address":                  {join(token, machineRequest(t, "web1", func(r *EnrolRequest) { r.IPv4 = "::1" })), "web1", Malformed},
		"no system":                   {join(token, machineRequest(t, "web1", func(r *EnrolRequest) { r.System = `x"; y = "` })), "web1", Malformed},
		"another version":             {changed(func(j *JoinRequest) { j.Version = 2 }), "web1", OtherVersion},
		"nothing":                     {&JoinRequest{Version: 1}, "web1", Untrusted},
	} {
		if _, r, err := f.verifier.ProveJoin(c.join, c.node, now); !errors.Is(err, &Refusal{Code: c.want}) || r != nil {
			t.Errorf("%s: %v, want %s", name, err, c.want)
		}
	}
	t.Run("a token orders nothing", func(t *testing.T) {
		signer, _, err := token.Signer()
		must(t, err)
		for a := range leastRole {
			for _, target := range []string{"web1", ControllerName} {
				order, _, err := signer.Request(a, target, nil, now)
				must(t, err)
				if _, _, err := f.verifier.Verify(order, Expect{Kind: KindRequest, Targets: []string{target}, Now: now}, nil); !errors.Is(err, &Refusal{Code: OverRole}) {
					t.Errorf("%s to %s: %v", a, target, err)
				}
			}
		}
	})
}

// What the controller says can't make a machine another's node, or trust anybody else.
func TestEnrolmentByToken(t *testing.T) {
	f, stranger := newFleet(t), newFleet(t)
	token, _ := f.token(t, "web1", now.Add(time.Hour))
	machine := machineRequest(t, "web1", nil)
	issue := func(f *fleet, name, key, xkey string) string {
		user, err := f.keys.IssueNode(name, key, xkey)
		must(t, err)
		return user
	}
	good := issue(f, "web1", machine.Key, machine.XKey)
	a, err := token.Enrolment(&JoinState{User: good, Account: f.public.AccountJWT}, machine)
	must(t, err)
	if a.Fleet.Operator != f.public.Operator || string(a.CA) != string(token.CAPEM()) || a.User != good || a.Name != "web1" {
		t.Errorf("%+v", a)
	}
	other := machineRequest(t, "web1", nil)
	person, err := f.keys.Issue("web1", Admin, machine.Key, time.Time{})
	must(t, err)
	for name, s := range map[string]JoinState{
		"another fleet":            {User: issue(stranger, "web1", machine.Key, machine.XKey), Account: stranger.public.AccountJWT},
		"another fleet's node":     {User: issue(stranger, "web1", machine.Key, machine.XKey), Account: f.public.AccountJWT},
		"another machine":          {User: issue(f, "web1", other.Key, other.XKey), Account: f.public.AccountJWT},
		"another machine's secret": {User: issue(f, "web1", machine.Key, other.XKey), Account: f.public.AccountJWT},
		"another name":             {User: issue(f, "db1", machine.Key, machine.XKey), Account: f.public.AccountJWT},
		"another role":             {User: person, Account: f.public.AccountJWT},
		"the token itself":         {User: token.User, Account: f.public.AccountJWT},
		"nothing":                  {},
	} {
		if _, err := token.Enrolment(&s, machine); err == nil {
			t.Errorf("%s was taken", name)
		}
	}
}

// A fleet that was made before there were tokens works as before, and gets to know them.
func TestFleetWithoutTokens(t *testing.T) {
	f := newFleet(t)
	delete(f.keys.Signing, Joiner)
	old, err := f.keys.Publish(nil)
	must(t, err)
	if _, _, err := f.keys.NewToken("web1", now.Add(time.Hour), f.public.Operator, testCA(t), []string{"tls://c:4222"}); err == nil || !strings.Contains(err.Error(), "joiner") {
		t.Errorf("a token without a key for it: %v", err)
	}
	if changed, err := f.keys.Complete(); !changed || err != nil {
		t.Fatal(changed, err)
	}
	if changed, err := f.keys.Complete(); changed || err != nil {
		t.Fatal(changed, err)
	}
	now, err := f.keys.Publish(nil)
	must(t, err)
	for account, want := range map[string]bool{old.AccountJWT: false, now.AccountJWT: true} {
		if known, err := f.keys.Published(account); known != want || err != nil {
			t.Errorf("the account JWT knows all keys: %v, want %v (%v)", known, want, err)
		}
	}
}

func FuzzParseToken(f *testing.F) {
	fl := newFleet(f)
	token, _ := fl.token(f, "web1", time.Unix(1<<31, 0))
	text := token.String()
	f.Add(text)
	f.Add(text[:len(text)/2])
	f.Add(tokenPrefix + "1..e3b0c442")
	f.Add(tokenPrefix + "1.e30.44136fa3")
	f.Fuzz(func(t *testing.T, text string) {
		token, err := ParseToken(text)
		if err != nil {
			return
		}
		if _, _, err := token.Signer(); err != nil || token.Ends().IsZero() || len(token.CAPEM()) == 0 {
			t.Fatalf("%q was taken and is none: %v", text, err)
		}
		if again, err := ParseToken(token.String()); err != nil || again.String() != token.String() {
			t.Fatalf("%q does not survive being written: %v", text, err)
		}
	})
}

func FuzzJoinRequest(f *testing.F) {
	fl := newFleet(f)
	token, _ := fl.token(f, "web1", now.Add(time.Hour))
	j, err := token.Join(machineRequest(f, "web1", nil))
	must(f, err)
	f.Add(Encode(j))
	f.Fuzz(func(t *testing.T, data []byte) {
		j, err := Decode[JoinRequest](data)
		if err != nil {
			return
		}
		if id, r, err := fl.verifier.ProveJoin(&j, "web1", now); err == nil && (id.Role != Joiner || r.Name != "web1") {
			t.Fatalf("proven: %+v, %+v", id, r)
		}
	})
}

func FuzzJoining(f *testing.F)    { fuzzDecode[Joining](f, Joining{Token: "U", Node: "n1"}) }
func FuzzJoinAnswer(f *testing.F) { fuzzDecode[JoinAnswer](f, JoinAnswer{Token: "U", Node: "n1"}) }
