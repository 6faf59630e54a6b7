package provision

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/agent"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision/sshtest"
)

// jump is a host on the way, as a project's settings have it.
func jump(t *testing.T, h *sshtest.Host) project.SSHAddress {
	a, err := project.ParseSSHAddress("me@" + h.Address)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func TestJumpHosts(t *testing.T) {
	first, second, last := sshtest.Start(t), sshtest.Start(t), sshtest.Start(t)
	tg := target(t, last, "root")
	tg.KeyFiles = []string{first.KeyFile, second.KeyFile, last.KeyFile}
	tg.Host = "localhost" // else it would be one of its own jump hosts
	tg = tg.Through([]project.SSHAddress{jump(t, first), jump(t, second)})
	m, err := Dial(t.Context(), tg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if out, err := m.Run(t.Context(), nil, "echo", "here"); err != nil || string(out) != "here\n" {
		t.Errorf("%q, %v", out, err)
	}
	if !slices.Equal(first.Forwarded(), []string{second.Address}) || !slices.Equal(second.Forwarded(), []string{tg.Address()}) || last.Sessions() != 1 {
		t.Errorf("the way was %v, %v", first.Forwarded(), second.Forwarded())
	}
	if err := tg.Open(t.Context()); err != nil {
		t.Error(err)
	}
	pinned, err := os.ReadFile(tg.KnownHosts)
	if err != nil || strings.Count(string(pinned), "\n") != 3 {
		t.Errorf("pinned are\n%s%v", pinned, err)
	}

	second.ChangeHostKey(t)
	if _, err := Dial(t.Context(), tg); err == nil || !strings.Contains(err.Error(), "the way to localhost: ") || !strings.Contains(err.Error(), "another host key") {
		t.Errorf("a jump host with another key: %v", err)
	}
	if got := target(t, last, "root").Through([]project.SSHAddress{jump(t, last)}); len(got.Jumps) != 0 {
		t.Error("a jump host is reached through itself")
	}
}

// A key that is locked in its file is used where ssh-agent holds it, and is known to be what let us in.
func TestKeyOfTheAgent(t *testing.T) {
	h := sshtest.Start(t)
	tg := target(t, h, "root")
	data, err := os.ReadFile(h.KeyFile)
	if err != nil {
		t.Fatal(err)
	}
	private, err := ssh.ParseRawPrivateKey(data)
	if err != nil {
		t.Fatal(err)
	}
	locked, err := ssh.MarshalPrivateKeyWithPassphrase(*private.(*ed25519.PrivateKey), "", []byte("secret"))
	if err != nil {
		t.Fatal(err)
	}
	tg.KeyFiles = []string{filepath.Join(t.TempDir(), "locked")}
	if err := os.WriteFile(tg.KeyFiles[0], pem.EncodeToMemory(locked), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Dial(t.Context(), tg); err == nil || !strings.Contains(err.Error(), "no usable SSH key") {
		t.Errorf("without the agent: %v", err)
	}
	keys := agent.NewKeyring()
	other, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	for _, key := range []any{other, private} {
		if err := keys.Add(agent.AddedKey{PrivateKey: key}); err != nil {
			t.Fatal(err)
		}
	}
	tg.AgentSocket = filepath.Join(t.TempDir(), "agent")
	l, err := net.Listen("unix", tg.AgentSocket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			go agent.ServeAgent(keys, conn)
		}
	}()
	m, err := Dial(t.Context(), tg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if m.UserKey == nil || m.UserKey.Type() != ssh.KeyAlgoED25519 {
		t.Errorf("let in by %v", m.UserKey)
	}
}

// A node's host key is pinned by its name: it may get another address, and another machine its old one.
func TestHostKeyOfANode(t *testing.T) {
	web1, other := sshtest.Start(t), sshtest.Start(t)
	tg := target(t, web1, "root")
	tg.Node = "web1"
	dial := func(tg Target) error {
		m, err := Dial(t.Context(), tg)
		if err == nil {
			m.Close()
		}
		return err
	}
	if err := dial(tg); err != nil {
		t.Fatal(err)
	}
	if as, err := PinnedAs(tg.KnownHosts, "web1", ""); err != nil || as != "web1@nix-infra" {
		t.Errorf("pinned as %q, %v", as, err)
	}
	moved := tg
	moved.Host = "localhost"
	if err := dial(moved); err != nil {
		t.Errorf("by another address: %v", err)
	}
	elsewhere := target(t, other, "root")
	elsewhere.Node, elsewhere.KnownHosts = "web1", tg.KnownHosts
	if err := dial(elsewhere); err == nil || !strings.Contains(err.Error(), "another host key") {
		t.Errorf("another machine under its name: %v", err)
	}

	// One that was pinned by its address, before it had a name, is the one that has to answer.
	byAddress := target(t, other, "root")
	if err := dial(byAddress); err != nil {
		t.Fatal(err)
	}
	other.ChangeHostKey(t)
	byAddress.Node = "db1"
	if err := dial(byAddress); err == nil || !strings.Contains(err.Error(), "another host key") {
		t.Errorf("another machine at its address: %v", err)
	}
}

// cable is a way to an address that can be unplugged.
type cable struct {
	address string
	up      atomic.Bool // while it is not, whoever connects is turned away
	onCut   func()

	dead     chan struct{} // closed: nothing comes through any more, and nobody is told
	cutting  sync.Once
	finished <-chan struct{}
}

func newCable(t *testing.T, to string) *cable {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	c := &cable{address: l.Addr().String(), dead: make(chan struct{}), finished: t.Context().Done()}
	go func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			far, err := net.Dial("tcp", to)
			if err != nil || !c.up.Load() {
				near.Close()
				continue
			}
			go c.carry(near, far)
			go c.carry(far, near)
		}
	}()
	return c
}

func (c *cable) carry(from, to net.Conn) {
	defer from.Close()
	defer to.Close()
	for buf := make([]byte, 4096); ; {
		n, err := from.Read(buf)
		select {
		case <-c.dead:
			<-c.finished
			return
		default:
		}
		if err != nil {
			return
		}
		if _, err := to.Write(buf[:n]); err != nil {
			return
		}
	}
}

// cut has nothing come through any more.
func (c *cable) cut() {
	c.cutting.Do(func() {
		close(c.dead)
		if c.onCut != nil {
			c.onCut()
		}
	})
}

func TestReachWaits(t *testing.T) {
	h := sshtest.Start(t)
	c := newCable(t, h.Address)
	tg := target(t, h, "root")
	behind, err := ParseTarget("root@" + c.address)
	if err != nil {
		t.Fatal(err)
	}
	tg.Host, tg.Port = behind.Host, behind.Port
	waited := 0
	waiting := func(why error) {
		if !strings.Contains(why.Error(), "no SSH") {
			t.Errorf("it waits because of %v", why)
		}
		if waited++; waited == 2 {
			c.up.Store(true)
		}
	}
	if _, err := Reach(t.Context(), []Target{tg}, Patience{}, waiting); err == nil || !strings.Contains(err.Error(), "no SSH") || waited != 0 {
		t.Errorf("without patience it waited %d times: %v", waited, err)
	}
	m, err := Reach(t.Context(), []Target{tg}, Patience{Reach: time.Minute}, waiting)
	if err != nil || waited != 2 {
		t.Fatalf("it waited %d times: %v", waited, err)
	}
	m.Close()

	h.LetOnly("admin")
	m, err = Reach(t.Context(), []Target{tg}, Patience{Keys: time.Minute}, func(why error) {
		if !strings.Contains(why.Error(), "does not accept any of the keys") {
			t.Errorf("it waits because of %v", why)
		}
		h.LetOnly("root")
	})
	if err != nil {
		t.Fatal(err)
	}
	m.Close()
}

// A machine that boots refuses the keys when it goes down and when it comes up: each time it is given some time for them.
func TestReachAcrossABoot(t *testing.T) {
	h := sshtest.Start(t)
	h.LetOnly("nobody")
	c := newCable(t, h.Address)
	c.up.Store(true)
	tg := target(t, h, "root")
	away, err := ParseTarget("root@" + c.address)
	if err != nil {
		t.Fatal(err)
	}
	tg.Port = away.Port
	var waits []string
	m, err := Reach(t.Context(), []Target{tg}, Patience{Reach: time.Minute, Keys: retryEvery / 2}, func(why error) {
		var refused *refusedKeys
		switch there := errors.As(why, &refused); {
		case there && len(waits) == 0:
			waits = append(waits, "goes down")
			c.up.Store(false)
		case there:
			waits = append(waits, "comes up")
			h.LetOnly("root")
		default:
			waits = append(waits, "is away")
			c.up.Store(true)
		}
	})
	if err != nil || !slices.Equal(waits, []string{"goes down", "is away", "comes up"}) {
		t.Fatalf("it waited while it %q: %v", waits, err)
	}
	m.Close()
}

func TestAnywhereArguments(t *testing.T) {
	key := filepath.Join(t.TempDir(), "key")
	if err := os.WriteFile(key, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	tg := TargetOf(project.SSHAddress{User: "admin", Host: "2001:db8::1", Port: 2222})
	tg.KeyFiles = []string{"/nonexistent", key}
	tg = tg.Through([]project.SSHAddress{{User: "me", Host: "gate"}, {Host: "inner", Port: 23}})
	want := "--flake path:/t/etc/nixos#web1 --target-host admin@2001:db8::1 --ssh-port 2222 --copy-host-keys --extra-files /t " +
		"--generate-hardware-config nixos-generate-config /t/etc/nixos/hardware-configuration.nix -i " + key + " --ssh-option ProxyJump=me@gate:22,root@inner:23"
	if got := strings.Join(anywhereArgs("/t", tg, "web1"), " "); got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
}

// A stand-in of nixos-anywhere: what is seen is how it is called, and what becomes of its output.
func TestAnywhere(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "nixos-anywhere")
	if err := os.WriteFile(program, []byte("#!/bin/sh\necho \"$2 $4\"\nexit \"$(cat \"$0.exit\")\"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	tg := TargetOf(project.SSHAddress{Host: "192.0.2.1"})
	for code, fails := range map[string]bool{"0": false, "3": true} {
		os.WriteFile(program+".exit", []byte(code), 0o600)
		lines, err := Anywhere(t.Context(), program, "/t", filepath.Join(dir, "log"), tg, "web1")
		if (err != nil) != fails || fails && !slices.Equal(lines, []string{"path:/t/etc/nixos#web1 root@192.0.2.1"}) {
			t.Errorf("exit %s: %q, %v", code, lines, err)
		}
	}
}
