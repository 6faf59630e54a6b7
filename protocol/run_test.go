package protocol

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"
)

func TestSeal(t *testing.T) {
	key, err := nkeys.CreateCurveKeys()
	must(t, err)
	public, err := key.PublicKey()
	must(t, err)
	sealed, err := Seal([]byte("s3cret"), public)
	must(t, err)
	if bytes.Contains(sealed, []byte("s3cret")) {
		t.Error("it is in clear")
	}
	opened, err := Unseal(sealed, key)
	if err != nil || string(opened) != "s3cret" {
		t.Errorf("%q, %v", opened, err)
	}
	other, err := nkeys.CreateCurveKeys()
	must(t, err)
	if _, err := Unseal(sealed, other); err == nil {
		t.Error("another key opens it")
	}
	for i := range sealed {
		changed := bytes.Clone(sealed)
		changed[i] ^= 1
		if opened, err := Unseal(changed, key); err == nil {
			t.Errorf("with byte %d changed it opens as %q", i, opened)
		}
		if _, err := Unseal(sealed[:i], key); err == nil {
			t.Errorf("its first %d bytes open", i)
		}
	}
	if _, err := Seal(nil, "XNONSENSE"); err == nil {
		t.Error("sealed to nonsense")
	}
}

func TestProveNode(t *testing.T) {
	f := newFleet(t)
	v, err := NewVerifier(f.public.Operator, f.public.AccountJWT)
	must(t, err)
	key, xkey := mustKey(t, nkeys.CreateUser), mustKey(t, nkeys.CreateCurveKeys)
	token, err := f.keys.IssueNode("n1", key, xkey)
	must(t, err)
	id, err := v.ProveNode(&NodeRecord{Name: "n1", JWT: token}, time.Now())
	if err != nil || id.Key != key || id.XKey != xkey {
		t.Errorf("%+v, %v", id, err)
	}
	bare, err := f.keys.Issue("n1", Node, key, time.Time{})
	must(t, err)
	viewer, err := f.keys.Issue("n1", Viewer, key, time.Time{})
	must(t, err)
	foreign, err := newFleet(t).keys.IssueNode("n1", key, xkey)
	must(t, err)
	for name, r := range map[string]NodeRecord{"no JWT": {Name: "n1"}, "of another node": {Name: "n2", JWT: token}, "without a curve key": {Name: "n1", JWT: bare},
		"a person's": {Name: "n1", JWT: viewer}, "of another fleet": {Name: "n1", JWT: foreign}, "cut": {Name: "n1", JWT: token[:len(token)-4]}} {
		if id, err := v.ProveNode(&r, time.Now()); err == nil {
			t.Errorf("%s: %+v", name, id)
		}
	}
	if _, err := f.keys.IssueNode("n1", key, "XABC"); err == nil {
		t.Error("a node's JWT with nonsense for a curve key")
	}
}

func TestOrdersOfRunning(t *testing.T) {
	for _, bad := range []CommandOrder{{}, {Argv: []string{""}}, {Argv: []string{"a\x00b"}}, {Argv: make([]string, MaxArgs+1)}, {Argv: []string{"a", strings.Repeat("b", MaxArgSize)}},
		{Argv: []string{"a"}, Timeout: -1}, {Argv: []string{"a"}, Timeout: MaxRunTime + 1}, {Argv: []string{"a"}, SealTo: "X"}} {
		if bad.Validate() == nil {
			t.Errorf("%.200v is valid", bad)
		}
	}
	must(t, (&CommandOrder{Argv: []string{"systemctl", "", "--all"}, Role: Viewer}).Validate())
	if (&CommandOrder{Argv: []string{"uptime"}, Role: Node}).Validate() == nil {
		t.Error("a node's role was taken")
	}
	digest := Digest(nil)
	must(t, (&ScriptOrder{Module: "mongo-db_2", SHA256: digest}).Validate())
	for _, bad := range []ScriptOrder{{SHA256: digest}, {Module: "..", SHA256: digest}, {Module: "a/b", SHA256: digest}, {Module: "a"}, {Module: "-a", SHA256: digest}, {Module: "a", SHA256: digest, Env: make([]byte, MaxEnvSize+2000)}} {
		if bad.Validate() == nil {
			t.Errorf("%.200v is valid", bad)
		}
	}
	key := make([]byte, 32)
	for _, to := range []string{TunnelUpload, "127.0.0.1:22", "[::1]:8080", "db.internal:5432"} {
		if err := (&TunnelOrder{To: to, Public: key}).Validate(); err != nil {
			t.Errorf("%s: %v", to, err)
		}
	}
	for _, to := range []string{"", "127.0.0.1", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:ssh", ":22", "a b:22", "-o:22", "UPLOAD:1"} {
		if (&TunnelOrder{To: to, Public: key}).Validate() == nil {
			t.Errorf("%q is an address", to)
		}
	}
	if (&TunnelOrder{To: "127.0.0.1:22", Public: key[:31]}).Validate() == nil {
		t.Error("half a key")
	}
}

func TestDetail(t *testing.T) {
	token := mustKey(t, nkeys.CreateUser)
	revoked, err := newFleet(t).keys.Publish(map[string]time.Time{token: now})
	must(t, err)
	for _, c := range []struct {
		action  Action
		payload any
		want    string
	}{
		{RunCommand, CommandOrder{Argv: []string{"systemctl", "status", "a b", ""}}, `systemctl status "a b" ""`},
		{RunShell, ShellOrder{Text: "a\nb"}, "a b"},
		{RunScript, ScriptOrder{Module: "hello", SHA256: Digest(nil), Words: []string{"status", "--x=1"}, Env: []byte("sealed")}, "hello: status --x=1"},
		{OpenTunnel, TunnelOrder{To: "127.0.0.1:22", Public: make([]byte, 32)}, "127.0.0.1:22"},
		{ReadFiles, FilesQuery{Path: "/etc/hosts"}, "/etc/hosts"},
		{Release, NameRequest{Name: "/nix/store/x"}, "/nix/store/x"},
		{RemoveNode, NameRequest{Name: "web1"}, "web1"},
		{PutNode, NodeRecord{Name: "web1", Key: "UWEB1"}, "web1: key UWEB1"},
		{TagNode, TagsRequest{Node: "web1", Tags: []string{"eu", "web"}}, "web1: eu web"},
		{LockNode, LockRequest{Node: "web1", Reason: "disk"}, "web1: locked: disk"},
		{LockNode, LockRequest{Node: "web1"}, "web1: unlocked"},
		{AnswerJoining, JoinAnswer{Token: token, Node: "web1", User: "x"}, "web1: let in by the token " + token},
		{AnswerJoining, JoinAnswer{Token: token, Node: "web1"}, "web1: the token " + token + " is void"},
		{SteerRollout, RolloutOrder{ID: "d1", Verb: PauseRollout}, "d1: pause"},
		{Deploy, DeployRequest{Deployment: "d1", Mode: Switch, Items: []DeployItem{{Node: "web1", Serial: 1, Digest: Digest(nil)}}}, "d1: switch web1"},
		{PutAccount, AccountUpdate{Account: revoked.AccountJWT}, "revoked so far: 1"},
		{PutAccount, AccountUpdate{Account: "x"}, ""},
		{Ping, nil, ""},
		{RunCommand, "nonsense", ""},
	} {
		if got := Detail(c.action, Encode(c.payload)); got != c.want {
			t.Errorf("%s: %q, want %q", c.action, got, c.want)
		}
	}
	if got := Detail(RunShell, Encode(ShellOrder{Text: strings.Repeat("é", 1000)})); len(got) > maxDetail+3 {
		t.Errorf("%d bytes", len(got))
	}
}

func TestTunnelSubjects(t *testing.T) {
	if user, id, ok := TunnelSender(TunnelSubject("n1", "ann", "abc")); !ok || user != "ann" || id != "abc" {
		t.Error(user, id, ok)
	}
	if _, _, ok := TunnelSender(ReplySubject("ann", "abc", "n1")); ok {
		t.Error("a reply is a tunnel's")
	}
	for _, r := range Roles {
		p, err := Permissions(r)
		must(t, err)
		may := false
		for _, s := range p.Pub.Allow {
			may = may || strings.Contains(s, ".tunnel.")
		}
		if may != r.AtLeast(Operator) {
			t.Errorf("%s may send a tunnel's frames: %v", r, may)
		}
	}
}

func TestSecretsOfManifests(t *testing.T) {
	sealed, err := Seal([]byte("v"), mustKey(t, nkeys.CreateCurveKeys))
	must(t, err)
	good := []SealedSecret{{Name: "a", Sealed: sealed}, {Name: "b.c", Sealed: sealed, PreBuild: true}}
	m := manifest(func(m *Manifest) { m.Secrets = good })
	must(t, m.Validate())
	for name, secrets := range map[string][]SealedSecret{"twice": {good[0], good[0]}, "out of order": {good[1], good[0]}, "empty": {{Name: "a"}}, "a path": {{Name: "a/b", Sealed: sealed}},
		"hidden": {{Name: ".a", Sealed: sealed}}, "too large": {{Name: "a", Sealed: make([]byte, maxSealedSize+1)}}} {
		m := manifest(func(m *Manifest) { m.Secrets = secrets })
		if m.Validate() == nil {
			t.Errorf("%s: valid", name)
		}
	}
}
