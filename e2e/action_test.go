//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/protocol"
)

// trial is the action.sh of the app module "trial": one of each way to behave.
const trial = `#!/usr/bin/env bash
case "$1" in
  exit) echo to stdout; echo to stderr >&2; exit "$2" ;;
  words) shift; printf '<%s>' "$@" ;;
  env) printf %s "$MARK" | sha256sum; echo "at $WHERE"; mkfifo /run/trial; read -r _ </run/trial; rm /run/trial ;;
  leave) # children that outlive it
    sleep 4711 &
    setsid --fork sleep 4711
    (setsid nohup sleep 4711 >/dev/null 2>&1 &)
    [ "$2" = exit ] && exit 0
    [ "$2" = deaf ] && (trap '' TERM HUP INT; exec sleep 4711) &
    echo waiting; wait ;;
  memory) head -c 400M /dev/zero | tail -c 400M | wc -c ;;
  tasks) for _ in $(seq 60); do sleep 4711 & done; jobs -p | wc -l; wait ;;
  flood) head -c 100M /dev/zero | tr '\0' x ;;
  secret) printf '%s\n' "$MARK"; exit "${2:-0}" ;;
esac
`

// trialModule deploys the module to n1 of the fleet, with what the policy gives actions.
func (f *fleet) trialModule() *lab.Node {
	f.t.Helper()
	f.write("app_modules/trial/action.sh", trial)
	f.write("nodes/n1.nix", service("has the module trial", `etc."nix-infra/policy.json".text = builtins.toJSON { v = 1; actions = { memory = 67108864; tasks = 32; }; };`))
	f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s")
	return f.nodes["n1"]
}

// ran is the document at the end of what ran on a node, as docs/json.md has it.
type ran struct {
	Node    string `json:"node"`
	Exit    *int   `json:"exit"`
	Result  string `json:"result"`
	Reason  string `json:"reason"`
	Rule    string `json:"rule"`
	Dropped int64  `json:"dropped"`
	Lost    int    `json:"lost"`
	Piped   *int   `json:"piped"`

	stdout, stderr strings.Builder
	code           int
}

func (r *ran) String() string {
	exit := "null"
	if r.Exit != nil {
		exit = fmt.Sprint(*r.Exit)
	}
	return fmt.Sprintf("exit status %d; exit %s, result %q, reason %q, dropped %d, lost %d; stdout %.200q, stderr %.200q", r.code, exit, r.Result, r.Reason, r.Dropped, r.Lost, r.stdout.String(), r.stderr.String())
}

// run runs a command of the CLI that runs something on one node.
func (f *fleet) run(args ...string) *ran {
	f.t.Helper()
	result := f.cli(append([]string{args[0], "--json"}, args[1:]...)...)
	r := &ran{code: result.code}
	for line := range strings.Lines(result.out) {
		var part struct {
			Stream, Text string
			Data         []byte
			Result       string
		}
		if err := json.Unmarshal([]byte(line), &part); err != nil {
			f.t.Fatalf("%s: %q: %v", args[0], line, err)
		}
		switch {
		case part.Stream == "stdout":
			r.stdout.WriteString(part.Text + string(part.Data))
		case part.Stream == "stderr":
			r.stderr.WriteString(part.Text + string(part.Data))
		case part.Result != "":
			if err := json.Unmarshal([]byte(line), r); err != nil {
				f.t.Fatalf("%s: %q: %v", args[0], line, err)
			}
		}
	}
	if r.Result == "" {
		f.t.Fatalf("nix-infra %v: %v", args, result)
	}
	return r
}

func (f *fleet) action(flags []string, words string) *ran {
	f.t.Helper()
	return f.run(append([]string{"action", "n1", "--app-module", "trial", "--cmd", words}, flags...)...)
}

// nothingLeft waits until a node has nothing of what was run for anybody.
func (f *fleet) nothingLeft(node *lab.Node, within time.Duration) {
	f.t.Helper()
	f.eventually(within, func() string {
		if pids, err := node.Exec(f.ctx, "pgrep", "-a", "-f", "^sleep 4711"); err == nil {
			return "still running: " + string(pids)
		}
		if units := f.exec(node, "systemctl", "list-units", "--all", "--no-legend", "--plain", "nix-infra-run-*"); units != "" {
			return "still there: " + units
		}
		return ""
	})
}

// TestActionLimits: an action ends as it ends, or because of a limit, and says which; nothing of it stays. What it is given
// and what it gives as a secret is nobody else's.
func TestActionLimits(t *testing.T) {
	f := shared(t)
	node := f.trialModule()
	controllers := f.exec(node, "cat", "/sys/fs/cgroup/cgroup.controllers")
	// limited runs an action that one of the kernel's controllers stops, or, where this kernel can't do so in a node, one
	// whose unit has the limit.
	limited := func(t *testing.T, controller, property, want, words string, stopped func(*ran) bool) {
		f := f.as(t)
		if strings.Contains(controllers, controller) {
			if r := f.action([]string{"--timeout", "20s"}, words); !stopped(r) {
				t.Errorf("%v", r)
			}
			f.nothingLeft(node, atOnce)
			return
		}
		t.Logf("this machine's cgroups have no %s for nodes: looking at the unit's %s", controller, property)
		cmd := f.command("action", "n1", "--app-module", "trial", "--cmd", "leave")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		unit := f.runUnit(node)
		if got := f.property(node, unit, property); got != want {
			t.Errorf("%s is %s, want %s", property, got, want)
		}
		f.exec(node, "systemctl", "stop", unit)
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 1 {
			t.Errorf("an action whose unit was stopped: %v", err)
		}
		f.nothingLeft(node, atOnce)
	}

	t.Run("exit status", func(t *testing.T) {
		f := f.as(t)
		r := f.action(nil, "exit 7")
		if r.code != 1 || r.Exit == nil || *r.Exit != 7 || r.Result != protocol.ResultExit || r.stdout.String() != "to stdout\n" || r.stderr.String() != "to stderr\n" {
			t.Errorf("%v", r)
		}
		if r := f.cli("action", "n1", "--app-module", "trial", "--cmd", `words 'a b' "" $x*;`); r.code != 2 || r.out != "" {
			t.Errorf("words that only a shell could make something of: %v", r)
		}
		if r := f.action(nil, `words 'a b' "" '$HOME;*' %n`); r.code != 0 || r.stdout.String() != `<a b><><$HOME;*><%n>` {
			t.Errorf("%v", r)
		}
	})
	t.Run("what it leaves", func(t *testing.T) {
		f := f.as(t)
		if r := f.action(nil, "leave exit"); r.code != 0 {
			t.Errorf("%v", r)
		}
		f.nothingLeft(node, atOnce)
	})
	t.Run("time", func(t *testing.T) {
		f := f.as(t)
		r := f.action([]string{"--timeout", "2s"}, "leave deaf")
		if r.code != 1 || r.Exit == nil || *r.Exit != -1 || r.Result != protocol.ResultTimeout || !strings.Contains(r.Reason, "2") {
			t.Errorf("%v", r)
		}
		f.nothingLeft(node, atOnce)
	})
	t.Run("memory", func(t *testing.T) {
		limited(t, "memory", "MemoryMax", "67108864", "memory", func(r *ran) bool {
			return r.code == 1 && r.Result == protocol.ResultMemory && strings.Contains(r.Reason, "64 MiB")
		})
	})
	t.Run("tasks", func(t *testing.T) {
		limited(t, "pids", "TasksMax", "32", "tasks", func(r *ran) bool {
			return r.code == 1 && strings.Contains(r.stderr.String(), "fork")
		})
	})
	t.Run("output", func(t *testing.T) {
		f := f.as(t)
		r := f.action(nil, "flood")
		if got := int64(r.stdout.Len()); r.Exit == nil || *r.Exit != 0 || got != 64<<20 || r.Dropped != 100<<20-got {
			t.Errorf("%v of %d bytes", r, r.stdout.Len())
		}
	})
	t.Run("environment", func(t *testing.T) { f.as(t).actionEnvironment(node) })
	t.Run("secret", func(t *testing.T) { f.as(t).actionSecret(node) })
	t.Run("changed", func(t *testing.T) {
		f := f.as(t)
		f.exec(node, "sh", "-c", "echo 'exit 0' >/etc/nixos/app_modules/trial/action.sh")
		if r := f.action(nil, "exit 7"); r.code != 2 && r.Result != "exit-code" {
			t.Errorf("the node's own version of it was run: %v", r)
		}
		f.must("deploy", "n1", "--timeout", "60s", "--settle", "1s")
		f.write("app_modules/trial/action.sh", trial+"# changed\n")
		if r := f.action(nil, "exit 0"); r.code != 2 || !strings.Contains(r.Reason, "deploy") {
			t.Errorf("one that was not deployed: %v", r)
		}
		f.write("app_modules/trial/action.sh", trial)
	})
}

// runUnit waits for the unit of what runs for somebody on a node.
func (f *fleet) runUnit(node *lab.Node) (unit string) {
	f.t.Helper()
	f.eventually(soon, func() string {
		unit, _, _ = strings.Cut(f.exec(node, "systemctl", "list-units", "--state=active", "--no-legend", "--plain", "nix-infra-run-*"), " ")
		if unit == "" {
			return "nothing runs"
		}
		return ""
	})
	return unit
}

// actionEnvironment: a variable's value is in the environment of the action's own processes and nowhere else.
func (f *fleet) actionEnvironment(node *lab.Node) {
	t := f.t
	mark := "mark," + protocol.NewID()
	f.mark(node, mark)
	tap := f.wiretap()
	cmd := f.command("action", "n1", "--app-module", "trial", "--cmd", "env", "--env-var", "MARK", "--env-vars", "WHERE=[%%localhost.ipv4%%],OTHER=x")
	cmd.Env = append(cmd.Env, "MARK="+mark)
	out := &output{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	f.eventually(soon, func() string {
		if strings.Contains(out.String(), "at ") {
			return ""
		}
		return "the action says " + out.String()
	})
	unit := f.runUnit(node)
	if want := f.exec(node, "sh", "-c", "printf %s \"$(cat /root/mark)\" | sha256sum"); !strings.Contains(out.String(), want) || !strings.Contains(out.String(), "at "+node.IP+"\n") {
		t.Errorf("the action says %q, want %s and %s", out, want, node.IP)
	}
	has := func(what, command string) bool {
		t.Helper()
		_, err := node.Exec(f.ctx, "bash", "-c", command)
		return err == nil
	}
	pid := f.property(node, unit, "MainPID")
	if !has("its environment", "grep -qzFf /root/mark /proc/"+pid+"/environ") {
		t.Error("it is not in the environment of the action, so that this would show nothing")
	}
	for what, command := range map[string]string{
		"a command line":           "cat /proc/[0-9]*/cmdline 2>/dev/null | grep -qaFf /root/mark",
		"the unit's properties":    "systemctl show --all " + unit + " | grep -qFf /root/mark",
		"the unit's file":          "systemctl cat " + unit + " | grep -qFf /root/mark",
		"the agent's environment":  "grep -qzFf /root/mark /proc/" + f.property(node, "nix-infra-agent.service", "MainPID") + "/environ",
		"a file that others read":  "find /run /tmp /var/tmp /dev/shm -xdev -type f -perm /077 -print0 | xargs -0r grep -qlFf /root/mark",
		"something that stays":     "grep -rqFf /root/mark /var/lib/nix-infra-agent /etc/systemd /etc/nixos /var/tmp",
		"PID 1's own environments": "grep -qzFf /root/mark /proc/1/environ",
	} {
		if has(what, command) {
			t.Errorf("the value is in %s", what)
		}
	}
	f.exec(node, "sh", "-c", "echo >/run/trial")
	if err := cmd.Wait(); err != nil {
		t.Errorf("%v: %s", err, out)
	}
	f.nothingLeft(node, atOnce)
	for what, command := range map[string]string{
		"the journal":     "journalctl --sync; journalctl --no-pager -o export | grep -qaFf /root/mark",
		"a file in /run":  "grep -rqsaFf /root/mark /run --exclude-dir=systemd --exclude-dir=log",
		"what is in /tmp": "grep -rqsaFf /root/mark /tmp /dev/shm",
	} {
		if has(what, command) {
			t.Errorf("afterwards the value is in %s", what)
		}
	}
	if n := tap.carrying(mark); n != 0 {
		t.Errorf("the broker carried it %d times", n)
	}
	if tap.carrying("at "+node.IP) == 0 && tap.carrying(protocol.RequestSubject("n1", protocol.RunScript)) == 0 && len(tap.heard) == 0 {
		t.Error("the broker carried nothing, so that this shows nothing")
	}
	if audit := f.must("audit", "--since", "10m", "--json").out; strings.Contains(audit, mark) || !strings.Contains(audit, "trial") {
		t.Errorf("in the record is the value, or not the action: %.2000s", audit)
	}
}

// mark puts a text that is searched for into a file, so that the search itself has it in no argument.
func (f *fleet) mark(node *lab.Node, text string) {
	f.t.Helper()
	if err := node.WriteFile("/root/mark", []byte(text+"\n"), 0o600); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { f.exec(node, "rm", "/root/mark") })
}

// actionSecret: what an action prints becomes a secret of the project, and nobody sees it on its way.
func (f *fleet) actionSecret(node *lab.Node) {
	t := f.t
	mark := "secret-" + protocol.NewID()
	f.mark(node, mark)
	tap := f.wiretap()
	save := func(words, name string) result {
		t.Helper()
		return f.cli("action", "n1", "--app-module", "trial", "--cmd", words, "--env-vars", "MARK="+mark, "--save-as-secret", name)
	}
	if r := save("secret 3", "trial.failed"); r.code != 1 || strings.Contains(r.out+r.errOut, mark) {
		t.Errorf("an action that prints and fails: %v", r)
	}
	r := save("secret", "trial.token")
	if r.code != 0 || strings.Contains(r.out+r.errOut, mark) || !strings.Contains(r.out+r.errOut, "trial.token") {
		t.Errorf("%v", r)
	}
	if got := f.must("secrets", "show", "trial.token").out; strings.TrimSpace(got) != mark {
		t.Errorf("secret trial.token is %q, want %q", got, mark)
	}
	if list := f.must("secrets", "list").out; !strings.Contains(list, "trial.token") || strings.Contains(list, "trial.failed") {
		t.Errorf("the project's secrets are %s", list)
	}
	if n := tap.carrying(mark); n != 0 || len(tap.heard) == 0 {
		t.Errorf("of %d messages, the value was in %d", len(tap.heard), n)
	}
	files, err := filepath.Glob(filepath.Join(f.project, "secrets", "*"))
	if err != nil || len(files) == 0 {
		t.Errorf("the project has the files %v, %v", files, err)
	}
	for what, command := range map[string]string{
		"the journal": "journalctl --sync; journalctl --no-pager -o export | grep -qaFf /root/mark",
		"a file":      "grep -rqsaFf /root/mark /run /tmp /var/tmp /var/lib/nix-infra-agent /dev/shm --exclude-dir=log",
	} {
		if _, err := node.Exec(f.ctx, "bash", "-c", command); err == nil {
			t.Errorf("on the node the value is in %s", what)
		}
	}
}
