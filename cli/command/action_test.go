package command

import (
	"encoding/json"
	"fmt"
	"io"
	"maps"
	"os"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

// actor is a node that runs actions: does gets an action's words and its environment, and gives what it prints, to stderr
// too, and its exit status.
func actor(t *testing.T, f *fleettest.Fleet, n *fleettest.Node, does func(words []string, env map[string]string) (stdout, stderr string, exit int)) {
	run := func(o *protocol.Verified, send func(any), _ <-chan struct{}) error {
		order, err := protocol.Decode[protocol.ScriptOrder](o.Payload)
		if err != nil {
			return err
		}
		if order.SHA256 != protocol.Digest([]byte("echo action\n")) || order.Module != "mongodb" {
			return protocol.Refuse(protocol.Conflict, "another action.sh")
		}
		env := map[string]string{}
		if len(order.Env) > 0 {
			plain, err := protocol.Unseal(order.Env, f.XKey(n.Name))
			if err != nil {
				return err
			}
			if err := json.Unmarshal(plain, &env); err != nil {
				return err
			}
		}
		stdout, stderr, exit := does(order.Words, env)
		part := protocol.Output{Stdout: []byte(stdout), Stderr: []byte(stderr)}
		if order.SealTo != "" {
			part.Stdout = nil
			if exit == 0 && stdout != "" {
				if part.Sealed, err = f.XKey(n.Name).Seal([]byte(stdout), order.SealTo); err != nil {
					return err
				}
			}
		}
		send(part)
		ending := exits(exit)
		if exit == 0 {
			ending = success
		}
		send(protocol.Output{Ended: ending})
		return nil
	}
	n.Script(fleettest.Script{Streams: map[protocol.Action]fleettest.Streams{protocol.RunScript: run}})
}

// shows has an action print its words and environment.
func shows(words []string, env map[string]string) (string, string, int) {
	return fmt.Sprintf("%q %v\n", words, env), "to stderr\n", 0
}

func withModule(t *testing.T) (*shell, *fleettest.Fleet) {
	s, f := newFleet(t)
	s.write("app_modules/mongodb/action.sh", "echo action\n")
	return s, f
}

// secretStore is the project's secrets, past the command line.
func (s *shell) secretStore() *vault.Secrets { return s.secretStoreOf(s.env["SECRETS_PASS"]) }

func (s *shell) secretStoreOf(password string) *vault.Secrets {
	s.t.Helper()
	a := &app{Environment: Environment{Stderr: io.Discard, VaultOptions: []vault.Option{vault.WorkFactor(2)}}, dir: s.dir, batch: true}
	p, err := a.openProject()
	if err != nil {
		s.t.Fatal(err)
	}
	p.Env.Process = func(name string) string { return map[string]string{"SECRETS_PASS": password}[name] }
	return a.secretStore(p)
}

func TestAction(t *testing.T) {
	s, f := withModule(t)
	db1, db2 := f.Add("db1", "db"), f.Add("db2", "db")
	actor(t, f, db1, shows)
	actor(t, f, db2, shows)
	f.Change("db2", func(n *protocol.NodeState) { n.IPv4, n.Beat.OverlayIP = "192.0.2.8", "10.10.2.0" })
	for _, c := range []struct {
		args []string
		want string
	}{
		{[]string{"db1", "--app-module", "mongodb", "--cmd", "create-db --name='a b'"}, `["create-db" "--name=a b"] map[]`},
		{[]string{"--target=db1", "--app-module=mongodb", "--cmd="}, `[] map[]`},
		{[]string{"db1", "--app-module", "mongodb", "--", "status", "a;b"}, `["status" "a;b"] map[]`},
		{[]string{"--target=db1", "--app-module=mongodb", "--cmd=init", "--env-vars=A=1,B=x=y==, C=it's \"$(x)\"", "--env-vars", "D=4"}, `["init"] map[A:1 B:x=y== C:it's "$(x)" D:4]`},
		{[]string{"db1", "--app-module=mongodb", "--cmd=init", "--env-var", "A=1,2=3", "--env-var", "FROM_HERE"}, `["init"] map[A:1,2=3 FROM_HERE:of the environment]`},
		{[]string{"db1", "--app-module=mongodb", "--cmd=init", "--env-vars=A=[%%localhost.hostname%%]/[%%localhost.ipv4%%]/[%%db2.ipv4%%]/[%%db2.overlayIp%%]"}, `["init"] map[A:db1/192.0.2.7/192.0.2.8/10.10.2.0]`},
	} {
		s.env["FROM_HERE"] = "of the environment"
		if r := s.run(append([]string{"action"}, c.args...)...); r.status != OK || r.out != c.want+"\n" || r.stderr != "to stderr\n" {
			t.Errorf("%q: %+v, want %s", c.args, r, c.want)
		}
	}
	r := s.run("action", "@db", "--app-module=mongodb", "--cmd=x", "--env-vars=A=[%%localhost.ipv4%%]", "--merge")
	if r.status != OK || !strings.Contains(r.out, "db1: [\"x\"] map[A:192.0.2.7]\n") || !strings.Contains(r.out, "db2: [\"x\"] map[A:192.0.2.8]\n") || strings.Count(r.out, ": to stderr\n") != 2 {
		t.Errorf("%+v", r)
	}

	// Nothing is run where something of it is wrong.
	ran := false
	actor(t, f, db1, func([]string, map[string]string) (string, string, int) { ran = true; return "", "", 0 })
	for says, args := range map[string][]string{
		"which app module":                        {"--cmd=x"},
		"do what?":                                {"--app-module=mongodb"},
		"not in both":                             {"--app-module=mongodb", "--cmd=x", "--", "y"},
		"no app_modules/mongo/action.sh":          {"--app-module=mongo", "--cmd=x"},
		"is no app module":                        {"--app-module=../..", "--cmd=x"},
		"expected K=value":                        {"--app-module=mongodb", "--cmd=x", "--env-vars=A=1,2"},
		"A is given twice":                        {"--app-module=mongodb", "--cmd=x", "--env-vars=A=1,A=2"},
		"NOT_HERE: it is not set":                 {"--app-module=mongodb", "--cmd=x", "--env-var=NOT_HERE"},
		"a shell would":                           {"--app-module=mongodb", "--cmd=x $(id)"},
		"no node db9 is known":                    {"--app-module=mongodb", "--cmd=x", "--env-vars=A=[%%db9.ipv4%%]"},
		"the overlay address of db1 is not known": {"--app-module=mongodb", "--cmd=x", "--env-vars=A=[%%localhost.overlayIp%%]"},
		"no secret gone; nix-infra secrets":       {"--app-module=mongodb", "--cmd=x", "--env-var=A=[%%secrets/gone%%]"},
		"--timeout 25h0m0s":                       {"--app-module=mongodb", "--cmd=x", "--timeout=25h"},
		"can't be the name of a secret":           {"--app-module=mongodb", "--cmd=x", "--save-as-secret=../x"},
		"leave out one":                           {"--app-module=mongodb", "--cmd=x --save-as-secret=a", "--save-as-secret=b"},
		"the limit is 65536":                      {"--app-module=mongodb", "--cmd=x", "--env-var=A=" + strings.Repeat("x", protocol.MaxEnvSize)},
		"a secret is what one node prints, and 2": {"db2", "--app-module=mongodb", "--cmd=x", "--save-as-secret=a"},
	} {
		s.expect(Refused, says, append([]string{"action", "db1"}, args...)...)
	}
	if ran {
		t.Error("it was run all the same")
	}
	s.write("app_modules/mongodb/action.sh", "echo another\n")
	s.expect(Refused, "another action.sh", "action", "db1", "--app-module=mongodb", "--cmd=x")
}

// The values of secrets and variables are for one node's eyes, proven to be that node's.
func TestActionProvesTheNode(t *testing.T) {
	s, f := withModule(t)
	actor(t, f, f.Add("db1"), shows)
	f.Register("evil")
	if err := s.secretStore().Put("root", []byte(`p,w"=`)); err != nil {
		t.Fatal(err)
	}
	r := s.run("action", "db1", "--app-module=mongodb", "--cmd=x", "--env-var=PW=[%%secrets/root%%]")
	if r.status != OK || r.out != "[\"x\"] map[PW:p,w\"=]\n" {
		t.Errorf("%+v", r)
	}
	own := f.Record("db1").JWT
	for _, c := range []struct{ says, jwt string }{
		{"keys of evil (node) for db1", f.Record("evil").JWT},
		{"nothing proves the keys of db1; enroll it again", ""},
	} {
		f.Change("db1", func(n *protocol.NodeState) { n.JWT = c.jwt })
		s.expect(Refused, c.says, "action", "db1", "--app-module=mongodb", "--cmd=x", "--env-vars=A=1")
		s.expect(Refused, c.says, "action", "db1", "--app-module=mongodb", "--cmd=x", "--save-as-secret=s")
	}
	f.Change("db1", func(n *protocol.NodeState) { n.JWT = own })

	// An output that somebody else sealed, who had the key from the order, is not the node's.
	f.Add("other").Script(fleettest.Script{Streams: map[protocol.Action]fleettest.Streams{protocol.RunScript: func(o *protocol.Verified, send func(any), _ <-chan struct{}) error {
		order, err := protocol.Decode[protocol.ScriptOrder](o.Payload)
		if err != nil {
			return err
		}
		stranger, err := nkeys.CreateCurveKeys()
		if err != nil {
			return err
		}
		sealed, err := stranger.Seal([]byte("planted"), order.SealTo)
		if err != nil {
			return err
		}
		send(protocol.Output{Sealed: sealed, Stdout: []byte("planted"), Ended: success})
		return nil
	}}})
	r = s.run("action", "other", "--app-module=mongodb", "--cmd=x", "--save-as-secret=s")
	if r.status != SomeFailed || r.out != "" || !strings.Contains(r.stderr, "was not sealed by that node") {
		t.Errorf("%+v", r)
	}
	if s.secretStore().Has("s") {
		t.Error("it was saved")
	}
}

func TestActionAsSecret(t *testing.T) {
	s, f := withModule(t)
	db1 := f.Add("db1")
	prints := func(stdout, stderr string, exit int) {
		actor(t, f, db1, func(words []string, _ map[string]string) (string, string, int) {
			return strings.ReplaceAll(stdout, "WORDS", strings.Join(words, " ")), stderr, exit
		})
	}
	save := func(more ...string) run {
		return s.run(append([]string{"action", "--target=db1", "--app-module=mongodb"}, more...)...)
	}
	shown := func() string {
		t.Helper()
		value, err := s.secretStore().Get("app.url")
		if err != nil {
			t.Fatal(err)
		}
		return string(value)
	}

	prints("mongodb://WORDS@[%%db1.ipv4%%]\r\n\n", "made\n", 0)
	r := save("--cmd=create --name=x", "--save-as-secret=app.url")
	if r.status != OK || r.out != "db1: what the action of mongodb printed is secret app.url now\n" || r.stderr != "made\n" {
		t.Errorf("%+v", r)
	}
	if got := shown(); got != "mongodb://create --name=x@[%%db1.ipv4%%]" {
		t.Errorf("saved %q", got)
	}
	saved := maps.Clone(s.snapshot())
	unchanged := func(what string) {
		t.Helper()
		if fmt.Sprint(s.snapshot()) != fmt.Sprint(saved) {
			t.Errorf("%s: files were changed", what)
			saved = s.snapshot()
		}
	}

	prints("half", "it broke\n", 4)
	if r := save("--cmd=create", "--save-as-secret=app.url", "--force"); r.status != SomeFailed || r.out != "" || r.stderr != "it broke\nnix-infra: db1: exited with 4; no secret was saved\n" {
		t.Errorf("%+v", r)
	}
	unchanged("after a failure")
	prints("\n\n", "", 0)
	if r := save("--cmd=create", "--save-as-secret=app.url", "--force"); r.status != SomeFailed || r.stderr != "nix-infra: db1: the action printed nothing; no secret was saved\n" {
		t.Errorf("%+v", r)
	}
	unchanged("after no output")
	prints("new", "", 0)
	s.stdin = "no\n"
	if r := save("--cmd=create", "--save-as-secret=app.url"); r.status != Refused || !strings.Contains(r.stderr, "there is a secret app.url already; replace it?") {
		t.Errorf("%+v", r)
	}
	unchanged("after a no")
	for n, args := range [][]string{{"--cmd=1", "--store-as-secret=app.url", "--force"}, {"--cmd=2", "--save-as-secret", "app.url", "--batch"}, {"--cmd=3 --save-as-secret=app.url", "--batch"}} {
		prints("new WORDS", "", 0)
		r := save(args...)
		if r.status != OK || shown() != fmt.Sprint("new ", n+1) || strings.Contains(r.stderr, "among the words") != (n == 2) {
			t.Errorf("%q: %+v, saved %q", args, r, shown())
		}
	}
	docs := documents(t, save("--cmd=4", "--save-as-secret=app.url", "--batch", "--json").out)
	if len(docs) != 2 || docs[0]["exit"] != 0.0 || docs[1]["secret"] != "app.url" || docs[1]["saved"] != true {
		t.Errorf("%v", docs)
	}

	// Who can't open the project's keys makes nothing that could then not be kept.
	ran := false
	actor(t, f, db1, func([]string, map[string]string) (string, string, int) { ran = true; return "x", "", 0 })
	creds := s.path("ops.creds")
	if err := os.WriteFile(creds, f.Credentials("ops", protocol.Operator, time.Time{}), 0o600); err != nil {
		t.Fatal(err)
	}
	s.env["SECRETS_PASS"] = "wrong"
	s.expect(Refused, "password", "--creds", creds, "action", "db1", "--app-module=mongodb", "--cmd=x", "--save-as-secret=new")
	if ran {
		t.Error("it was run all the same")
	}
}
