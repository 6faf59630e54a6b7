//go:build linux

package e2e

import (
	"path/filepath"
	"strings"
	"testing"
)

// TestModes: what each mode leaves running, and what it leaves to boot.
func TestModes(t *testing.T) {
	f := newFleet(t, "n1")
	node := f.nodes["n1"]
	old := f.proven("n1")["n1"]
	deploy := func(mode, message string) {
		t.Helper()
		f.write("nodes/n1.nix", service(message, ""))
		f.must("deploy", "n1", "--mode", mode, "--timeout", "60s", "--settle", "1s", "--batch")
	}
	reboot := func() {
		t.Helper()
		if err := node.Reboot(f.ctx); err != nil {
			t.Fatal(err)
		}
	}

	f.write("nodes/n1.nix", strings.Replace(service("only looked at", `units."extra.service".service = { Type = "exec"; ExecStart = "/bin/sleep infinity"; };
  packages = [ (testos.run "app-1.2" "mkdir -p $out/bin; echo app >$out/bin/app") ];`), "{ ... }", "{ testos, ... }", 1))
	r := f.must("deploy", "n1", "--mode", "dry-activate", "--timeout", "60s", "--batch")
	for _, says := range []string{"restart hello.service", "start extra.service", "app"} {
		if !strings.Contains(r.out, says) {
			t.Errorf("a dry run does not say that it would %s: %v", says, r)
		}
	}
	if s := f.status()["n1"]; s.Serial != 1 || s.State != "confirmed" || f.running(node) != old || f.bootDefault(node) != old {
		t.Errorf("a dry run changed something: %+v", s)
	}

	deploy("test", "for now")
	s := f.status()["n1"]
	if s.State != "confirmed" || f.running(node) == old || f.bootDefault(node) != old {
		t.Errorf("mode test: %+v; runs %s, boots %s, before %s", s, f.running(node), f.bootDefault(node), old)
	}
	reboot()
	if got := f.running(node); got != old {
		t.Errorf("after a reboot, a test system still runs: %s", got)
	}

	deploy("boot", "from the next boot on")
	s = f.status()["n1"]
	staged := f.bootDefault(node)
	if s.State != "staged" || f.running(node) != old || staged == old {
		t.Errorf("mode boot: %+v; runs %s, boots %s, before %s", s, f.running(node), staged, old)
	}
	reboot()
	s = f.waitState("n1", soon, "confirmed", func(s status) bool { return s.Online && s.State == "confirmed" && s.Closure == staged })
	if got := f.running(node); got != staged {
		t.Errorf("after the reboot %s runs, want %s: %+v", got, staged, s)
	}
}

// TestEnrollOffline enrols a machine that the operator can't reach: the request and the answer travel by hand.
func TestEnrollOffline(t *testing.T) {
	f := newFleet(t)
	if _, err := f.lab.Start(f.ctx, "n1"); err != nil {
		t.Fatal(err)
	}
	node := f.lab.Node("n1")
	f.nodes["n1"] = node
	const agent = "/opt/nix-infra-agent"
	if err := node.CopyTo(filepath.Join(programs.dir, "nix-infra-agent"), agent, 0o755); err != nil {
		t.Fatal(err)
	}
	if out, err := node.Exec(f.ctx, agent, "run"); err == nil || !strings.Contains(string(out), "request") {
		t.Errorf("an agent that is not enrolled should say what to do: %v %s", err, out)
	}
	f.write("n1.request", f.exec(node, agent, "request", "--name", "n1")+"\n")
	f.must("enroll", "--request", filepath.Join(f.project, "n1.request"), "--answer", filepath.Join(f.project, "n1.answer"), "--tag", "far-away", "--batch")
	if err := node.CopyTo(filepath.Join(f.project, "n1.answer"), "/root/answer", 0o600); err != nil {
		t.Fatal(err)
	}
	f.exec(node, agent, "load", "/root/answer")
	f.exec(node, "systemd-run", "--unit=nix-infra-agent", "--service-type=notify", "-p", "Restart=always", agent, "run")
	f.waitState("n1", soon, "online", func(s status) bool { return s.Online })
	f.write("nodes/n1.nix", service("far away", ""))
	f.must("deploy", "@far-away", "--timeout", "60s", "--settle", "1s", "--batch")
	if got := f.exec(node, "systemctl", "is-active", "hello.service"); got != "active" {
		t.Errorf("hello.service is %s", got)
	}
}
