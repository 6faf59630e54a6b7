//go:build linux

package e2e

import (
	"strings"
	"testing"
	"time"
)

func TestDeploy(t *testing.T) {
	names := []string{"n1", "n2", "n3", "n4"}
	f := newFleet(t, names...)
	f.write("app_modules/hello/empty", "")
	for _, n := range names {
		f.write("nodes/"+n+".nix", service("hello from "+n+" at [%%localhost.ipv4%%]", ""))
	}
	f.must("deploy", "all", "--timeout", "60s", "--settle", "1s", "--batch")
	all := f.status()
	for _, n := range names {
		s, node := all[n], f.nodes[n]
		if s.State != "confirmed" || s.Serial != 1 || s.Closure != f.running(node) || s.Closure != f.bootDefault(node) || !s.Online || time.Since(s.LastSeen) > 30*time.Second {
			t.Errorf("%s: status %+v; runs %s", n, s, f.running(node))
		}
		if got := f.exec(node, "systemctl", "is-active", "hello.service"); got != "active" {
			t.Errorf("%s: hello.service is %s", n, got)
		}
		if log := f.exec(node, "journalctl", "-u", "hello.service", "-o", "cat"); !strings.Contains(log, "hello from "+n+" at "+node.IP) {
			t.Errorf("%s: hello.service says %q", n, log)
		}
		if got := f.exec(node, "cat", "/etc/nixos/"+n+".nix"); !strings.Contains(got, node.IP) {
			t.Errorf("%s: /etc/nixos does not show what runs: %s", n, got)
		}
	}

	// A second deploy that changes nothing: confirmed, without a build and without a new generation.
	pid := f.exec(f.nodes["n1"], "systemctl", "show", "-p", "MainPID", "--value", "hello.service")
	f.must("deploy", "all", "--timeout", "60s", "--settle", "1s", "--batch")
	for n, s := range f.status() {
		if s.State != "confirmed" || s.Serial != 2 || s.Generation != all[n].Generation || s.Closure != all[n].Closure {
			t.Errorf("%s: after a deploy that changes nothing: %+v, before %+v", n, s, all[n])
		}
	}
	if again := f.exec(f.nodes["n1"], "systemctl", "show", "-p", "MainPID", "--value", "hello.service"); again != pid {
		t.Errorf("hello.service was restarted: pid %s, before %s", again, pid)
	}
	report := f.must("deployment", "show", f.status()["n1"].Deployment, "--json").out
	if !strings.Contains(report, `"built":false`) || strings.Contains(report, `"built":true`) {
		t.Errorf("the second deploy built something: %s", report)
	}
}

func TestOfflineCatchesUp(t *testing.T) {
	f := newFleet(t, "n1", "n2")
	node := f.nodes["n2"]
	if err := node.Stop(f.ctx); err != nil {
		t.Fatal(err)
	}
	for _, version := range []string{"one", "two"} {
		for _, n := range []string{"n1", "n2"} {
			f.write("nodes/"+n+".nix", service(version, ""))
		}
		r := f.cli("deploy", "n1", "n2", "--timeout", "60s", "--settle", "1s", "--batch")
		if r.code != 3 || !strings.Contains(r.out+r.errOut, "n2") {
			t.Fatalf("a deploy to a node that is off: %v", r)
		}
	}
	if err := node.Boot(f.ctx); err != nil {
		t.Fatal(err)
	}
	s := f.waitState("n2", soon, "confirmed at serial 2", func(s status) bool { return s.State == "confirmed" && s.Serial == 2 })
	if s.Closure != f.running(node) || !strings.Contains(f.exec(node, "journalctl", "-b", "-u", "hello.service", "-o", "cat"), "two") {
		t.Errorf("n2 did not converge to the second deploy: %+v", s)
	}
}

// The deploy changes the unit and the binary of the agent that carries it out.
func TestAgentReplacesItself(t *testing.T) {
	f := newFleet(t, "n1")
	node := f.nodes["n1"]
	if err := node.CopyTo(programs.next, "/opt/next-agent", 0o755); err != nil {
		t.Fatal(err)
	}
	before := f.status()["n1"]
	if before.Agent != "under-test" {
		t.Fatalf("the enrolled agent is %q", before.Agent)
	}
	unit := f.exec(node, "systemctl", "cat", "nix-infra-agent.service")

	// The very first deploy brings an agent that can't work: the one that was enrolled, whose unit is in neither
	// system, has to be there again.
	first := f.running(node)
	f.write("nodes/n1.nix", service("broken agent", agentUnit(unit, "/bin/false")))
	if r := f.cli("deploy", "n1", "--timeout", "15s", "--settle", "1s", "--batch"); r.code != 1 {
		t.Errorf("a first deploy with a broken agent: %v", r)
	}
	f.waitState("n1", soon, "rolled back", func(s status) bool {
		return s.Online && s.State == "rolled-back" && s.Agent == "under-test" && s.Closure == first
	})

	f.write("nodes/n1.nix", service("new agent", agentUnit(unit, "/opt/next-agent run")))
	f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s", "--batch")
	s := f.status()["n1"]
	if s.State != "confirmed" || s.Agent != "next" || s.Closure != f.running(node) || s.Closure == before.Closure {
		t.Errorf("%+v", s)
	}

	// And a new agent that can't work: the old system, and with it the agent that works, comes back by itself.
	f.write("nodes/n1.nix", service("broken again", agentUnit(unit, "/bin/false")))
	if r := f.cli("deploy", "n1", "--timeout", "15s", "--settle", "1s", "--batch"); r.code != 1 {
		t.Errorf("a deploy with a broken agent: %v", r)
	}
	back := f.waitState("n1", soon, "rolled back", func(s status) bool { return s.State == "rolled-back" })
	if back.Agent != "next" || back.Closure != s.Closure || f.running(node) != s.Closure || f.bootDefault(node) != s.Closure {
		t.Errorf("after a broken agent: %+v, before %+v", back, s)
	}
}

// agentUnit is the agent's unit as a part of a configuration, with another ExecStart.
func agentUnit(current, execStart string) string {
	var lines []string
	for line := range strings.Lines(current) {
		line = strings.TrimRight(line, "\n")
		switch {
		case strings.HasPrefix(line, "# "):
			continue
		case strings.HasPrefix(line, "ExecStart="):
			line = "ExecStart=" + execStart
		}
		lines = append(lines, line)
	}
	return "units.\"nix-infra-agent.service\".text = ''\n" + strings.Join(lines, "\n") + "\n'';"
}

func TestControllerRestart(t *testing.T) {
	f := newFleet(t, "n1", "n2")
	for _, n := range []string{"n1", "n2"} {
		f.write("nodes/"+n+".nix", service("after the storm", held))
	}
	cmd := f.command("deploy", "all", "--timeout", "60s", "--settle", "1s", "--batch")
	var out strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.waitState("n1", soon, "building", func(s status) bool { return s.State == "building" })
	f.exec(f.ctl, "systemctl", "kill", "--signal=KILL", "nix-infra-controller.service")
	f.release("n1", "n2")
	if err := cmd.Wait(); err != nil {
		t.Fatalf("the deploy did not end as if nothing had happened: %v\n%s", err, out.String())
	}
	for n, s := range f.status() {
		if s.State != "confirmed" || s.Serial != 1 || s.Closure != f.running(f.nodes[n]) {
			t.Errorf("%s: %+v", n, s)
		}
	}
}
