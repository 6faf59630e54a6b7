//go:build linux

package e2e

import (
	"encoding/json"
	"strconv"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// rollout is the first line of `rollout show --json`, as docs/json.md has it.
type rollout struct {
	Deployment string `json:"deployment"`
	State      string `json:"state"`
	Reason     string `json:"reason"`
	Back       string `json:"back"`
	Released   int    `json:"released"`
	Failures   int    `json:"failures"`
	Waves      []int  `json:"waves"`
}

func (f *fleet) rollout(id string) rollout {
	f.t.Helper()
	line, _, _ := strings.Cut(f.must("rollout", "show", id, "--json").out, "\n")
	var r rollout
	if err := json.Unmarshal([]byte(line), &r); err != nil {
		f.t.Fatalf("rollout show --json: %q: %v", line, err)
	}
	return r
}

func (f *fleet) waitRollout(id, state string) rollout {
	f.t.Helper()
	var last rollout
	f.eventually(soon, func() string {
		if last = f.rollout(id); last.State == state {
			return ""
		}
		return "the rollout is " + last.State + ": " + last.Reason
	})
	return last
}

// latest is the id of the newest deployment.
func (f *fleet) latest() string {
	f.t.Helper()
	line, _, _ := strings.Cut(f.must("deployments", "--limit", "1", "--json").out, "\n")
	var d struct {
		Deployment string `json:"deployment"`
	}
	if err := json.Unmarshal([]byte(line), &d); err != nil || d.Deployment == "" {
		f.t.Fatalf("deployments --json: %q: %v", line, err)
	}
	return d.Deployment
}

// knows tells whether the agent of a node ever had a deployment's manifest, by its own record.
func (f *fleet) knows(n *lab.Node, deployment string) bool {
	f.t.Helper()
	out, err := n.Exec(f.ctx, "journalctl", "-o", "cat", "--no-pager", "NIX_INFRA_REQUEST="+deployment)
	if err != nil && !strings.Contains(string(out), "No entries") {
		f.t.Fatal(err)
	}
	return strings.Contains(string(out), "audit: deploy by ")
}

// untouched checks that a node was left alone: it runs its old closure with the same processes, and was told nothing.
func (f *fleet) untouched(n *lab.Node, closure, pid, deployment string) {
	f.t.Helper()
	if got := f.running(n); got != closure {
		f.t.Errorf("%s runs %s, want %s", n.Name, got, closure)
	}
	if got := f.mainPID(n); got != pid {
		f.t.Errorf("%s: hello.service was restarted", n.Name)
	}
	if f.knows(n, deployment) {
		f.t.Errorf("%s was given deployment %s", n.Name, deployment)
	}
}

func (f *fleet) mainPID(n *lab.Node) string {
	f.t.Helper()
	return f.exec(n, "systemctl", "show", "-p", "MainPID", "--value", "hello.service")
}

// started is when hello.service was started last, in microseconds of the monotonic clock, which all nodes share.
func (f *fleet) started(n *lab.Node) uint64 {
	f.t.Helper()
	at, err := strconv.ParseUint(f.exec(n, "systemctl", "show", "-p", "ActiveEnterTimestampMonotonic", "--value", "hello.service"), 10, 64)
	if err != nil {
		f.t.Fatal(err)
	}
	return at
}

// acceptedAt and confirmedAt are when a node recorded that it began with a deployment, and that it had proven it, by
// the same clock.
func (f *fleet) acceptedAt(n *lab.Node, deployment string) uint64 {
	f.t.Helper()
	return f.recordedAt(n, deployment, "begins")
}

func (f *fleet) confirmedAt(n *lab.Node, deployment string) uint64 {
	f.t.Helper()
	return f.recordedAt(n, deployment, "ok")
}

func (f *fleet) recordedAt(n *lab.Node, deployment, what string) uint64 {
	f.t.Helper()
	type entry struct {
		Message   string `json:"MESSAGE"`
		Monotonic uint64 `json:"__MONOTONIC_TIMESTAMP,string"`
	}
	out := f.exec(n, "journalctl", "-o", "json", "--no-pager", "NIX_INFRA_REQUEST="+deployment)
	for line := range strings.Lines(out) {
		var e entry
		if err := json.Unmarshal([]byte(line), &e); err != nil {
			f.t.Fatalf("%s: %q: %v", n.Name, line, err)
		}
		if strings.Contains(e.Message, "): "+what) {
			return e.Monotonic
		}
	}
	f.t.Fatalf("%s has no record that %s %s: %s", n.Name, deployment, what, out)
	return 0
}

// rolled writes a configuration for each node and deploys it to all.
func (f *fleet) rolled(configurations map[string]string, flags ...string) result {
	f.t.Helper()
	for n, text := range configurations {
		f.write("nodes/"+n+".nix", text)
	}
	return f.cli(append([]string{"deploy", "all", "--timeout", "60s", "--settle", "1s"}, flags...)...)
}

// TestCanaryStops: a system that does not hold reaches the canary, and nobody else hears of it.
func TestCanaryStops(t *testing.T) {
	f := newFleet(t, "n1", "n2", "n3")
	old := f.proven("n1", "n2", "n3")
	pids := map[string]string{}
	for n, node := range f.nodes {
		pids[n] = f.mainPID(node)
	}
	bad := service("bad", failing)
	r := f.rolled(map[string]string{"n1": bad, "n2": bad, "n3": bad}, "--canary=1", "--batch=2")
	id := f.latest()
	if r.code != 1 || !strings.Contains(r.out+r.errOut, "broken.service") {
		t.Errorf("a deploy that stops at its canary: %v", r)
	}
	f.isBack(f.nodes["n1"], old["n1"])
	if got := f.rollout(id); got.State != "stopped" || got.Released != 1 || got.Failures != 1 {
		t.Errorf("%+v", got)
	}
	for _, n := range []string{"n2", "n3"} {
		f.untouched(f.nodes[n], old[n], pids[n], id)
		if s := f.status()[n]; s.Serial != 1 || s.State != "confirmed" {
			t.Errorf("%+v", s)
		}
	}
	// What was held back is not kept from the next one.
	f.write("nodes/n2.nix", service("good again", ""))
	f.must("deploy", "n2", "--timeout", "60s", "--settle", "1s")
	if f.running(f.nodes["n2"]) == old["n2"] {
		t.Error("n2 does not run what was deployed after a rollout that stopped")
	}
}

// TestBatchOrder: waves follow each other in the order of the tags, each one once the last one is proven.
func TestBatchOrder(t *testing.T) {
	f := newFleet(t)
	f.join([]string{"n1", "n2"}, "--tag", "db")
	f.join([]string{"n3"}, "--tag", "web")
	f.join([]string{"n4"}, "--tag", "other")
	configurations := map[string]string{}
	for n := range f.nodes {
		configurations[n] = service("in order", "")
	}
	if r := f.rolled(configurations, "--canary=1", "--batch=2", "--order=@web,@db"); r.code != 0 {
		t.Fatal(r)
	}
	id := f.latest()
	if got := f.rollout(id); got.State != "done" || got.Released != 4 || len(got.Waves) != 3 {
		t.Errorf("%+v", got)
	}
	waves := [][]string{{"n3"}, {"n1", "n2"}, {"n4"}}
	for i := 1; i < len(waves); i++ {
		for _, earlier := range waves[i-1] {
			proven := f.confirmedAt(f.nodes[earlier], id)
			for _, later := range waves[i] {
				if at := f.started(f.nodes[later]); at <= proven {
					t.Errorf("%s switched %d ms before %s was proven", later, (proven-at)/1000, earlier)
				}
			}
		}
	}
}

// TestMaxFailuresRollsBack: one failure is allowed; at the second the nodes that have it go back, and nobody else gets it.
func TestMaxFailuresRollsBack(t *testing.T) {
	names := []string{"n1", "n2", "n3", "n4"}
	f := newFleet(t, names...)
	old := f.proven(names...)
	pid := f.mainPID(f.nodes["n4"])
	good, bad := service("better", ""), service("bad", failing)
	r := f.rolled(map[string]string{"n1": good, "n2": bad, "n3": bad, "n4": good}, "--batch=1", "--max-failures=1", "--on-failure=rollback")
	if r.code != 1 {
		t.Errorf("a deploy that is taken back: %v", r)
	}
	id := f.status()["n3"].Deployment
	got := f.waitRollout(id, "rolled-back")
	if got.Released != 3 || got.Failures != 2 || got.Back == "" {
		t.Errorf("%+v", got)
	}
	n1 := f.waitState("n1", soon, "back", func(s status) bool { return s.State == "confirmed" && s.Deployment == got.Back })
	if n1.Closure != old["n1"] || f.running(f.nodes["n1"]) != old["n1"] || f.bootDefault(f.nodes["n1"]) != old["n1"] {
		t.Errorf("n1 should have gone back to %s: %+v", old["n1"], n1)
	}
	if log := f.exec(f.nodes["n1"], "journalctl", "-u", "hello.service", "-o", "cat", "--no-pager"); !strings.Contains(log, "better") {
		t.Errorf("n1 never had it: %s", log)
	}
	for _, n := range []string{"n2", "n3"} { // went back by themselves, and are not told to once more
		f.isBack(f.nodes[n], old[n])
		if f.knows(f.nodes[n], got.Back) {
			t.Errorf("%s was told to go back, and had by itself", n)
		}
	}
	f.untouched(f.nodes["n4"], old["n4"], pid, id)
}

// TestPauseResumeAbort steers a rollout while it runs. A node that has begun ends, whatever is said meanwhile.
func TestPauseResumeAbort(t *testing.T) {
	names := []string{"n1", "n2", "n3"}
	f := newFleet(t, names...)
	old := f.proven(names...)
	pid := f.mainPID(f.nodes["n3"])
	configurations := map[string]string{}
	for _, n := range names {
		configurations[n] = service("steered", held)
	}
	if r := f.rolled(configurations, "--batch=1", "--detach"); r.code != 0 {
		t.Fatal(r)
	}
	id := f.latest()
	during := func(node, verb string) {
		t.Helper()
		f.waitState(node, soon, "building", func(s status) bool { return s.Deployment == id && s.State == "building" })
		f.must("rollout", verb, id)
		f.release(node)
		f.waitState(node, soon, "confirmed", func(s status) bool { return s.Deployment == id && s.State == "confirmed" })
		if f.running(f.nodes[node]) == old[node] {
			t.Errorf("%s, which had begun, does not run it", node)
		}
	}
	during("n1", "pause")
	if got := f.rollout(id); got.State != "paused" || got.Released != 1 {
		t.Errorf("paused: %+v", got)
	}
	if got := f.running(f.nodes["n2"]); got != old["n2"] || f.knows(f.nodes["n2"], id) {
		t.Errorf("n2 got it while the rollout was paused: %s", got)
	}
	f.must("rollout", "resume", id)
	during("n2", "abort")
	if got := f.rollout(id); got.State != "aborted" || got.Released != 2 {
		t.Errorf("aborted: %+v", got)
	}
	if r := f.cli("rollout", "resume", id); r.code != 2 {
		t.Errorf("a rollout that ended was resumed: %v", r)
	}
	f.untouched(f.nodes["n3"], old["n3"], pid, id)
	// n3 takes the next one, and never had the one before.
	f.write("nodes/n3.nix", service("after all", ""))
	f.must("deploy", "n3", "--timeout", "60s", "--settle", "1s")
	if f.knows(f.nodes["n3"], id) {
		t.Error("n3 was given what was aborted")
	}
}
