package command

import (
	"context"
	"io"
	"os"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

// ownMachines is a fleet of machines that are their owner's own.
const ownMachines = `servers:
  web1: { ip: 192.0.2.1, ssh_key: ssh/nixinfra }
  web2: { ip: 192.0.2.2, ssh_key: ssh/nixinfra }
  db1: { ip: 192.0.2.3, ssh_key: ssh/nixinfra }
`

func TestDestroyOwn(t *testing.T) {
	s, f := newFleet(t)
	s.write("servers.yaml", ownMachines)
	f.Register("web1")
	f.Register("web2")
	pins := "web1@nix-infra ssh-ed25519 AAAA\n"
	s.write("nix-infra/known_hosts", pins)

	for stdin, says := range map[string]string{"": "nobody answered, and nothing was done; --batch goes on without asking", "web2\n": "that is not its name; nothing was done", "yes\n": "not its name"} {
		s.stdin = stdin
		if r := s.run("destroy", "web1"); r.status != Refused || !strings.Contains(r.stderr, says) || !strings.Contains(r.stderr, "web1 is taken out of the fleet, and goes on running, as a machine of your own. Type its name") {
			t.Errorf("answered %q: status %d\n%s", stdin, r.status, r.stderr)
		}
	}
	if f.Record("web1") == nil {
		t.Fatal("it was destroyed without the right answer")
	}
	s.stdin = "web1\nweb2\n"
	if out := s.must("destroy", "web2", "web1"); !strings.Contains(out, "web1: out of the fleet; a machine of your own, which goes on running what it has\n") {
		t.Errorf("it says %s", out)
	}
	if f.Record("web1") != nil || f.Record("web2") != nil {
		t.Error("they are still in the fleet")
	}
	if got := s.read("nix-infra/known_hosts"); got != pins {
		t.Errorf("the machine is still there, but its host key is forgotten: %q", got)
	}

	// Once more, and beside one that was never enrolled.
	s.stdin = ""
	d := documents(t, s.must("destroy", "web1", "db1", "--batch", "--json"))
	if d[0]["name"] != "db1" || d[0]["unregistered"] != false || d[1]["name"] != "web1" || d[1]["provider"] != "self-hosted" || d[1]["deleted"] != false {
		t.Errorf("documents %v", d)
	}

	// Of one that is nowhere any more, as after a run that was ended before it could, all is forgotten.
	s.write("servers.yaml", strings.Replace(ownMachines, "  web1: ", "  web9: ", 1))
	s.write("nix-infra.yaml", strings.Replace(s.read("nix-infra.yaml"), "controllers:", "nodes: { web1: { ipv4: 192.0.2.1 } }\ncluster: { uuid: c1, control_nodes: [web1, etcd1] }\ncontrollers:", 1))
	s.must("destroy", "web1", "--batch", "--keep-server")
	if got := s.read("nix-infra/known_hosts"); got != pins {
		t.Errorf("its host key is forgotten, though its server was to be kept: %q", got)
	}
	s.must("destroy", "web1", "--batch")
	if pins, settings := s.read("nix-infra/known_hosts"), s.read("nix-infra.yaml"); pins != "" || strings.Contains(settings, "192.0.2.1") || !strings.Contains(settings, "control_nodes: [etcd1]") {
		t.Errorf("it is still in %q and\n%s", pins, settings)
	}
}

func TestDestroyKeepServer(t *testing.T) {
	s, f := newFleet(t)
	f.Register("web1")
	s.expect(Refused, "HCLOUD_TOKEN", "destroy", "web1", "--batch") // no provider
	out := s.must("cluster", "destroy", "--batch", "--target=web1", "--ctrl-nodes=etcd001", "--keep-server")
	if f.Record("web1") != nil || !strings.Contains(out, "web1: out of the fleet") {
		t.Errorf("it is still there: %s", out)
	}
	if out := s.must("destroy", "web1", "--batch", "--keep-server"); !strings.Contains(out, "there is nothing of it any more") {
		t.Errorf("once more: %s", out)
	}
	access := documents(t, s.must("access", "list", "--json"))
	if last := access[len(access)-1]; last["name"] != "web1" || last["role"] != string(protocol.Node) || last["state"] != "revoked" {
		t.Errorf("on record is %v", last)
	}
	f.Register("web2")
	s.must("fleet", "destroy", "--batch", "--target=web2 web1", "--keep-server") // one of them is gone already
	if f.Record("web2") != nil {
		t.Error("web2 is still there")
	}
}

// Ctrl-C is an answer, too, for which nothing has to be typed.
func TestDestroyInterrupted(t *testing.T) {
	s, f := newFleet(t)
	s.write("servers.yaml", ownMachines)
	f.Register("web1")
	nobody, _ := io.Pipe()
	ctx, interrupt := context.WithCancel(t.Context())
	asked := &watched{}
	go func() {
		asked.await("Type its name to go on: ")
		interrupt()
	}()
	status := Run(ctx, []string{"-d", s.dir, "destroy", "web1"}, Environment{
		Stdin: nobody, Stdout: io.Discard, Stderr: asked, Getenv: func(name string) string { return s.env[name] }, VaultOptions: []vault.Option{vault.WorkFactor(2)},
	})
	if status != Interrupted || !strings.HasSuffix(asked.String(), "nix-infra: interrupted\n") || f.Record("web1") == nil {
		t.Errorf("status %d\n%s", status, asked)
	}
}

func TestDestroyRefusals(t *testing.T) {
	s, f := newFleet(t)
	s.write("servers.yaml", ownMachines)
	f.Register("web1")
	s.expect(Refused, "which machines?", "destroy")
	s.expect(Refused, "machines are named one by one", "destroy", "web*")
	s.expect(Refused, "there is no node and no server called wbe1; nothing was destroyed", "destroy", "web1", "wbe1", "--batch")
	s.expect(Refused, "use hetzner or self-hosted", "destroy", "web1", "--batch", "--provider", "aws")
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"cluster: { uuid: c1, control_nodes: [etcd001] }\n")
	s.expect(Refused, "--ctrl-nodes: etcd002: no control node of this cluster", "destroy", "web1", "--batch", "--ctrl-nodes=etcd001 etcd002")
	if f.Record("web1") == nil {
		t.Error("web1 is gone")
	}
}

func TestSSHKey(t *testing.T) {
	s := newShell(t)
	s.must("init", "--fleet", "testfleet", "--controller", "tls://127.0.0.1:1")
	s.expect(Refused, "--name: a key needs a name", "ssh-key", "create")
	s.expect(Refused, "--name", "ssh-key", "create", "--name", "../x")
	s.must("ssh-key", "create", "--name", "deploy", "--email", "ops@example.org", "--batch")
	public, private := s.read("ssh/deploy.pub"), s.read("ssh/deploy")
	if !strings.HasPrefix(public, "ssh-ed25519 ") || !strings.HasSuffix(public, " ops@example.org\n") {
		t.Errorf("the public half is %q", public)
	}
	if info, err := os.Stat(s.path("ssh/deploy")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("the private half: %v, %v", info, err)
	}
	s.must("ssh-key", "create", "--name", "deploy")
	if s.read("ssh/deploy") != private {
		t.Error("the pair was made anew")
	}
	s.expect(Refused, "HCLOUD_TOKEN", "ssh-key", "add", "--name", "deploy")
	s.expect(Refused, "nix-infra ssh-key create --name other makes a pair", "ssh-key", "add", "--name", "other")
	s.write("servers.yaml", ownMachines)
	for _, verb := range []string{"add", "remove"} {
		if r := s.run("ssh-key", verb, "--batch", "--name=deploy"); r.status != OK || !strings.Contains(r.stderr, "no provider keeps keys") {
			t.Errorf("%s: status %d, %s", verb, r.status, r.stderr)
		}
	}
}
