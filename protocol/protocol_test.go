package protocol

import (
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"
)

func TestCheckName(t *testing.T) {
	for _, good := range []string{"n1", "a", "web-01", strings.Repeat("a", 63)} {
		if err := CheckName(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "N1", "a.b", "*", ">", "-a", "a-", "a b", "all", "not", "localhost", ControllerName, "ä", strings.Repeat("a", 64), "a\n"} {
		if CheckName(bad) == nil {
			t.Errorf("%q is a name", bad)
		}
	}
}

func TestDecodeIsStrict(t *testing.T) {
	for name, in := range map[string]string{
		"empty": "", "two documents": `{"v":1}{"v":1}`, "unknown field": `{"v":1,"sudo":true}`, "trailing text": `{"v":1} x`, "array": `[]`,
		"too long": `{"digest":"` + strings.Repeat("a", MaxMessage) + `"}`,
	} {
		if _, err := Decode[Look]([]byte(in)); err == nil {
			t.Errorf("%s was decoded", name)
		}
	}
	if _, err := Decode[Look]([]byte(` {"v":1,"serial":2,"digest":"x"} `)); err != nil {
		t.Error(err)
	}
}

func TestSubjects(t *testing.T) {
	if n, w, ok := UpSender(UpSubject("n1", UpBeat)); !ok || n != "n1" || w != UpBeat {
		t.Error(n, w, ok)
	}
	for _, s := range []string{"", "ni.v1.node.n1.up", "ni.v1.node.n1.down.look", "ni.v1.node.*.up.beat", "ni.v1.node.N1.up.beat", "xx.v1.node.n1.up.beat"} {
		if _, _, ok := UpSender(s); ok {
			t.Errorf("%q has a sender", s)
		}
	}
	if !OwnInbox("n1", InboxPrefix("n1")+".abc.1") {
		t.Error("own inbox refused")
	}
	for _, s := range []string{"", InboxPrefix("n2") + ".abc", InboxPrefix("n1"), "_INBOX.x", LookSubject("n11"), InboxPrefix("n1") + ".*", InboxPrefix("n1") + ".>"} {
		if OwnInbox("n1", s) {
			t.Errorf("%q is an inbox of n1", s)
		}
	}
	if !OwnReply("n1", ReplySubject("vera", "id", "n1")) || OwnReply("n1", ReplySubject("vera", "id", "n2")) || OwnReply("n1", "ni.v1.reply.*.id.n1") {
		t.Error("OwnReply")
	}
	if RequestSubject("n1", Release) != "ni.v1.node.n1.req.deployer" || RequestSubject(Everyone, Ping) != "ni.v1.all.req.viewer" || RequestSubject(ControllerName, PutNode) != "ni.v1.ctl.req.admin" {
		t.Error("RequestSubject")
	}
}

func TestEnrol(t *testing.T) {
	f := newFleet(t)
	key, err := nkeys.CreateUser()
	must(t, err)
	r := EnrolRequest{Version: Version, Role: Node, Name: "n1", XKey: mustKey(t, nkeys.CreateCurveKeys), Hostname: "h", System: "x86_64-linux", Created: now}
	r.Key, err = key.PublicKey()
	must(t, err)
	must(t, r.Prove(key))
	must(t, r.Validate())
	renamed := r
	renamed.Name = "n2"
	if renamed.Validate() == nil {
		t.Error("a request under another name is proven")
	}
	king := r
	king.Role = Admin
	must(t, king.Prove(key))
	if king.Validate() == nil {
		t.Error("a machine enrols as admin")
	}
	token, err := f.keys.Issue(r.Name, Node, r.Key, time.Time{})
	must(t, err)
	a := EnrolAnswer{Version: Version, Role: Node, Name: "n1", User: token, Fleet: *f.public, Controllers: []string{"tls://c:4222", "wss://c:443"}}
	must(t, a.Validate())
	must(t, a.For(key))
	other, err := nkeys.CreateUser()
	must(t, err)
	if a.For(other) == nil {
		t.Error("the answer fits another key")
	}
	for name, change := range map[string]func(*EnrolAnswer){
		"another name":     func(a *EnrolAnswer) { a.Name = "n2" },
		"another role":     func(a *EnrolAnswer) { a.Role = Controller },
		"another operator": func(a *EnrolAnswer) { a.Fleet = *newFleet(t).public },
		"no controllers":   func(a *EnrolAnswer) { a.Controllers = nil },
		"plain text":       func(a *EnrolAnswer) { a.Controllers = []string{"nats://c:4222"} },
		"no port":          func(a *EnrolAnswer) { a.Controllers = []string{"tls://c"} },
		"a password":       func(a *EnrolAnswer) { a.Controllers = []string{"tls://a:b@c:4222"} },
	} {
		bad := a
		change(&bad)
		if bad.Validate() == nil {
			t.Errorf("%s: valid", name)
		}
	}
}

func TestCredentials(t *testing.T) {
	f := newFleet(t)
	a, err := f.keys.Credentials("vera", Viewer, time.Time{})
	must(t, err)
	b, err := f.keys.Credentials("dora", Deployer, time.Time{})
	must(t, err)
	if _, c, err := ParseCredentials(a); err != nil || c.Name != "vera" {
		t.Fatal(c, err)
	}
	// Dora's JWT with Vera's seed.
	cut := func(s []byte) (token, seed string) {
		i := strings.Index(string(s), "************************* IMPORTANT")
		return string(s[:i]), string(s[i:])
	}
	token, _ := cut(b)
	_, seed := cut(a)
	for name, c := range map[string]string{"mixed": token + seed, "no seed": token, "no jwt": seed, "empty": "", "half": string(a[:len(a)/2])} {
		if _, _, err := ParseCredentials([]byte(c)); err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestStateOfNode(t *testing.T) {
	beat := &Beat{Serial: 3, Phase: Confirmed}
	for want, n := range map[string]NodeState{
		"new":       {Online: true},
		"lost":      {Beat: beat},
		"pending":   {Online: true, Beat: beat, Desired: &Desired{Serial: 4}},
		"idle":      {Online: true, Beat: &Beat{}},
		"confirmed": {Online: true, Beat: beat, Desired: &Desired{Serial: 3}},
	} {
		if got := n.State(); got != want {
			t.Errorf("got %s, want %s", got, want)
		}
	}
}
