//go:build linux

package e2e

import (
	"path/filepath"
	"strings"
	"testing"
)

const agentProgram = "/var/lib/nix-infra-agent/bin/nix-infra-agent"

// TestBreakGlass: with the controller down, what an operator signed and what root on the node says still works, and is
// proven like any deploy.
func TestBreakGlass(t *testing.T) {
	f := newFleet(t, "n1")
	node := f.nodes["n1"]
	one := f.deployed("n1", "one")
	f.exec(f.ctl, "systemctl", "stop", "nix-infra-controller.service")
	// bundle signs a deployment without a controller, and brings it to the node by hand.
	bundle := func(text, serial string, flags ...string) string {
		t.Helper()
		f.write("nodes/n1.nix", text)
		file := filepath.Join(t.TempDir(), "n1.bundle")
		f.must(append([]string{"deploy", "n1", "--out", file, "--offline", "--serial", serial, "--settle", "1s"}, flags...)...)
		remote := "/root/" + serial + ".bundle"
		if err := node.CopyTo(file, remote, 0o600); err != nil {
			t.Fatal(err)
		}
		return remote
	}

	said := f.exec(node, agentProgram, "apply", bundle(service("by hand", ""), "2"))
	by := f.running(node)
	f.says(node, by, "by hand")
	if by == one || !strings.Contains(said, "building") || !strings.HasSuffix(said, "confirmed") {
		t.Errorf("%s: apply says %s", by, said)
	}
	if status := f.exec(node, agentProgram, "status"); !strings.Contains(status, by) || !strings.Contains(status, "(serial 2): confirmed") {
		t.Errorf("status says %s", status)
	}

	// What can't be proven is rolled back here, too, and no serial comes twice.
	out, err := node.Exec(f.ctx, agentProgram, "apply", bundle(service("bad", failing), "3", "--timeout", "60s"))
	if err == nil || !strings.Contains(string(out), "rolled-back") || !strings.Contains(string(out), "broken.service") {
		t.Errorf("apply of a system that fails: %v: %s", err, out)
	}
	f.says(node, by, "by hand")
	if out, err := node.Exec(f.ctx, agentProgram, "apply", "/root/2.bundle"); err == nil {
		t.Errorf("an old bundle was taken: %s", out)
	}
	// One that was changed on its way is nobody's order.
	f.exec(node, "sh", "-c", "tail -c +2 /root/3.bundle >/root/damaged.bundle")
	if out, err := node.Exec(f.ctx, agentProgram, "apply", "/root/damaged.bundle"); err == nil {
		t.Errorf("a damaged bundle was taken: %s", out)
	}

	if said := f.exec(node, agentProgram, "rollback"); !strings.HasSuffix(said, "confirmed") {
		t.Errorf("rollback says %s", said)
	}
	f.says(node, one, "one")
	if out, err := node.Exec(f.ctx, "systemd-run", "--quiet", "--pipe", "--wait", "-p", "User=nobody", agentProgram, "rollback"); err == nil {
		t.Errorf("nobody may roll back: %s", out)
	}

	// Back at the controller, it is all told, and the next deploy is one like any other.
	f.exec(f.ctl, "systemctl", "start", "nix-infra-controller.service")
	f.waitState("n1", soon, "online", func(s status) bool { return s.Online && s.Closure == one && s.Serial == 3 })
	f.says(node, one, "one")
	f.deployed("n1", "as ever")
	f.says(node, f.status()["n1"].Closure, "as ever")
}
