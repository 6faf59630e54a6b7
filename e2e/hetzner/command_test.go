package hetzner_test

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud"

	"github.com/nix-infra/nix-infra/cli"
	"github.com/nix-infra/nix-infra/cli/command"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/provision/sshtest"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/e2e/hetzner"
)

// desk is a project's folder without a fleet of its own yet, and a command line.
type desk struct {
	*bench
	dir string
	env []string
}

func newDesk(t *testing.T, o hetzner.Options) *desk {
	b := newBench(t, o)
	d := &desk{bench: b, dir: t.TempDir(), env: []string{"HCLOUD_TOKEN=" + token, "HCLOUD_ENDPOINT=" + serve(t, b.fake), "NO_COLOR=1"}}
	d.write("nix-infra.yaml", "fleet: home\ncontrollers: []\n")
	d.write("ssh/nixinfra.pub", b.order.SSHKey.PublicKey+"\n")
	return d
}

func (d *desk) write(name, text string) {
	d.Helper()
	path := filepath.Join(d.dir, name)
	must(d.T, os.MkdirAll(filepath.Dir(path), 0o755))
	must(d.T, os.WriteFile(path, []byte(text), 0o644))
}

// run runs a command line and wants that status, and what it says to hold all of these.
func (d *desk) run(status int, args []string, says ...string) {
	d.Helper()
	var out bytes.Buffer
	got := cli.Main(d.Context(), append([]string{"-d", d.dir}, args...), strings.NewReader(""), &out, &out, d.env)
	if got != status {
		d.Errorf("%v: status %d, want %d\n%s", args, got, status, out.String())
	}
	for _, want := range says {
		if !strings.Contains(out.String(), want) {
			d.Errorf("%v: it does not say %q:\n%s", args, want, out.String())
		}
	}
}

// init makes it a project with keys of its own. Its password costs a second of work by design, and here next to none.
func (d *desk) init() {
	d.Helper()
	must(d.T, os.RemoveAll(filepath.Join(d.dir, "ssh")))
	d.env = append(d.env, "SECRETS_PASS=a password")
	var said bytes.Buffer
	if status := command.Run(d.Context(), []string{"-d", d.dir, "init"}, command.Environment{
		Stdin: strings.NewReader(""), Stdout: &said, Stderr: &said, Getenv: d.getenv, VaultOptions: []vault.Option{vault.WorkFactor(2)},
	}); status != command.OK {
		d.Fatalf("init: status %d\n%s", status, &said)
	}
}

// getenv is a variable of the desk's environment.
func (d *desk) getenv(name string) string {
	for _, e := range d.env {
		if value, ok := strings.CutPrefix(e, name+"="); ok {
			return value
		}
	}
	return ""
}

func TestSSHKeyCommands(t *testing.T) {
	d := newDesk(t, hetzner.Options{})
	d.run(0, []string{"ssh-key", "add", "--name", "nixinfra"}, "SSH key nixinfra: added (hetzner)")
	d.run(0, []string{"ssh-key", "add", "--name", "nixinfra", "--json"}, `{"name":"nixinfra","provider":"hetzner","state":"unchanged"}`)
	d.run(0, []string{"ssh-key", "remove", "--batch", "--name=nixinfra"}, "SSH key nixinfra: removed (hetzner)")
	d.run(0, []string{"ssh-key", "remove", "--name=nixinfra"}, "is not known there")

	d.write("ssh/bad.pub", "no key\n")
	d.run(2, []string{"ssh-key", "add", "--name", "bad"}, "SSH key bad: its public half is no key")
	d.write(".env", "HCLOUD_ENDPOINT=https://elsewhere.example.org/v1\n") // where the user's own token would go
	d.run(2, []string{"ssh-key", "add", "--name", "nixinfra"}, "HCLOUD_ENDPOINT is in the project's environment file")
	must(t, os.Remove(filepath.Join(d.dir, ".env")))
	d.env[0] = "HCLOUD_TOKEN=wrong"
	d.run(2, []string{"ssh-key", "add", "--name", "nixinfra"}, "it does not know the token in HCLOUD_TOKEN")
	d.env[0] = "HCLOUD_TOKEN="
	d.run(2, []string{"ssh-key", "add", "--name", "nixinfra"}, "servers.yaml", "HCLOUD_TOKEN")
}

func TestDestroyCommand(t *testing.T) {
	d := newDesk(t, hetzner.Options{ActionTime: 5 * time.Millisecond})
	d.order.Names = []string{"n1", "n2", "n3", "n4"}
	servers := d.create()
	c := client(t, d.fake, 0)
	_, _, err := c.Server.Create(t.Context(), hcloud.ServerCreateOpts{Name: "byhand", ServerType: &hcloud.ServerType{Name: "cx23"}, Image: &hcloud.Image{Name: "debian-13"}, Location: &hcloud.Location{Name: "fsn1"}})
	must(t, err)
	away := d.order
	away.Fleet, away.Names = "away", []string{"theirs"}
	_, err = d.other.Create(t.Context(), away, d.step)
	must(t, err)

	d.write("nix-infra.yaml", "fleet: home\ncontrollers: [tls://"+servers[0].Host+":4222, tls://ctl.example.org:4222]\ncluster: { uuid: c1, control_nodes: [n1, n9], service_groups: { n1: [services] } }\nnodes: { n1: { ipv4: "+servers[0].Host+", tags: [web] } }\n")
	d.write("nix-infra/known_hosts", "n1@nix-infra ssh-ed25519 AAAA\n"+servers[0].Host+" ssh-ed25519 AAAA\nn2@nix-infra ssh-ed25519 BBBB\n")
	d.run(2, []string{"destroy", "n1"}, "n1 is a controller of this fleet", "n1 is a control node of the cluster", "Type its name to go on", "nobody answered, and nothing was done")
	d.run(2, []string{"destroy", "n8", "--batch"}, "there is no node and no server called n8")
	if len(d.fake.Servers()) != 6 {
		t.Fatalf("%d servers are left", len(d.fake.Servers()))
	}

	d.run(0, []string{"destroy", "--batch", "--target=n1 byhand"}, "byhand was not made by nix-infra for this fleet", "n1: deleted at hetzner", "byhand: deleted at hetzner")
	hosts, err := os.ReadFile(filepath.Join(d.dir, "nix-infra/known_hosts"))
	if string(hosts) != "n2@nix-infra ssh-ed25519 BBBB\n" {
		t.Errorf("pinned host keys are %q, %v", hosts, err)
	}
	settings, err := os.ReadFile(filepath.Join(d.dir, "nix-infra.yaml"))
	if text := string(settings); err != nil || !strings.Contains(text, "control_nodes: [n9]") || strings.Contains(text, servers[0].Host) || !strings.Contains(text, "ctl.example.org") || strings.Contains(text, "services") || strings.Contains(text, "ipv4:") || !strings.Contains(text, "web") {
		t.Errorf("the settings are\n%s%v", text, err)
	}

	// One that can't be deleted keeps no other from it, and nothing of it is forgotten; the next run finishes.
	d.fake.Fail(hetzner.Fault{Method: "DELETE", Path: "/v1/servers/" + servers[1].ID, Status: 422, Code: "service_error", Message: "no hands"})
	d.run(1, []string{"destroy", "n2", "n3", "--batch"}, "1 of 2 were not deleted", "delete n2: no hands", "n3: deleted at hetzner")
	if hosts, _ := os.ReadFile(filepath.Join(d.dir, "nix-infra/known_hosts")); !strings.Contains(string(hosts), "n2@nix-infra") {
		t.Error("n2, which is still there, has no host key any more")
	}
	d.run(0, []string{"destroy", "n2", "--batch", "--json"}, `{"name":"n2","unregistered":false,"provider":"hetzner","deleted":true}`)
	d.run(1, []string{"destroy", "theirs", "--batch"}, "belongs to the fleet away")
	var left []string
	for _, s := range d.fake.Servers() {
		left = append(left, s.Name)
	}
	if !slices.Equal(left, []string{"n4", "theirs"}) {
		t.Errorf("left are %v", left)
	}
}

// TestProvisionCommand: machines that can't be made are told one by one. What was pinned for machines of their names is forgotten.
func TestProvisionCommand(t *testing.T) {
	d := newDesk(t, hetzner.Options{})
	d.init()
	d.write("nix-infra/known_hosts", "n1@nix-infra ssh-ed25519 AAAA\nn9@nix-infra ssh-ed25519 BBBB\n")
	d.fake.Fail(hetzner.Fault{Method: "POST", Path: "/v1/servers", Status: 412, Code: "resource_unavailable", Message: "error during placement"})
	d.fake.Fail(hetzner.Fault{Method: "POST", Path: "/v1/servers", Status: 403, Code: "resource_limit_exceeded", Message: "server limit exceeded"})
	args := []string{"provision", "n1", "n2", "--method", "none", "--no-deploy", "--batch"}
	d.run(0, append(args, "--dry-run"), "in all: 16.28 EUR a month")
	if hosts, _ := os.ReadFile(filepath.Join(d.dir, "nix-infra/known_hosts")); !strings.Contains(string(hosts), "n1@") {
		t.Errorf("a dry run changes what is pinned to %s", hosts)
	}
	const n1, n2 = "hetzner: n1: error during placement (resource_unavailable, fake", "hetzner: n2: server limit exceeded (resource_limit_exceeded, fake"
	d.run(1, args, "n1: failed: create: "+n1, "n2: failed: create: "+n2, "2 machines are not in; run the same command again, it goes on where this ended:\n  n1: create: "+n1, "\n  n2: create: "+n2)
	if hosts, err := os.ReadFile(filepath.Join(d.dir, "nix-infra/known_hosts")); string(hosts) != "n9@nix-infra ssh-ed25519 BBBB\n" {
		t.Errorf("pinned are %s, %v", hosts, err)
	}
}

// TestNoController: where the machine that is to be the controller can't be made, the others are not kept waiting for it.
func TestNoController(t *testing.T) {
	d := newDesk(t, hetzner.Options{})
	d.init()
	web1 := sshtest.Start(t)
	web1.Runs(t, "ID=nixos\n")
	web1.NixOS(t)
	d.write("servers.yaml", "servers:\n  ctl: { provider: hetzner, ssh_key: ssh/nixinfra }\n  web1: { ip: 127.0.0.1, ssh_key: "+web1.KeyFile+" }\n")
	d.write("nix-infra.yaml", "fleet: home\ncontrollers: []\nnodes: { web1: { ssh: \""+web1.Address+"\" } }\n")
	d.fake.Fail(hetzner.Fault{Method: "POST", Path: "/v1/servers", Status: 412, Code: "resource_unavailable", Message: "error during placement"})
	d.run(1, []string{"provision", "ctl", "web1", "--method", "none", "--no-deploy", "--batch"},
		"ctl: failed: create: hetzner: ctl: error during placement", "web1: failed: agent: ctl did not become the controller", "2 machines are not in")
}

// TestHybrid: of what is in servers.yaml, some machines are their owner's, and some Hetzner's, each with its key.
func TestHybrid(t *testing.T) {
	d := newDesk(t, hetzner.Options{})
	d.write("ssh/other.pub", newKey(t)+"\n")
	d.write("servers.yaml", `servers:
  cloud2: { provider: hetzner, ssh_key: ssh/other, username: admin }
  own1: { ip: 192.0.2.9, ssh_key: ssh/nixinfra, username: me }
  cloud1: { provider: hetzner, ssh_key: ssh/nixinfra }
`)
	p := d.choose(t, "")
	if found, err := p.Servers(t.Context()); err != nil || len(found) != 1 || found[0].Name != "own1" {
		t.Errorf("before anything was made there are %+v, %v", found, err)
	}
	o := provision.Order{Fleet: "home", Names: []string{"own1", "cloud1", "cloud2"}, SSHKey: d.order.SSHKey}
	plan, err := p.Plan(t.Context(), o)
	must(t, err)
	if len(plan.Missing) != 2 || len(plan.Existing) != 1 || plan.Existing[0].Name != "own1" {
		t.Errorf("the plan is %+v", plan)
	}
	// One that can't be made keeps no other from it.
	d.fake.Fail(hetzner.Fault{Method: "POST", Path: "/v1/servers", Status: 412, Code: "resource_unavailable", Message: "error during placement"})
	must(t, os.Rename(filepath.Join(d.dir, "ssh/other.pub"), filepath.Join(d.dir, "ssh/away")))
	servers, err := p.Create(t.Context(), o, d.step)
	var each provision.ServerErrors
	if !errors.As(err, &each) || len(each) != 2 || len(servers) != 1 || servers[0].Name != "own1" {
		t.Errorf("there are %+v, %v", servers, err)
	}
	failsWith(t, each["cloud1"], "cloud1: error during placement", "there is no room for it now")
	failsWith(t, each["cloud2"], "the public half of the ssh_key", "other.pub")
	must(t, os.Rename(filepath.Join(d.dir, "ssh/away"), filepath.Join(d.dir, "ssh/other.pub")))
	servers, err = p.Create(t.Context(), o, d.step)
	must(t, err)
	for i, want := range []provision.Server{
		{Name: "own1", Provider: "self-hosted", Host: "192.0.2.9", User: "me", KeyFile: filepath.Join(d.dir, "ssh/nixinfra")},
		{Name: "cloud1", Provider: "hetzner", User: "root", KeyFile: filepath.Join(d.dir, "ssh/nixinfra")},
		{Name: "cloud2", Provider: "hetzner", User: "admin", KeyFile: filepath.Join(d.dir, "ssh/other")},
	} {
		if s := servers[i]; s.Name != want.Name || s.Provider != want.Provider || s.User != want.User || s.KeyFile != want.KeyFile || want.Host != "" && s.Host != want.Host || s.Host == "" {
			t.Errorf("server %d is %+v", i, s)
		}
	}
	if again, err := p.Create(t.Context(), o, d.step); err != nil || len(again) != 3 || d.ordered() != 3 {
		t.Errorf("once more: %+v, %v; %d were ordered", again, err, d.ordered())
	}
	keys, err := client(t, d.fake, 0).SSHKey.All(t.Context())
	if err != nil || len(keys) != 2 {
		t.Errorf("%d keys, %v", len(keys), err)
	}
	_, err = p.Plan(t.Context(), provision.Order{Names: []string{"own2"}})
	failsWith(t, err, "own2 is not in servers.yaml; list it there with its ip, or with provider: hetzner")
	if err := p.Destroy(t.Context(), servers[0], nil); err != provision.ErrOwners {
		t.Errorf("one's own machine: %v", err)
	}
	d.run(0, []string{"destroy", "own1", "cloud1", "--batch"}, "own1: a machine of your own", "cloud1: deleted at hetzner")

	// By --provider, Hetzner is all there is.
	if found, err := d.choose(t, "hetzner").Servers(t.Context()); err != nil || len(found) != 1 || found[0].Name != "cloud2" {
		t.Errorf("at Hetzner there are %+v, %v", found, err)
	}
}

// choose is what a command in the project's folder would choose.
func (d *desk) choose(t *testing.T, insist string) provision.Provider {
	t.Helper()
	p, err := project.Open(d.dir, "")
	must(t, err)
	p.Env.Process = d.getenv
	chosen, err := provision.Choose(p, insist, func(string) (provision.Provider, error) { return d.Hetzner, nil })
	must(t, err)
	return chosen
}
