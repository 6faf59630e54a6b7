//go:build linux

package lab_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// login runs a command over SSH with a key.
func login(ctx context.Context, l *lab.Lab, key, user, host string, argv ...string) (string, error) {
	out, err := l.Command(ctx, append([]string{"ssh", "-i", key, "-oBatchMode=yes", "-oStrictHostKeyChecking=no", "-oConnectTimeout=30",
		"-oIdentitiesOnly=yes", "-oUserKnownHostsFile=/dev/null", "-oLogLevel=ERROR", user + "@" + host}, argv...)...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// infected runs the lab's stand-in of nixos-infect over SSH, and returns what it printed.
func infected(t *testing.T, l *lab.Lab, key, user string, n *lab.Node) (string, error) {
	t.Helper()
	argv := []string{"env", "NO_REBOOT=1", "NIX_CHANNEL=nixos-25.11", "NO_SWAP=1", "bootFs=/boot", "doNetConf=y", "bash", "-s"}
	if user != "root" {
		argv = append([]string{"sudo"}, argv...)
	}
	cmd := l.Command(t.Context(), append([]string{"ssh", "-i", key, "-oBatchMode=yes", "-oStrictHostKeyChecking=no", "-oIdentitiesOnly=yes",
		"-oUserKnownHostsFile=/dev/null", "-oLogLevel=ERROR", user + "@" + n.IP}, argv...)...)
	cmd.Stdin = strings.NewReader(lab.InfectScript)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func TestPlain(t *testing.T) {
	t.Parallel()
	l := open(t, "plain")
	key := filepath.Join(t.TempDir(), "id")
	must(t, exec.Command("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key).Run())
	public, err := os.ReadFile(key + ".pub")
	must(t, err)
	nodes, err := l.StartWith(t.Context(), lab.NodeOptions{Plain: true, AuthorizedKeys: string(public)}, "p1")
	must(t, err)
	n := nodes[0]

	t.Run("is no NixOS", func(t *testing.T) {
		if got := sh(t, n, `. /etc/os-release; echo "$ID"; systemctl is-system-running; ls -d /etc/NIXOS /etc/nixos /nix /run/current-system 2>/dev/null; command -v nix nix-store; id admin 2>/dev/null; true`); got != "debian\nrunning" {
			t.Errorf("a plain node has something of NixOS, or is no running Debian: %s", got)
		}
		if _, err := login(t.Context(), l, l.SSHKey(), "root", n.IP, "true"); err == nil {
			t.Error("it lets in another key than it was given")
		}
	})

	hostKey := sh(t, n, "cat /etc/ssh/ssh_host_ed25519_key.pub")
	t.Run("a script that fails, or whose machine loses its power, leaves it as it is", func(t *testing.T) {
		must(t, n.WriteFile("/run/lab-infect-fail", []byte("no space left\n"), 0o644))
		if out, err := infected(t, l, key, "root", n); err == nil || !strings.HasSuffix(out, "no space left\n") {
			t.Errorf("it should have failed: %v\n%s", err, out)
		}
		must(t, n.Kill(t.Context()))
		must(t, n.Boot(t.Context()))
		if got := sh(t, n, "ls -d /etc/NIXOS /nix 2>/dev/null; true"); got != "" {
			t.Errorf("it has %s", got)
		}
	})

	if out, err := infected(t, l, key, "root", n); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	sh(t, n, "touch /root/old; test -e /etc/NIXOS")
	if _, err := n.Exec(t.Context(), "nix", "--version"); err == nil {
		t.Error("it is converted before its reboot")
	}
	must(t, n.Reboot(t.Context()))
	ordinary := func(t *testing.T, n *lab.Node, key string) {
		t.Helper()
		out, err := login(t.Context(), l, key, "root", n.IP, `readlink /run/booted-system /nix/var/nix/profiles/system >/dev/null && cat /etc/testos/node; hostname; ls /etc/nixos`)
		if want := n.Name + " 25.11\n" + n.Name + "\nconfiguration.nix\nhardware-configuration.nix\nnetworking.nix"; err != nil || out != want {
			t.Errorf("after the conversion: %v: %s", err, out)
		}
		if got := sh(t, n, `systemctl is-system-running; ls /root/old /old-root /home/admin 2>/dev/null; readlink -f /boot/testos/default; readlink -f /run/current-system`); len(strings.Fields(got)) != 3 ||
			strings.Fields(got)[1] != strings.Fields(got)[2] {
			t.Errorf("it does not run what it boots, or kept something: %s", got)
		}
	}
	ordinary(t, n, key)
	if got := sh(t, n, "cat /etc/ssh/ssh_host_ed25519_key.pub"); got != hostKey {
		t.Errorf("its host key was %s and is %s", hostKey, got)
	}
	must(t, n.Kill(t.Context()))
	must(t, n.Boot(t.Context()))
	ordinary(t, n, key)

	t.Run("sudo user", func(t *testing.T) {
		nodes, err := l.StartWith(t.Context(), lab.NodeOptions{Plain: true, SudoUser: "admin"}, "p2")
		must(t, err)
		n := nodes[0]
		if _, err := login(t.Context(), l, l.SSHKey(), "root", n.IP, "true"); err == nil {
			t.Error("root may log in")
		}
		if out, err := login(t.Context(), l, l.SSHKey(), "admin", n.IP, "sudo", "-n", "id", "-un"); err != nil || out != "root" {
			t.Errorf("sudo: %v: %s", err, out)
		}
		if out, err := infected(t, l, l.SSHKey(), "admin", n); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		must(t, n.Reboot(t.Context()))
		ordinary(t, n, l.SSHKey())
	})

	t.Run("hold", func(t *testing.T) {
		nodes, err := l.StartWith(t.Context(), lab.NodeOptions{Plain: true}, "p3")
		must(t, err)
		must(t, nodes[0].WriteFile("/run/lab-infect-hold", nil, 0o644))
		ctx, cancel := context.WithCancel(t.Context())
		cmd := nodes[0].Command(ctx, "env", "NO_SWAP=1", "bash", "-s")
		cmd.Stdin = strings.NewReader(lab.InfectScript)
		out, err := cmd.StdoutPipe()
		must(t, err)
		must(t, cmd.Start())
		var seen bytes.Buffer
		for buf := make([]byte, 256); !strings.Contains(seen.String(), "unpacking"); {
			n, err := out.Read(buf)
			must(t, err)
			seen.Write(buf[:n])
		}
		cancel()
		_ = cmd.Wait()
		if got := sh(t, nodes[0], "ls /etc/NIXOS /etc/NIXOS_LUSTRATE 2>/dev/null; ls /etc/nixos"); !strings.HasPrefix(got, "configuration.nix") {
			t.Errorf("killed half-way it left %s", got)
		}
	})
}

// TestPlainAtOnce converts several nodes at the same time, as people do.
func TestPlainAtOnce(t *testing.T) {
	t.Parallel()
	l := open(t, "plain-many")
	nodes, err := l.StartWith(t.Context(), lab.NodeOptions{Plain: true}, "p1", "p2", "p3")
	must(t, err)
	errs := make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() {
			if _, errs[i] = infected(t, l, l.SSHKey(), "root", n); errs[i] == nil {
				errs[i] = n.Reboot(t.Context())
			}
		})
	}
	wg.Wait()
	for i, n := range nodes {
		if errs[i] != nil || sh(t, n, "cut -d' ' -f1 /etc/testos/node") != n.Name {
			t.Errorf("%s: %v", n.Name, errs[i])
		}
	}
}

func TestRemove(t *testing.T) {
	t.Parallel()
	l := open(t, "remove")
	nodes := start(t, l, "n1", "n2")
	sh(t, nodes[1], "touch /srv/file")
	must(t, l.Remove(t.Context(), "n2"))
	if l.Node("n2") != nil || reaches(nodes[0], nodes[1].IP) {
		t.Error("it is still there")
	}
	must(t, l.Remove(t.Context(), "n2"))
	again := start(t, l, "n2")[0]
	if again.IP == nodes[1].IP || sh(t, again, "ls /srv") != "" {
		t.Error("a new node of that name is not a new machine")
	}
	willReach(t, nodes[0], "n2")
}
