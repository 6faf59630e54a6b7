// Package sshtest is a machine that can be reached over SSH, for the tests of enrolment: a real SSH
// server in the test's process, whose commands really run, with the machine's folders below a temporary
// one and stand-ins for what needs a machine (systemctl, sudo, uname).
package sshtest

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// folders of the machine that commands are about.
var folders = []string{
	"/var/lib/nix-infra-agent", "/var/lib/nix-infra-controller", "/var/lib/nix-infra-convert", "/etc/systemd/system", "/run/systemd/system",
	"/run/current-system", "/proc/sys/kernel/random", "/sys/class/net", "/etc/os-release", "/etc/nixos", "/root/.ssh", "/boot/",
}

// Host is the machine.
type Host struct {
	Address string // host:port
	KeyFile string // private key that it accepts
	Uname   string // what uname says

	root     string
	accepted ssh.PublicKey
	leash    *os.File // held open by each command, and by all that those leave behind

	serving sync.WaitGroup

	mu        sync.Mutex
	conns     []net.Conn
	onCommand func()
	users     []string // who may log in; nil: everybody
	keys      []ssh.Signer
	sessions  int
	forwarded []string
}

// Start runs a machine until the test ends. Then there is a file off in $FAKE_ROOT, and what runs on it is waited for: nothing
// writes below folders that are being removed.
func Start(t testing.TB) *Host {
	h := &Host{root: t.TempDir(), Uname: "Linux x86_64"}
	ended, leash, err := os.Pipe()
	must(t, err)
	h.leash = leash
	for _, dir := range []string{"/var/lib", "/etc/systemd/system", "/run/systemd/system", "/bin"} {
		must(t, os.MkdirAll(h.Path(dir), 0o755))
	}
	h.script(t, "systemctl", `if [ "$1" = show ]; then cat "$0.fragment" 2>/dev/null; exit 0; fi; echo "$*" >> "$0.log"; if [ -e "$0.fail" ]; then echo "no such thing" >&2; exit 1; fi`)
	h.script(t, "systemd-run", `while [ "$1" != systemctl ]; do shift; done; exec "$@"`)
	h.script(t, "sudo", `touch "$0.used"; [ "$1 $2" = "-n --" ] || exit 1; shift 2; exec "$@"`)
	h.script(t, "journalctl", `printf 'first line\n\033[2Jlast line of the log\n'`)
	h.script(t, "uname", `echo "$FAKE_UNAME"`)
	h.script(t, "sync", ``)
	for _, firewall := range []string{"iptables", "ip6tables", "nft"} {
		h.script(t, firewall, `exit 1`)
	}
	public, private, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	h.accepted, err = ssh.NewPublicKey(public)
	must(t, err)
	block, err := ssh.MarshalPrivateKey(private, "test")
	must(t, err)
	h.KeyFile = filepath.Join(t.TempDir(), "key")
	must(t, os.WriteFile(h.KeyFile, pem.EncodeToMemory(block), 0o600))
	h.ChangeHostKey(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	h.Address = l.Addr().String()
	accepting := make(chan struct{})
	go func() { defer close(accepting); h.listen(l) }()
	t.Cleanup(func() {
		l.Close()
		<-accepting
		h.stop(t, ended)
	})
	return h
}

// patience is how long the commands of a machine may take to end, once their connections have.
const patience = time.Minute

// stop ends the connections, and waits for what runs: the pipe that ended reads from has no other end when nothing does.
func (h *Host) stop(t testing.TB, ended *os.File) {
	h.mu.Lock()
	for _, c := range h.conns {
		c.Close()
	}
	h.mu.Unlock()
	h.serving.Wait()
	h.leash.Close()
	defer ended.Close()
	if err := errors.Join(os.WriteFile(h.Path("/off"), nil, 0o600), ended.SetReadDeadline(time.Now().Add(patience))); err != nil {
		t.Error(err)
	}
	if _, err := ended.Read(make([]byte, 1)); err != io.EOF {
		t.Errorf("a command on the machine did not end: %v", err)
	}
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// Path is where a path of the machine really is.
func (h *Host) Path(path string) string { return filepath.Join(h.root, path) }

func (h *Host) script(t testing.TB, name, text string) {
	program(t, h.Path("/bin/"+name), text)
}

// program writes a program. Nothing is started meanwhile: a child that has the file open keeps everybody from running it.
func program(t testing.TB, path, text string) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	must(t, os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755))
}

// ChangeHostKey gives the machine another host key, as a reinstallation does.
func (h *Host) ChangeHostKey(t testing.TB) {
	_, private, err := ed25519.GenerateKey(rand.Reader)
	must(t, err)
	s, err := ssh.NewSignerFromKey(private)
	must(t, err)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keys = []ssh.Signer{s}
}

// AddHostKey gives the machine a host key of another type beside the one that it has.
func (h *Host) AddHostKey(t testing.TB) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	s, err := ssh.NewSignerFromKey(key)
	must(t, err)
	h.mu.Lock()
	defer h.mu.Unlock()
	h.keys = append([]ssh.Signer{s}, h.keys...)
}

// ReadOnlyEtc makes /etc/systemd/system a link, as on NixOS.
func (h *Host) ReadOnlyEtc(t testing.TB) {
	must(t, os.Remove(h.Path("/etc/systemd/system")))
	must(t, os.Symlink(t.TempDir(), h.Path("/etc/systemd/system")))
}

// Deployed makes the agent's unit one of the machine's own system, at this path.
func (h *Host) Deployed(path string) {
	os.WriteFile(h.Path("/bin/systemctl.fragment"), []byte(path+"\n"), 0o600)
}

// FailSystemctl makes every systemctl fail.
func (h *Host) FailSystemctl() { os.WriteFile(h.Path("/bin/systemctl.fail"), nil, 0o600) }

// Systemctl is what systemctl was told, and forgets it.
func (h *Host) Systemctl() []string {
	data, _ := os.ReadFile(h.Path("/bin/systemctl.log"))
	os.Remove(h.Path("/bin/systemctl.log"))
	return strings.Split(strings.TrimSpace(string(data)), "\n")
}

// Sudoed tells whether sudo was used.
func (h *Host) Sudoed() bool { _, err := os.Stat(h.Path("/bin/sudo.used")); return err == nil }

// Sessions is how many commands were run.
func (h *Host) Sessions() int {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.sessions
}

// OnCommand has something called whenever a command begins.
func (h *Host) OnCommand(do func()) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.onCommand = do
}

// Program writes a program that can be installed. When it is run it is this test program, which has to
// call Play if its first argument is "play".
func (h *Host) Program(t testing.TB, name, role string) string {
	self, err := os.Executable()
	must(t, err)
	path := filepath.Join(t.TempDir(), name)
	program(t, path, fmt.Sprintf(`exec '%s' play '%s' %s "$@"`, self, h.Path("/var/lib/"+name), role))
	return path
}

// Play is the installed program: DIR ROLE request --name NAME, or DIR ROLE load -.
func Play(args []string, in io.Reader, out io.Writer) error {
	home := machine.Home{Dir: args[0], Role: protocol.Role(args[1])}
	switch args[2] {
	case "request":
		r, err := home.Request(args[4])
		if err != nil {
			return err
		}
		_, err = out.Write(protocol.Encode(r))
		return err
	case "load":
		answer, err := io.ReadAll(in)
		if err != nil {
			return err
		}
		_, err = home.Load(answer)
		return err
	}
	return fmt.Errorf("no command %q", args[2])
}

// Silent is a port that takes connections and says nothing.
func Silent(t testing.TB) (port int) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	must(t, err)
	t.Cleanup(func() { l.Close() })
	return l.Addr().(*net.TCPAddr).Port
}

func (h *Host) listen(l net.Listener) {
	for {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		h.mu.Lock()
		h.conns = append(h.conns, conn)
		h.mu.Unlock()
		h.serving.Go(func() { h.serve(conn) })
	}
}

func (h *Host) serve(conn net.Conn) {
	defer conn.Close()
	config := &ssh.ServerConfig{PublicKeyCallback: func(who ssh.ConnMetadata, key ssh.PublicKey) (*ssh.Permissions, error) {
		if string(key.Marshal()) != string(h.accepted.Marshal()) || !h.lets(who.User()) {
			return nil, errors.New("unknown key")
		}
		return nil, nil
	}}
	h.mu.Lock()
	for _, k := range h.keys {
		config.AddHostKey(k)
	}
	h.mu.Unlock()
	_, channels, requests, err := ssh.NewServerConn(conn, config)
	if err != nil {
		return
	}
	go ssh.DiscardRequests(requests)
	for c := range channels {
		if c.ChannelType() == "direct-tcpip" {
			h.serving.Go(func() { h.forward(c) })
			continue
		}
		channel, requests, err := c.Accept()
		if err != nil {
			return
		}
		h.serving.Go(func() { h.session(channel, requests) })
	}
}

func (h *Host) session(channel ssh.Channel, requests <-chan *ssh.Request) {
	defer channel.Close()
	for r := range requests {
		var command struct{ Line string }
		if r.Type != "exec" || ssh.Unmarshal(r.Payload, &command) != nil {
			r.Reply(false, nil)
			continue
		}
		r.Reply(true, nil)
		h.mu.Lock()
		h.sessions++
		onCommand := h.onCommand
		h.mu.Unlock()
		if onCommand != nil {
			onCommand()
		}
		code, killed := h.run(command.Line, channel, requests)
		if killed != 0 {
			channel.SendRequest("exit-signal", false, ssh.Marshal(struct {
				Name       string
				Core       bool
				Text, Lang string
			}{Name: strings.TrimPrefix(unix.SignalName(killed), "SIG")}))
		} else {
			channel.SendRequest("exit-status", false, ssh.Marshal(struct{ Code uint32 }{uint32(code)}))
		}
		return
	}
}

// run runs a command line with the shell, as sshd does, and ends it when the session is closed. It gives the exit status, or the
// signal that killed it.
func (h *Host) run(line string, channel ssh.Channel, requests <-chan *ssh.Request) (code int, killed syscall.Signal) {
	for _, f := range folders {
		line = strings.ReplaceAll(line, f, h.Path(f))
	}
	c := exec.Command("sh", "-c", "exec "+line)
	c.Stdout, c.Stderr, c.ExtraFiles = channel, channel.Stderr(), []*os.File{h.leash}
	// Without GORACE, each program that is this one, built to find races, would take a second to end.
	c.Env = []string{"PATH=" + h.Path("/bin") + ":" + os.Getenv("PATH"), "FAKE_UNAME=" + h.Uname, "FAKE_ROOT=" + h.root, "FAKE_HOME=" + h.Path("/home"),
		"GORACE=atexit_sleep_ms=0"}
	stdin, err := c.StdinPipe()
	if err == nil {
		err = c.Start()
	}
	if err != nil {
		return 127, 0
	}
	go func() { io.Copy(stdin, channel); stdin.Close() }()
	go func() {
		for range requests {
		}
		c.Process.Kill()
	}()
	_ = c.Wait() // how it ended is in its state
	if status := c.ProcessState.Sys().(syscall.WaitStatus); status.Signaled() {
		return 0, status.Signal()
	}
	return c.ProcessState.ExitCode(), 0
}
