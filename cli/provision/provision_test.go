package provision

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision/sshtest"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// TestMain lets this test program play the program that is installed: what is uploaded is a script
// that starts it.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "play" {
		if err := sshtest.Play(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	retryEvery = 20 * time.Millisecond
	os.Exit(m.Run())
}

func authority(t *testing.T) *Authority {
	keys, err := protocol.NewFleet("testfleet")
	if err != nil {
		t.Fatal(err)
	}
	public, err := keys.Publish(nil)
	if err != nil {
		t.Fatal(err)
	}
	ca, err := NewCA("testfleet", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return &Authority{Keys: keys, Public: *public, CA: ca, Controllers: []string{"tls://ctl.example.org:4222"}}
}

func target(t *testing.T, h *sshtest.Host, user string) Target {
	tg, err := ParseTarget(user + "@" + h.Address)
	if err != nil {
		t.Fatal(err)
	}
	tg.KnownHosts = filepath.Join(t.TempDir(), "known_hosts")
	tg.KeyFiles = []string{h.KeyFile}
	return tg
}

func install(t *testing.T, h *sshtest.Host, tg Target, p Program, change func(*Installation)) (bool, []string, error) {
	m, err := Dial(t.Context(), tg)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	a := authority(t)
	var steps []string
	i := Installation{Program: p, Name: "web1", Binary: h.Program(t, p.Name, string(p.Role)), Step: func(s string) { steps = append(steps, s) },
		Sign: func(r *protocol.EnrolRequest) (*protocol.EnrolAnswer, error) {
			return a.Sign(r, []string{r.Name, "127.0.0.1"}, time.Now())
		}}
	if change != nil {
		change(&i)
	}
	_, lasting, err := Install(t.Context(), m, i)
	return lasting, steps, err
}

func TestInstallAgent(t *testing.T) {
	for _, user := range []string{"root", "admin"} {
		t.Run(user, func(t *testing.T) {
			h := sshtest.Start(t)
			tg := target(t, h, user)
			lasting, steps, err := install(t, h, tg, Agent, nil)
			if err != nil || !lasting {
				t.Fatalf("after %v: %v, lasting %v", steps, err, lasting)
			}
			got, err := machine.Home{Dir: h.Path("/var/lib/nix-infra-agent"), Role: protocol.Node}.Open()
			if err != nil || got.Name != "web1" {
				t.Errorf("the machine is %+v, %v", got, err)
			}
			for path, want := range map[string]os.FileMode{
				"/var/lib/nix-infra-agent": 0o700, "/var/lib/nix-infra-agent/bin": 0o700,
				"/var/lib/nix-infra-agent/bin/nix-infra-agent": 0o700, "/etc/systemd/system/nix-infra-agent.service": 0o644,
			} {
				if s, err := os.Stat(h.Path(path)); err != nil || s.Mode().Perm() != want {
					t.Errorf("%s: %v, want mode %v (%v)", path, s, want, err)
				}
			}
			want := []string{"daemon-reload", "enable nix-infra-agent.service", "restart --no-block nix-infra-agent.service"}
			if got := h.Systemctl(); !slices.Equal(got, want) {
				t.Errorf("systemctl was told %q", got)
			}
			if left, _ := filepath.Glob(h.Path("/var/lib/nix-infra-agent/bin/*.*")); len(left) > 0 {
				t.Errorf("left over: %v", left)
			}
			if user == "admin" && !h.Sudoed() {
				t.Error("a user who is not root did not use sudo")
			}
			before := got.Key
			if _, _, err := install(t, h, tg, Agent, nil); err == nil || !strings.Contains(err.Error(), "another operator") {
				t.Errorf("a machine was taken from its operator: %v", err)
			}
			again, err := machine.Home{Dir: h.Path("/var/lib/nix-infra-agent"), Role: protocol.Node}.Open()
			if err != nil || fmt.Sprint(again.Key) != fmt.Sprint(before) {
				t.Errorf("the keys changed: %v", err)
			}
		})
	}
}

func TestInstallController(t *testing.T) {
	h := sshtest.Start(t)
	if _, steps, err := install(t, h, target(t, h, "root"), Controller, nil); err != nil {
		t.Fatalf("after %v: %v", steps, err)
	}
	m, err := machine.Home{Dir: h.Path("/var/lib/nix-infra-controller"), Role: protocol.Controller}.Open()
	if err != nil || m.Certificate == nil {
		t.Fatalf("no certificate: %v", err)
	}
	unit, err := os.ReadFile(h.Path("/etc/systemd/system/nix-infra-controller.service"))
	if err != nil || !strings.Contains(string(unit), "LimitNOFILE=1048576") || !strings.Contains(string(unit), "Type=notify") {
		t.Errorf("unit: %v\n%s", err, unit)
	}
}

// On NixOS, /etc/systemd/system leads into the store.
func TestUnitWhereEtcIsReadOnly(t *testing.T) {
	h := sshtest.Start(t)
	h.ReadOnlyEtc(t)
	lasting, steps, err := install(t, h, target(t, h, "root"), Agent, nil)
	if err != nil || lasting {
		t.Fatalf("after %v: %v, lasting %v", steps, err, lasting)
	}
	if _, err := os.Stat(h.Path("/run/systemd/system/nix-infra-agent.service")); err != nil {
		t.Error(err)
	}
	if got := strings.Join(h.Systemctl(), ","); strings.Contains(got, "enable") {
		t.Errorf("a unit in /run was enabled: %s", got)
	}
}

// A system that has the agent keeps its unit: enrolling again brings the program, and whatever was enrolled is taken up.
func TestUnitOfTheSystem(t *testing.T) {
	h := sshtest.Start(t)
	h.ReadOnlyEtc(t)
	h.Deployed("/etc/systemd/system/nix-infra-agent.service")
	lasting, steps, err := install(t, h, target(t, h, "root"), Agent, nil)
	if err != nil || !lasting {
		t.Fatalf("after %v: %v, lasting %v", steps, err, lasting)
	}
	if _, err := os.Stat(h.Path("/run/systemd/system/nix-infra-agent.service")); !os.IsNotExist(err) {
		t.Errorf("a unit in /run: %v", err)
	}
	if got := h.Systemctl(); !slices.Equal(got, []string{"restart nix-infra-agent.service"}) {
		t.Errorf("systemctl was told %q", got)
	}
}

func TestFailuresNameTheStep(t *testing.T) {
	for name, c := range map[string]struct {
		host   func(*sshtest.Host)
		change func(*Installation)
		want   []string
	}{
		"not Linux":         {func(h *sshtest.Host) { h.Uname = "Darwin arm64" }, nil, []string{"look at the machine: ", "Darwin arm64"}},
		"foreign processor": {func(h *sshtest.Host) { h.Uname = "Linux riscv64" }, func(i *Installation) { i.Binary = "" }, []string{"look at the machine: ", "riscv64"}},
		"no binary":         {nil, func(i *Installation) { i.Binary = "/nonexistent" }, []string{"upload nix-infra-agent: ", "/nonexistent"}},
		"refused to sign":   {nil, func(i *Installation) { i.Name = "Not_A_Name" }, []string{"make its keys: ", "Not_A_Name"}},
		"no systemd":        {func(h *sshtest.Host) { os.RemoveAll(h.Path("/run/systemd/system")) }, nil, []string{"install and start nix-infra-agent.service: ", "does not run systemd"}},
		"systemctl fails":   {func(h *sshtest.Host) { h.FailSystemctl() }, nil, []string{"systemctl daemon-reload: ", "no such thing"}},
	} {
		t.Run(name, func(t *testing.T) {
			h := sshtest.Start(t)
			if c.host != nil {
				c.host(h)
			}
			_, _, err := install(t, h, target(t, h, "root"), Agent, c.change)
			for _, w := range c.want {
				if err == nil || !strings.Contains(err.Error(), w) {
					t.Errorf("%v does not say %q", err, w)
				}
			}
		})
	}
}

func TestHostKeyIsPinned(t *testing.T) {
	h := sshtest.Start(t)
	tg := target(t, h, "root")
	dial := func() error {
		m, err := Dial(t.Context(), tg)
		if err == nil {
			m.Close()
		}
		return err
	}
	if err := dial(); err != nil {
		t.Fatal(err)
	}
	pinned, err := os.ReadFile(tg.KnownHosts)
	if err != nil || strings.Count(string(pinned), "\n") != 1 {
		t.Fatalf("pinned %q, %v", pinned, err)
	}
	if err := dial(); err != nil {
		t.Errorf("the same host the second time: %v", err)
	}
	h.AddHostKey(t) // one of another type, which is not the pinned one and no change
	if err := dial(); err != nil {
		t.Errorf("a host with a second key: %v", err)
	}
	h.ChangeHostKey(t)
	err = dial()
	if err == nil || !strings.Contains(err.Error(), "another host key") || !strings.Contains(err.Error(), tg.KnownHosts) {
		t.Errorf("a changed host key: %v", err)
	}
	if after, _ := os.ReadFile(tg.KnownHosts); string(after) != string(pinned) {
		t.Error("the changed key was pinned")
	}
	if h.Sessions() != 0 {
		t.Error("something was run on a host with a changed key")
	}
}

// Machines may be enrolled at the same time: no pin of one gets lost by that of another.
func TestPinsAtOnce(t *testing.T) {
	file := filepath.Join(t.TempDir(), "known_hosts")
	if err := os.WriteFile(file, []byte("# no newline at its end"), 0o600); err != nil {
		t.Fatal(err)
	}
	const hosts = 8
	var targets []Target
	for range hosts {
		h := sshtest.Start(t)
		tg := target(t, h, "root")
		tg.KnownHosts = file
		targets = append(targets, tg)
	}
	var wg sync.WaitGroup
	for _, tg := range targets {
		wg.Go(func() {
			m, err := Dial(t.Context(), tg)
			if err != nil {
				t.Error(err)
				return
			}
			m.Close()
		})
	}
	wg.Wait()
	pinned, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for _, tg := range targets {
		if n := strings.Count(string(pinned), "\n"+knownhosts.Normalize(tg.Address())+" "); n != 1 {
			t.Errorf("%s is pinned %d times in:\n%s", tg.Address(), n, pinned)
		}
	}
}

func TestOpenPorts(t *testing.T) {
	for _, nixos := range []bool{false, true} {
		h := sshtest.Start(t)
		want := []string{""}
		if nixos {
			h.Firewall(t)
			want = []string{"-w -I nixos-fw -p tcp --dport 4222 -j nixos-fw-accept", "-w -I nixos-fw -p tcp --dport 443 -j nixos-fw-accept"}
		}
		m, err := Dial(t.Context(), target(t, h, "root"))
		if err != nil {
			t.Fatal(err)
		}
		if err := OpenPorts(t.Context(), m, []int{4222, 443}); err != nil || !slices.Equal(h.Opened(), want) {
			t.Errorf("NixOS %v: told %q, %v", nixos, h.Opened(), err)
		}
		m.Close()
	}
}

func TestDialSaysWhatIsWrong(t *testing.T) {
	h := sshtest.Start(t)
	stranger := sshtest.Start(t)
	for name, c := range map[string]struct {
		change func(*Target)
		want   string
	}{
		"no key":        {func(tg *Target) { tg.KeyFiles = []string{"/nonexistent"} }, "no usable SSH key: looked at /nonexistent"},
		"another's key": {func(tg *Target) { tg.KeyFiles = []string{stranger.KeyFile} }, "does not accept any of the keys"},
		"nobody there":  {func(tg *Target) { tg.Port = 1 }, "can't reach 127.0.0.1:1"},
		"broken pins":   {func(tg *Target) { os.WriteFile(tg.KnownHosts, []byte("rubbish\n"), 0o600) }, "known_hosts"},
	} {
		t.Run(name, func(t *testing.T) {
			tg := target(t, h, "root")
			c.change(&tg)
			_, err := Dial(t.Context(), tg)
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("got %v, want %q", err, c.want)
			}
		})
	}
}

func TestDialHasADeadline(t *testing.T) {
	tg := target(t, sshtest.Start(t), "root")
	tg.Port = sshtest.Silent(t)
	tg.Timeout = 200 * time.Millisecond
	if _, err := Dial(t.Context(), tg); err == nil {
		t.Error("connected to a host that says nothing")
	}
}

func TestRunEndsWithItsContext(t *testing.T) {
	h := sshtest.Start(t)
	m, err := Dial(t.Context(), target(t, h, "root"))
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if out, err := m.Run(t.Context(), nil, "printf", "%s", `it's "$HOME" and * \`); err != nil || string(out) != `it's "$HOME" and * \` {
		t.Errorf("arguments don't arrive as they are: %q, %v", out, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	if _, err := m.Run(ctx, nil, "sleep", "600"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it ended with %v", err)
	}
}

// A machine that is gone without a word, behind another one that is, keeps nobody longer than the context says: while a command
// runs, while one is begun, and while much is sent.
func TestRunOverADeadConnection(t *testing.T) {
	for name, argv := range map[string][]string{"running": {"sleep", "600"}, "begun": {"true"}, "sending": {"cat"}} {
		t.Run(name, func(t *testing.T) {
			h, gate := sshtest.Start(t), sshtest.Start(t)
			c := newCable(t, gate.Address)
			c.up.Store(true)
			tg := target(t, h, "root")
			tg.KeyFiles = append(tg.KeyFiles, gate.KeyFile)
			tg.Host = "localhost" // else it would be its own jump host
			jump, err := project.ParseSSHAddress("me@" + c.address)
			if err != nil {
				t.Fatal(err)
			}
			m, err := Dial(t.Context(), tg.Through([]project.SSHAddress{jump}))
			if err != nil {
				t.Fatal(err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			var stdin io.Reader = neverEnding{}
			switch name {
			case "running":
				h.OnCommand(func() { c.cut(); cancel() })
				stdin = nil
			case "begun":
				c.cut()
				stdin = nil
				time.AfterFunc(50*time.Millisecond, cancel) // whether it waits already or will: it must end
			case "sending":
				h.OnCommand(c.cut)
				c.onCut = func() { time.AfterFunc(50*time.Millisecond, cancel) }
			}
			if _, err := m.Run(ctx, stdin, argv...); !errors.Is(err, context.Canceled) {
				t.Errorf("it ended with %v", err)
			}
			m.Close()
		})
	}
}

// neverEnding is an input without an end.
type neverEnding struct{}

func (neverEnding) Read(p []byte) (int, error) { return len(p), nil }

func TestParseTarget(t *testing.T) {
	for in, want := range map[string]string{
		"host": "root@host:22", "admin@host": "admin@host:22", "admin@host:2222": "admin@host:2222", "192.0.2.1": "root@192.0.2.1:22",
		"[2001:db8::1]:23": "root@[2001:db8::1]:23", "2001:db8::1": "root@[2001:db8::1]:22",
		"": "", "@host": "", "user@": "", "host:0": "", "host:ssh": "", "-oProxy=x": "", "a b": "",
	} {
		tg, err := ParseTarget(in)
		if got := tg.User + "@" + tg.Address(); (err == nil) != (want != "") || err == nil && got != want {
			t.Errorf("%q: %s, %v; want %q", in, got, err, want)
		}
	}
}

func TestCA(t *testing.T) {
	ca, err := NewCA("testfleet", time.Now())
	if err != nil {
		t.Fatal(err)
	}
	bundle, err := ca.Private()
	if err != nil {
		t.Fatal(err)
	}
	if ca, err = ParseCA(bundle); err != nil {
		t.Fatal(err)
	}
	for _, bad := range [][]byte{nil, []byte("rubbish"), ca.Public(), bundle[:len(bundle)/2]} {
		if _, err := ParseCA(bad); err == nil {
			t.Errorf("%d bytes of rubbish are a CA", len(bad))
		}
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{DNSNames: []string{"evil.example.org"}}, key)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := ca.SignController([]byte("rubbish"), []string{"ctl"}, time.Now()); err == nil {
		t.Error("rubbish was signed")
	}
	signed, err := ca.SignController(csr, []string{"ctl", "192.0.2.1", "ctl"}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	cert := parsePEM(t, signed)
	roots := x509.NewCertPool()
	roots.AddCert(ca.Certificate)
	for host, good := range map[string]bool{"ctl": true, "192.0.2.1": true, "evil.example.org": false, "192.0.2.2": false} {
		if _, err := cert.Verify(x509.VerifyOptions{Roots: roots, DNSName: host}); (err == nil) != good {
			t.Errorf("%s: %v", host, err)
		}
	}
	if cert.IsCA {
		t.Error("a controller's certificate is a CA")
	}
}

func parsePEM(t *testing.T, data []byte) *x509.Certificate {
	block, _ := pem.Decode(data)
	cert, err := x509.ParseCertificate(block.Bytes)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

// TestSignAfterRevocation: a machine whose key was revoked a moment ago may come back.
func TestSignAfterRevocation(t *testing.T) {
	must := func(t *testing.T, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	keys, err := protocol.NewFleet("testfleet")
	must(t, err)
	r, err := machine.Home{Dir: t.TempDir(), Role: protocol.Node}.Request("n1")
	must(t, err)
	public, err := keys.Publish(map[string]time.Time{r.Key: time.Now()})
	must(t, err)
	ca, err := NewCA("testfleet", time.Now())
	must(t, err)
	a := &Authority{Keys: keys, Public: *public, CA: ca, Controllers: []string{"tls://c:4222"}}
	answer, err := a.Sign(r, nil, time.Now())
	must(t, err)
	v, err := protocol.NewVerifier(public.Operator, public.AccountJWT)
	must(t, err)
	if id, err := v.Identify(answer.User, time.Now()); err != nil || id.Name != "n1" {
		t.Errorf("%+v, %v", id, err)
	}
}
