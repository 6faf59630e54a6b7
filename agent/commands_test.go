package agent_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/agent/run"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

// runner runs what it is told to, without systemd's limits, and remembers it.
type runner struct {
	mu    sync.Mutex
	specs []run.Spec
}

func (r *runner) Run(ctx context.Context, s run.Spec, stdout, stderr *os.File) (protocol.Ending, error) {
	r.mu.Lock()
	r.specs = append(r.specs, s)
	r.mu.Unlock()
	c := exec.CommandContext(ctx, s.Argv[0], s.Argv[1:]...)
	if s.Script != nil {
		c = exec.CommandContext(ctx, s.Argv[0], append([]string{"-c", string(s.Script), "script"}, s.Argv[1:]...)...)
	}
	c.Stdout, c.Stderr, c.Env = stdout, stderr, append(os.Environ(), s.Env...)
	for name, value := range s.Private {
		c.Env = append(c.Env, name+"="+value)
	}
	switch err := c.Run(); {
	case ctx.Err() != nil:
		return protocol.Ending{Exit: -1, Result: protocol.ResultEnded}, nil
	case c.ProcessState == nil:
		return protocol.Ending{}, err
	case err != nil:
		code := c.ProcessState.ExitCode()
		return protocol.Ending{Exit: code, Result: protocol.ResultExit, Reason: fmt.Sprintf("exit status %d", code)}, nil
	}
	return protocol.Ending{Result: protocol.ResultSuccess}, nil
}

func (r *runner) last(t *testing.T) run.Spec {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	if len(r.specs) == 0 {
		t.Fatal("nothing ran")
	}
	return r.specs[len(r.specs)-1]
}

func (r *runner) count() int {
	r.mu.Lock()
	defer r.mu.Unlock()
	return len(r.specs)
}

// cached is a host whose systems are in a cache.
type cached struct{ reconcile.Host }

func (cached) Substitute(context.Context, reconcile.Substitution) error { return nil }

// commanded is a node that runs things, and what is asked of it.
type commanded struct {
	t      *testing.T
	fleet  *testfleet.Fleet
	side   *side
	dir    string
	system string
	runner *runner
}

func command(t *testing.T) *commanded {
	f := testfleet.New(t)
	c := &commanded{t: t, fleet: f, side: control(t, f), dir: enrolled(t, f), system: t.TempDir(), runner: &runner{}}
	start(t, c.dir, func(o *agent.Options) { o.Runner, o.System, o.Host = c.runner, c.system, cached{o.Host} })
	testfleet.Eventually(t, "a beat", func() bool { _, n := c.side.lastBeat(); return n > 0 })
	return c
}

func (c *commanded) policy(document string) {
	c.t.Helper()
	file := filepath.Join(c.system, "etc/nix-infra/policy.json")
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		c.t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(document), 0o644); err != nil {
		c.t.Fatal(err)
	}
}

// deploy confirms a deployment with a module's action.
func (c *commanded) deploy(serial uint64, module, action string) {
	c.t.Helper()
	e, err := zstd.NewWriter(nil)
	if err != nil {
		c.t.Fatal(err)
	}
	defer e.Close()
	digest := protocol.Digest([]byte(action))
	c.side.mu.Lock()
	c.side.blobs[digest] = e.EncodeAll([]byte(action), nil)
	c.side.mu.Unlock()
	doc := manifest(c.t, c.side, c.fleet.User("dee", protocol.Deployer), node, serial, func(m *protocol.Manifest) {
		m.Closure = &protocol.Closure{Path: systemPath("old"), Caches: []string{"https://cache.example"}, Keys: []string{"cache.example-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="}}
		m.Files = append([]protocol.File{{Path: protocol.ModuleAction(module), SHA256: digest, Size: int64(len(action))}}, m.Files...)
	})
	c.side.look(c.t, doc, serial, "")
	testfleet.Eventually(c.t, "the deployment", func() bool {
		b, _ := c.side.lastBeat()
		return b.Serial == serial && b.Phase == protocol.Confirmed
	})
}

// result is what came of an order.
type result struct {
	stdout, stderr string
	sealed         []byte
	ended          protocol.Ending
	refused        *protocol.Refusal
}

// order has somebody of a role run something, and waits for its end.
func (c *commanded) order(role protocol.Role, a protocol.Action, payload any) (r result) {
	c.t.Helper()
	who := c.fleet.User("ann", role)
	nc := c.fleet.Connect(who, "")
	defer nc.Close()
	signed, id, err := who.Request(a, node, payload, time.Now())
	if err != nil {
		c.t.Fatal(err)
	}
	sub, err := nc.SubscribeSync(protocol.ReplySubject("ann", id, node))
	if err != nil {
		c.t.Fatal(err)
	}
	// By the subject of the own role: what is above it, the broker would refuse, and the node shall.
	if err := nc.PublishRequest(protocol.RequestSubject(node, protocol.Ping), protocol.ReplySubject("ann", id, node), protocol.Encode(signed)); err != nil {
		c.t.Fatal(err)
	}
	for {
		m, err := sub.NextMsg(30 * time.Second)
		if err != nil {
			c.t.Fatal(err)
		}
		reply, err := protocol.Decode[protocol.Reply](m.Data)
		if err != nil {
			c.t.Fatal(err)
		}
		if r.refused = reply.Refused; !reply.More {
			return r
		}
		o, err := protocol.Decode[protocol.Output](reply.Body)
		if err != nil {
			c.t.Fatal(err)
		}
		r.stdout += string(o.Stdout)
		r.stderr += string(o.Stderr)
		if o.Ended != nil {
			r.ended, r.sealed = *o.Ended, o.Sealed
		}
	}
}

func (c *commanded) refused(code protocol.Code, words string, role protocol.Role, a protocol.Action, payload any) {
	c.t.Helper()
	before := c.runner.count()
	r := c.order(role, a, payload)
	if r.refused == nil || r.refused.Code != code || !strings.Contains(r.refused.Reason, words) || strings.Contains(r.refused.Reason, "\n") {
		c.t.Errorf("%s %+v by %s: %+v, want %s with %q", a, payload, role, r.refused, code, words)
	}
	if c.runner.count() != before {
		c.t.Errorf("%s %+v by %s was run", a, payload, role)
	}
}

const rules = `{"v": 1, "defaultCommands": false, "allowShell": {"timeout": 50}, "commands": [
	{"name": "say", "program": "echo", "role": "viewer", "forms": [{"operands": [{"what": "word", "pattern": "[a-z]+", "max": 3}]}],
	 "user": "root", "groups": ["adm"], "env": [{"name": "HERE", "value": "on-{node}"}], "timeout": 40, "output": 5000},
	{"name": "fail", "program": "false", "role": "operator"},
	{"name": "gone", "program": "not-installed-anywhere", "role": "viewer"}],
	"actions": {"memory": 33554432, "tasks": 7, "timeout": 30}}`

func TestCommands(t *testing.T) {
	c := command(t)
	c.policy(rules)
	r := c.order(protocol.Viewer, protocol.RunCommand, protocol.CommandOrder{Argv: []string{"echo", "hello", "there"}, Timeout: 10})
	if r.refused != nil || r.stdout != "hello there\n" || r.ended.Exit != 0 || r.ended.Result != protocol.ResultSuccess || r.ended.Rule != "say" {
		t.Errorf("%+v", r)
	}
	s := c.runner.last(t)
	if s.User != "root" || !slices.Equal(s.Groups, []string{"adm"}) || !slices.Contains(s.Env, "HERE=on-"+node) || s.Timeout != 10*time.Second || s.Output != 5000 ||
		s.Memory <= 0 || s.Tasks <= 0 || !filepath.IsAbs(s.Argv[0]) || s.Seal != nil || s.Private != nil {
		t.Errorf("%+v", s)
	}
	for _, asked := range []int{0, 41} {
		if c.order(protocol.Viewer, protocol.RunCommand, protocol.CommandOrder{Argv: []string{"echo", "x"}, Timeout: asked}); c.runner.last(t).Timeout != 40*time.Second {
			t.Errorf("a timeout of %d s: %v", asked, c.runner.last(t).Timeout)
		}
	}
	if r := c.order(protocol.Operator, protocol.RunCommand, protocol.CommandOrder{Argv: []string{"false"}}); r.refused != nil || r.ended.Exit != 1 || r.ended.Result != protocol.ResultExit {
		t.Errorf("%+v", r)
	}
	c.refused(protocol.Denied, "", protocol.Admin, protocol.RunCommand, protocol.CommandOrder{Argv: []string{"echo", "NO"}})
	c.refused(protocol.OverRole, "fail", protocol.Viewer, protocol.RunCommand, protocol.CommandOrder{Argv: []string{"false"}})
	// Somebody may ask for less than they have, and never for more.
	c.refused(protocol.OverRole, "fail", protocol.Admin, protocol.RunCommand, protocol.CommandOrder{Argv: []string{"false"}, Role: protocol.Viewer})
	c.refused(protocol.OverRole, "fail", protocol.Viewer, protocol.RunCommand, protocol.CommandOrder{Argv: []string{"false"}, Role: protocol.Admin})
	c.refused(protocol.Unknown, "not installed", protocol.Viewer, protocol.RunCommand, protocol.CommandOrder{Argv: []string{"not-installed-anywhere"}})
	c.refused(protocol.Malformed, "no program", protocol.Viewer, protocol.RunCommand, protocol.CommandOrder{})
	c.refused(protocol.OverRole, "", protocol.Deployer, protocol.RunShell, protocol.ShellOrder{Text: "id"})
	if r := c.order(protocol.Admin, protocol.RunShell, protocol.ShellOrder{Text: "echo a | tr a b; exit 9"}); r.stdout != "b\n" || r.ended.Exit != 9 || c.runner.last(t).User != "root" || c.runner.last(t).Timeout != 50*time.Second {
		t.Errorf("%+v", r)
	}
	c.policy(`{"v": 1}`)
	c.refused(protocol.Denied, "allowShell", protocol.Admin, protocol.RunShell, protocol.ShellOrder{Text: "id"})
	c.policy(`{"v": 2}`)
	c.refused(protocol.Failed, "version 1", protocol.Viewer, protocol.RunCommand, protocol.CommandOrder{Argv: []string{"echo", "hello"}})
	c.recorded(
		"exec echo hello there, begins", "exec echo hello there, ok",
		"exec false, begins", "exec false, ok: exit status 1",
		"exec echo NO, begins", "exec echo NO, denied",
		"shell id, over-role",
		"shell echo a | tr a b; exit 9, begins", "shell echo a | tr a b; exit 9, ok: exit status 9")
}

// recorded checks that records are in the stream, in this order.
func (c *commanded) recorded(want ...string) {
	c.t.Helper()
	var have []string
	missing := ""
	testfleet.Eventually(c.t, "the records", func() bool {
		have = nil
		for _, r := range c.side.audited(c.t) {
			line := fmt.Sprintf("%s %s, %s", r.Action, r.Detail, r.Outcome)
			if r.Outcome == "" {
				line += "begins"
			} else if r.Outcome == "ok" && r.Reason != "" {
				line += ": " + r.Reason
			}
			have = append(have, line)
		}
		at := 0
		for _, line := range want {
			i := slices.Index(have[at:], line)
			if i < 0 {
				missing = line
				return false
			}
			at += i + 1
		}
		return true
	})
	if c.t.Failed() {
		c.t.Logf("missing: %s\nthere are: %s", missing, strings.Join(have, "\n"))
	}
}

func TestActions(t *testing.T) {
	c := command(t)
	c.policy(rules)
	const action = "echo \"$1:$#\"; echo \"${SECRET:-none}\" | tr a-z A-Z; echo log >&2; exit ${EXIT:-0}\n"
	digest := protocol.Digest([]byte(action))
	m, err := agent.Home(c.dir).Open()
	if err != nil {
		t.Fatal(err)
	}
	key, err := m.XKey.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	sealed := func(env string) []byte {
		data, err := protocol.Seal([]byte(env), key)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	order := protocol.ScriptOrder{Module: "app", SHA256: digest, Words: []string{"status me", "$HOME"}}
	c.refused(protocol.Unknown, "deploy first", protocol.Operator, protocol.RunScript, order)
	c.deploy(1, "app", action)
	r := c.order(protocol.Operator, protocol.RunScript, order)
	if r.refused != nil || r.stdout != "status me:2\nNONE\n" || r.stderr != "log\n" || r.ended.Exit != 0 {
		t.Errorf("%+v", r)
	}
	s := c.runner.last(t)
	if s.User != "root" || s.Memory != 33554432 || s.Tasks != 7 || s.Timeout != 30*time.Second || string(s.Script) != action || s.ID == "" {
		t.Errorf("%+v", s)
	}
	order.Env = sealed(`{"SECRET": "hush", "EXIT": "3"}`)
	if r := c.order(protocol.Operator, protocol.RunScript, order); r.stdout != "status me:2\nHUSH\n" || r.ended.Exit != 3 {
		t.Errorf("%+v", r)
	}

	// The output is sealed to whom the order says, and is the node's.
	once, err := nkeys.CreateCurveKeys()
	if err != nil {
		t.Fatal(err)
	}
	if order.SealTo, err = once.PublicKey(); err != nil {
		t.Fatal(err)
	}
	if r := c.order(protocol.Operator, protocol.RunScript, order); r.stdout != "" || r.stderr != "log\n" || r.sealed != nil || r.ended.Exit != 3 {
		t.Errorf("the output of a failure: %+v", r)
	}
	order.Env = sealed(`{"SECRET": "hush"}`)
	r = c.order(protocol.Operator, protocol.RunScript, order)
	if opened, err := once.Open(r.sealed, key); err != nil || string(opened) != "status me:2\nHUSH\n" || r.stdout != "" {
		t.Errorf("%q %v: %+v", opened, err, r)
	}
	order.SealTo = ""

	stranger, err := nkeys.CreateCurveKeys()
	if err != nil {
		t.Fatal(err)
	}
	other, err := stranger.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	elsewhere, err := protocol.Seal([]byte(`{}`), other)
	if err != nil {
		t.Fatal(err)
	}
	for words, env := range map[string][]byte{"sealed to another key": elsewhere, "not sealed": []byte(`{"A": "b"}`), "no JSON object": sealed(`["hush"]`),
		"LD_PRELOAD": sealed(`{"LD_PRELOAD": "hush"}`), "variable A": sealed(`{"A": "hush\u0000"}`)} {
		bad := order
		bad.Env = env
		code := protocol.Invalid
		if words == "no JSON object" {
			code = protocol.Malformed
		}
		c.refused(code, words, protocol.Operator, protocol.RunScript, bad)
	}
	c.refused(protocol.OverRole, "", protocol.Viewer, protocol.RunScript, order)
	c.refused(protocol.Unknown, "app_modules/other/action.sh", protocol.Operator, protocol.RunScript, protocol.ScriptOrder{Module: "other", SHA256: digest})
	c.refused(protocol.Malformed, "module", protocol.Operator, protocol.RunScript, protocol.ScriptOrder{Module: "../app", SHA256: digest})

	// Another deployment brings another action: the old one is not run any more.
	c.deploy(2, "app", "echo other\n")
	c.refused(protocol.Conflict, digest[:12], protocol.Operator, protocol.RunScript, order)
	c.refused(protocol.Conflict, "deployment d-2 brought", protocol.Operator, protocol.RunScript, order)
	c.recorded(`action app: "status me" $HOME, begins`, `action app: "status me" $HOME, ok`, `action app: "status me" $HOME, ok: exit status 3`, `action app: "status me" $HOME, conflict`)
	for _, r := range c.side.audited(t) {
		if strings.Contains(strings.ToLower(fmt.Sprintf("%+v", r)), "hush") {
			t.Errorf("a secret is on record: %+v", r)
		}
	}
}
