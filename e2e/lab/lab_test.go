//go:build linux

package lab_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// open makes a lab for this test. The pid keeps two runs of the tests apart, the suffix two tests of a run.
func open(t *testing.T, suffix string) *lab.Lab {
	t.Helper()
	if err := lab.Available(); err != nil {
		if os.Getenv("CI") == "" {
			t.Skip(err)
		}
		t.Fatal(err)
	}
	l, err := lab.Open(t.Context(), lab.Options{Name: fmt.Sprintf("t%d-%s", os.Getpid(), suffix), Log: t.Output(), OwnerPID: os.Getpid()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Down(context.Background()); err != nil {
			t.Error(err)
		}
	})
	return l
}

func start(t *testing.T, l *lab.Lab, names ...string) []*lab.Node {
	t.Helper()
	nodes, err := l.Start(t.Context(), names...)
	if err != nil {
		t.Fatal(err)
	}
	return nodes
}

func sh(t *testing.T, n *lab.Node, script string) string {
	t.Helper()
	out, err := n.Exec(t.Context(), "sh", "-c", script)
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(out))
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// reaches tells whether another node answers within a second.
func reaches(n *lab.Node, host string) bool {
	_, err := n.Exec(context.Background(), "ping", "-c1", "-W1", host)
	return err == nil
}

// willReach waits until it answers: the bridge learns that a link is up by itself, in its time.
func willReach(t *testing.T, n *lab.Node, host string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !reaches(n, host); {
		if time.Now().After(deadline) {
			t.Fatalf("%s does not reach %s", n.Name, host)
		}
	}
}

func TestNodes(t *testing.T) {
	t.Parallel()
	l := open(t, "nodes")
	nodes := start(t, l, "alpha", "beta")
	alpha, beta := nodes[0], nodes[1]

	t.Run("exec", func(t *testing.T) {
		if got := sh(t, alpha, "hostname"); got != "alpha" {
			t.Errorf("hostname is %q", got)
		}
		if got := sh(t, alpha, "cat /proc/1/comm; systemctl is-system-running"); got != "systemd\nrunning" {
			t.Errorf("not a running systemd: %q", got)
		}
		if got := sh(t, alpha, "env | grep -v -e ^PWD= -e ^_= -e ^OLDPWD= | cut -d= -f1 | sort | xargs"); got != "HOME LANG PATH TERM USER" {
			t.Errorf("the caller's environment came along: %s", got)
		}
		if got := sh(t, alpha, "tail -n1 /proc/self/cgroup"); got != "0::/lab-exec" {
			t.Errorf("a command is in the cgroup %q", got)
		}
		_, err := alpha.Exec(t.Context(), "sh", "-c", "echo because; exit 7")
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 7 || !strings.Contains(err.Error(), "because") {
			t.Errorf("error lacks status or output: %v", err)
		}
	})

	t.Run("exec ends with its context", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cmd := alpha.Command(ctx, "sh", "-c", "echo up; exec sleep 1000.5")
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		_, err = io.ReadFull(out, make([]byte, 3))
		must(t, err)
		cancel()
		if err := cmd.Wait(); err == nil {
			t.Error("a cancelled command succeeded")
		}
		if got := sh(t, alpha, "pgrep -f 'sleep 1000[.]5' || echo gone"); got != "gone" {
			t.Errorf("it still runs on the node: %s", got)
		}
	})

	t.Run("network", func(t *testing.T) {
		willReach(t, alpha, "beta")
		willReach(t, beta, "alpha")
		willReach(t, alpha, "operator")
		out, err := l.Command(t.Context(), "ssh", "-i", l.SSHKey(), "-oBatchMode=yes", "-oStrictHostKeyChecking=no",
			"-oUserKnownHostsFile=/dev/null", "-oLogLevel=ERROR", "root@"+beta.IP, "hostname").CombinedOutput()
		if err != nil || string(out) != "beta\n" {
			t.Errorf("ssh: %v: %s", err, out)
		}
		conn, err := l.Dial(t.Context(), "tcp", beta.IP+":22")
		must(t, err)
		must(t, conn.Close())
		if out, err := exec.Command("ip", "route", "get", beta.IP).CombinedOutput(); err == nil {
			t.Errorf("this machine itself has a route to the nodes: %s", out)
		}
	})

	t.Run("listen", func(t *testing.T) {
		listener, err := l.Listen(t.Context(), "tcp", l.HostIP()+":0")
		must(t, err)
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			fmt.Fprintf(w, "to %s", r.RemoteAddr)
		})}
		go server.Serve(listener) //nolint:errcheck // it ends when it is closed
		defer server.Close()
		const get = `exec 3<>/dev/tcp/operator/$0; printf 'GET / HTTP/1.0\r\n\r\n' >&3; tail -n 1 <&3`
		out, err := alpha.Exec(t.Context(), "bash", "-c", get, strconv.Itoa(listener.Addr().(*net.TCPAddr).Port))
		if err != nil || !strings.Contains(string(out), "to "+alpha.IP+":") {
			t.Errorf("a server in the test's own process: %v: %s", err, out)
		}
	})

	t.Run("files", func(t *testing.T) {
		must(t, alpha.WriteFile("/srv/deep/down/file", []byte("text"), 0o640))
		if got := sh(t, alpha, "stat -c '%a %U' /srv/deep/down/file; cat /srv/deep/down/file"); got != "640 root\ntext" {
			t.Errorf("wrote %q", got)
		}
		// An absolute link must be followed on the node, not here.
		sh(t, alpha, "ln -s /srv/deep/down/file /srv/link; echo of-the-node >/run/only")
		got, err := alpha.ReadFile("/srv/link")
		if err != nil || string(got) != "text" {
			t.Errorf("read %q, %v", got, err)
		}
		if got, err := alpha.ReadFile("/run/only"); err != nil || string(got) != "of-the-node\n" {
			t.Errorf("read %q, %v", got, err)
		}
		if _, err := alpha.ReadFile("/srv/none"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a missing file is not ErrNotExist: %v", err)
		}
		local := filepath.Join(t.TempDir(), "blob")
		blob := bytes.Repeat([]byte("blob"), 1<<18)
		must(t, os.WriteFile(local, blob, 0o600))
		must(t, alpha.CopyTo(local, "/usr/local/bin/blob", 0o755))
		if got, err := alpha.ReadFile("/usr/local/bin/blob"); err != nil || !bytes.Equal(got, blob) {
			t.Errorf("copied %d bytes of %d, %v", len(got), len(blob), err)
		}
	})

	t.Run("nix store", func(t *testing.T) {
		if got := sh(t, beta, "echo x >/tmp/x; nix-store --add /tmp/x"); !strings.HasPrefix(got, "/nix/store/") {
			t.Errorf("added %q", got)
		}
	})

	t.Run("late node", func(t *testing.T) {
		gamma := start(t, l, "gamma")[0]
		willReach(t, alpha, "gamma")
		willReach(t, gamma, "alpha")
	})

	t.Run("names", func(t *testing.T) {
		for _, name := range []string{"", "Up", "a.b", "../x", strings.Repeat("x", 33)} {
			if _, err := l.Start(t.Context(), name); err == nil {
				t.Errorf("the node name %q was accepted", name)
			}
		}
		if l.Node("nobody") != nil {
			t.Error("a node that nobody made")
		}
	})
}

func TestCut(t *testing.T) {
	t.Parallel()
	l := open(t, "cut")
	nodes := start(t, l, "n1", "n2", "n3")
	must(t, nodes[1].Cut(t.Context()))
	if reaches(nodes[0], "n2") || reaches(nodes[1], "n1") {
		t.Error("a node that was cut off is reached")
	}
	willReach(t, nodes[0], "n3")
	if sh(t, nodes[1], "hostname") != "n2" {
		t.Error("no exec on a node that is cut off")
	}
	must(t, nodes[1].Reboot(t.Context()))
	if reaches(nodes[0], "n2") {
		t.Error("a reboot healed the cable")
	}
	must(t, nodes[1].Heal(t.Context()))
	willReach(t, nodes[0], "n2")
}

func TestPower(t *testing.T) {
	t.Parallel()
	n := start(t, open(t, "power"), "n1")[0]
	bootID := func() string { return sh(t, n, "cat /proc/sys/kernel/random/boot_id") }

	first := bootID()
	machineID := sh(t, n, "cat /etc/machine-id")
	sh(t, n, "echo kept >/srv/file; echo lost >/run/file; nft add table inet of-this-boot; ip link set eth0 down")
	must(t, n.Kill(t.Context()))
	if n.Running() {
		t.Error("it runs without power")
	}
	if _, err := n.Exec(t.Context(), "true"); err == nil || !strings.Contains(err.Error(), "not running") {
		t.Errorf("exec without power: %v", err)
	}
	must(t, n.Boot(t.Context()))
	second := bootID()
	if first == second {
		t.Error("the boot id is the same after a power cut")
	}
	if got := sh(t, n, "cat /srv/file; cat /run/file 2>/dev/null; nft list tables; cat /sys/class/net/eth0/operstate"); got != "kept\nup" {
		t.Errorf("after a power cut: %q", got)
	}
	if got := sh(t, n, "cat /etc/machine-id"); got != machineID || got == "" {
		t.Errorf("machine id was %q and is %q", machineID, got)
	}

	must(t, n.Reboot(t.Context()))
	third := bootID()
	if third == second {
		t.Error("the boot id is the same after a reboot")
	}

	// One that begins on the node itself: the old boot must not pass for the new.
	_, _ = n.Exec(t.Context(), "systemctl", "reboot")
	for ctx := t.Context(); ; {
		must(t, ctx.Err())
		must(t, n.Ready(ctx))
		if out, err := n.Exec(ctx, "cat", "/proc/sys/kernel/random/boot_id"); err == nil && strings.TrimSpace(string(out)) != third {
			break
		}
	}

	must(t, n.Stop(t.Context()))
	if n.Running() {
		t.Error("it runs after it was stopped")
	}
	must(t, n.Boot(t.Context()))
	if got := sh(t, n, "cat /srv/file; journalctl --list-boots | grep -c ."); !strings.HasPrefix(got, "kept") {
		t.Errorf("after stop and boot: %q", got)
	}
}

func TestSmallDisk(t *testing.T) {
	t.Parallel()
	l := open(t, "disk")
	nodes, err := l.StartWith(t.Context(), lab.NodeOptions{DiskMiB: 64}, "tiny")
	must(t, err)
	tiny := nodes[0]
	out, err := tiny.Exec(t.Context(), "dd", "if=/dev/zero", "of=/srv/big", "bs=1M", "count=100")
	if err == nil || !strings.Contains(string(out), "No space left") {
		t.Errorf("100 MiB fit on a disk of 64: %v", err)
	}
	must(t, tiny.Kill(t.Context()))
	must(t, tiny.Boot(t.Context()))
	if got := sh(t, tiny, "test -s /srv/big && rm /srv/big && echo room >/srv/file && cat /srv/file"); got != "room" {
		t.Errorf("after the power cut: %q", got)
	}
}

func TestSideBySide(t *testing.T) {
	t.Parallel()
	one, two := open(t, "one"), open(t, "two")
	a, b := start(t, one, "n1")[0], start(t, two, "n1")[0]
	if a.IP != b.IP {
		t.Errorf("addresses %s and %s: the test means them to be the same", a.IP, b.IP)
	}
	sh(t, a, "echo one >/srv/lab")
	sh(t, b, "echo two >/srv/lab")
	if sh(t, a, "cat /srv/lab") != "one" || sh(t, b, "cat /srv/lab") != "two" {
		t.Error("two labs share a disk")
	}
	must(t, a.Cut(t.Context()))
	if conn, err := two.Dial(t.Context(), "tcp", b.IP+":22"); err != nil {
		t.Errorf("cutting a node of one lab cut the other's: %v", err)
	} else {
		_ = conn.Close()
	}
	must(t, one.Down(t.Context()))
	if got := sh(t, b, "systemctl is-system-running"); got != "running" {
		t.Errorf("with the other lab down: %s", got)
	}
	if _, err := exec.Command("ip", "route", "get", b.IP).Output(); err == nil {
		t.Error("the guard route went with the first lab")
	}
}

func TestAttach(t *testing.T) {
	t.Parallel()
	l := open(t, "attach")
	start(t, l, "n1")
	again, err := lab.Attach(l.Name())
	must(t, err)
	if got := sh(t, again.Node("n1"), "hostname"); got != "n1" {
		t.Errorf("attached to %q", got)
	}
	start(t, again, "n2")
	if l.Node("n2") == nil || len(l.Nodes()) != 2 {
		t.Error("the first does not see the node that the second made")
	}
	if _, err := lab.Attach("t-none"); !errors.Is(err, lab.ErrNoLab) {
		t.Errorf("attached to no lab: %v", err)
	}
}

func TestReap(t *testing.T) {
	t.Parallel()
	if err := lab.Available(); err != nil {
		open(t, "unavailable") // skips or fails
	}
	owner := exec.Command("sleep", "1000")
	must(t, owner.Start())
	l, err := lab.Open(t.Context(), lab.Options{Name: fmt.Sprintf("t%d-reap", os.Getpid()), Log: t.Output(), OwnerPID: owner.Process.Pid})
	must(t, err)
	t.Cleanup(func() { _ = l.Down(context.Background()) })
	start(t, l, "n1")
	// The owner's own child on the operator's side, which a crash leaves behind.
	stray := l.Command(context.Background(), "sleep", "1000")
	must(t, stray.Start())

	reaped, err := lab.Reap(t.Context(), t.Output())
	must(t, err)
	if _, err := lab.Attach(l.Name()); err != nil {
		t.Fatalf("a lab with a live owner was removed (%v): %v", reaped, err)
	}
	must(t, owner.Process.Kill())
	_ = owner.Wait()
	// Another test's Open may reap it first; either way it is gone when this returns.
	for ctx := t.Context(); ; {
		_, err = lab.Reap(ctx, t.Output())
		must(t, err)
		if _, err := lab.Attach(l.Name()); errors.Is(err, lab.ErrNoLab) {
			break
		}
		must(t, ctx.Err())
	}
	if err := stray.Wait(); err == nil {
		t.Error("the stray process ended well instead of with the lab")
	}
	left, err := filepath.Glob("/run/netns/*" + l.Name() + "*")
	must(t, err)
	if len(left) > 0 {
		t.Errorf("namespaces are left: %v", left)
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	must(t, err)
	if strings.Contains(string(mounts), l.Name()) {
		t.Error("mounts are left")
	}
}
