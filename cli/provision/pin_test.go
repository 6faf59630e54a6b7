package provision

import (
	"crypto/ed25519"
	"crypto/rand"
	"errors"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/cli/provision/sshtest"
)

func publicKey(t *testing.T) ssh.PublicKey {
	t.Helper()
	public, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	key, err := ssh.NewPublicKey(public)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func authorized(key ssh.PublicKey) string {
	return strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))
}

func TestPinNode(t *testing.T) {
	file := filepath.Join(t.TempDir(), "known_hosts")
	pin := func(node string, key ssh.PublicKey) {
		t.Helper()
		if err := PinNode(file, node, key); err != nil {
			t.Fatal(err)
		}
	}
	expect := func(lines ...string) {
		t.Helper()
		data, err := os.ReadFile(file)
		if err != nil || !slices.Equal(strings.Split(strings.TrimSpace(string(data)), "\n"), lines) {
			t.Errorf("the file has, error %v:\n%s", err, data)
		}
	}
	one, two, three := publicKey(t), publicKey(t), publicKey(t)
	pin("web1", one)
	pin("web10", two)
	pin("web1", one)
	expect("web1@nix-infra "+authorized(one), "web10@nix-infra "+authorized(two))
	pin("web1", three)
	expect("web10@nix-infra "+authorized(two), "web1@nix-infra "+authorized(three))
	if err := os.WriteFile(file, []byte("192.0.2.1 "+authorized(one)), 0o644); err != nil { // no line break
		t.Fatal(err)
	}
	pin("web1", two)
	expect("192.0.2.1 "+authorized(one), "web1@nix-infra "+authorized(two))
}

// Two may come to the same host for the first time at once: it is pinned once, and to both it has to be the same.
func TestFirstContactsAtOnce(t *testing.T) {
	gate := Target{Host: "gate.example.org", Port: 22, KnownHosts: filepath.Join(t.TempDir(), "known_hosts")}
	first, second := publicKey(t), publicKey(t)
	var came []*pins
	for _, shown := range []ssh.PublicKey{first, first, second} {
		p, err := gate.pins()
		if err != nil {
			t.Fatal(err)
		}
		if err := p.check(gate.Address(), nil, shown); err != nil {
			t.Fatal(err)
		}
		came = append(came, p)
	}
	if err := errors.Join(came[0].keep(), came[1].keep()); err != nil {
		t.Fatal(err)
	}
	if err := came[2].keep(); err == nil || !strings.Contains(err.Error(), "another host key") {
		t.Errorf("another key at the same time: %v", err)
	}
	if pinned, err := os.ReadFile(gate.KnownHosts); err != nil || string(pinned) != "gate.example.org "+authorized(first)+"\n" {
		t.Errorf("pinned are\n%s%v", pinned, err)
	}
}

func TestPinnedAs(t *testing.T) {
	file := filepath.Join(t.TempDir(), "known_hosts")
	if name, err := PinnedAs(file, "web1", "192.0.2.1"); name != "" || err != nil {
		t.Errorf("without a file: %q, %v", name, err)
	}
	key := authorized(publicKey(t))
	for name, c := range map[string]struct{ file, alias string }{
		"nothing":          {"# a comment\n\n192.0.2.11 " + key + "\n", ""},
		"by name":          {"192.0.2.1 " + key + "\nweb1@nix-infra " + key + "\n", "web1@nix-infra"},
		"by address":       {"web2@nix-infra " + key + "\n192.0.2.1 " + key + "\n", "192.0.2.1"},
		"by another port":  {"[192.0.2.1]:2222 " + key + "\n", "[192.0.2.1]:2222"},
		"two keys of one":  {"192.0.2.1 " + key + "\n192.0.2.1 " + authorized(publicKey(t)) + "\n", "192.0.2.1"},
		"two behind a NAT": {"[192.0.2.1]:2201 " + key + "\n[192.0.2.1]:2202 " + key + "\n", ""},
	} {
		if err := os.WriteFile(file, []byte(c.file), 0o644); err != nil {
			t.Fatal(err)
		}
		if alias, err := PinnedAs(file, "web1", "192.0.2.1"); alias != c.alias || err != nil {
			t.Errorf("%s: %q, %v", name, alias, err)
		}
	}
}

func TestHostKey(t *testing.T) {
	host := sshtest.Start(t)
	conn, err := net.Dial("tcp", host.Address)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	key, err := HostKey(t.Context(), conn)
	if err != nil {
		t.Fatal(err)
	}
	target, err := ParseTarget("root@" + host.Address)
	if err != nil {
		t.Fatal(err)
	}
	target.KeyFiles, target.KnownHosts = []string{host.KeyFile}, filepath.Join(t.TempDir(), "known_hosts")
	m, err := Dial(t.Context(), target)
	if err != nil {
		t.Fatal(err)
	}
	defer m.Close()
	if authorized(m.HostKey) != authorized(key) {
		t.Error("the key that is shown is another one than SSH uses")
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("no SSH\r\n"))
			c.Close()
		}
	}()
	if conn, err = net.Dial("tcp", l.Addr().String()); err != nil {
		t.Fatal(err)
	}
	if key, err := HostKey(t.Context(), conn); err == nil {
		t.Errorf("%v of what is no SSH server", key)
	}
}
