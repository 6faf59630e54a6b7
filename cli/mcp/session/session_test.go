package session_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp/session"
)

// TestMain is the supervisor, too, where it is started as one.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "supervise" {
		os.Exit(session.Supervise(os.Args[2:]))
	}
	os.Exit(m.Run())
}

func manager(t *testing.T) *session.Manager {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	m := session.New(session.Options{Supervisor: []string{exe, "supervise"}})
	t.Cleanup(m.Close)
	return m
}

func start(t *testing.T, m *session.Manager, script string, env ...string) *session.Session {
	t.Helper()
	s, err := m.Start(session.Order{Tool: "test", Dir: t.TempDir(), Argv: []string{"/bin/sh", "-c", script}, Env: env})
	if err != nil {
		t.Fatal(err)
	}
	return s
}

func ended(t *testing.T, s *session.Session) session.Status {
	t.Helper()
	select {
	case <-s.Ended():
	case <-time.After(2 * time.Minute):
		t.Fatalf("it does not end: %+v", s.Status())
	}
	return s.Status()
}

func output(t *testing.T, s *session.Session) string {
	t.Helper()
	var all strings.Builder
	for from := 0; ; {
		chunks, total, err := s.Output(from, 7, 100_000)
		if err != nil {
			t.Fatal(err)
		}
		for _, c := range chunks {
			all.WriteString(c)
		}
		if from += len(chunks); from >= total {
			return all.String()
		}
	}
}

func TestSession(t *testing.T) {
	m := manager(t)
	s := start(t, m, `echo "to stdout, $WORD"; echo to stderr >&2; exit 7`, "WORD=hello")
	status := ended(t, s)
	if status.State != session.Finished || status.ExitCode == nil || *status.ExitCode != 7 {
		t.Errorf("%+v", status)
	}
	if got := output(t, s); got != "to stdout, hello\nto stderr\n" {
		t.Errorf("%q", got)
	}
	if m.Get(s.ID) != s || m.Get("session_0_0") != nil || len(m.List()) != 1 {
		t.Error("it is not to be found")
	}
	if _, err := m.Start(session.Order{Dir: "/nowhere", Argv: []string{"/bin/true"}}); err == nil {
		t.Error("a session began in a folder that is not there")
	}
	s, err := m.Start(session.Order{Dir: "/", Argv: []string{"/nowhere/program"}})
	if err != nil {
		t.Fatal(err)
	}
	if status := ended(t, s); status.State != session.Failed || !strings.Contains(status.Reason, "/nowhere/program") {
		t.Errorf("%+v", status)
	}
	s = start(t, m, "kill -9 $$")
	if status := ended(t, s); status.State != session.Failed || status.ExitCode != nil || !strings.Contains(status.Reason, "killed") {
		t.Errorf("%+v", status)
	}
}

// TestOutputIsBounded: a program that says more than is kept is not stopped by that, and its last words are there.
func TestOutputIsBounded(t *testing.T) {
	m := manager(t)
	s := start(t, m, "echo first; head -c 80000000 /dev/zero | tr '\\0' x; echo; echo last")
	ended(t, s)
	got := output(t, s)
	if !strings.HasPrefix(got, "first\n") || !strings.HasSuffix(got, "\nlast\n") || !strings.Contains(got, "bytes were left out here]") || len(got) > 65<<20 {
		t.Errorf("%d bytes, from %q to %q", len(got), got[:20], got[len(got)-100:])
	}
	chunks, total, err := s.Output(0, 1000, 20_000)
	if n := len(strings.Join(chunks, "")); err != nil || n > 20_000 || n < 8_000 || total < 8000 {
		t.Errorf("%d bytes of %d chunks, %v", n, total, err)
	}
	if chunks, _, err := s.Output(1<<40, 10, 1000); err != nil || len(chunks) != 0 {
		t.Errorf("after the end: %q %v", chunks, err)
	}
	if chunks, _, err := s.Output(-5, 1, 1000); err != nil || len(chunks) != 1 {
		t.Errorf("before the beginning: %d %v", len(chunks), err)
	}
}

// TestChunksAreWholeCharacters whatever the program's writes were.
func TestChunksAreWholeCharacters(t *testing.T) {
	m := manager(t)
	s := start(t, m, `i=0; while [ $i -lt 3000 ]; do printf 'ä€😀'; i=$((i+1)); done; printf '\342\202'`)
	ended(t, s)
	chunks, total, err := s.Output(0, 100, 1<<20)
	if err != nil || len(chunks) != total || total < 4 {
		t.Fatal(len(chunks), total, err)
	}
	for i, c := range chunks[:total-1] {
		if strings.ToValidUTF8(c, "") != c {
			t.Errorf("chunk %d is cut in a character: …%q", i, c[len(c)-4:])
		}
	}
	if got := strings.Join(chunks, ""); got != strings.Repeat("ä€😀", 3000)+"\xe2\x82" {
		t.Errorf("%d bytes came", len(got))
	}
}

// alive tells whether a process runs.
func alive(pid int) bool {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	return err == nil && !strings.Contains(string(stat), ") Z ")
}

// pids waits until files with process ids are there, and reads them.
func pids(t *testing.T, dir string, names ...string) (all []int) {
	t.Helper()
	deadline := time.Now().Add(2 * time.Minute)
	for _, name := range names {
		for {
			data, err := os.ReadFile(filepath.Join(dir, name))
			if pid, bad := strconv.Atoi(strings.TrimSpace(string(data))); err == nil && bad == nil {
				all = append(all, pid)
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("%s was not started", name)
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
	return all
}

// runaways starts processes that do what they can to get away: another process group, another session, a double fork, deaf
// to signals.
const runaways = `
trap '' TERM INT HUP
sh -c 'echo $$ > child; exec sleep 1000' &
setsid sh -c 'trap "" TERM; echo $$ > setsid; sleep 1000; sleep 1000' &
(setsid sh -c 'setsid sh -c "trap \"\" TERM HUP; echo \$\$ > double; while :; do sleep 1; done" & exit 0' &)
(nohup setsid sh -c 'env -i sh -c "echo \$\$ > bare; exec sleep 1000"' >/dev/null 2>&1 </dev/null &)
`

var runawayNames = []string{"child", "setsid", "double", "bare"}

func TestCancelEndsAll(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("LEFT OUT: only Linux has child subreapers")
	}
	t.Parallel()
	m := manager(t)
	s := start(t, m, runaways+"echo $$ > main; while :; do sleep 1; done")
	all := pids(t, s.Order.Dir, append(runawayNames, "main")...)
	if err := s.Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, pid := range all {
		if alive(pid) {
			t.Errorf("process %d is still there", pid)
		}
	}
	status := ended(t, s)
	if status.State != session.Cancelled || status.ExitCode != nil {
		t.Errorf("%+v", status)
	}
	if err := s.Cancel(t.Context()); err != nil {
		t.Errorf("a second time: %v", err)
	}
}

// TestWhatIsLeft: what a program leaves running goes on, and is ended with the session.
func TestWhatIsLeft(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("LEFT OUT: only Linux has child subreapers")
	}
	t.Parallel()
	m := manager(t)
	s := start(t, m, runaways+"while ! [ -s child -a -s setsid -a -s double -a -s bare ]; do sleep 0.05; done; echo done; exit 3")
	status := ended(t, s)
	if status.State != session.Finished || *status.ExitCode != 3 || status.Left < 4 || output(t, s) != "done\n" {
		t.Errorf("%+v %q", status, output(t, s))
	}
	all := pids(t, s.Order.Dir, runawayNames...)
	for _, pid := range all {
		if !alive(pid) {
			t.Errorf("process %d did not go on", pid)
		}
	}
	if err := s.Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	for _, pid := range all {
		if alive(pid) {
			t.Errorf("process %d is still there", pid)
		}
	}
	if status := s.Status(); status.State != session.Finished || *status.ExitCode != 3 || status.Left != 0 {
		t.Errorf("%+v", status)
	}
}

// TestEndsWithServer: a server that is killed takes its sessions with it.
func TestEndsWithServer(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("LEFT OUT: only Linux has child subreapers")
	}
	t.Parallel()
	if dir := os.Getenv("SESSION_DIR"); dir != "" { // the server
		m := manager(t)
		if _, err := m.Start(session.Order{Dir: dir, Argv: []string{"/bin/sh", "-c", runaways + "echo $$ > main; sleep 1000"}}); err != nil {
			t.Fatal(err)
		}
		<-t.Context().Done()
		return
	}
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	server, err := os.StartProcess(exe, []string{exe, "-test.run", "^TestEndsWithServer$"}, &os.ProcAttr{Env: append(os.Environ(), "SESSION_DIR="+dir)})
	if err != nil {
		t.Fatal(err)
	}
	all := pids(t, dir, append(runawayNames, "main")...)
	if err := server.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := server.Wait(); err != nil {
		t.Fatal(err)
	}
	deadline := time.Now().Add(2 * time.Minute)
	for _, pid := range all {
		for alive(pid) {
			if time.Now().After(deadline) {
				t.Fatalf("process %d is still there", pid)
			}
			time.Sleep(20 * time.Millisecond)
		}
	}
}

// TestSupervisorKilled: the program ends with what watches over it, and the session says what may be left.
func TestSupervisorKilled(t *testing.T) {
	if runtime.GOOS != "linux" {
		t.Skip("LEFT OUT: only Linux ties a process's life to another's")
	}
	t.Parallel()
	m := manager(t)
	s := start(t, m, "echo $PPID > supervisor; echo $$ > main; while :; do sleep 1; done")
	both := pids(t, s.Order.Dir, "supervisor", "main")
	if err := syscall.Kill(both[0], syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); alive(both[1]); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the program goes on")
		}
	}
	if status := ended(t, s); status.State != session.Failed || !strings.Contains(status.Reason, "may be left") {
		t.Errorf("%+v", status)
	}
	if err := s.Cancel(t.Context()); err != nil {
		t.Error(err)
	}
}

// TestLeftRunning: sessions that end and leave processes behind don't add up without end.
func TestLeftRunning(t *testing.T) {
	t.Parallel()
	m := manager(t)
	var first *session.Session
	for range 16 {
		s := start(t, m, "sleep 1000 >/dev/null 2>&1 &")
		ended(t, s)
		if first == nil {
			first = s
		}
	}
	if _, err := m.Start(session.Order{Dir: "/", Argv: []string{"/bin/true"}}); err == nil || !strings.Contains(err.Error(), "still run") {
		t.Errorf("one too many: %v", err)
	}
	if err := first.Cancel(t.Context()); err != nil {
		t.Fatal(err)
	}
	ended(t, start(t, m, "true"))
}

// TestSpooledIsBounded: what is kept of old sessions makes room for new ones.
func TestSpooledIsBounded(t *testing.T) {
	t.Parallel()
	m := manager(t)
	for range 6 { // each as much as a session may have
		s := start(t, m, "head -c 80000000 /dev/zero")
		ended(t, s)
		if err := s.Cancel(t.Context()); err != nil { // it ended; this waits until its supervisor has, too
			t.Fatal(err)
		}
	}
	if n := len(m.List()); n > 4 || n < 3 {
		t.Errorf("%d sessions of 64 MiB are kept", n)
	}
}

func TestBounds(t *testing.T) {
	m := manager(t)
	var first *session.Session
	for range session.MaxRunning {
		s := start(t, m, "sleep 1000")
		if first == nil {
			first = s
		}
	}
	if _, err := m.Start(session.Order{Dir: "/", Argv: []string{"/bin/true"}}); err == nil || !strings.Contains(err.Error(), "cancel it") {
		t.Errorf("one too many: %v", err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if err := first.Cancel(gone); err == nil {
		t.Log("it was fast")
	}
	if err := first.Cancel(t.Context()); err != nil {
		t.Error(err)
	}
	for range 40 { // those that ended don't add up
		s := start(t, m, "true")
		ended(t, s)
	}
	// What watched over them may take a moment longer to end: with the race detector, a second.
	for deadline := time.Now().Add(2 * time.Minute); len(m.List()) > 32; time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Errorf("%d sessions are kept", len(m.List()))
			break
		}
	}
	m.Close()
	if _, err := m.Start(session.Order{Dir: "/", Argv: []string{"/bin/true"}}); err == nil {
		t.Error("one began after the end")
	}
}
