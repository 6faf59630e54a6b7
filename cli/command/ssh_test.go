package command

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// sshd is a real one, which accepts the project's key.
type sshd struct {
	address string
	hostKey string // public, as in an authorized_keys file
	user    string
}

func startSSHD(t *testing.T, accepts string) *sshd {
	t.Helper()
	program, err := exec.LookPath("sshd")
	if err != nil {
		if program = "/usr/sbin/sshd"; !exists(program) {
			without(t, "sshd")
		}
	}
	me, err := user.Current()
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	d := &sshd{user: me.Username}
	command(t, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "", "-f", filepath.Join(dir, "host"))
	public, err := os.ReadFile(filepath.Join(dir, "host.pub"))
	if err != nil {
		t.Fatal(err)
	}
	d.hostKey = strings.TrimSpace(string(public))
	config := fmt.Sprintf("HostKey %s/host\nAuthorizedKeysFile %s\nStrictModes no\nPidFile none\nPasswordAuthentication no\nKbdInteractiveAuthentication no\nUsePAM no\nPermitRootLogin yes\n", dir, accepts)
	if err := os.WriteFile(filepath.Join(dir, "config"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	_ = os.MkdirAll("/run/sshd", 0o755) // Debian's wants it; another user's has it
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	d.address = l.Addr().String()
	var said syncBuffer
	var serving sync.WaitGroup
	serving.Go(func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			serving.Go(func() {
				serveSSH(t.Context(), conn.(*net.TCPConn), &said, program, "-i", "-e", "-f", filepath.Join(dir, "config"))
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		serving.Wait()
		if t.Failed() {
			t.Logf("sshd said:\n%s", said.String())
		}
	})
	return d
}

// serveSSH has sshd serve one connection, as inetd would: so its port is never anybody else's.
func serveSSH(ctx context.Context, conn *net.TCPConn, says io.Writer, program string, args ...string) {
	file, err := conn.File()
	conn.Close()
	if err != nil {
		fmt.Fprintln(says, err)
		return
	}
	defer file.Close()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr, cmd.WaitDelay = file, file, says, time.Second
	if err := cmd.Run(); err != nil {
		fmt.Fprintln(says, err)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func command(t *testing.T, name string, args ...string) {
	t.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", name, err, out)
	}
}

// toSSHD is a Script's Tunnels whose port 22 is the sshd's.
func (d *sshd) toSSHD(to string) (func(*tunnel.Conn), error) {
	if to != "127.0.0.1:22" {
		return nil, protocol.Refuse(protocol.Denied, "the node's policy has no tunnel to %s", to)
	}
	return fleettest.Dial(d.address)
}

func (d *sshd) pin(t *testing.T, s *shell, name string) {
	t.Helper()
	if err := os.WriteFile(s.path("nix-infra", "known_hosts"), []byte(name+" "+d.hostKey+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestSSH(t *testing.T) {
	s, f := newFleet(t)
	d := startSSHD(t, s.path("ssh", "nixinfra.pub"))
	n := f.Add("web1")
	n.Script(fleettest.Script{Tunnels: d.toSSHD})
	d.pin(t, s, provision.NodeAlias("web1"))
	me := "--user=" + d.user

	if out := s.must("ssh", "web1", me, "--", "echo", "hello", "there"); out != "hello there\n" {
		t.Errorf("it printed %q", out)
	}
	if out := s.must("ssh", me, "--target=web1 web2", "--", "echo 'a  b' && echo $((6*7))"); out != "a  b\n42\n" {
		t.Errorf("the shell there printed %q", out)
	}
	s.stdin = "what stdin has"
	if out := s.must("ssh", "web1", me, "--", "cat"); out != s.stdin {
		t.Errorf("cat printed %q", out)
	}
	s.stdin = ""
	if r := s.run("ssh", "web1", me, "--", "echo oops >&2; exit 42"); r.status != 42 || r.stderr != "oops\n" {
		t.Errorf("status %d, %q", r.status, r.stderr)
	}
	if out := s.must("ssh", "web1", me, "--batch", "--", "head -c 3000000 /dev/zero | wc -c"); strings.TrimSpace(out) != "3000000" {
		t.Errorf("%q bytes", out)
	}
	if orders := n.TunnelOrders(); len(orders) != 5 {
		t.Errorf("%d tunnels were opened for 5 commands", len(orders))
	}
}

// Only the key that is pinned is taken, wherever it is that a connection leads to.
func TestSSHHostKeys(t *testing.T) {
	s, f := newFleet(t)
	d := startSSHD(t, s.path("ssh", "nixinfra.pub"))
	f.Add("web1").Script(fleettest.Script{Tunnels: d.toSSHD})
	me := "--user=" + d.user
	s.expect(2, "no host key of web1 is pinned", "ssh", "web1", me, "--", "true")

	d.pin(t, s, f.Record("web1").IPv4) // as at an enrolment by an older version
	s.must("ssh", "web1", me, "--", "true")

	other := startSSHD(t, s.path("ssh", "nixinfra.pub"))
	other.pin(t, s, provision.NodeAlias("web1"))
	r := s.run("ssh", "web1", me, "--", "echo it ran")
	if r.status != 255 || r.out != "" || !strings.Contains(r.stderr, "REMOTE HOST IDENTIFICATION HAS CHANGED") {
		t.Errorf("with another host key: status %d, %q, %s", r.status, r.out, r.stderr)
	}

	r = s.run("ssh", "web1", me, "--pin", "--", "true")
	if r.status != 0 || !strings.HasPrefix(r.stderr, "pinned the host key of web1: ssh-ed25519 SHA256:") {
		t.Errorf("--pin: status %d, %s", r.status, r.stderr)
	}
	if known := s.read("nix-infra/known_hosts"); known != provision.NodeAlias("web1")+" "+d.hostKey+"\n" {
		t.Errorf("pinned is\n%s", known)
	}
	s.must("ssh", "web1", me, "--", "true")
}

func TestSSHRefused(t *testing.T) {
	s, f := newFleet(t)
	d := startSSHD(t, s.path("ssh", "nixinfra.pub"))
	f.Add("web1").Script(fleettest.Script{Tunnels: d.toSSHD})
	f.Register("web2")
	d.pin(t, s, "web1@nix-infra,web2@nix-infra")
	s.expect(2, "which node?", "ssh")
	s.expect(2, "goes to one node, by its name", "ssh", "@web")
	s.expect(2, `there is no node "web9"`, "ssh", "web9")
	s.expect(2, "the node's policy has no tunnel to 127.0.0.1:2222", "ssh", "web1", "--port=2222")
	s.expect(2, "there is no SSH key", "ssh", "web1", "--ssh-key=nowhere")
	s.expect(3, "web2 is not connected", "ssh", "web2")
}

// What is in a path goes through ssh's configuration and a shell, and stays what it is.
func TestSSHQuoting(t *testing.T) {
	s, f := newFleet(t)
	odd := filepath.Join(t.TempDir(), `it's 100% "odd" $(touch x)\`)
	if err := os.Rename(s.dir, odd); err != nil {
		t.Fatal(err)
	}
	s.dir = odd
	public, err := os.ReadFile(s.path("ssh", "nixinfra.pub"))
	if err != nil {
		t.Fatal(err)
	}
	accepts := filepath.Join(t.TempDir(), "accepted") // sshd's own configuration has less ways to say it
	if err := os.WriteFile(accepts, public, 0o600); err != nil {
		t.Fatal(err)
	}
	d := startSSHD(t, accepts)
	f.Add("web1").Script(fleettest.Script{Tunnels: d.toSSHD})
	d.pin(t, s, provision.NodeAlias("web1"))
	if out := s.must("ssh", "web1", "--user="+d.user, "--batch", "--", "echo through"); out != "through\n" {
		t.Errorf("it printed %q", out)
	}
}

// The program of another one's ProxyCommand, with credentials of its own.
func TestTunnelCommand(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1").Script(fleettest.Script{Tunnels: fleettest.Dial})
	to := echoService(t)
	s.stdin = strings.Repeat("to and fro ", 100_000)
	if out := s.must("tunnel", "web1", to); out != s.stdin {
		t.Errorf("%d bytes came back of %d", len(out), len(s.stdin))
	}
	delete(s.env, "SECRETS_PASS")
	s.expect(2, "password", "tunnel", "web1", to)
	s.expect(2, "NODE and HOST:PORT", "tunnel", "web1")
	s.expect(2, "host:port", "tunnel", "web1", "22")
}

func echoService(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c)
			}()
		}
	}()
	return l.Addr().String()
}

// lineWriter hands over what is written, line by line.
type lineWriter struct {
	mu    sync.Mutex
	all   bytes.Buffer
	lines chan string
}

func (w *lineWriter) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.all.Write(p)
	for _, l := range strings.Split(strings.TrimSpace(string(p)), "\n") {
		w.lines <- l
	}
	return len(p), nil
}

func (w *lineWriter) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.all.String()
}

func TestPortForward(t *testing.T) {
	s, f := newFleet(t)
	n := f.Add("web1")
	web := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { fmt.Fprint(w, "this is "+r.URL.Path) })}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = web.Serve(l) }()
	t.Cleanup(func() { web.Close() })
	n.Script(fleettest.Script{Tunnels: func(to string) (func(*tunnel.Conn), error) {
		if to != "127.0.0.1:80" && to != "db.internal:5432" {
			return nil, protocol.Refuse(protocol.Failed, "web1 can't reach %s: connection refused", to)
		}
		return fleettest.Dial(l.Addr().String())
	}})
	ctx, cancel := context.WithCancel(t.Context())
	out := &lineWriter{lines: make(chan string, 100)}
	ended := make(chan run, 1)
	go func() {
		ended <- s.runContext(ctx, out, "port-forward", "web1", "0:80", "0:db.internal:5432", "--json")
	}()
	var ports []string
	for _, remote := range []string{"127.0.0.1:80", "db.internal:5432"} {
		var d map[string]any
		select {
		case text := <-out.lines:
			if err := json.Unmarshal([]byte(text), &d); err != nil {
				t.Fatal(err)
			}
		case r := <-ended:
			t.Fatalf("it ended: %+v", r)
		}
		if d["event"] != "listening" || d["node"] != "web1" || d["remote"] != remote {
			t.Fatalf("it says %v", d)
		}
		_, port, _ := net.SplitHostPort(d["local"].(string))
		ports = append(ports, port)
	}
	for _, host := range []string{"127.0.0.1:" + ports[0], "127.0.0.1:" + ports[1], "[::1]:" + ports[0]} {
		browser := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
		answer, err := browser.Get("http://" + host + "/a/page")
		if err != nil {
			if strings.HasPrefix(host, "[") && !sixHere() {
				continue
			}
			t.Fatal(err)
		}
		body, err := io.ReadAll(answer.Body)
		answer.Body.Close()
		if err != nil || string(body) != "this is /a/page" {
			t.Errorf("%s: %q, %v", host, body, err)
		}
		var d map[string]any
		if err := json.Unmarshal([]byte(<-out.lines), &d); err != nil || d["event"] != "closed" || d["error"] != "" || d["received"].(float64) < 15 {
			t.Errorf("the end of a connection is told as %v, %v", d, err)
		}
	}
	open, err := net.Dial("tcp", "127.0.0.1:"+ports[0])
	if err != nil {
		t.Fatal(err)
	}
	defer open.Close()
	if _, err := open.Write([]byte("GET / HTTP/1.1\r\n")); err != nil {
		t.Fatal(err)
	}
	s.expect(2, "is taken", "port-forward", "web1", ports[0]+":80")
	cancel()
	if r := <-ended; r.status != 130 {
		t.Errorf("Ctrl-C ended it with %d: %s", r.status, r.stderr)
	}
	if _, err := io.ReadAll(open); err == nil {
		t.Error("the open connection ended like any other")
	}
	if answer, err := http.Get("http://127.0.0.1:" + ports[0] + "/still"); err == nil { // others may have the port by now
		body, _ := io.ReadAll(answer.Body)
		if answer.Body.Close(); string(body) == "this is /still" {
			t.Error("it still listens")
		}
	}
}

func sixHere() bool {
	l, err := net.Listen("tcp", "[::1]:0")
	if err == nil {
		l.Close()
	}
	return err == nil
}

func TestPortForwardRefused(t *testing.T) {
	s, f := newFleet(t)
	n := f.Add("web1")
	n.Script(fleettest.Script{Tunnels: func(to string) (func(*tunnel.Conn), error) {
		return nil, protocol.Refuse(protocol.Failed, "web1 can't reach %s: connection refused", to)
	}})
	f.Register("web2")
	s.expect(2, "which node?", "port-forward")
	s.expect(2, "which port?", "port-forward", "web1")
	s.expect(2, "web1 can't reach 127.0.0.1:1: connection refused", "port-forward", "web1", "0:1")
	s.expect(3, "web2 is not connected", "port-forward", "web2", "0:1")
	s.expect(2, "need --remote-port", "port-forward", "--target=web1", "--local-port=3")
	for _, bad := range []string{"x", "0:70000", "70000:1", "a:b:c", "::", "0:", "0:0", "-5:3", "80::80", "[::1:80", "a b:1"} {
		if r := s.run("port-forward", "web1", "--", bad); r.status != 2 || len(n.TunnelOrders()) != 1 {
			t.Errorf("%q: status %d, %s", bad, r.status, r.stderr)
		}
	}
}

func TestForwards(t *testing.T) {
	for spec, want := range map[string]forward{
		"5432":             {"5432", "127.0.0.1:5432"},
		"8080:80":          {"8080", "127.0.0.1:80"},
		"0:80":             {"0", "127.0.0.1:80"},
		"db:5432":          {"5432", "db:5432"},
		"1:db.internal:2":  {"1", "db.internal:2"},
		"10.0.0.7:80":      {"80", "10.0.0.7:80"},
		"8080:10.0.0.7:80": {"8080", "10.0.0.7:80"},
		"[::1]:80":         {"80", "[::1]:80"},
		"8080:[::1]:80":    {"8080", "[::1]:80"},
	} {
		_, got, err := (&forwardOptions{}).forwards([]string{"web1", spec}, "127.0.0.1")
		if err != nil || !slices.Equal(got, []forward{want}) {
			t.Errorf("%s: %v, %v", spec, got, err)
		}
	}
	node, got, err := (&forwardOptions{targets: []string{"db1 db2"}, localPort: 3307, remotePort: 3306}).forwards(nil, protocol.OverlayHost)
	if err != nil || node != "db1" || !slices.Equal(got, []forward{{"3307", "overlay:3306"}}) {
		t.Errorf("%s %v, %v", node, got, err)
	}
	node, got, err = (&forwardOptions{targets: []string{"db1"}, remotePort: 80, remoteHost: "10.0.0.7"}).forwards([]string{"81"}, "127.0.0.1")
	if err != nil || node != "db1" || !slices.Equal(got, []forward{{"80", "10.0.0.7:80"}, {"81", "127.0.0.1:81"}}) {
		t.Errorf("%s %v, %v", node, got, err)
	}
}

// without ends a test that needs a program of this machine which is not there; in CI it has to be.
func without(t *testing.T, program string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("there is no %s, and CI needs it", program)
	}
	t.Skipf("left out: there is no %s on this machine", program)
}
