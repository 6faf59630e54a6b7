package command

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

func TestAccessAdd(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	f.Add("db1")
	creds := s.path("bob.creds")
	d := documents(t, s.must("access", "add", "bob", "--role", "deployer", "--target", "web*", "--target", "n[12]", "--expires", "90d", "--out", creds, "--json"))[0]
	if d["name"] != "bob" || fmt.Sprint(d["targets"]) != "[n[12] web*]" || d["state"] != "valid" || d["by"] != "alice" || d["file"] != creds {
		t.Errorf("document %v", d)
	}
	if info, err := os.Stat(creds); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the credentials: %v, %v", info, err)
	}
	for _, line := range lines(s.read("bob.creds")) {
		if strings.HasPrefix(line, "SU") && strings.Contains(s.read("nix-infra/access.json"), line) {
			t.Error("the record holds the secret")
		}
	}
	who := documents(t, s.must("--creds", creds, "whoami", "--json"))[0]
	if who["name"] != "bob" || who["role"] != "deployer" || fmt.Sprint(who["targets"]) != "[n[12] web*]" || who["expires"] == nil || who["key"] != d["key"] {
		t.Errorf("whoami: %v", who)
	}
	if out := s.must("--creds", creds, "whoami"); !strings.Contains(out, "deployer of fleet testfleet on n[12] web*, until ") {
		t.Errorf("whoami: %s", out)
	}
	// What the grant does not cover is not there for it.
	for _, target := range []string{"web1", "all"} {
		if out := s.must("--creds", creds, "ping", target); !strings.Contains(out, "1 of 1 answered") {
			t.Errorf("ping %s: %s", target, out)
		}
	}
	s.expect(Refused, "matches no node", "--creds", creds, "ping", "db1")

	for _, c := range []struct {
		says string
		args []string
	}{
		{"bob has access already", []string{"bob", "--role", "viewer", "--out", s.path("other.creds")}},
		{"there is a file", []string{"carol", "--role", "viewer", "--out", creds}},
		{"expected viewer", []string{"carol", "--role", "node", "--out", s.path("x.creds")}},
		{"expected viewer", []string{"carol", "--out", s.path("x.creds")}},
		{"not a valid name", []string{"Carol", "--role", "viewer"}},
		{"a node judges a grant by its own name", []string{"carol", "--role", "viewer", "--target", "@web"}},
		{"a node judges a grant by its own name", []string{"carol", "--role", "viewer", "--target", "system=x"}},
		{"an admin has the whole fleet", []string{"carol", "--role", "admin", "--target", "web1"}},
		{"is no time", []string{"carol", "--role", "viewer", "--expires", "soon"}},
		{"not in the future", []string{"carol", "--role", "viewer", "--expires", "2020-01-01"}},
		{"no such file", []string{"carol", "--role", "viewer", "--out", s.path("nowhere/x.creds")}},
	} {
		before := s.snapshot()
		s.expect(Refused, c.says, append([]string{"access", "add"}, c.args...)...)
		if fmt.Sprint(s.snapshot()) != fmt.Sprint(before) {
			t.Errorf("%v: it changed files all the same", c.args)
		}
	}

	r := s.run("access", "add", "watcher", "--role", "viewer", "--out", "-", "--json")
	if _, claims, err := protocol.ParseCredentials([]byte(r.out)); err != nil || claims.Name != "watcher" || r.status != OK {
		t.Errorf("to stdout: %v, %+v", err, r)
	}
	for _, g := range documents(t, s.must("access", "list", "--json")) {
		if g["state"] != "valid" {
			t.Errorf("%v is %v", g["name"], g["state"])
		}
	}
	out := lines(s.must("access", "list"))
	for i, want := range []string{"NAME", "alice    admin", "mcp      viewer    all", "bob      deployer  n[12] web*", "watcher  viewer    all"} {
		if !strings.HasPrefix(out[i], want) {
			t.Errorf("line %d is %q, want %q", i, out[i], want)
		}
	}
}

func TestAccessRevoke(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	creds, carol := s.path("bob.creds"), s.path("carol.creds")
	s.must("access", "add", "bob", "--role", "viewer", "--out", creds)
	s.must("access", "add", "carol", "--role", "viewer", "--out", carol)
	data, err := os.ReadFile(creds)
	if err != nil {
		t.Fatal(err)
	}
	bob, _, err := protocol.ParseCredentials(data)
	if err != nil {
		t.Fatal(err)
	}
	closed := make(chan struct{})
	nc, err := connect.To{URLs: []string{f.URL}, CA: f.Authority.CA.Public(), Signer: bob, Name: "bob", InboxPrefix: "unused"}.Dial(
		nats.MaxReconnects(0), nats.ClosedHandler(func(*nats.Conn) { close(closed) }), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()

	before := s.snapshot()
	s.stdin = "no\n"
	if r := s.run("access", "revoke", "bob"); r.status != Refused || !strings.Contains(r.stderr, "revoke bob, viewer, given by alice?") {
		t.Errorf("asked %+v", r)
	}
	s.stdin = ""
	if r := s.run("access", "revoke", "bob"); r.status != Refused || !strings.Contains(r.stderr, "--batch") {
		t.Errorf("nobody there: %+v", r)
	}
	s.expect(Refused, "nobody called dave", "access", "revoke", "dave")
	s.expect(Refused, "alice is you", "access", "revoke", "alice", "--batch")
	if fmt.Sprint(s.snapshot()) != fmt.Sprint(before) {
		t.Error("what was not done changed files")
	}

	s.stdin = "yes\n"
	s.must("access", "revoke", "bob")
	select {
	case <-closed:
	case <-time.After(time.Minute):
		t.Fatal("bob is still connected")
	}
	s.expect(Refused, "revoked", "--creds", creds, "status")
	s.must("--creds", carol, "status")
	d := documents(t, s.must("access", "list", "--json"))[2]
	if d["name"] != "bob" || d["state"] != "revoked" || d["revoked_by"] != "alice" || d["revoked"] == nil {
		t.Errorf("on record is %v", d)
	}

	// The next one still has the ones before, and so has a fleet.json that is made anew.
	s.must("access", "revoke", "carol", "--batch")
	revoked := func() int {
		t.Helper()
		a := &app{dir: s.dir}
		fleet, err := a.readFleet()
		if err != nil {
			t.Fatal(err)
		}
		void, err := protocol.Revocations(fleet.Public.AccountJWT)
		if err != nil {
			t.Fatal(err)
		}
		return len(void)
	}
	if n := revoked(); n != 2 {
		t.Errorf("%d are revoked", n)
	}
	if err := os.Remove(s.path("nix-infra/fleet.json")); err != nil {
		t.Fatal(err)
	}
	s.must("init")
	if n := revoked(); n != 2 {
		t.Errorf("of a new fleet.json %d are revoked", n)
	}
	s.must("access", "add", "bob", "--role", "viewer", "--out", s.path("bob2.creds"))
	s.must("--creds", s.path("bob2.creds"), "status")
}

// What could not be told is told by the same command again.
func TestRevokeWithoutController(t *testing.T) {
	s, f := newFleet(t)
	s.must("access", "add", "bob", "--role", "viewer", "--out", s.path("bob.creds"))
	settings := s.read("nix-infra.yaml")
	s.write("nix-infra.yaml", strings.ReplaceAll(settings, f.URL, "tls://127.0.0.1:1"))
	known := f.Account()
	s.expect(Unanswered, "run the same command again", "access", "revoke", "bob", "--batch")
	s.expect(Refused, "revoked", "--creds", s.path("bob.creds"), "status")
	s.write("nix-infra.yaml", settings)
	if f.Account() != known {
		t.Fatal("the fleet knows already")
	}
	f.Foreign()
	if r := s.run("access", "revoke", "bob", "--batch"); r.status != OK || !strings.Contains(r.out, "the fleet was told again") || !strings.Contains(r.stderr, "account_jwt") {
		t.Errorf("%+v", r)
	}
	if f.Account() == known {
		t.Error("the fleet does not know")
	}
}

// Of two copies of a project, the one that is behind can't bring back who was revoked by the other.
func TestRevokeFromAnOldCopy(t *testing.T) {
	s, _ := newFleet(t)
	s.must("access", "add", "bob", "--role", "viewer", "--out", s.path("bob.creds"))
	s.must("access", "add", "carol", "--role", "viewer", "--out", s.path("carol.creds"))
	old := map[string]string{}
	for _, file := range []string{"nix-infra/fleet.json", "nix-infra/access.json"} {
		old[file] = s.read(file)
	}
	s.must("access", "revoke", "bob", "--batch")
	for file, text := range old {
		s.write(file, text)
	}
	s.expect(Unanswered, "bring the project folder up to date", "access", "revoke", "carol", "--batch")
}

func TestRemovedNodeIsRevoked(t *testing.T) {
	s, f := newFleet(t)
	web1 := f.Signer("web1", protocol.Node)
	key, err := web1.Key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	f.Register("web1")
	f.Change("web1", func(n *protocol.NodeState) { n.Key = key })
	s.must("node", "remove", "web1")
	if f.Record("web1") != nil {
		t.Error("web1 is still there")
	}
	if void, err := protocol.Revocations(f.Account()); err != nil || void[key].IsZero() {
		t.Errorf("revoked are %v, %v", void, err)
	}
	_, err = connect.To{URLs: []string{f.URL}, CA: f.Authority.CA.Public(), Signer: web1, Name: "web1", InboxPrefix: "unused"}.Dial()
	if !errors.Is(err, nats.ErrAuthRevoked) && !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("it came in: %v", err)
	}
	d := documents(t, s.must("access", "list", "--json"))[2]
	if d["name"] != "web1" || d["role"] != "node" || d["state"] != "revoked" {
		t.Errorf("on record is %v", d)
	}
}

func TestCredentialsThatEndSoon(t *testing.T) {
	now := time.Now()
	for name, c := range map[string]struct {
		issued, expires time.Duration
		want            bool
	}{
		"never":              {-time.Hour, 0, false},
		"in a month":         {-time.Hour, 30 * 24 * time.Hour, false},
		"of a year, a day":   {-364 * 24 * time.Hour, 24 * time.Hour, true},
		"of a day, just now": {-time.Minute, 24 * time.Hour, false},
		"of a day, an hour":  {-23 * time.Hour, time.Hour, true},
		"of 14 days, 5":      {-9 * 24 * time.Hour, 5 * 24 * time.Hour, false},
	} {
		me := &identity{issued: now.Add(c.issued).Unix(), expires: now.Add(c.expires).Unix()}
		if c.expires == 0 {
			me.expires = 0
		}
		if me.endsSoon(now) != c.want {
			t.Errorf("%s: %v", name, !c.want)
		}
	}
}

// recorded puts chains of a node and a controller into the fleet's record.
func recorded(f interface {
	Write(subject string, data []byte)
}) {
	chains := map[string]string{}
	write := func(subject, at string, seq uint64, r protocol.AuditRecord) {
		r.Version, r.Seq, r.Prev, r.At = 1, seq, chains[subject], at
		r.Time = time.Date(2026, 3, 4, 5, 6, int(seq), 0, time.UTC)
		data := protocol.Encode(r)
		chains[subject] = protocol.Digest(data)
		f.Write(subject, data)
	}
	for i := range uint64(4) {
		seq, user := 2*i+1, []string{"bob", "carol"}[i%2]
		ordered := protocol.AuditRecord{User: user, Role: protocol.Viewer, Request: fmt.Sprint("r", i), Action: protocol.Ping, Target: "web1"}
		write(protocol.UpSubject("web1", protocol.UpAudit), "web1", seq, ordered)
		ordered.Outcome = "ok"
		write(protocol.UpSubject("web1", protocol.UpAudit), "web1", seq+1, ordered)
		write(protocol.ControllerAudit("ctl"), "ctl", i+1, protocol.AuditRecord{User: user, Role: protocol.Viewer, Action: protocol.Deploy, Outcome: string(protocol.OverRole), Reason: "no\x1b[2J"})
	}
}

func TestAudit(t *testing.T) {
	s, f := newFleet(t)
	if out := lines(s.must("audit")); len(out) != 1 {
		t.Errorf("an empty record: %v", out)
	}
	recorded(f)
	numbers := func(args ...string) string {
		t.Helper()
		var got []string
		out := s.must(append([]string{"audit", "--json"}, args...)...)
		if out == "" {
			return ""
		}
		for _, d := range documents(t, out) {
			got = append(got, fmt.Sprint(d["number"]))
		}
		return strings.Join(got, " ")
	}
	for _, c := range []struct{ args, want string }{
		{"", "1 2 3 4 5 6 7 8 9 10 11 12"},
		{"--limit 2", "11 12"},
		{"--limit 0", "1 2 3 4 5 6 7 8 9 10 11 12"},
		{"--user bob", "1 2 3 7 8 9"},
		{"--denied", "3 6 9 12"},
		{"--denied --user carol --limit 1", "12"},
		{"--node web1 --action ping --since 2026-03-04T05:06:05Z", "7 8 10 11"},
		{"--node ctl --until 2026-03-04T05:06:03Z", "3 6"},
		{"--until 2020-01-01", ""},
	} {
		if got := numbers(strings.Fields(c.args)...); got != c.want {
			t.Errorf("%s: %s, want %s", c.args, got, c.want)
		}
	}
	golden(t, "json/audit.jsonl", s.must("audit", "--json", "--limit", "2"))
	out := lines(s.must("audit", "--limit", "3"))
	if len(out) != 4 || !strings.Contains(out[1], "node web1") || !strings.Contains(out[1], "begins") || !strings.Contains(out[3], "over-role") || strings.Contains(out[3], "\x1b") {
		t.Errorf("shown is %q", out)
	}
	s.expect(Refused, "--since", "audit", "--since", "yesterday")
	s.expect(Refused, "--node", "audit", "--node", "web*")
	s.expect(Refused, "--limit", "audit", "--limit", "-1")
	s.must("access", "add", "dora", "--role", "deployer", "--out", s.path("dora.creds"))
	s.expect(Refused, "over-role", "--creds", s.path("dora.creds"), "audit")
}

func TestAuditVerify(t *testing.T) {
	s, f := newFleet(t)
	s.must("audit", "verify")
	recorded(f)
	if out := s.must("audit", "verify"); !strings.Contains(out, "12 records of 2 writers: nothing was changed") || !strings.Contains(out, "node web1") {
		t.Errorf("a whole record:\n%s", out)
	}
	var whole []protocol.StoredRecord
	f.Alter(func(r []protocol.StoredRecord) []protocol.StoredRecord {
		whole = r
		return r
	})
	for name, c := range map[string]struct {
		change func(r []protocol.StoredRecord) []protocol.StoredRecord
		kind   string
		from   float64
	}{
		"removed": {func(r []protocol.StoredRecord) []protocol.StoredRecord {
			r = append(r[:3:3], r[4:]...)
			for i := range r {
				r[i].Number = uint64(i + 1) // the stream was made anew
			}
			return r
		}, "missing", 3},
		"changed": {func(r []protocol.StoredRecord) []protocol.StoredRecord {
			r[3].Data = []byte(strings.Replace(string(r[3].Data), `"carol"`, `"bob"`, 1))
			return r
		}, "changed", 3},
		"reordered": {func(r []protocol.StoredRecord) []protocol.StoredRecord {
			r[3].Data, r[4].Data = r[4].Data, r[3].Data
			return r
		}, "reordered", 3},
	} {
		t.Run(name, func(t *testing.T) {
			s.t = t
			f.Alter(func([]protocol.StoredRecord) []protocol.StoredRecord {
				return c.change(append([]protocol.StoredRecord{}, whole...))
			})
			s.expect(SomeFailed, "the record was changed or is not whole: 1 fault", "audit", "verify")
			docs := documents(t, s.run("audit", "verify", "--json").out)
			if d := docs[0]; d["event"] != "finding" || d["kind"] != c.kind || d["from"] != c.from || d["writer"] != "node web1" || d["fault"] != true {
				t.Errorf("found %v", d)
			}
			if d := docs[len(docs)-1]; d["event"] != "verified" || d["faults"] != 1.0 || d["writers"] != 2.0 {
				t.Errorf("the end is %v", d)
			}
		})
	}
	s.t = t
	f.Alter(func([]protocol.StoredRecord) []protocol.StoredRecord { return whole })
	f.CutRecord(4)
	if out := s.must("audit", "verify"); !strings.Contains(out, "cut  node web1, record 1–3") || !strings.Contains(out, "8 records of 2 writers") {
		t.Errorf("cut by retention:\n%s", out)
	}

	// What was seen once and is cut off since shows each time, whatever is written in its place.
	f.Alter(func(r []protocol.StoredRecord) []protocol.StoredRecord { return r[:len(r)-2] }) // the node's last and the controller's
	cut := func() {
		t.Helper()
		var gone []string
		for _, d := range documents(t, s.run("audit", "verify", "--json").out) {
			if d["kind"] == "gone" && d["fault"] == true {
				gone = append(gone, fmt.Sprint(d["writer"], " ", d["from"]))
			}
		}
		if fmt.Sprint(gone) != "[controller ctl 4 node web1 8]" {
			t.Errorf("cut off are %q", gone)
		}
	}
	cut()
	s.expect(SomeFailed, "2 faults", "audit", "verify")
	f.Write(protocol.UpSubject("web1", protocol.UpAudit), protocol.Encode(protocol.AuditRecord{Version: 1, Seq: 8, At: "web1", Outcome: "ok"}))
	cut()
	if err := os.Remove(s.path("nix-infra/audit.json")); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if out := s.run("audit", "verify").out; strings.Contains(out, "gone") {
			t.Errorf("once that is known:\n%s", out)
		}
	}
}

// Two that change the record at once, as CI and a person do, lose nothing of each other's, and the fleet ends up with the
// account JWT that has all.
func TestAccessOfManyAtOnce(t *testing.T) {
	s, f := newFleet(t)
	const many = 8
	all := func(args func(name string) []string) {
		t.Helper()
		var wg sync.WaitGroup
		for i := range many {
			wg.Go(func() {
				if r := s.runContext(t.Context(), &watched{}, args(fmt.Sprint("user", i))...); r.status != OK {
					t.Errorf("user%d: %s", i, r.stderr)
				}
			})
		}
		wg.Wait()
	}
	all(func(name string) []string {
		return []string{"access", "add", name, "--role", "viewer", "--out", s.path(name + ".creds")}
	})
	keys := map[string]string{}
	for _, d := range documents(t, s.must("access", "list", "--json")) {
		keys[d["name"].(string)] = d["key"].(string)
	}
	for i := range many {
		_, claims, err := protocol.ParseCredentials([]byte(s.read(fmt.Sprintf("user%d.creds", i))))
		if err != nil || keys[fmt.Sprint("user", i)] != claims.Subject {
			t.Errorf("user%d is not on record with what they have: %v", i, err)
		}
	}
	all(func(name string) []string { return []string{"access", "revoke", name, "--batch"} })
	void, err := protocol.Revocations(f.Account())
	if err != nil || len(void) != many || !strings.Contains(s.read("nix-infra/fleet.json"), f.Account()) {
		t.Errorf("the fleet knows that %d of %d are revoked: %v", len(void), many, err)
	}
}

// access.json is what people and other programs may read.
func TestAccessRecord(t *testing.T) {
	s, _ := newFleet(t)
	s.must("access", "add", "bob", "--role", "operator", "--target", "web1", "--expires", "2099-01-02", "--out", s.path("bob.creds"))
	var r struct {
		V      int `json:"v"`
		Grants []map[string]any
	}
	if err := json.Unmarshal([]byte(s.read("nix-infra/access.json")), &r); err != nil || r.V != 1 || len(r.Grants) != 3 {
		t.Fatalf("%+v, %v", r, err)
	}
	g := r.Grants[2]
	if g["name"] != "bob" || g["role"] != "operator" || g["expires"] != "2099-01-02T00:00:00Z" || g["by"] != "alice" || fmt.Sprint(g["targets"]) != "[web1]" {
		t.Errorf("on record is %v", g)
	}
	s.write("nix-infra/access.json", "{")
	s.expect(Refused, "damaged", "access", "list")
	s.expect(Refused, "damaged", "access", "revoke", "bob", "--batch")
}
