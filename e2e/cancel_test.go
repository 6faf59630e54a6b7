//go:build linux

package e2e

import (
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/protocol"
)

// TestCancelStopsRemote: whoever stops asking has what was asked for stopped, on the node, with all its children: at once
// where it can be said, and soon where nobody can say it.
func TestCancelStopsRemote(t *testing.T) {
	f := newFleet(t, "n1", "n2", "n3")
	f.write("app_modules/trial/action.sh", trial)
	for n := range f.nodes {
		f.write("nodes/"+n+".nix", service("has the module trial", ""))
	}
	f.must("deploy", "all", "--timeout", "60s", "--settle", "1s")
	// begin starts the CLI, and returns when what it asked for runs on a node.
	begin := func(node *lab.Node, process string, args ...string) *exec.Cmd {
		t.Helper()
		cmd, out := f.command(args...), &output{}
		cmd.Stdout, cmd.Stderr = out, out
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		f.eventually(soon, func() string {
			if pids, err := node.Exec(f.ctx, "pgrep", "-f", process); err != nil {
				return "no " + process + " on " + node.Name + "; the CLI says " + out.String()
			} else if process == left && strings.Count(string(pids), "\n") < 3 {
				return "its children don't all run yet"
			}
			return ""
		})
		return cmd
	}
	ends := func(cmd *exec.Cmd, code int) {
		t.Helper()
		err := cmd.Wait()
		if got := cmd.ProcessState.ExitCode(); got != code {
			t.Errorf("exit %d, want %d: %v", got, code, err)
		}
	}
	action := func(node string) []string {
		return []string{"action", node, "--app-module", "trial", "--cmd", "leave"}
	}
	signal := func(cmd *exec.Cmd, s syscall.Signal) {
		t.Helper()
		if err := cmd.Process.Signal(s); err != nil {
			t.Fatal(err)
		}
	}

	// Nobody is left to say that it shall end: what it asked for is not renewed.
	abandoned := begin(f.nodes["n3"], left, action("n3")...)
	signal(abandoned, syscall.SIGKILL)
	ends(abandoned, -1)
	since := time.Now()

	const tail = "^(/[^ ]*/)?tail .*flake.nix"
	many := begin(f.nodes["n1"], tail, "exec", "n1", "n2", "--", "tail", "-f", "/etc/nixos/flake.nix")
	f.eventually(soon, func() string {
		if _, err := f.nodes["n2"].Exec(f.ctx, "pgrep", "-f", tail); err != nil {
			return "n2 does not run it"
		}
		return ""
	})
	signal(many, syscall.SIGINT)
	ends(many, 130)
	for _, n := range []string{"n1", "n2"} {
		f.eventually(atOnce, func() string {
			if pids, err := f.nodes[n].Exec(f.ctx, "pgrep", "-f", tail); err == nil {
				return n + " still runs it: " + string(pids)
			}
			return ""
		})
	}

	interrupted := begin(f.nodes["n1"], left, action("n1")...)
	signal(interrupted, syscall.SIGINT)
	ends(interrupted, 130)
	f.nothingLeft(f.nodes["n1"], atOnce)

	// An agent that was killed ends what it left behind when it is back; the units run on without it until then.
	orphaned := begin(f.nodes["n2"], left, action("n2")...)
	f.exec(f.nodes["n2"], "systemctl", "kill", "--signal=KILL", "nix-infra-agent.service")
	f.nothingLeft(f.nodes["n2"], soon)
	signal(orphaned, syscall.SIGINT)
	ends(orphaned, 130)

	f.nothingLeft(f.nodes["n3"], time.Until(since.Add(protocol.StreamLifetime+atOnce)))
}

// atOnce is a limit for what has to end because it was told to, and long before it would because nobody renews it.
const atOnce = protocol.StreamLifetime / 2

// left are the processes that the action "leave" leaves.
const left = "^sleep 4711"
