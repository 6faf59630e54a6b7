//go:build linux

package e2e

import (
	"encoding/json"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// deadline is the time that those deploys give a node that only the timer takes back; it must be back within it + 10 s.
const deadline = 12 * time.Second

// proven gives the node a first configuration that works, and says which closure that is.
func (f *fleet) proven(names ...string) map[string]string {
	f.t.Helper()
	closures := map[string]string{}
	for _, n := range names {
		f.write("nodes/"+n+".nix", service("good", ""))
	}
	f.must(append([]string{"deploy", "--timeout", "60s", "--settle", "1s", "--batch"}, names...)...)
	for _, n := range names {
		closures[n] = f.running(f.nodes[n])
	}
	return closures
}

// isBack checks that a node runs and boots its old closure, with its service, and says so.
func (f *fleet) isBack(node *lab.Node, old string) status {
	f.t.Helper()
	s := f.waitState(node.Name, soon, "rolled back", func(s status) bool { return s.Online && s.State == "rolled-back" })
	if got := f.running(node); got != old || s.Closure != old {
		f.t.Errorf("%s runs %s and says %s, want %s", node.Name, got, s.Closure, old)
	}
	if got := f.bootDefault(node); got != old {
		f.t.Errorf("%s boots %s, want %s", node.Name, got, old)
	}
	if got := f.exec(node, "systemctl", "is-active", "hello.service"); got != "active" {
		f.t.Errorf("%s: hello.service is %s", node.Name, got)
	}
	if s.Reason == "" {
		f.t.Errorf("%s does not say why: %+v", node.Name, s)
	}
	return s
}

// wasInTime checks by a node's own journal that it went back within its deadline + 10 s: from when the timer was armed until
// the old system was active again. A slow machine takes longer to build, and to tell.
func (f *fleet) wasInTime(node *lab.Node) {
	f.t.Helper()
	var armed, back uint64 // microseconds
	out := f.exec(node, "journalctl", "--no-pager", "-o", "json", "-u", "nix-infra-revert-*")
	for line := range strings.Lines(out) {
		var e struct {
			Unit      string `json:"UNIT"`
			Job       string `json:"JOB_TYPE"`
			Result    string `json:"JOB_RESULT"`
			Monotonic uint64 `json:"__MONOTONIC_TIMESTAMP,string"`
		}
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			f.t.Fatalf("%s: %q: %v", node.Name, line, err)
		}
		switch {
		case e.Job != "start" || e.Result != "done":
		case strings.HasSuffix(e.Unit, ".timer"):
			armed, back = e.Monotonic, 0
		case strings.HasSuffix(e.Unit, ".service"):
			back = e.Monotonic
		}
	}
	took := time.Duration(back-armed) * time.Microsecond
	if armed == 0 || back < armed || took > deadline+10*time.Second {
		f.t.Errorf("%s was back after %s: %s", node.Name, took, out)
	}
}

func (f *fleet) deployArgs(node string) []string {
	return []string{"deploy", node, "--timeout", "60s", "--settle", "1s", "--batch"}
}

func TestRevertOnFailedUnit(t *testing.T) {
	f := newFleet(t, "n1", "n2")
	old := f.proven("n1", "n2")
	f.write("nodes/n1.nix", service("bad", failing))
	f.write("nodes/n2.nix", service("better", ""))
	r := f.cli("deploy", "n1", "n2", "--timeout", "60s", "--settle", "1s", "--batch")
	if r.code != 1 || !strings.Contains(r.out+r.errOut, "broken.service") {
		t.Fatalf("a deploy that fails on one of two nodes: %v", r)
	}
	f.isBack(f.nodes["n1"], old["n1"])
	s := f.waitState("n1", soon, "without failed units", func(s status) bool { return s.Serial == 2 && len(s.FailedUnits) == 0 })
	if s := f.status()["n2"]; s.State != "confirmed" || s.Closure == old["n2"] {
		t.Errorf("n2 should run the new system: %+v", s)
	}
	if show := f.must("deployment", "show", s.Deployment, "--log").out; !strings.Contains(show, "about to fail") {
		t.Errorf("the deployment's record lacks the log of the failed unit: %s", show)
	}

	// The closure is in quarantine: the same again is refused without another try, until it is released.
	if r := f.cli(f.deployArgs("n1")...); r.code != 1 || !strings.Contains(r.out+r.errOut, "quarantine") {
		t.Errorf("a closure that failed before: %v", r)
	}
	f.must("node", "release", "n1")
	if r := f.cli(f.deployArgs("n1")...); r.code != 1 || strings.Contains(r.out+r.errOut, "quarantine") {
		t.Errorf("a released closure: %v", r)
	}
}

// The new configuration drops all packets: the agent can't reach the controller, and neither can anybody
// tell the node to go back.
func TestRevertOnLostNetwork(t *testing.T) {
	f := newFleet(t, "n1")
	old := f.proven("n1")
	f.write("nodes/n1.nix", service("cut off", `firewall = "table inet f { chain i { type filter hook input priority 0; policy drop; }; chain o { type filter hook output priority 0; policy drop; }; }";`))
	if r := f.cli("deploy", "n1", "--timeout", deadline.String(), "--settle", "1s", "--batch"); r.code != 1 {
		t.Errorf("a deploy that cuts the network: %v", r)
	}
	f.isBack(f.nodes["n1"], old["n1"])
	f.wasInTime(f.nodes["n1"])
}

func TestRevertOnHungActivation(t *testing.T) {
	f := newFleet(t, "n1")
	old := f.proven("n1")
	f.write("nodes/n1.nix", service("hangs", `activationScript = "echo hanging; sleep 3600";`))
	if r := f.cli("deploy", "n1", "--timeout", deadline.String(), "--settle", "1s", "--batch"); r.code != 1 {
		t.Errorf("a deploy whose activation hangs: %v", r)
	}
	f.isBack(f.nodes["n1"], old["n1"])
	f.wasInTime(f.nodes["n1"])
}

// The node loses its power between activation and confirmation.
func TestRevertOnPowerCut(t *testing.T) {
	f := newFleet(t, "n1")
	old, node := f.proven("n1"), f.nodes["n1"]
	// Activation is done and the checks wait for the units to settle: that is where the power goes.
	f.write("nodes/n1.nix", service("unproven", ""))
	f.must("deploy", "n1", "--timeout", "60s", "--settle", "50s", "--batch", "--detach")
	f.waitState("n1", soon, "checking", func(s status) bool { return s.State == "checking" })
	if f.running(node) == old["n1"] {
		t.Fatal("checking, and the new system does not run")
	}
	if err := node.Kill(f.ctx); err != nil {
		t.Fatal(err)
	}
	if err := node.Boot(f.ctx); err != nil {
		t.Fatal(err)
	}
	s := f.isBack(node, old["n1"])
	if !strings.Contains(s.Reason, "reboot") {
		t.Errorf("the reason does not tell of the reboot: %q", s.Reason)
	}
}

// The steps that the agent journals, on the way to a rollback and on the way to a confirmation.
var (
	stepsBack    = []string{"accepted", "fetching", "building", "activating", "armed", "checking", "rolling-back", "reverted", "rolled-back", "reported"}
	stepsForward = []string{"accepted", "fetching", "building", "activating", "armed", "checking", "confirming", "profile", "boot-default", "disarmed", "confirmed", "reported"}
)

// kill -9 of the agent at every step that it journals:
//   - a configuration that can't be proven ends on the old closure, whichever step the agent died at;
//   - where the agent stays dead, the timer brings the old closure back without it;
//   - one that can be proven is confirmed by the agent that systemd starts in its place.
//
// Each is a deploy of its own. Four nodes take them off the list, one after the other.
func TestRevertOnAgentKill(t *testing.T) {
	names := []string{"n1", "n2", "n3", "n4"}
	f := newFleet(t, names...)
	units := map[string]string{}
	for n, node := range f.nodes {
		if err := node.CopyTo(programs.crash, "/opt/crash-agent", 0o755); err != nil {
			t.Fatal(err)
		}
		units[n] = agentUnit(f.exec(node, "systemctl", "cat", "nix-infra-agent.service"), "/opt/crash-agent")
		f.write("nodes/"+n+".nix", service("good", units[n]))
	}
	f.must("deploy", "all", "--timeout", "60s", "--settle", "1s", "--batch")

	type kill struct{ kind, step string }
	var kills []kill
	for _, step := range []string{"checking", "confirming", "profile", "boot-default"} {
		kills = append(kills, kill{"dead", step})
	}
	for _, step := range stepsForward {
		kills = append(kills, kill{"good", step})
	}
	for _, step := range stepsBack {
		kills = append(kills, kill{"bad", step})
	}
	next := make(chan kill, len(kills))
	for _, k := range kills {
		next <- k
	}
	close(next)
	var nodes sync.WaitGroup
	for n := range f.nodes {
		nodes.Go(func() {
			for k := range next {
				t.Run(k.kind+"/"+k.step, func(t *testing.T) {
					c := &crashing{f.as(t), f.nodes[n], units[n]}
					switch k.kind {
					case "bad":
						c.bad(k.step)
					case "dead":
						c.dead(k.step)
					case "good":
						c.good(k.step)
					}
				})
			}
		})
	}
	nodes.Wait()
}

// crashing is a node whose agent can be told to kill itself.
type crashing struct {
	*fleet
	node *lab.Node
	unit string // of that agent, as a part of a configuration
}

// deploy deploys, and returns once the agent has died at a step.
func (c *crashing) deploy(step, more string, flags ...string) {
	c.t.Helper()
	c.write("nodes/"+c.node.Name+".nix", service(c.t.Name(), c.unit+more))
	c.exec(c.node, "rm", "-f", "/run/crashed")
	if err := c.node.WriteFile("/run/crash-at", []byte(step), 0o644); err != nil {
		c.t.Fatal(err)
	}
	c.must(append([]string{"deploy", c.node.Name, "--batch", "--detach"}, flags...)...)
	c.eventually(soon, func() string {
		if _, err := c.node.ReadFile("/run/crashed"); err != nil {
			return "the agent did not reach step " + step
		}
		return ""
	})
}

func (c *crashing) bad(step string) {
	// Starts well, and fails once activation is over.
	const failsLater = `units."broken.service" = {
    unit.Description = "fails later";
    service = { Type = "exec"; ExecStart = "/bin/sh -c 'sleep 1; exit 7'"; };
  };`
	old := c.running(c.node)
	c.deploy(step, failsLater, "--timeout", deadline.String(), "--settle", "3s")
	c.isBack(c.node, old)
}

func (c *crashing) dead(step string) {
	old := c.running(c.node)
	c.exec(c.node, "touch", "/run/crash-stay")
	c.deploy(step, "", "--timeout", deadline.String(), "--settle", "1s")
	c.eventually(soon, func() string {
		if got := c.running(c.node); got != old {
			return "the node runs " + got
		}
		return ""
	})
	c.exec(c.node, "rm", "/run/crash-stay")
	c.isBack(c.node, old)
	c.wasInTime(c.node)
}

func (c *crashing) good(step string) {
	old, before := c.running(c.node), c.status()[c.node.Name].Serial
	c.deploy(step, "", "--timeout", "60s", "--settle", "1s")
	s := c.waitState(c.node.Name, soon, "confirmed", func(s status) bool { return s.State == "confirmed" && s.Serial == before+1 })
	if s.Closure == old || s.Closure != c.running(c.node) || s.Closure != c.bootDefault(c.node) {
		c.t.Errorf("%+v; runs %s", s, c.running(c.node))
	}
}
