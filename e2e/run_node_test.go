//go:build linux

package e2e

import (
	"os/exec"
	"path/filepath"
	"testing"
)

// TestRunOnNode runs agent/run's own tests of running programs where they can be had: on a real node, whose systemd is
// nobody else's. They are about each kind of end, what is left behind, the sandbox, and what systemd makes of arguments
// and environments.
func TestRunOnNode(t *testing.T) {
	f := newLab(t)
	binary := filepath.Join(t.TempDir(), "run.test")
	build := exec.CommandContext(f.ctx, "go", "test", "-c", "-o", binary, "../agent/run")
	build.Env = append(build.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if err := f.ctl.CopyTo(binary, "/root/run.test", 0o755); err != nil {
		t.Fatal(err)
	}
	out, err := f.ctl.Exec(f.ctx, "env", "NIX_INFRA_TEST_NODE=1", "/root/run.test", "-test.v", "-test.run", "^TestNode", "-test.timeout", "6m")
	t.Logf("%s", out)
	if err != nil {
		t.Error(err)
	}
}
