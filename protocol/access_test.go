package protocol

import (
	"errors"
	"strings"
	"testing"
	"time"
)

func TestParseTargets(t *testing.T) {
	for given, want := range map[string]string{
		"web1": "web1", "web* db1": "db1 web*", "web2,web1 web2": "web1 web2", "all": "", "web1 all": "", "n[12]": "n[12]",
	} {
		got, err := ParseTargets([]string{given})
		if err != nil || strings.Join(got, " ") != want {
			t.Errorf("%q: %q, %v", given, got, err)
		}
	}
	if got, err := ParseTargets(nil); err != nil || got != nil {
		t.Errorf("nothing: %q, %v", got, err)
	}
	many := strings.Repeat("x* ", maxTargets)
	for i := range maxTargets {
		many += strings.Repeat("a", i+1) + " "
	}
	for given, says := range map[string]string{
		"@web": "names, globs or all", "state=lost": "names, globs or all", "not web1": "names, globs or all",
		"Web1": "lower-case", "n[1": "bad pattern", `a\*`: "lower-case", " , ": "no target", strings.Repeat("a", 65): "at most 64",
		many: "a grant can carry",
	} {
		if got, err := ParseTargets([]string{given}); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%.40q: %q, %v", given, got, err)
		}
	}
}

// A grant that is restricted to some nodes is worth nothing on the others, whatever it signs and however it is addressed.
func TestTargets(t *testing.T) {
	f := newFleet(t)
	signer := func(targets ...string) *Signer {
		creds, err := f.keys.Credentials("dora", Deployer, time.Time{}, targets...)
		must(t, err)
		s, _, err := ParseCredentials(creds)
		must(t, err)
		return s
	}
	request := func(s *Signer, target string) *Signed {
		signed, _, err := s.Request(Ping, target, nil, now)
		must(t, err)
		return signed
	}
	for _, c := range []struct {
		name, node, target string
		grant              []string
		want               Code
	}{
		{"no restriction", "web1", "web1", nil, ""},
		{"its own name", "web1", "web1", []string{"web1"}, ""},
		{"a glob", "web17", "web17", []string{"db1", "web*"}, ""},
		{"another", "db2", "db2", []string{"db1", "web*"}, OffTarget},
		{"the beginning of its name is no glob", "web17", "web17", []string{"web1"}, OffTarget},
		{"everyone, and one of them", "web1", Everyone, []string{"web*"}, ""},
		{"everyone, and none of them", "db1", Everyone, []string{"web*"}, OffTarget},
		{"the controller, which asks about each node", ControllerName, ControllerName, []string{"web*"}, ""},
		{"another's order, of a grant that covers both", "web2", "web1", []string{"web*"}, Misaddressed},
	} {
		t.Run(c.name, func(t *testing.T) {
			seen := seenMap{}
			targets := []string{c.node, Everyone}
			if c.node == ControllerName {
				targets = targets[:1]
			}
			_, id, err := f.verifier.Verify(request(signer(c.grant...), c.target), Expect{Kind: KindRequest, Targets: targets, Now: now}, seen)
			if c.want == "" && err != nil || c.want != "" && !errors.Is(err, &Refusal{Code: c.want}) {
				t.Fatalf("got %v, want %q", err, c.want)
			}
			if id.Name != "dora" {
				t.Errorf("the sender is %+v", id)
			}
			if c.want != "" && len(seen) > 0 {
				t.Error("a refused order was remembered")
			}
		})
	}
	t.Run("manifests", func(t *testing.T) {
		for node, want := range map[string]Code{"web1": "", "db1": OffTarget} {
			m := manifest(func(m *Manifest) { m.Node, m.Attr = node, SystemAttr(node) })
			doc, err := signer("web*").Manifest(m)
			must(t, err)
			_, _, err = f.verifier.Manifest(doc, node, m.Created)
			if want == "" && err != nil || want != "" && !errors.Is(err, &Refusal{Code: want}) {
				t.Errorf("%s: %v", node, err)
			}
		}
	})
	t.Run("who has no restriction", func(t *testing.T) {
		for _, r := range []Role{Admin, Node, Controller} {
			if _, err := f.keys.Credentials("x", r, time.Time{}, "web1"); err == nil {
				t.Errorf("%s was restricted", r)
			}
		}
		if _, err := f.keys.Credentials("x", Viewer, time.Time{}, "@web"); err == nil {
			t.Error("a tag became a target")
		}
	})
}

// nextSecond waits until an account JWT that is made is newer than all that were.
func nextSecond() {
	for s := time.Now().Unix(); time.Now().Unix() == s; {
		time.Sleep(10 * time.Millisecond)
	}
}

func TestSucceeds(t *testing.T) {
	f, other := newFleet(t), newFleet(t)
	key := func() string {
		pub, err := f.signer(t, "x", Viewer, time.Time{}).Key.PublicKey()
		must(t, err)
		return pub
	}
	bob, carol, at := key(), key(), time.Now()
	publish := func(revoked map[string]time.Time) string {
		p, err := f.keys.Publish(revoked)
		must(t, err)
		return p.AccountJWT
	}
	nextSecond()
	one := publish(map[string]time.Time{bob: at})
	must(t, f.verifier.Succeeds(one))
	_, err := f.verifier.SetAccount(one)
	must(t, err)
	must(t, f.verifier.Succeeds(one)) // again
	nextSecond()
	for name, c := range map[string]struct {
		token string
		want  Code
	}{
		"forgets bob":        {publish(map[string]time.Time{carol: at}), Conflict},
		"revokes bob less":   {publish(map[string]time.Time{bob: at.Add(-time.Hour)}), Conflict},
		"adds carol":         {publish(map[string]time.Time{bob: at, carol: at}), ""},
		"the one before":     {f.public.AccountJWT, Conflict},
		"another operator's": {other.public.AccountJWT, Untrusted},
		"garbage":            {"x", Untrusted},
	} {
		err := f.verifier.Succeeds(c.token)
		if c.want == "" && err != nil || c.want != "" && !errors.Is(err, &Refusal{Code: c.want}) {
			t.Errorf("%s: %v", name, err)
		}
	}
	revoked, err := Revocations(one)
	if err != nil || len(revoked) != 1 || revoked[bob].Unix() != at.Unix() {
		t.Errorf("revocations %v, %v", revoked, err)
	}
}

func TestAuditQuery(t *testing.T) {
	r := &AuditRecord{Time: now, At: "web1", User: "bob", Action: Deploy, Outcome: string(OverRole)}
	begun := &AuditRecord{Time: now, At: "web1", User: "bob", Action: Deploy}
	for name, c := range map[string]struct {
		q           AuditQuery
		ended, open bool
	}{
		"all":    {AuditQuery{}, true, true},
		"denied": {AuditQuery{Denied: true}, true, false},
		"user":   {AuditQuery{User: "bob", At: "web1", Action: Deploy}, true, true},
		"others": {AuditQuery{User: "rob"}, false, false},
		"since":  {AuditQuery{Since: now}, true, true},
		"until":  {AuditQuery{Until: now}, false, false},
	} {
		if c.q.Matches(r) != c.ended || c.q.Matches(begun) != c.open {
			t.Errorf("%s: %v, %v", name, c.q.Matches(r), c.q.Matches(begun))
		}
	}
	for subject, want := range map[string]string{
		UpSubject("web1", UpAudit): "node web1", ControllerAudit("ctl"): "controller ctl", UpSubject("web1", UpBeat): "",
		"ni.v1.controller.UP.audit": "", "ni.v1.controller.a.b.audit": "",
	} {
		if _, writer, ok := AuditWriter(subject); writer != want || ok != (want != "") {
			t.Errorf("%s: %q, %v", subject, writer, ok)
		}
	}
}
