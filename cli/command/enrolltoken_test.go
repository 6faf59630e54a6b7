package command

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// tokenMachine is a machine with a token, as its agent would be.
type tokenMachine struct {
	t       *testing.T
	token   *protocol.Token
	home    machine.Home
	request *protocol.EnrolRequest
	nc      *nats.Conn
}

// comes has a new machine come with a token.
func comes(t *testing.T, text string) *tokenMachine {
	t.Helper()
	n := &tokenMachine{t: t, home: machine.Home{Dir: t.TempDir(), Role: protocol.Node}}
	var err error
	if n.token, err = protocol.ParseToken(text); err != nil {
		t.Fatal(err)
	}
	if n.request, err = n.home.Request(n.token.Node); err != nil {
		t.Fatal(err)
	}
	signer, key, err := n.token.Signer()
	if err != nil {
		t.Fatal(err)
	}
	to := connect.To{URLs: n.token.Controllers, CA: n.token.CAPEM(), Signer: signer, InboxPrefix: protocol.JoinInbox(n.token.Node, key), Timeout: time.Minute}
	if n.nc, err = to.Dial(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(n.nc.Close)
	return n
}

func (n *tokenMachine) ask() (state protocol.JoinState, err error) {
	n.t.Helper()
	message, err := n.token.Join(n.request)
	if err != nil {
		n.t.Fatal(err)
	}
	m, err := n.nc.Request(protocol.UpSubject(n.token.Node, protocol.UpJoin), protocol.Encode(message), time.Minute)
	if err != nil {
		n.t.Fatal(err)
	}
	reply, err := protocol.Decode[protocol.Reply](m.Data)
	if err != nil {
		n.t.Fatal(err)
	}
	if reply.Refused != nil {
		return state, reply.Refused
	}
	return state, json.Unmarshal(reply.Body, &state)
}

// waits asks until it is let in, and becomes the node.
func (n *tokenMachine) waits() {
	n.t.Helper()
	deadline := time.Now().Add(time.Minute)
	state, err := n.ask()
	for ; err == nil && state.User == "" && time.Now().Before(deadline); state, err = n.ask() {
		time.Sleep(10 * time.Millisecond)
	}
	if err != nil {
		n.t.Fatal(err)
	}
	answer, err := n.token.Enrolment(&state, n.request)
	if err != nil {
		n.t.Fatal(err)
	}
	if _, err := n.home.Load(protocol.Encode(answer)); err != nil {
		n.t.Fatal(err)
	}
}

// tokens is the project's record of them.
func (s *shell) tokens() *tokenRecord {
	s.t.Helper()
	r := &tokenRecord{}
	if err := json.Unmarshal([]byte(s.read("nix-infra/tokens.json")), r); err != nil {
		s.t.Fatal(err)
	}
	return r
}

// changeRecord changes the record behind the program's back.
func (s *shell) changeRecord(change func(*token)) {
	s.t.Helper()
	r := s.tokens()
	change(&r.Tokens[len(r.Tokens)-1])
	s.write("nix-infra/tokens.json", string(protocol.Encode(r)))
}

func TestEnrollByToken(t *testing.T) {
	s, f := newFleet(t)
	comesUp(t, f, "web9", nil)
	out, ended := &watched{}, make(chan run, 1)
	go func() {
		ended <- s.runContext(t.Context(), out, "enroll", "--token", "web9", "--tag", "web", "--tag", "eu")
	}()
	out.await("\n")
	text := strings.TrimSpace(out.String())
	if secret, err := protocol.ParseToken(text); err != nil || strings.Contains(s.read("nix-infra/tokens.json"), secret.Seed) {
		t.Errorf("the token %q: %v; what is in the project must not have its secret", text, err)
	}
	n := comes(t, text)
	n.waits()
	r := <-ended
	for _, want := range []string{n.request.Hostname, "192.0.2.7", n.request.Key, "web9: enrolled"} {
		if !strings.Contains(r.stderr, want) {
			t.Errorf("it does not show %q:\n%s", want, r.stderr)
		}
	}
	if r.status != OK || strings.TrimSpace(r.out) != text {
		t.Errorf("status %d, and on stdout is more than the token: %q", r.status, r.out)
	}
	m, err := n.home.Open()
	if err != nil {
		t.Fatal(err)
	}
	record := f.Record("web9")
	if m.Name != "web9" || record.Key != n.request.Key || record.XKey != n.request.XKey || record.JWT != m.Answer.User || !slices.Equal(record.Tags, []string{"eu", "web"}) {
		t.Errorf("registered as %+v", record.NodeRecord)
	}
	if jwt := strings.TrimSpace(s.read("nix-infra/nodes/web9.jwt")); jwt != m.Answer.User {
		t.Error("the project does not know its JWT")
	}
	if t1 := s.tokens().Tokens[0]; t1.Used == nil || t1.Machine != n.request.Key {
		t.Errorf("on record: %+v", t1)
	}
	if _, err := comes(t, text).ask(); !errors.Is(err, &protocol.Refusal{Code: protocol.Conflict}) {
		t.Errorf("a second machine: %v", err)
	}
	if r := s.run("enroll", "--pending", "web9"); r.status != OK || !strings.Contains(r.stderr, "web9: enrolled") {
		t.Errorf("once more: %+v", r)
	}
	s.expect(Refused, "node remove web9", "enroll", "--revoke-token", "web9")
	s.expect(Refused, "is enrolled", "enroll", "--token", "web9")
}

func TestEnrollTokenDetached(t *testing.T) {
	s, f := newFleet(t)
	d := documents(t, s.must("enroll", "--token", "web9", "--detach", "--json", "--expires", "2h", "--tag", "web"))[0]
	text, _ := d["token"].(string)
	if d["event"] != "token" || d["node"] != "web9" || d["key"] != s.tokens().Tokens[0].Key {
		t.Errorf("it says %v", d)
	}
	if out := s.must("enroll", "--pending"); !strings.Contains(out, "web9") || !strings.Contains(out, "open") {
		t.Errorf("who waits:\n%s", out)
	}
	s.expect(Unanswered, "no machine has come", "enroll", "--pending", "web9")
	s.expect(Refused, "there is a token for web9 already", "enroll", "--token", "web9", "--detach")

	n := comes(t, text)
	if _, err := n.ask(); err != nil {
		t.Fatal(err)
	}
	list := documents(t, s.must("enroll", "--pending", "--json"))
	if len(list) != 1 || list[0]["state"] != "asks" || list[0]["hostname"] != n.request.Hostname || list[0]["key"] != n.request.Key || list[0]["address"] != "192.0.2.7" {
		t.Errorf("who waits: %v", list)
	}
	thief := comes(t, text)
	if _, err := thief.ask(); err == nil {
		t.Fatal("a second machine is let wait, too")
	}
	if out := s.must("enroll", "--pending"); !strings.Contains(out, thief.request.Key) {
		t.Errorf("nobody says that another machine came:\n%s", out)
	}
	r := s.run("enroll", "--pending", "web9", "--wait", "300ms")
	if r.status != Unanswered || !strings.Contains(r.stderr, "WARNING: another machine") || !strings.Contains(r.stderr, "nothing was heard") {
		t.Errorf("status %d\n%s", r.status, r.stderr)
	}
	n.waits()
	if record := f.Record("web9"); record.Key != n.request.Key || !slices.Equal(record.Tags, []string{"web"}) {
		t.Errorf("registered as %+v", record)
	}
	if out := s.must("enroll", "--pending"); !strings.Contains(out, "no token is open") {
		t.Errorf("afterwards:\n%s", out)
	}
}

// A controller that was broken into can't bring in a machine that did not come with the token, or a second one.
func TestEnrollTokenAndABadController(t *testing.T) {
	s, f := newFleet(t)
	made := func(node string) *tokenMachine {
		t.Helper()
		n := comes(t, strings.TrimSpace(s.must("enroll", "--token", node, "--detach")))
		if _, err := n.ask(); err != nil {
			t.Fatal(err)
		}
		return n
	}
	says := func(n *tokenMachine, r *protocol.EnrolRequest) protocol.JoinRequest {
		j, err := n.token.Join(r)
		if err != nil {
			t.Fatal(err)
		}
		return *j
	}
	web, db := made("web9"), made("db9")
	other, err := machine.Home{Dir: t.TempDir(), Role: protocol.Node}.Request("web9")
	if err != nil {
		t.Fatal(err)
	}
	unsigned := says(web, web.request)
	unsigned.Request = protocol.Encode(other)
	another := *db
	another.token = &protocol.Token{Seed: db.token.Seed, User: web.token.User}
	for name, forged := range map[string]protocol.JoinRequest{
		"another machine's request": unsigned,
		"signed by another token":   says(&another, other),
		"another token's request":   says(db, db.request),
		"nothing":                   {},
	} {
		f.AlterJoining("web9", func(j *protocol.Joining) { j.Request = forged })
		if r := s.run("enroll", "--pending", "web9", "--wait", "100ms"); r.status != Refused {
			t.Errorf("%s: status %d\n%s", name, r.status, r.stderr)
		}
		if list := documents(t, s.must("enroll", "--pending", "--json")); list[1]["node"] != "web9" || list[1]["state"] != "unknown" {
			t.Errorf("%s is listed as %v", name, list)
		}
	}
	if f.Record("web9") != nil {
		t.Fatal("it was registered")
	}
	// Somebody has the token, and the controller: only one machine gets in, all the same.
	f.AlterJoining("web9", func(j *protocol.Joining) { j.Request = says(web, web.request) })
	s.run("enroll", "--pending", "web9", "--wait", "100ms")
	f.AlterJoining("web9", func(j *protocol.Joining) { j.Request, j.User = says(web, other), "" })
	if r := s.run("enroll", "--pending", "web9", "--wait", "100ms"); r.status != Refused || !strings.Contains(r.stderr, "nothing was signed") {
		t.Errorf("a second machine: status %d\n%s", r.status, r.stderr)
	}
	s.must("node", "remove", "web9")
	f.AlterJoining("web9", func(j *protocol.Joining) { j.Request, j.User = says(web, web.request), "" })
	if r := s.run("enroll", "--pending", "web9", "--wait", "100ms"); r.status != Refused || !strings.Contains(r.stderr, "was thrown out") {
		t.Errorf("the first machine, after it was removed: status %d\n%s", r.status, r.stderr)
	}
	f.AlterJoining("web9", func(j *protocol.Joining) { j.Request = says(web, other) })
	if r := s.run("enroll", "--pending", "web9", "--wait", "100ms"); r.status != Refused || !strings.Contains(r.stderr, "let in another machine") {
		t.Errorf("a second machine, after the first was removed: status %d\n%s", r.status, r.stderr)
	}
}

func TestRevokeToken(t *testing.T) {
	s, f := newFleet(t)
	text := strings.TrimSpace(s.must("enroll", "--token", "web9", "--detach"))
	n := comes(t, text)
	if _, err := n.ask(); err != nil {
		t.Fatal(err)
	}
	s.must("enroll", "--revoke-token", "web9")
	s.must("enroll", "--revoke-token", "web9")
	if _, err := n.ask(); !errors.Is(err, &protocol.Refusal{Code: protocol.Revoked}) {
		t.Errorf("the machine that waited: %v", err)
	}
	// Whatever the controller says.
	f.AlterJoining("web9", func(j *protocol.Joining) { j.Void = false })
	s.expect(Refused, "was taken back", "enroll", "--pending", "web9")
	s.must("enroll", "--token", "web9", "--detach")

	s.changeRecord(func(t *token) { t.Ends = time.Now().Add(-time.Second) })
	s.expect(Refused, "ended at", "enroll", "--revoke-token", "web9")
	s.expect(Refused, "ended at", "enroll", "--pending", "web9")
	s.must("enroll", "--token", "web9", "--detach")
	f.Stop()
	r := s.run("enroll", "--revoke-token", "web9")
	if r.status != Unanswered || !strings.Contains(r.stderr, "run the same command again") || s.tokens().Tokens[2].Revoked == nil {
		t.Errorf("without a controller: status %d\n%s", r.status, r.stderr)
	}
}

func TestEnrollTokenOutput(t *testing.T) {
	s, _ := newFleet(t)
	file := s.path("web9.yaml")
	if r := s.run("enroll", "--token", "web9", "--detach", "--cloud-init", "--out", file); r.status != OK || r.out != "" {
		t.Fatalf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
	info, err := os.Stat(file)
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	data := s.read("web9.yaml")
	i := strings.Index(data, "nix-infra-token-")
	if i < 0 || !strings.HasPrefix(data, "#cloud-config\n") || !strings.Contains(data, "join, /run/nix-infra/token]") || !strings.Contains(data, `permissions: "0600"`) {
		t.Fatalf("user-data:\n%s", data)
	}
	if _, err := protocol.ParseToken(strings.Fields(data[i:])[0]); err != nil {
		t.Error(err)
	}
	if out := s.must("enroll", "--token", "db9", "--detach", "--cloud-init"); !strings.HasPrefix(out, "#cloud-config\n") {
		t.Errorf("user-data:\n%s", out)
	}
	// Ctrl-C leaves the token good.
	ctx, interrupt := context.WithCancel(t.Context())
	out, ended := &watched{}, make(chan run, 1)
	go func() { ended <- s.runContext(ctx, out, "enroll", "--token", "web8") }()
	out.await("\n")
	interrupt()
	if r := <-ended; r.status != Interrupted || s.tokens().newest("web8").state(time.Now()) != "open" {
		t.Errorf("status %d\n%s", r.status, r.stderr)
	}
}

func TestEnrollTokenBadInput(t *testing.T) {
	s, f := newFleet(t)
	s.write("dora.creds", string(f.Credentials("dora", protocol.Deployer, time.Time{})))
	for _, c := range []struct {
		says string
		args []string
	}{
		{"needs the NAME", []string{"--token"}},
		{"not a valid name", []string{"--token", "Web 1"}},
		{"1m0s to 168h0m0s", []string{"--token", "web9", "--expires", "169h"}},
		{"1m0s to 168h0m0s", []string{"--token", "web9", "--expires", "1s"}},
		{"give one", []string{"--token", "web9", "--ssh", "root@192.0.2.1"}},
		{"give one", []string{"--token", "--pending", "web9"}},
		{"a way in of its own", []string{"--token", "web9", "--controller"}},
		{"are for --token", []string{"web9", "--ssh", "192.0.2.1", "--detach"}},
		{"are for --token", []string{"--pending", "web9", "--out", "x"}},
		{"remembers it", []string{"--pending", "web9", "--tag", "web"}},
		{"no token was made for web9", []string{"--pending", "web9"}},
		{"no token was made for web9", []string{"--revoke-token", "web9"}},
		{"needs the NAME", []string{"--revoke-token"}},
		{"tag", []string{"--token", "web9", "--tag", "No Tag"}},
		{"dora is deployer; tokens need admin", []string{"--token", "web9", "--creds", s.path("dora.creds")}},
		{"dora is deployer; tokens need admin", []string{"--pending", "web9", "--creds", s.path("dora.creds")}},
		{"dora is deployer; tokens need admin", []string{"--revoke-token", "web9", "--creds", s.path("dora.creds")}},
		{"no such file", []string{"--token", "web9", "--out", s.path("nowhere/token")}},
	} {
		s.expect(Refused, c.says, append([]string{"enroll"}, c.args...)...)
	}
	if _, err := os.Stat(s.path("nix-infra/tokens.json")); err == nil && len(s.tokens().Tokens) > 0 {
		t.Error("a token was made")
	}
	s.write("nix-infra/tokens.json", "{")
	s.expect(Refused, "is damaged", "enroll", "--token", "web9")
}

// A project of before there were tokens gets a key for them, and the fleet hears of it.
func TestEnrollTokenInAnOldProject(t *testing.T) {
	s, f := newFleet(t)
	a := &app{Environment: Environment{Stdin: os.Stdin}, dir: s.dir}
	p, err := a.openProject()
	if err != nil {
		t.Fatal(err)
	}
	v := a.vault(func(name string) string { return s.env[name] })
	public, err := a.readFleet()
	if err != nil {
		t.Fatal(err)
	}
	authority, err := a.authority(p, public)
	if err != nil {
		t.Fatal(err)
	}
	delete(authority.Keys.Signing, protocol.Joiner)
	if err := v.Put(fleetEntry, protocol.Encode(authority.Keys)); err != nil {
		t.Fatal(err)
	}
	before := f.Account()
	n := comes(t, strings.TrimSpace(s.must("enroll", "--token", "web9", "--detach")))
	if _, err := n.ask(); err != nil {
		t.Fatal(err)
	}
	after := f.Account()
	if after == before || !strings.Contains(s.read("nix-infra/fleet.json"), after) {
		t.Error("the fleet and the project don't have the same new account JWT")
	}
	s.must("enroll", "--token", "db9", "--detach")
	if f.Account() != after {
		t.Error("the second token made another account JWT")
	}
	comesUp(t, f, "web9", nil)
	s.must("enroll", "--pending", "web9")
	n.waits()
}
