package run

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// These tests need a machine with systemd that is nobody's: e2e's TestRunOnNode runs them on a node of the lab.
const onNode = "NIX_INFRA_TEST_NODE"

func needNode(t *testing.T) *Systemd {
	t.Helper()
	if os.Getenv(onNode) == "" {
		t.Skip("needs a node: see e2e's TestRunOnNode")
	}
	return &Systemd{Dir: "/run/nix-infra-run-test", Hidden: []string{"/srv"}, Log: slog.New(slog.NewTextHandler(t.Output(), nil))}
}

// did is what came of a run.
type did struct {
	stdout, stderr string
	parts          int
	dropped        int64
	ending         protocol.Ending
	err            error
}

func (d did) String() string {
	return fmt.Sprintf("stdout %.300q, stderr %.300q, %d parts, %d dropped, %+v, error %v", d.stdout, d.stderr, d.parts, d.dropped, d.ending, d.err)
}

// perform runs a program of the node, with "" for what spec leaves open.
func perform(ctx context.Context, h Host, s Spec) (d did) {
	if s.ID == "" {
		s.ID = "test-" + protocol.NewID()
	}
	if s.Timeout == 0 {
		s.Timeout = 30 * time.Second
	}
	if s.Memory == 0 {
		s.Memory = 256 << 20
	}
	if s.Tasks == 0 {
		s.Tasks = 64
	}
	if s.Output == 0 {
		s.Output = 1 << 20
	}
	s.What = "a test"
	var err error
	if s.Argv[0], err = Program(s.Argv[0]); err != nil {
		return did{err: err}
	}
	d.err = Run(ctx, h, s, func(o protocol.Output) error {
		d.parts++
		d.stdout += string(o.Stdout)
		d.stderr += string(o.Stderr)
		d.dropped += o.Dropped
		if o.Ended != nil {
			d.ending = *o.Ended
		}
		return nil
	})
	return d
}

func shell(text string) Spec { return Spec{Argv: []string{"bash", "-c", text}, User: "root"} }

func TestNodeEndings(t *testing.T) {
	h := needNode(t)
	for _, c := range []struct {
		spec   Spec
		exit   int
		result string
		reason string
	}{
		{shell("exit 0"), 0, protocol.ResultSuccess, ""},
		{Spec{Argv: []string{"true"}}, 0, protocol.ResultSuccess, ""},
		{shell("exit 1"), 1, protocol.ResultExit, "exit status 1"},
		{shell("exit 143"), 143, protocol.ResultExit, "exit status 143"},
		{shell("exit 203"), 203, protocol.ResultExit, "exit status 203"},
		{shell("exit 255"), 255, protocol.ResultExit, "exit status 255"},
		{shell("kill -KILL $$"), -1, protocol.ResultSignal, "killed by signal 9 (SIGKILL)"},
		{shell("kill -TERM $$"), -1, protocol.ResultSignal, "killed by signal 15 (SIGTERM)"},
		{shell("kill -SEGV $$"), -1, protocol.ResultSignal, "killed by signal 11 (SIGSEGV)"},
		{Spec{Argv: []string{"sleep", "60"}, Timeout: time.Second}, -1, protocol.ResultTimeout, "it took longer than 1s, and was ended"},
		{Spec{Argv: []string{"bash", "-c", "trap '' TERM; while :; do sleep 1; done"}, Timeout: time.Second}, -1, protocol.ResultTimeout, "it took longer than 1s, and was ended"},
	} {
		d := perform(t.Context(), h, c.spec)
		if d.err != nil || d.ending.Exit != c.exit || d.ending.Result != c.result || d.ending.Reason != c.reason {
			t.Errorf("%q: %v", c.spec.Argv, d)
		}
	}
	// What took processor time says so.
	d := perform(t.Context(), h, shell("for ((i = 0; i < 200000; i++)); do :; done; sleep 0.2"))
	if d.ending.CPU < int64(50*time.Millisecond) || d.ending.Millis < 200 {
		t.Errorf("%v", d)
	}
}

func TestNodeRefusals(t *testing.T) {
	h := needNode(t)
	garbage := filepath.Join(t.TempDir(), "garbage")
	if err := os.WriteFile(garbage, []byte("\x00no program"), 0o755); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		spec Spec
		want string
	}{
		{Spec{Argv: []string{garbage}, User: "root"}, "it can't be executed"},
		{Spec{Argv: []string{"true"}, User: "nobody-at-all"}, "the user of its rule does not exist here"},
		{Spec{Argv: []string{"true"}, Groups: []string{"nobody-at-all"}}, "a group of its rule does not exist here"},
	} {
		if d := perform(t.Context(), h, c.spec); d.err == nil || !strings.Contains(d.err.Error(), c.want) || d.ending.Result != "" {
			t.Errorf("%q: %v", c.spec.Argv, d)
		}
	}
	failed, err := exec.Command("systemctl", "--failed", "--no-legend", "--plain").Output()
	if err != nil || strings.Contains(string(failed), unitPrefix) {
		t.Errorf("failed units are left: %s %v", failed, err)
	}
}

// TestNodeArguments: what was allowed is what runs, byte for byte, and so is what a script gets.
func TestNodeArguments(t *testing.T) {
	h := needNode(t)
	args := []string{"$HOME", "${PATH}", "$$", "%n%%i", "a b", "", "'", `"`, `\`, `\n`, "a\nb", "\t", "*", ";", "é\U0001F600", "-x", "@", ":", "!"}
	want := strings.Join(args, "\x00") + "\x00"
	if d := perform(t.Context(), h, Spec{Argv: append([]string{"printf", `%s\0`}, args...)}); d.stdout != want {
		t.Errorf("got %q, want %q: %v", d.stdout, want, d)
	}
	script := Spec{Argv: append([]string{"bash"}, args...), User: "root", Dir: "/root", Private: map[string]string{"SECRET": "hush"},
		// The file of the environment is removed by us, once systemd says that the script runs.
		Script: []byte(`for ((i = 0; i < 100; i++)); do [[ -e "${0%/*}/environment" ]] || break; sleep 0.05; done
stat -c '%a %U' "$0" >&2; pwd >&2; ls "${0%/*}" >&2; printf '%s\0' "$@"; test "$SECRET" = hush; test "$HOME" = /root`)}
	d := perform(t.Context(), h, script)
	if d.stdout != want || d.stderr != "400 root\n/root\nscript\n" || d.ending.Result != protocol.ResultSuccess {
		t.Errorf("a script: %v", d)
	}
	if left, err := os.ReadDir(h.Dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}

func TestNodeEnvironment(t *testing.T) {
	h := needNode(t)
	var every strings.Builder
	for c := rune(1); c < 0x250; c++ {
		every.WriteRune(c)
	}
	env := map[string]string{"EVERY": every.String(), "EMPTY": "", "LINES": "a\n\nb\n", "LONG": strings.Repeat("x", 40<<10),
		"HASH": "# no comment", "SEMI": "; no comment", "SPACES": "  a  ", "END": `\`, "QUOTED": `"'"'`, "EXPANDED": "$HOME ${HOME} `id` %n", "CR": "a\r\nb", "WIDE": "\U0001F600\uFFFD"}
	if err := CheckPrivate(env); err != nil {
		t.Fatal(err)
	}
	d := perform(t.Context(), h, Spec{Argv: []string{"cat", "/proc/self/environ"}, User: "root", Private: env})
	got := map[string]string{}
	for _, entry := range strings.Split(d.stdout, "\x00") {
		name, value, _ := strings.Cut(entry, "=")
		got[name] = value
	}
	for name, value := range env {
		if got[name] != value {
			t.Errorf("%s: got %q, want %q", name, got[name], value)
		}
	}
	// What is refused is what systemd would refuse, which would be the end of the whole environment.
	for _, r := range []string{"\uFDD0", "\uFFFE", "\U0001FFFF"} {
		if CheckPrivate(map[string]string{"BAD": r}) == nil {
			t.Errorf("%q is taken", r)
		}
	}
}

// processes are the ids of those whose command line has text in it.
func processes(t *testing.T, text string) (found []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if data, err := os.ReadFile(f); err == nil && bytes.Contains(data, []byte(text)) {
			found = append(found, f)
		}
	}
	return found
}

// TestNodeNothingIsLeft: no child stays, however it went to the background, and whatever it does with signals.
func TestNodeNothingIsLeft(t *testing.T) {
	h := needNode(t)
	for name, text := range map[string]string{
		"plain":    "sleep 98761 & exit 0",
		"daemon":   "(setsid sleep 98762 >/dev/null 2>&1 </dev/null &); exit 3",
		"stubborn": "(trap '' TERM HUP INT; setsid bash -c 'exec -a 98763 sleep 98763' &); exit 0",
	} {
		begun := time.Now()
		d := perform(t.Context(), h, shell(text))
		if d.err != nil || time.Since(begun) > time.Minute {
			t.Errorf("%s: after %v: %v", name, time.Since(begun), d)
		}
		if left := processes(t, "9876"); len(left) > 0 {
			t.Errorf("%s: left running: %v", name, left)
		}
	}
}

func TestNodeIsEnded(t *testing.T) {
	h := needNode(t)
	why := errors.New("its sender ended it")
	for name, text := range map[string]string{
		"polite":   "trap 'echo bye; exit 5' TERM; echo begun; while :; do sleep 0.1; done",
		"stubborn": "trap '' TERM; echo begun; setsid sleep 98764 & while :; do sleep 1; done",
	} {
		ctx, end := context.WithCancelCause(t.Context())
		begun := time.Now()
		var out string
		var last *protocol.Ending
		program, err := Program("bash")
		if err != nil {
			t.Fatal(err)
		}
		err = Run(ctx, h, Spec{ID: "test-" + protocol.NewID(), What: "a test", Argv: []string{program, "-c", text}, User: "root", Timeout: time.Minute, Memory: 256 << 20, Tasks: 64, Output: 1 << 20},
			func(o protocol.Output) error {
				if out += string(o.Stdout); strings.Contains(out, "begun") {
					end(why)
				}
				last = o.Ended
				return nil
			})
		if err != nil || last == nil || last.Result != protocol.ResultEnded || last.Reason != why.Error() || last.Exit != -1 || time.Since(begun) > time.Minute {
			t.Errorf("%s: after %v: %v %+v", name, time.Since(begun), err, last)
		}
		if name == "polite" && out != "begun\nbye\n" {
			t.Errorf("what it says at its end is lost: %q", out)
		}
		if left := processes(t, "98764"); len(left) > 0 {
			t.Errorf("%s: left running: %v", name, left)
		}
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if d := perform(ended, h, shell("touch /run/never")); d.err == nil {
		t.Errorf("it began after it was ended: %v", d)
	}
	if _, err := os.Stat("/run/never"); err == nil {
		t.Error("it ran after it was ended")
	}
}

func TestNodeMemory(t *testing.T) {
	h := needNode(t)
	begun := time.Now()
	d := perform(t.Context(), h, Spec{Argv: []string{"bash", "-c", "head -c 200M /dev/zero | tail -c 200M | wc -c"}, Memory: 64 << 20})
	t.Logf("after %v: %v", time.Since(begun), d)
	if d.stdout == "209715200\n" {
		t.Errorf("it got all the memory that it wanted: %v", d)
	}
	d = perform(t.Context(), h, Spec{Argv: []string{"bash", "-c", "head -c 20M /dev/zero | tail -c 20M | wc -c"}, Memory: 64 << 20})
	if d.stdout != "20971520\n" || d.ending.Result != protocol.ResultSuccess {
		t.Errorf("it did not get what it may have: %v", d)
	}
}

func TestNodeFlood(t *testing.T) {
	h := needNode(t)
	begun := time.Now()
	d := perform(t.Context(), h, Spec{Argv: []string{"yes"}, Timeout: 3 * time.Second, Output: 300_000})
	if len(d.stdout) != 300_000 || d.dropped < 1<<20 || d.ending.Result != protocol.ResultTimeout || d.parts > 60 || time.Since(begun) > time.Minute {
		t.Errorf("after %v: %d bytes in %d parts, %d dropped, %+v %v", time.Since(begun), len(d.stdout), d.parts, d.dropped, d.ending, d.err)
	}
}

// TestNodeSandbox: a command that need not be root sees the machine, and can do nothing to it.
func TestNodeSandbox(t *testing.T) {
	h := needNode(t)
	for _, file := range []string{"/srv/hidden", "/run/secrets/hidden"} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte("hidden\n"), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	for _, user := range []string{"", "daemon"} {
		for _, c := range []struct{ text, want string }{
			{`test "$(id -u)" != 0 && echo yes`, "yes\n"},
			{"id -un", map[string]string{"": "nobody\n", "daemon": "daemon\n"}[user]},
			{"systemctl show -p Version --value | grep -c .", "1\n"},
			{"systemctl is-active dbus.service", "active\n"},
			{"systemctl list-units --type=service --no-legend | grep -c dbus", "1\n"},
			{"ps -e -o comm= | grep -c '^systemd$'", ""},
			{"ss -H -l -n -t | grep -c :22", ""},
			{"df / | grep -c %", "2\n"},
			{"cat /etc/hostname | wc -l", "1\n"},
			{"touch /etc/mark /var/mark /run/mark /root/mark /dev/shm/mark 2>/dev/null || echo refused", "refused\n"},
			{"systemctl stop ssh.service 2>/dev/null || echo refused", "refused\n"},
			{"cat /srv/hidden /run/secrets/hidden 2>/dev/null || echo refused", "refused\n"},
			{"cat /etc/shadow 2>/dev/null || echo refused", "refused\n"},
			{"unshare -U true 2>/dev/null || echo refused", "refused\n"},
			{"touch /tmp/mark && ls /tmp", "mark\n"},
			{"echo $TERM:$PAGER:$SYSTEMD_PAGER; test -t 0 || test -t 1 || echo no tty", "dumb:cat:\nno tty\n"},
		} {
			d := perform(t.Context(), h, Spec{Argv: []string{"bash", "-c", c.text}, User: user})
			if d.err != nil || c.want != "" && d.stdout != c.want || c.want == "" && d.stdout == "0\n" {
				t.Errorf("as %q: %s: %v", user, c.text, d)
			}
		}
	}
	if _, err := os.Stat("/tmp/mark"); err == nil {
		t.Error("/tmp is not its own")
	}
	journal := Spec{Argv: []string{"journalctl", "-n", "1", "-o", "cat", "_PID=1"}, Groups: []string{"systemd-journal"}}
	if d := perform(t.Context(), h, journal); d.stdout == "" || d.ending.Exit != 0 {
		t.Errorf("the journal: %v", d)
	}
	journal.Groups = nil
	if d := perform(t.Context(), h, journal); d.stdout != "" {
		t.Errorf("the journal without its group: %v", d)
	}
}

// TestNodeSystemdIsReplaced: what systemd does to itself, as by a deploy, is not the end of a run, and its result is known.
func TestNodeSystemdIsReplaced(t *testing.T) {
	h := needNode(t)
	d := perform(t.Context(), h, shell("systemctl daemon-reexec; sleep 1; echo done; exit 7"))
	if d.err != nil || d.stdout != "done\n" || d.ending.Exit != 7 {
		t.Errorf("%v", d)
	}
}

func TestNodeStoppedByOthers(t *testing.T) {
	h := needNode(t)
	id := "test-" + protocol.NewID()
	s := shell("systemctl stop --no-block " + unitName(id) + "; sleep 60")
	s.ID = id
	if d := perform(t.Context(), h, s); d.err != nil || d.ending.Result != protocol.ResultStopped || d.ending.Exit != -1 {
		t.Errorf("%v", d)
	}
}

// TestNodeClear: what an agent left that was killed is ended, with all that was private of it.
func TestNodeClear(t *testing.T) {
	h := needNode(t)
	program, err := Program("sleep")
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.OpenFile(os.DevNull, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	var units []string
	for i := range 3 {
		s := Spec{ID: fmt.Sprintf("test-%d-%s", i, protocol.NewID()), What: "a test", Argv: []string{program, "98765"}, User: "root", Timeout: time.Minute, Memory: 64 << 20, Tasks: 8,
			Private: map[string]string{"A": "b"}}
		if i == 1 {
			s.Argv = []string{"/bin/sh", "-c", "trap '' TERM; sleep 98765; sleep 98765"}
		}
		p, err := h.newPrivate(s)
		if err != nil {
			t.Fatal(err)
		}
		f, err := follow(unitName(s.ID))
		if err != nil {
			t.Fatal(err)
		}
		defer f.close()
		if err := f.start(t.Context(), h.settings(s, p, null, null)); err != nil {
			t.Fatal(err)
		}
		units = append(units, f.unit)
	}
	for deadline := time.Now().Add(time.Minute); len(processes(t, "98765")) < 3; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("they do not begin")
		}
	}
	if err := h.Clear(t.Context()); err != nil {
		t.Error(err)
	}
	if left := processes(t, "98765"); len(left) > 0 {
		t.Errorf("left running: %v", left)
	}
	for _, unit := range units {
		f, err := follow(unit)
		if err != nil {
			t.Fatal(err)
		}
		defer f.close()
		if u, err := f.look(t.Context()); err != nil || !u.gone() {
			t.Errorf("%s: %+v %v", unit, u, err)
		}
	}
	if left, err := os.ReadDir(h.Dir); err != nil || len(left) > 0 {
		t.Errorf("left behind: %v %v", left, err)
	}
}
