package local

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

const nobodyAsks = "NIX_INFRA_TEST_NOBODY_ASKS"

// TestMain is, in a process of nobody's, a client.
func TestMain(m *testing.M) {
	if path := os.Getenv(nobodyAsks); path != "" {
		_, _, err := (&Client{Path: path}).RollBack(context.Background(), protocol.Rollback{})
		fmt.Println(err)
		return
	}
	os.Exit(m.Run())
}

// asNobody gives what nobody hears from the agent.
func asNobody(t *testing.T, path string) string {
	t.Helper()
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	program := path + ".test" // where nobody can run it
	if err := os.WriteFile(program, self, 0o755); err != nil {
		t.Fatal(err)
	}
	c := exec.CommandContext(t.Context(), program)
	c.Dir, c.Env = "/", []string{nobodyAsks + "=" + path}
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
	var out bytes.Buffer
	c.Stdout, c.Stderr = &out, &out
	if err := c.Run(); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	return out.String()
}
