//go:build linux

package e2e

import (
	"bytes"
	"crypto/aes"
	"crypto/cipher"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/protocol"
)

// keystream is AES-128 in counter mode over zeros: as long as is asked for, and nowhere the same twice. A node makes the
// same with openssl.
type keystream struct{ cipher.Stream }

const keystreamKey = "000102030405060708090a0b0c0d0e0f"

func newKeystream() *keystream {
	key, _ := hex.DecodeString(keystreamKey)
	block, err := aes.NewCipher(key)
	if err != nil {
		panic(err)
	}
	return &keystream{cipher.NewCTR(block, make([]byte, aes.BlockSize))}
}

func (k *keystream) Read(p []byte) (int, error) {
	clear(p)
	k.XORKeyStream(p, p)
	return len(p), nil
}

// serve has a node run a shell's text for each connection to a port of its loopback.
func (f *fleet) serve(node *lab.Node, unit string, port int, text string) {
	f.t.Helper()
	dir := "/run/systemd/system/"
	for name, content := range map[string]string{
		unit + ".socket":   fmt.Sprintf("[Socket]\nListenStream=127.0.0.1:%d\nAccept=yes\n", port),
		unit + "@.service": fmt.Sprintf("[Service]\nStandardInput=socket\nStandardError=journal\nExecStart=-/bin/sh -c '%s'\n", text),
	} {
		if err := node.WriteFile(dir+name, []byte(content), 0o644); err != nil {
			f.t.Fatal(err)
		}
	}
	f.exec(node, "systemctl", "daemon-reload")
	f.exec(node, "systemctl", "start", unit+".socket")
	f.t.Cleanup(func() {
		f.exec(node, "sh", "-c", "systemctl stop "+unit+".socket '"+unit+"@*'; rm "+dir+unit+".socket "+dir+unit+"@.service; systemctl daemon-reload")
	})
}

// forward runs port-forward until the test ends, and returns once it listens on these ports here.
func (f *fleet) forward(node string, ports map[int]int) *exec.Cmd {
	f.t.Helper()
	args := []string{"port-forward", node}
	for local, remote := range ports {
		args = append(args, fmt.Sprintf("%d:%d", local, remote))
	}
	cmd, out := f.command(args...), &output{}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() {
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil {
			f.t.Error(err)
		}
		if err := cmd.Wait(); cmd.ProcessState.ExitCode() != 130 {
			f.t.Errorf("port-forward: %v: %s", err, out)
		}
	})
	f.eventually(soon, func() string {
		for local := range ports {
			if !strings.Contains(out.String(), fmt.Sprint(local)) {
				return "port-forward says " + out.String()
			}
		}
		return ""
	})
	return cmd
}

func (f *fleet) dial(port int) *net.TCPConn {
	f.t.Helper()
	conn, err := f.lab.Dial(f.ctx, "tcp", fmt.Sprintf("127.0.0.1:%d", port))
	if err != nil {
		f.t.Fatal(err)
	}
	deadline, _ := f.ctx.Deadline()
	if err := conn.SetDeadline(deadline); err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { conn.Close() })
	return conn.(*net.TCPConn)
}

// peak is the most memory that a process had, in MiB, by its /proc/PID/status.
func peak(t *testing.T, status []byte) int {
	t.Helper()
	_, rest, ok := bytes.Cut(status, []byte("VmHWM:"))
	fields := bytes.Fields(rest)
	if !ok || len(fields) == 0 {
		t.Fatalf("no VmHWM in %s", status)
	}
	kib, err := strconv.Atoi(string(fields[0]))
	if err != nil {
		t.Fatal(err)
	}
	return kib >> 10
}

// TestTunnelBulk: a lot goes through a tunnel as it is, in both directions, with the broker gone in the middle of it, and
// neither end holds much of it at a time.
func TestTunnelBulk(t *testing.T) {
	f := shared(t)
	node := f.nodes["n1"]
	const down, up, most = 1 << 30, 128 << 20, 48 // bytes, bytes, MiB
	f.serve(node, "bulk-down", 7100, fmt.Sprintf("openssl enc -aes-128-ctr -K %s -iv %032d -in /dev/zero 2>/dev/null | head -c %d", keystreamKey, 0, down))
	f.serve(node, "bulk-up", 7101, "sha256sum")
	agent := f.property(node, "nix-infra-agent.service", "MainPID")
	f.exec(node, "sh", "-c", "echo 5 >/proc/"+agent+"/clear_refs") // its peak begins anew
	cli := f.forward("n1", map[int]int{17100: 7100, 17101: 7101})

	conn, want := f.dial(17100), newKeystream()
	var restarted chan error
	got, expected := make([]byte, 1<<20), make([]byte, 1<<20)
	begun := time.Now()
	for at := 0; at < down; at += len(got) {
		if n, err := io.ReadFull(conn, got); err != nil {
			t.Fatalf("after %d of %d bytes: %v\n%s", at+n, down, err, f.exec(node, "journalctl", "--no-pager", "-n", "40"))
		}
		if _, err := want.Read(expected); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, expected) {
			t.Fatalf("other bytes than were sent, between %d and %d", at, at+len(got))
		}
		if at == down/4 {
			restarted = make(chan error, 1)
			go func() {
				_, err := f.ctl.Exec(f.ctx, "systemctl", "restart", "nix-infra-controller.service")
				restarted <- err
			}()
		}
	}
	if n, err := conn.Read(got); n != 0 || err != io.EOF {
		t.Errorf("after the last byte: %d more, %v", n, err)
	}
	if err := <-restarted; err != nil {
		t.Fatal(err)
	}
	t.Logf("1 GiB, and the broker's restart, took %v", time.Since(begun))

	conn = f.dial(17101)
	sum := sha256.New()
	if _, err := io.Copy(conn, io.TeeReader(io.LimitReader(newKeystream(), up), sum)); err != nil {
		t.Fatal(err)
	}
	if err := conn.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	said, err := io.ReadAll(conn)
	if err != nil || string(said) != fmt.Sprintf("%x  -\n", sum.Sum(nil)) {
		t.Errorf("the node got what has the sum %q, want %x: %v", said, sum.Sum(nil), err)
	}

	status, err := node.ReadFile("/proc/" + agent + "/status")
	if err != nil {
		t.Fatal(err)
	}
	ours, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", cli.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	if a, c := peak(t, status), peak(t, ours); a > most || c > most {
		t.Errorf("the agent had up to %d MiB, the CLI %d, want at most %d", a, c, most)
	} else {
		t.Logf("the agent had up to %d MiB, the CLI %d", a, c)
	}

	// What the policy doesn't allow, nothing leads to.
	creds, _ := f.grant("tom", protocol.Operator)
	for _, args := range [][]string{
		{"port-forward", "n1", "17102:" + f.ctl.IP + ":4222"},
		{"port-forward", "n1", "17102:8.8.8.8:53"},
		{"--creds", creds, "port-forward", "n1", "17102:7100"},
	} {
		if r := f.cli(args...); r.code != 2 || !strings.Contains(r.errOut, "n1") {
			t.Errorf("%v: %v", args, r)
		}
	}
}

// TestSSHThroughTunnel: ssh to a node whose sshd nobody reaches, and which has to be the one that was enrolled.
func TestSSHThroughTunnel(t *testing.T) {
	f := shared(t)
	node := f.nodes["n1"]
	f.exec(node, "nft", "add table inet closed { chain in { type filter hook input priority 0; iifname eth0 tcp dport 22 reject with tcp reset; }; }")
	t.Cleanup(func() { f.exec(node, "nft", "delete", "table", "inet", "closed") })
	if conn, err := f.lab.Dial(f.ctx, "tcp", node.IP+":22"); err == nil {
		conn.Close()
		t.Fatal("the port of sshd is open, so that this test would show nothing")
	}
	ssh := func(args ...string) result {
		t.Helper()
		return f.cli(append([]string{"ssh", "n1", "--ssh-key", f.lab.SSHKey(), "--"}, args...)...)
	}
	boot := f.exec(node, "cat", "/proc/sys/kernel/random/boot_id")
	if r := ssh("cat /proc/sys/kernel/random/boot_id; echo to stderr >&2; exit 7"); r.code != 7 || r.out != boot+"\n" || !strings.Contains(r.errOut, "to stderr") {
		t.Errorf("%v", r)
	}
	if r := f.run("cmd", "--target=n1", "--via=ssh", "--ssh-key", f.lab.SSHKey(), "cd /proc/sys/kernel/random && cat boot_id | tr a-f A-F; exit $((2+3))"); r.code != 1 || r.Exit == nil || *r.Exit != 5 || r.stdout.String() != strings.ToUpper(boot)+"\n" {
		t.Errorf("%v", r)
	}

	const key = "/etc/ssh/ssh_host_ed25519_key"
	restore := func() {
		t.Helper()
		f.exec(node, "sh", "-euc", "cp -p /root/host-key "+key+"; cp -p /root/host-key.pub "+key+".pub; systemctl restart ssh.service")
	}
	f.exec(node, "sh", "-euc", "cp -p "+key+" /root/host-key; cp -p "+key+".pub /root/host-key.pub; rm "+key+"*; ssh-keygen -q -t ed25519 -N '' -f "+key+"; systemctl restart ssh.service")
	t.Cleanup(restore)
	pinned, err := os.ReadFile(filepath.Join(f.project, "nix-infra", "known_hosts"))
	if err != nil {
		t.Fatal(err)
	}
	if r := ssh("cat /proc/sys/kernel/random/boot_id"); r.code != 255 || r.out != "" || !strings.Contains(strings.ToLower(r.errOut), "host key verification failed") {
		t.Errorf("a node with another host key: %v", r)
	}
	if r := f.cli("cmd", "--target=n1", "--via=ssh", "--ssh-key", f.lab.SSHKey(), "id"); r.code == 0 || r.out != "" {
		t.Errorf("a node with another host key: %v", r)
	}
	if after, err := os.ReadFile(filepath.Join(f.project, "nix-infra", "known_hosts")); err != nil || !bytes.Equal(after, pinned) {
		t.Errorf("the pins are others now: %v\n%s", err, after)
	}
	restore()
	if r := ssh("echo again"); r.code != 0 || r.out != "again\n" {
		t.Errorf("the old host key again: %v", r)
	}
}
