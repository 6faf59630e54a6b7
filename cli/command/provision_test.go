package command

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/provision/sshtest"
)

const debian12 = "PRETTY_NAME=\"Debian GNU/Linux 12 (bookworm)\"\nID=debian\n"

// inventory writes machines into servers.yaml, and how they are reached here.
func (s *shell) inventory(machines map[string]*sshtest.Host) {
	servers, nodes := "servers:\n", "nodes:\n"
	for name, h := range machines {
		servers += fmt.Sprintf("  %s: { ip: 127.0.0.1, ssh_key: %s, username: admin }\n", name, h.KeyFile)
		nodes += fmt.Sprintf("  %s: { ssh: %q }\n", name, h.Address)
	}
	s.write("servers.yaml", servers)
	settings, _, _ := strings.Cut(s.read("nix-infra.yaml"), "nodes:\n")
	s.write("nix-infra.yaml", settings+nodes)
}

// newcomers are machines that run something, in servers.yaml, and the flags that provision needs here.
func (s *shell) newcomers(osRelease string, names ...string) (map[string]*sshtest.Host, []string) {
	machines := map[string]*sshtest.Host{}
	for _, name := range names {
		machines[name] = sshtest.Start(s.t)
		machines[name].Runs(s.t, osRelease)
	}
	s.inventory(machines)
	return machines, []string{"--agent-binary", machines[names[0]].Program(s.t, "nix-infra-agent", "node")}
}

// infectScript writes a conversion script and gives its flags.
func (s *shell) infectScript(text string) []string {
	s.write("convert.sh", text)
	return []string{"--infect-script", s.path("convert.sh"), "--nixos-version", "25.11"}
}

func TestProvisionBringsIn(t *testing.T) {
	s, f := newFleet(t)
	machines, flags := s.newcomers(debian12, "web1", "web2", "bad")
	machines["web2"].NixOS(t)
	// Each machine's program writes to its own folder: these share one, so only one is installed.
	agent := machines["web1"].Program(t, "nix-infra-agent", "node")
	flags[1] = agent
	machines["bad"].Runs(t, "PRETTY_NAME=Fedora\nID=fedora\n")
	comesUp(t, f, "web1", nil)
	r := s.run(slices.Concat([]string{"provision", "web1", "bad", "--no-deploy", "--tag", "web"}, flags, s.infectScript(`touch "$FAKE_ROOT/nixos"`))...)
	if r.status != SomeFailed || !strings.Contains(r.stderr, "nix-infra: bad: look: it runs Fedora; machines with NixOS, Debian") || !strings.Contains(r.stderr, "run the same command again") {
		t.Errorf("status %d\n%s", r.status, r.stderr)
	}
	if !strings.Contains(r.stderr, "convert.sh: SHA-256 "+provision.ScriptHash([]byte(`touch "$FAKE_ROOT/nixos"`))) {
		t.Errorf("the script's hash is not shown:\n%s", r.stderr)
	}
	for _, phase := range []string{"reach", "look", "convert", "reboot", "verify", "agent", "heartbeat"} {
		if !strings.Contains(r.out, "web1: "+phase+": ") {
			t.Errorf("the phase %s is not shown:\n%s", phase, r.out)
		}
	}
	if !strings.Contains(r.out, "web1: enrolled in ") {
		t.Errorf("it does not say that web1 is in:\n%s", r.out)
	}
	if record := f.Record("web1"); record == nil || !slices.Equal(record.Tags, []string{"web"}) {
		t.Errorf("registered as %+v", record)
	}
	if pinned := s.read("nix-infra/known_hosts"); strings.Count(pinned, "web1@nix-infra ") != 1 {
		t.Errorf("pinned are\n%s", pinned)
	}
	if _, err := os.Stat(s.path("nix-infra/provision/web1.json")); err == nil {
		t.Error("what is remembered of web1 is still there")
	}
	if journal := s.read("nix-infra/provision/bad.json"); !strings.Contains(journal, `"phase":"look"`) {
		t.Errorf("of bad is remembered %s", journal)
	}
}

// A project without a controller gets one: the first machine.
func TestProvisionFirstController(t *testing.T) {
	s := newShell(t)
	s.must("init", "--nixos-version", "25.11")
	machines, flags := s.newcomers(debian12, "ctl", "web1")
	for _, h := range machines {
		h.NixOS(t)
	}
	flags = append(flags, "--controller-binary", machines["ctl"].Program(t, "nix-infra-controller", "controller"), "--no-deploy", "--method", "none")
	s.expect(Refused, "the project has no controller yet", append([]string{"provision", "ctl", "web1", "--controller", "none"}, flags...)...)

	out := s.must("provision", "ctl", "web1", "--dry-run", "--controller", "web1")
	if !strings.Contains(out, "nothing was made") || !strings.Contains(strings.Split(out, "web1")[1], "and the controller") {
		t.Errorf("the plan is\n%s", out)
	}
	r := s.run(append([]string{"provision", "ctl", "web1", "--json"}, append(flags, "--wait", "300ms")...)...)
	// Nobody answers there in this test; what counts is what was tried, and that both are told of.
	if r.status != SomeFailed || !strings.Contains(r.stderr, "ctl: controller: it does not answer") || !strings.Contains(r.stderr, "web1: agent: ctl did not become the controller") {
		t.Errorf("status %d\n%s", r.status, r.stderr)
	}
	settings := s.read("nix-infra.yaml")
	if !strings.Contains(settings, "tls://127.0.0.1:4222") || !strings.Contains(settings, "wss://127.0.0.1:443") {
		t.Errorf("the settings are\n%s", settings)
	}
	var ended []string
	for _, d := range documents(t, r.out) {
		if d["event"] == "machine" {
			ended = append(ended, fmt.Sprint(d["name"], " ", d["state"], " ", d["phase"]))
			if d["name"] == "ctl" && fmt.Sprint(d["log"]) == "<nil>" {
				t.Error("the controller's log is missing")
			}
		}
	}
	slices.Sort(ended)
	if want := []string{"ctl failed controller", "web1 failed agent"}; !slices.Equal(ended, want) {
		t.Errorf("ended %v, want %v", ended, want)
	}
	// The next run goes on with that machine, though the settings have URLs by now.
	if out := s.must("provision", "web1", "ctl", "--dry-run", "--json"); !strings.Contains(out, `"name":"ctl","state":"exists","host":"127.0.0.1","controller":true`) {
		t.Errorf("the plan is\n%s", out)
	}
}

// Those that are in already are left alone, and deployed to with the rest.
func TestInitMachineDeploys(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	f.Add("web2")
	s.newcomers(debian12, "web1", "web2")
	s.write("node_types/small.nix", "{ }\n")
	out := s.must("init-machine", "--target=web1 web2", "--node-module=node_types/small.nix", "--nixos-version=25.11", "--batch")
	for _, want := range []string{"web1: enrolled before", "web2: enrolled before", "web1: confirmed", ": 2 confirmed\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is missing:\n%s", want, out)
		}
	}
	p, err := project.Open(s.dir, "")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"web1", "web2"} {
		if n := p.Settings.Node(name); n.NodeModule != "node_types/small.nix" || n.NixOSVersion != "25.11" {
			t.Errorf("recorded is %+v", n)
		}
		if f.Tree(name)["cluster_node.nix"] == "" {
			t.Errorf("%s got no node module", name)
		}
	}
	s.expect(Refused, "db9 is not in servers.yaml", "init-machine", "db9", "--node-module", "node_types/small.nix", "--nixos-version", "25.11")
}

func TestProvisionRefuses(t *testing.T) {
	s, _ := newFleet(t)
	s.newcomers(debian12, "web1", "web2")
	for _, c := range []struct{ args, want string }{
		{"", "which machines?"},
		{"web1 Web2", `"Web2" is not a valid name`},
		{"web1 web1", "web1 is named twice"},
		{"all", "all"},
		{"web1 --node-names=web1", "web1 is named twice"},
		{"web1 --jobs 0", "--jobs 0"},
		{"web1 --provider aws", `--provider "aws" is not known`},
		{"web1 --provider hetzner", "HCLOUD_TOKEN is not set"},
		{"web1 --method kexec", `--method "kexec" is not known`},
		{"web1 --label a", `--label "a": expected key=value`},
		{"web1 --label nix-infra/fleet=x", "set by nix-infra itself"},
		{"web1 --controller web2", "--controller web2: it is not among the machines"},
		{"web9 --no-deploy", "web9 is not in servers.yaml"},
		{"web1", "no NixOS version is known for web1"},
		{"web1 --no-deploy --infect-script /nonexistent", "--infect-script: open /nonexistent"},
		{"web1 --no-deploy --mutation ../x", `--mutation "../x": expected the name of a file`},
		{"web1 --no-deploy --mutation x", "--mutation x: open"},
		{"web1 --no-deploy --mutation x --infect-script y", "are two scripts"},
		{"web1 --no-deploy --method none --mutation x", "go with --method infect"},
	} {
		s.expect(Refused, c.want, append([]string{"provision"}, strings.Fields(c.args)...)...)
	}
	s.expect(SomeFailed, "look: there is no conversion script in", "provision", "web1", "--no-deploy", "--nixos-version", "25.11")
	s.expect(SomeFailed, "look: it runs Debian GNU/Linux 12 (bookworm), and method none", "provision", "web1", "--no-deploy", "--method", "none")
}

// A machine that is waited for says each second why; that is shown where it changes.
func TestStepsAreShownOnce(t *testing.T) {
	out := &bytes.Buffer{}
	b, m := &bringIn{app: &app{Environment: Environment{Stdout: out}, json: true}}, &incoming{name: "web1"}
	for _, what := range []string{"reboot", "wait: no answer", "wait: no answer", "wait: connection refused", "wait: no answer"} {
		b.step(m, provision.PhaseReboot, what)
	}
	var said []string
	for _, d := range documents(t, out.String()) {
		said = append(said, fmt.Sprint(d["step"]))
	}
	if want := []string{"reboot", "wait: no answer", "wait: connection refused", "wait: no answer"}; !slices.Equal(said, want) {
		t.Errorf("it says %q, not %q", said, want)
	}
}

// What is pinned for a machine that is missing at its provider goes, unless it is in the fleet all the same.
func TestForgetPins(t *testing.T) {
	s := newShell(t)
	s.write("nix-infra/known_hosts", "web1@nix-infra ssh-ed25519 AAAA\nweb2@nix-infra ssh-ed25519 BBBB\nweb3@nix-infra ssh-ed25519 CCCC\n")
	b := &bringIn{app: &app{dir: s.dir}, machines: []*incoming{{name: "web1", fresh: true, already: true}, {name: "web2", fresh: true}, {name: "web3"}}}
	b.forgetPins()
	if got := s.read("nix-infra/known_hosts"); got != "web1@nix-infra ssh-ed25519 AAAA\nweb3@nix-infra ssh-ed25519 CCCC\n" {
		t.Errorf("pinned are\n%s", got)
	}
}

// The script has to be the one that the settings pin.
func TestInfectScriptIsPinned(t *testing.T) {
	s, _ := newFleet(t)
	_, flags := s.newcomers(debian12, "web1")
	s.write("nix-infra/infect/nixos-infect", "echo not it\n")
	args := append([]string{"provision", "web1", "--no-deploy", "--nixos-version", "25.11"}, flags...)
	s.expect(SomeFailed, "is not the pinned script: its SHA-256 is", args...)
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"provision: { infect: { sha256: "+strings.Repeat("ab", 32)+" } }\n")
	s.write("x.sh", "echo another\n")
	s.expect(Refused, "--infect-script: "+s.path("x.sh")+" is not the pinned script", append(args, "--infect-script", s.path("x.sh"))...)
}

// A script that is there and is the pinned one is kept; another one is nobody's to replace.
func TestInitFetch(t *testing.T) {
	s := newShell(t)
	s.must("init")
	s.write("nix-infra/infect/nixos-infect", "abc")
	s.expect(Refused, "is not the pinned script", "init", "--fetch")
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" // FIPS 180-2, appendix B.1
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"provision: { infect: { commit: "+strings.Repeat("1", 40)+", sha256: "+abc+" } }\n")
	if out := s.must("init", "--fetch"); !strings.Contains(out, "kept conversion script: ") {
		t.Errorf("it says\n%s", out)
	}
}

// nixos-anywhere is whatever has that name on PATH: here a program that notes how it is called. It is seen that it gets the
// node's tree, not that it installs anything.
func TestProvisionByNixosAnywhere(t *testing.T) {
	s := newShell(t)
	t.Setenv("PATH", s.path("bin")+":"+os.Getenv("PATH"))
	s.must("init", "--nixos-version", "25.11", "--controller", "tls://127.0.0.1:1")
	s.write("flake.nix", "{ }\n")
	s.write("configuration.nix", "{ }\n")
	s.write("modules/shared.nix", "{ }\n")
	machines, flags := s.newcomers(debian12, "web1")
	args := append([]string{"provision", "web1", "--no-deploy", "--method", "nixos-anywhere", "--controller", "web1"}, flags...)
	s.expect(SomeFailed, "look: there is no nixos-anywhere on this machine", args...)
	s.write("bin/nixos-anywhere", "#!/bin/sh\necho \"$@\" >"+s.path("asked")+"\nls ${2#path:} >/dev/null 2>&1\ncat \"$(echo \"$2\" | sed 's/^path://; s/#.*//')/flake.nix\" >>"+s.path("asked")+"\necho no disk\nexit 1\n")
	if err := os.Chmod(s.path("bin/nixos-anywhere"), 0o755); err != nil {
		t.Fatal(err)
	}
	r := s.run(args...)
	if r.status != SomeFailed || !strings.Contains(r.stderr, "convert: nixos-anywhere: exit status 1") || !strings.Contains(r.out, "    no disk\n") {
		t.Errorf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
	asked := s.read("asked")
	_, port, _ := strings.Cut(machines["web1"].Address, ":")
	if !strings.Contains(asked, "#web1 --target-host admin@127.0.0.1 --ssh-port "+port+" --copy-host-keys") || !strings.HasSuffix(asked, "{ }\n") {
		t.Errorf("it was asked %s", asked)
	}
}

func TestMigrate(t *testing.T) {
	s, f := newFleet(t)
	machines, flags := s.newcomers(debian12, "web1", "web2")
	s.expect(Refused, "self-hosted does not know a machine web9", "migrate", "web9")
	machines["web1"].NixOS(t)
	if err := os.MkdirAll(machines["web1"].Path("/etc/nixos"), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(machines["web1"].Path("/etc/nixos/networking.nix"), []byte("{ }\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	before := s.snapshot()
	r := s.run("migrate", "--dry-run", "--json")
	if r.status != SomeFailed || !strings.Contains(r.stderr, "web2: it runs Debian GNU/Linux 12 (bookworm), not NixOS") {
		t.Errorf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
	for _, d := range documents(t, r.out) {
		if d["name"] == "web1" && (d["would"] != "enroll" || fmt.Sprint(d["keeps"]) != "[networking.nix]") || d["name"] == "web2" && d["would"] != "fail" {
			t.Errorf("%v", d)
		}
	}
	if after := s.snapshot(); fmt.Sprint(after) != fmt.Sprint(before) {
		t.Error("a dry run changed the project")
	}
	comesUp(t, f, "web1", nil)
	out := s.must(append([]string{"migrate", "web1"}, flags...)...)
	if !strings.Contains(out, "web1: enrolled in ") || !strings.Contains(out, "nix-infra diff web1") || strings.Contains(out, "confirmed") {
		t.Errorf("it says\n%s", out)
	}
	if out := s.must("migrate", "web1", "--dry-run"); !strings.Contains(out, "stay enrolled") {
		t.Errorf("it says\n%s", out)
	}
}

// Ctrl-C ends it, with a word of how to go on; what was begun is remembered.
func TestProvisionInterrupted(t *testing.T) {
	s, _ := newFleet(t)
	_, flags := s.newcomers(debian12, "web1")
	ctx, interrupt := context.WithCancel(t.Context())
	out := &watched{}
	go func() {
		out.await("web1: convert: ")
		interrupt()
	}()
	r := s.runContext(ctx, out, slices.Concat([]string{"provision", "web1", "--no-deploy"}, flags, s.infectScript(`while [ ! -e "$FAKE_ROOT/off" ]; do sleep 0.1; done`))...)
	if r.status != Interrupted || !strings.Contains(r.stderr, "run the same command again") {
		t.Errorf("status %d\n%s", r.status, r.stderr)
	}
	if journal := s.read("nix-infra/provision/web1.json"); !strings.Contains(journal, `"phase":"convert"`) || strings.Contains(journal, "error") {
		t.Errorf("remembered is %s", journal)
	}
}
