//go:build linux

package e2e

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// TestBadInput: each mistake is answered in one line that says what, where and what to do, with exit 2, and
// leaves the fleet and the project as they were.
func TestBadInput(t *testing.T) {
	f := newFleet(t, "n1")
	old := f.proven("n1")
	settings, err := os.ReadFile(filepath.Join(f.project, "nix-infra.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		name string
		do   func()
		args []string
		says []string
	}{
		{"unknown node", nil, []string{"deploy", "n7", "--batch"}, []string{"n7", "n1"}},
		{"no target", nil, []string{"deploy", "--batch"}, []string{"all"}},
		{"unknown placeholder", func() { f.write("nodes/n1.nix", "{ ... }: {\n  # [%%no.such.key%%]\n}\n") },
			[]string{"deploy", "n1", "--batch"}, []string{"nodes/n1.nix:2", "no.such.key"}},
		{"malformed settings", func() { f.write("nix-infra.yaml", string(settings)+"\ncontrolers: []\n") },
			[]string{"status"}, []string{"nix-infra.yaml", "controlers"}},
		{"no project folder", func() { f.project = t.TempDir() }, []string{"deploy", "n1", "--batch"}, []string{"nix-infra init"}},
	} {
		project := f.project
		if c.do != nil {
			c.do()
		}
		r := f.cli(c.args...)
		f.project = project
		f.write("nix-infra.yaml", string(settings))
		f.write("nodes/n1.nix", service("good", ""))
		if r.code != 2 || strings.Count(r.errOut, "\n") != 1 {
			t.Errorf("%s: %v", c.name, r)
		}
		for _, s := range c.says {
			if !strings.Contains(r.errOut, s) {
				t.Errorf("%s: %q does not say %q", c.name, r.errOut, s)
			}
		}
	}
	cmd := f.command("status")
	cmd.Env = append(cmd.Env, "SECRETS_PASS=wrong", "NIX_INFRA_CREDS=")
	if out, err := cmd.CombinedOutput(); cmd.ProcessState.ExitCode() != 2 || !strings.Contains(string(out), "password") {
		t.Errorf("a wrong password: %v, %s", err, out)
	}
	f.exec(f.ctl, "systemctl", "stop", "nix-infra-controller.service")
	if r := f.cli("deploy", "n1", "--batch"); r.code != 2 && r.code != 3 || !strings.Contains(r.errOut, f.ctl.IP+":4222") || strings.Count(r.errOut, "\n") != 1 {
		t.Errorf("an unreachable controller: %v", r)
	}
	f.exec(f.ctl, "systemctl", "start", "nix-infra-controller.service")
	f.waitState("n1", soon, "as it was", func(s status) bool {
		return s.Online && s.State == "confirmed" && s.Serial == 1 && s.Closure == old["n1"]
	})
}

// TestFullDisk fills a node's disk: the deploy fails there with a reason, the node keeps what it runs, and takes
// the same deploy once there is room.
func TestFullDisk(t *testing.T) {
	f := newFleet(t)
	if _, err := f.lab.StartWith(f.ctx, lab.NodeOptions{DiskMiB: 64}, "n1"); err != nil {
		t.Fatal(err)
	}
	node := f.lab.Node("n1")
	f.nodes["n1"] = node
	f.enroll("n1")
	old := f.proven("n1")
	f.write("nodes/n1.nix", service("larger", ""))
	if out, err := node.Exec(f.ctx, "dd", "if=/dev/zero", "of=/var/fill", "bs=64k"); err == nil {
		t.Fatalf("the disk took all that there is: %s", out)
	}
	r := f.cli("deploy", "n1", "--timeout", "60s", "--settle", "1s", "--batch")
	if r.code != 1 || !strings.Contains(r.out+r.errOut, "space") {
		t.Errorf("a deploy to a node with a full disk: %v", r)
	}
	if got := f.running(node); got != old["n1"] {
		t.Errorf("it runs %s, want %s", got, old["n1"])
	}
	f.exec(node, "rm", "/var/fill")
	f.waitState("n1", soon, "online", func(s status) bool { return s.Online })
	f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s", "--batch")
	if s := f.status()["n1"]; s.State != "confirmed" || s.Closure == old["n1"] || s.Closure != f.bootDefault(node) {
		t.Errorf("%+v", s)
	}
}
