//go:build linux

package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/e2e/testos"
)

// newScaffold is a lab whose nodes belong to a project that init made of a template, and not to testos's. There is no network
// in which Nix could lock the flake, so its lock names the stand-in of nixpkgs that nodes have.
func newScaffold(t *testing.T, template string, names ...string) *fleet {
	t.Helper()
	f := newLab(t, names...)
	if err := initProject(f.project, "--template", template, "--name", "lab"); err != nil {
		t.Fatal(err)
	}
	f.creds = f.project + ".creds"
	lock, err := testos.FlakeLock(testos.DefaultVersion)
	if err != nil {
		t.Fatal(err)
	}
	f.write("flake.lock", string(lock))
	f.must("enroll", "ctl", "--controller", "--ssh", "root@"+f.ctl.IP, "--ssh-key", f.lab.SSHKey(), "--batch")
	return f
}

// TestScaffold: the project that init writes does what its README says, on nodes that are as NixOS: real Nix builds it.
func TestScaffold(t *testing.T) {
	f := newScaffold(t, "fleet", "node001", "testnode001")
	node := f.nodes["node001"]
	f.enrollAll([]string{"node001", "testnode001", "ctl"})
	f.feed(0, "the first message", "secrets", "store", "hello.message")

	t.Run("Deploy", func(t *testing.T) { f.as(t).scaffoldDeploys(node) })
	if t.Failed() {
		return
	}
	t.Run("Actions", func(t *testing.T) { f.as(t).scaffoldActs(node) })
	t.Run("OwnTests", func(t *testing.T) { f.as(t).scaffoldTests() })
	t.Run("Rollback", func(t *testing.T) { f.as(t).scaffoldGoesBack(node) })
	t.Run("Upgrade", func(t *testing.T) { f.as(t).scaffoldUpgrades(node) })
	t.Run("BuildLocal", func(t *testing.T) { f.as(t).scaffoldBuiltElsewhere() })
	t.Run("Controller", func(t *testing.T) { f.as(t).scaffoldController() })
}

// deploy deploys, without waiting longer than a test has to.
func (f *fleet) deploy(names ...string) {
	f.t.Helper()
	f.must(append([]string{"deploy", "--timeout", "60s", "--settle", "1s", "--batch"}, names...)...)
}

// hello is what the app says on its node. Its unit counts as started a moment before it listens.
func (f *fleet) hello(n *lab.Node, port int) string {
	f.t.Helper()
	return f.get(n, fmt.Sprintf("http://%s:%d/", n.IP, port))
}

// get asks a server of which the node knows, and for which it waits until it listens.
func (f *fleet) get(n *lab.Node, url string) string {
	f.t.Helper()
	return f.exec(n, "curl", "-sS", "--fail", "--max-time", "60", "--retry", "60", "--retry-delay", "1", "--retry-connrefused", url)
}

// fromStore wants the node's agent to be the one of its system.
func (f *fleet) fromStore(n *lab.Node, unit, when string) {
	f.t.Helper()
	if exe := f.exec(n, "readlink", "/proc/"+f.property(n, unit, "MainPID")+"/exe"); !strings.HasPrefix(exe, "/nix/store/") {
		f.t.Errorf("%s, %s runs %s", when, unit, exe)
	}
}

func (f *fleet) scaffoldDeploys(node *lab.Node) {
	t := f.t
	f.opens(node, 22) // as long as nothing is deployed
	f.deploy("node001")
	s := f.status()["node001"]
	if s.State != "confirmed" || s.Closure != f.running(node) || s.Closure != f.bootDefault(node) {
		t.Fatalf("status %+v", s)
	}
	if got := f.hello(node, 8080); got != "the first message" {
		t.Errorf("hello says %q", got)
	}
	if show := f.must("deployment", "show", s.Deployment, "--json").out; !strings.Contains(show, `"name":"hello"`) || strings.Contains(show, `"passed":false`) {
		t.Errorf("the health check: %s", show)
	}
	f.fromStore(node, "nix-infra-agent.service", "after the first deploy")
	if again := f.must("deploy", "node001", "--json", "--timeout", "60s", "--settle", "1s").out; strings.Contains(again, `"building"`) || f.status()["node001"].Closure != s.Closure {
		t.Errorf("nothing changed, and it was built: %s", again)
	}

	f.isClosed(node, "after the deploy")
	// Enrolment's unit is not what a NixOS machine has after a boot.
	f.exec(node, "sh", "-c", "rm /etc/systemd/system/nix-infra-agent.service /etc/systemd/system/multi-user.target.wants/nix-infra-agent.service")
	if err := node.Reboot(f.ctx); err != nil {
		t.Fatal(err)
	}
	f.answers("node001")
	f.waitState("node001", soon, "online again", func(s status) bool { return s.Online && s.State == "confirmed" })
	f.fromStore(node, "nix-infra-agent.service", "after a boot")
	f.isClosed(node, "after a boot")
	if got := f.hello(node, 8080); got != "the first message" {
		t.Errorf("after a boot, hello says %q", got)
	}
}

// isClosed wants a node's SSH to be reached through the agent, and in no other way.
func (f *fleet) isClosed(node *lab.Node, when string) {
	f.t.Helper()
	if f.reaches(node, 22) {
		f.t.Errorf("port 22 is open %s", when)
	}
	if r := f.cli("ssh", node.Name, "--", "hostname"); r.code != 0 || strings.TrimSpace(r.out) != node.Name {
		f.t.Errorf("ssh through the agent %s: %v", when, r)
	}
}

func (f *fleet) scaffoldActs(node *lab.Node) {
	t := f.t
	act := func(words string, more ...string) result {
		return f.cli(append([]string{"action", "node001", "--app-module", "hello", "--cmd", words}, more...)...)
	}
	if r := act("status"); r.code != 0 || !strings.Contains(r.out, "unit: active\n") || !strings.Contains(r.out, "answers: yes\n") {
		t.Errorf("status: %v", r)
	}
	if r := act("fail"); r.code != 1 || !strings.Contains(r.out+r.errOut, "failing, as asked") {
		t.Errorf("fail: %v", r)
	}
	if r := act("dance"); r.code != 1 || !strings.Contains(r.out+r.errOut, "usage: status | rotate-token | fail") {
		t.Errorf("an action that there isn't: %v", r)
	}
	r := act("rotate-token", "--save-as-secret", "hello.message", "--rotate", "--force")
	if r.code != 0 {
		t.Fatalf("rotate-token: %v", r)
	}
	token := strings.TrimSpace(f.must("secrets", "show", "hello.message").out)
	if len(token) != 32 || strings.Contains(r.out+r.errOut, token) || f.hello(node, 8080) != token {
		t.Errorf("the node says %q, the project has %q, and the action showed %v", f.hello(node, 8080), token, r)
	}
	if r := f.cli("exec", "node001", "--", "zramctl", "--output-all"); r.code != 0 {
		t.Errorf("the command that the policy allows: %v", r)
	}
	if r := f.cli("exec", "node001", "--", "zramctl", "--reset", "zram0"); r.code != 2 {
		t.Errorf("one that it doesn't: %v", r)
	}
}

// scaffoldTests runs the project's own tests, as somebody does who has nothing but the project and the program.
func (f *fleet) scaffoldTests() {
	script := func(code int, args ...string) string {
		f.t.Helper()
		cmd := f.lab.Command(f.ctx, append([]string{filepath.Join(f.project, "__test__/run-tests.sh")}, args...)...)
		cmd.Env = append(f.command().Env, "NIX_INFRA="+filepath.Join(programs.dir, "nix-infra"), "DEPLOY_FLAGS=--timeout 60s --settle 1s")
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil || cmd.ProcessState.ExitCode() != code {
			f.t.Fatalf("run-tests.sh %v: %v\n%s", args, err, out)
		}
		return string(out)
	}
	f.deploy("testnode001")
	if out := script(0, "run", "hello"); !strings.Contains(out, "ok: it answers with the new one\n") || !strings.HasSuffix(out, "passed: hello\n") {
		f.t.Errorf("run-tests.sh run hello: %s", out)
	}
	if out := script(0, "status"); !strings.Contains(out, "ok: testnode001 has no failed units\n") {
		f.t.Errorf("run-tests.sh status: %s", out)
	}
	if out := script(2, "run", "nothing"); !strings.Contains(out, "there is no test nothing; there are: hello") {
		f.t.Errorf("run-tests.sh run nothing: %s", out)
	}
	// A test that does not hold is one that failed.
	file := filepath.Join(f.project, "__test__/hello/test.sh")
	text, err := os.ReadFile(file)
	if err != nil {
		f.t.Fatal(err)
	}
	f.write("__test__/wrong/nodes/testnode001.nix", "{ }\n")
	f.write("__test__/wrong/test.sh", strings.Replace(string(text), `deploy "$node" --test-dir "$TEST_DIR"`, "assert_equal 'what is' 1 2; echo too far", 1))
	if out := script(1, "run", "--no-teardown", "wrong"); !strings.Contains(out, "FAILED: what is: wanted '1', got '2'") || strings.Contains(out, "too far") {
		f.t.Errorf("run-tests.sh run wrong: %s", out)
	}
}

func (f *fleet) scaffoldGoesBack(node *lab.Node) {
	t := f.t
	before := f.running(node)
	text, err := os.ReadFile(filepath.Join(f.project, "nodes/node001.nix"))
	if err != nil {
		t.Fatal(err)
	}
	f.write("nodes/node001.nix", strings.Replace(string(text), "enable = true;", "enable = true;\n    bindToPort = 8081;", 1))
	f.deploy("node001")
	if f.hello(node, 8081) == "" || f.running(node) == before {
		t.Error("the other port is not there")
	}
	f.must("rollback", "node001", "--timeout", "60s", "--settle", "1s", "--batch")
	if f.hello(node, 8080) == "" || f.running(node) != before {
		t.Error("it did not go back")
	}
	f.fromStore(node, "nix-infra-agent.service", "after a rollback")
	f.write("nodes/node001.nix", string(text))
}

// scaffoldUpgrades: a machine that is enrolled again has the other agent by its next deploy. Its port of SSH is closed, so
// that is done through the agent that it has.
func (f *fleet) scaffoldUpgrades(node *lab.Node) {
	t := f.t
	if before := f.status()["node001"].Agent; before == "next" {
		t.Fatalf("the agent is %s already", before)
	}
	f.forward("node001", map[int]int{17122: 22})
	f.must("enroll", "node001", "--ssh", "root@127.0.0.1:17122", "--ssh-key", filepath.Join(f.project, "ssh/nixinfra"), "--agent-binary", programs.next, "--batch")
	f.deploy("node001")
	f.waitState("node001", soon, "of the next version", func(s status) bool { return s.Agent == "next" && s.State == "confirmed" })
	f.fromStore(node, "nix-infra-agent.service", "after an upgrade")
	if f.hello(node, 8080) == "" {
		t.Error("hello is gone")
	}
}

// scaffoldBuiltElsewhere: a system that is built on another machine has the very agent that the node has, or is not built there.
func (f *fleet) scaffoldBuiltElsewhere() {
	t := f.t
	node := f.nodes["testnode001"]
	op := f.operatorMachine()
	url, _ := op.serveCache("/srv")
	op.write("nix-infra.yaml", f.exec(op.Node, "cat", "/root/project/nix-infra.yaml")+"\ncache: { push: 'file:///srv/cache', pull: [ '"+url+"/cache' ] }\n")
	op.write("nodes/testnode001.nix", "{ infrastructure.hello = { enable = true; bindToPort = 8082; }; }\n")
	deploy := func(agent string) result {
		t.Helper()
		if err := op.CopyTo(agent, "/usr/local/bin/nix-infra-agent", 0o755); err != nil {
			t.Fatal(err)
		}
		return op.cli("deploy", "testnode001", "--build=local", "--timeout", "60s", "--settle", "1s")
	}
	before := f.running(node)
	if r := deploy(programs.next); r.code != 1 || !strings.Contains(r.errOut, "the node has another nix-infra-agent than") || !strings.Contains(r.errOut, "--build=node") {
		t.Errorf("with another agent beside the CLI: %v", r)
	}
	if r := deploy(filepath.Join(programs.dir, "nix-infra-agent")); r.code != 0 {
		t.Fatalf("with the node's own: %v", r)
	}
	if f.running(node) == before || f.get(node, "http://127.0.0.1:8082/") != "hello from testnode001" {
		t.Error("what was built elsewhere does not run")
	}
	f.fromStore(node, "nix-infra-agent.service", "built elsewhere")
}

// scaffoldController: on a machine that is a controller, too, the system brings both.
func (f *fleet) scaffoldController() {
	t := f.t
	const unit = "nix-infra-controller.service"
	f.deploy("ctl")
	f.exec(f.ctl, "sh", "-c", "rm /etc/systemd/system/nix-infra-*.service /etc/systemd/system/multi-user.target.wants/nix-infra-*.service")
	if err := f.ctl.Reboot(f.ctx); err != nil {
		t.Fatal(err)
	}
	f.answers("ctl")
	f.fromStore(f.ctl, unit, "after a boot")
	f.fromStore(f.ctl, "nix-infra-agent.service", "after a boot")
	if user := f.exec(f.ctl, "ps", "-o", "user:32=", "-p", f.property(f.ctl, unit, "MainPID")); user != "nix-infra-controller" {
		t.Errorf("the controller runs as %q", user)
	}
	if f.reaches(f.ctl, 22) {
		t.Error("the controller's port 22 is open")
	}
	f.answers("node001") // it comes back by itself, at a time of its own
}
