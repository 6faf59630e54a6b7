package command

import (
	"crypto/ed25519"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"
	"golang.org/x/crypto/ssh/knownhosts"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
)

// symptoms are what doctor finds, but for what is fine and for what is of the machine that the tests run on: "level area about check:
// what", in the order in which it says it.
func (s *shell) symptoms(status int, args ...string) []string {
	s.t.Helper()
	r := s.run(append([]string{"doctor", "--json"}, args...)...)
	if r.status != status || r.stderr != "" {
		s.t.Errorf("status %d, want %d; stderr %s", r.status, status, r.stderr)
	}
	var all []string
	for _, d := range documents(s.t, r.out) {
		if what := d["what"].(string); strings.HasSuffix(what, ";") || what == "" {
			s.t.Errorf("what is wrong is %q", what)
		}
		if d["level"] != "ok" && d["area"] != "operator" {
			all = append(all, strings.ReplaceAll(fmt.Sprintf("%v %v %v %v: %v", d["level"], d["area"], d["about"], d["check"], d["what"]), s.dir, "DIR"))
		}
	}
	return all
}

// has is an error where not exactly one of them has each of these beginnings, and where there are others.
func has(t *testing.T, symptoms []string, want ...string) {
	t.Helper()
	rest := slices.Clone(symptoms)
	for _, w := range want {
		i := slices.IndexFunc(rest, func(s string) bool { return strings.HasPrefix(s, w) })
		if i < 0 {
			t.Errorf("nothing begins with %q in\n%s", w, strings.Join(symptoms, "\n"))
			continue
		}
		rest = slices.Delete(rest, i, i+1)
	}
	if len(rest) > 0 {
		t.Errorf("not expected:\n%s", strings.Join(rest, "\n"))
	}
}

// healthy is a project and a fleet with which nothing is wrong.
func healthy(t *testing.T) (*shell, *fleettest.Fleet) {
	s, f := newFleet(t)
	s.write("flake.lock", `{"nodes":{"nixpkgs":{"original":{"ref":"nixos-25.11"}}}}`)
	for _, name := range []string{"web1", "web2"} {
		f.Add(name).Script(agentAnswers("/etc/systemd/system/nix-infra-agent.service", nil))
		f.Change(name, func(n *protocol.NodeState) {
			n.Beat.Agent, n.Beat.Phase, n.Beat.Vitals = protocol.Build(), protocol.Confirmed, protocol.Vitals{DiskTotal: 1 << 36, DiskFree: 1 << 35}
		})
	}
	return s, f
}

// agentAnswers is a node whose agent's unit is that file, and whose policy is as the error says.
func agentAnswers(unit string, policy error) fleettest.Script {
	return fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
		switch o.Action {
		case protocol.Ping:
			return protocol.Pong{Agent: protocol.Build(), Time: time.Now()}, nil
		case protocol.ShowUnit:
			return protocol.UnitStatus{File: unit}, nil
		case protocol.ReadFiles:
			if policy == nil {
				policy = protocol.Refuse(protocol.Denied, "the node's policy does not show /")
			}
			return nil, policy
		}
		return nil, protocol.Refuse(protocol.Unknown, "no %s here", o.Action)
	}}
}

// hostKeys are lines of a known_hosts file.
func hostKeys(t *testing.T, names ...string) (lines string) {
	key, err := ssh.NewPublicKey(ed25519.PublicKey(make([]byte, ed25519.PublicKeySize)))
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range names {
		lines += knownhosts.Line([]string{name}, key) + "\n"
	}
	return lines
}

// like makes the controller know of a node what it knows of another.
func like(f *fleettest.Fleet, name, other string) {
	record := f.Record(other)
	f.Change(name, func(n *protocol.NodeState) { *n = *record; n.Name = name })
}

func TestDoctorFindsNothing(t *testing.T) {
	s, _ := healthy(t)
	has(t, s.symptoms(OK))
	out := s.must("doctor")
	if !strings.HasPrefix(lines(out)[len(lines(out))-1], "0 problems, ") || strings.Contains(out, "it is there") {
		t.Errorf("%s", out)
	}
	all := s.must("doctor", "web1", "--verbose")
	if !strings.Contains(all, "ok       web1: it is there") || strings.Contains(all, "web2:") {
		t.Errorf("%s", all)
	}
	s.expect(Refused, "target nobody matches no node", "doctor", "nobody")
	s.expect(Refused, `nothing follows "not"`, "doctor", "not")
}

// TestDoctorProject: each mistake of a project folder is found, by its file.
func TestDoctorProject(t *testing.T) {
	s, f := healthy(t)
	f.Register("old") // so that its host key is no stale one
	like(f, "old", "web2")
	s.write(".env", "A=1\n")
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"nodes: { web1: { nixos_version: 25.05 } }\n")
	s.write("nodes/web1.nix", "[%%nope%%] [%%secrets/missing%%]\n")
	s.write("nodes/web2.nix", "[%%secrets/old.token%%]\n")
	s.write("secrets/old.token", "cGxhaW4K\n")
	s.write("ssh/other", "private\n")
	s.write("nodes/Web_3.nix", "{ }\n")
	s.write("servers.yaml", "servers:\n  web1: { ip: 192.0.2.7, ssh_key: ssh/other }\n  web2: { ip: 192.0.2.7, ssh_key: ssh/gone }\n")
	s.write("nix-infra/known_hosts", hostKeys(t, "old@nix-infra", "gone@nix-infra", "192.0.2.9"))
	if err := os.Remove(s.path("ssh", "nixinfra")); err != nil {
		t.Fatal(err)
	}
	has(t, s.symptoms(SomeFailed, "web1", "web2"),
		"problem project web1 placeholders: nodes/web1.nix:1: unknown placeholder [%%nope%%]",
		`warning project nodes/Web_3.nix names: no node can have it: "Web_3" is not a valid name`,
		"warning project servers.yaml:3 ssh-key: the SSH key by which web2 is brought in is not here: DIR/ssh/gone",
		"problem project DIR/.env permissions: others on this machine can read it (its mode is 0644)",
		"problem project DIR/ssh/other permissions: others on this machine can read it",
		"warning project DIR/ssh/nixinfra ssh-key: the SSH key",
		"problem project secrets/missing secrets: nodes/web1.nix:1 names it, and it is not there",
		"problem project secrets/old.token secrets: it is stored as the earlier tool did",
		"warning project flake.lock lock: it locks nixpkgs at nixos-25.11, and web1 is to have 25.05",
		`warning project DIR/nix-infra/known_hosts host-keys: it has the host key of "gone"`,
	)
	for text, want := range map[string]string{"x": "problem project flake.lock lock: it is no lock", "": "warning project flake.lock lock: there is none"} {
		if text == "" {
			os.Remove(s.path("flake.lock"))
		} else {
			s.write("flake.lock", text)
		}
		if found := s.symptoms(SomeFailed, "web1"); !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, want) }) {
			t.Errorf("nothing begins with %q in %q", want, found)
		}
	}
	s.write("nix-infra/known_hosts", hostKeys(t, "web1@nix-infra")+"web2@nix-infra ssh-ed25519 AAAA\n")
	want := "problem project DIR/nix-infra/known_hosts host-keys: no machine is reached by SSH before it can be read: knownhosts: DIR/nix-infra/known_hosts:2: "
	if found := s.symptoms(SomeFailed, "web1"); !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, want) }) {
		t.Errorf("nothing begins with %q in %q", want, found)
	}
	// In this order: with settings that can't be read, nothing else is.
	for _, f := range []struct{ file, text string }{{"servers.yaml", "servers:\n  a: {}\n"}, {"nix-infra.yaml", "fleet: No\nx: 1\n"}} {
		file := f.file
		s.write(file, f.text)
		found := s.symptoms(SomeFailed)
		if !slices.ContainsFunc(found, func(f string) bool { return strings.Contains(f, file+":") }) {
			t.Errorf("%s: %q", file, found)
		}
	}
}

// What must stay private and git would take, or has taken already, is told of.
func TestDoctorGit(t *testing.T) {
	if _, err := exec.LookPath("git"); err != nil {
		without(t, "git")
	}
	s, _ := healthy(t)
	git := func(args ...string) {
		t.Helper()
		cmd := exec.Command("git", append([]string{"-C", s.dir, "-c", "user.name=a", "-c", "user.email=a@example.org"}, args...)...)
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
	}
	git("init", "-q")
	has(t, s.symptoms(OK))
	s.write(".gitignore", "ssh/\n")
	s.write(".env", "A=1\n")
	if err := os.Chmod(s.path(".env"), 0o600); err != nil {
		t.Fatal(err)
	}
	git("add", ".env")
	has(t, s.symptoms(SomeFailed),
		"problem project .env git: it is in the repository",
		"warning project .gitignore git: git would add nix-infra/admin.creds",
	)
	// A repository that came with the folder says which programs git runs to look into it.
	git("config", "core.fsmonitor", "touch "+s.path("ran")+"; false")
	s.symptoms(SomeFailed)
	if _, err := os.Stat(s.path("ran")); err == nil {
		t.Error("doctor ran a program that the project's repository names")
	}
}

// TestDoctorNodes: each trouble of a node is found, by the node's name.
func TestDoctorNodes(t *testing.T) {
	s, f := healthy(t)
	f.Register("fresh")
	n := f.Add("web3")
	n.Script(agentAnswers("/run/systemd/system/nix-infra-agent.service", protocol.Refuse(protocol.Failed, "nix-infra/policy.json of the running system: field \"v\": 2")))
	f.Change("web3", func(n *protocol.NodeState) {
		n.Beat.Agent, n.Beat.Phase, n.Beat.Deployment, n.Beat.Reason = "v0.0.1", protocol.RolledBack, "d1", "unit web failed"
		n.Beat.FailedUnits, n.Beat.RebootNeeded, n.Beat.Quarantine = []string{"web.service"}, true, []string{"/nix/store/x"}
		n.Beat.Vitals, n.Lock = protocol.Vitals{DiskTotal: 1 << 36, DiskFree: 1 << 20}, &protocol.Lock{By: "bob", Reason: "migration"}
	})
	f.Add("gone").Vanish()
	f.Add("mute").Silence()
	like(f, "mute", "web1")
	f.Add("late").Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
		if o.Action == protocol.Ping {
			return protocol.Pong{Time: time.Now().Add(-time.Minute)}, nil
		}
		return agentAnswers("/etc/systemd/system/nix-infra-agent.service", nil).Answers(o)
	}})
	f.Change("late", func(n *protocol.NodeState) { n.Beat.Agent, n.Beat.Phase = protocol.Build(), protocol.Confirmed })
	has(t, s.symptoms(SomeFailed),
		"problem node fresh online: it was enrolled, and never heard of",
		"problem node gone online: its heartbeats stopped",
		"problem node web3 deployment: its last deployment ended rolled-back: unit web failed",
		"warning node web3 version: it runs v0.0.1",
		"problem node web3 units: units have failed: web.service",
		"warning node web3 reboot: ",
		"warning node web3 lock: it is locked by bob: migration",
		"warning node web3 quarantine: 1 system it rolled back from",
		"problem node web3 disk: 1.0 MiB of 64.0 GiB are free",
		"warning node web3 agent: its agent lasts until the next boot",
		`problem node web3 policy: it allows nobody anything: nix-infra/policy.json of the running system: field "v": 2`,
		"problem node late clock: its clock is ",
		"problem node mute answers: it beats, but does not answer (ping)",
		"problem node mute answers: it beats, but does not answer (unit)",
		"problem node mute answers: it beats, but does not answer (files)",
	)
}

// SSH that should be closed and is not is found from here.
func TestDoctorSSH(t *testing.T) {
	s, f := healthy(t)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	s.write("nix-infra.yaml", s.read("nix-infra.yaml")+"nodes:\n  web1: { close_ssh: true, ssh: '"+l.Addr().String()+"' }\n  web2: { close_ssh: true, ssh: '127.0.0.1:1' }\n  web3: { close_ssh: true }\n")
	f.Change("web1", func(n *protocol.NodeState) {})
	f.Add("web3").Script(agentAnswers("/etc/systemd/system/nix-infra-agent.service", nil))
	f.Change("web3", func(n *protocol.NodeState) {
		n.IPv4, n.Beat.IPv4, n.Beat.Agent, n.Beat.Phase = "", "", protocol.Build(), protocol.Confirmed
	})
	has(t, s.symptoms(SomeFailed),
		"problem node web1 ssh: "+l.Addr().String()+" takes connections from here, and close_ssh says that it should not",
		"left-out node web3 ssh: whether SSH is closed: its address is not known",
	)
}

func TestDoctorController(t *testing.T) {
	s, f := healthy(t)
	f.Health(&protocol.ControllerHealth{Version: "v0.0.1", Time: time.Now().Add(-20 * time.Second), Etcd: "no leader\x1b[2J", Records: protocol.StreamHealth{Error: "disk full"}, DiskTotal: 1 << 36, DiskFree: 1 << 29})
	s.write("nix-infra.yaml", strings.Replace(s.read("nix-infra.yaml"), f.URL, "wss://127.0.0.1:1\n  - "+f.URL, 1))
	has(t, s.symptoms(SomeFailed),
		"problem controller wss://127.0.0.1:1 reachable: can't reach the controller at wss://127.0.0.1:1",
		"warning controller controller version: it runs v0.0.1",
		"problem controller controller clock: its clock is ",
		"problem controller controller etcd: etcd does not answer: no leader",
		"problem controller controller record: record does not answer: disk full",
		"warning controller controller disk: 512.0 MiB of 64.0 GiB are free",
	)
	f.Health(nil)
	s.write("nix-infra.yaml", strings.Replace(s.read("nix-infra.yaml"), "wss://127.0.0.1:1\n  - ", "", 1))
	has(t, s.symptoms(OK), "warning controller controller version: it is older than this program")
}

// It works where nobody answers, without a password, as a viewer, and in a folder that is no project; and says what it left out.
func TestDoctorLeavesOut(t *testing.T) {
	s, f := healthy(t)
	s.write("vera.creds", string(f.Credentials("vera", protocol.Viewer, time.Time{})))
	if err := os.Chmod(s.path("vera.creds"), 0o600); err != nil {
		t.Fatal(err)
	}
	password := s.env["SECRETS_PASS"]
	delete(s.env, "SECRETS_PASS")
	has(t, s.symptoms(OK, "--creds", s.path("vera.creds")))
	has(t, s.symptoms(OK, "--batch"),
		"left-out project controller and nodes credentials: nobody can be asked without credentials: ",
		"left-out project nodes/ placeholders: the addresses of nodes")
	s.env["SECRETS_PASS"] = "wrong"
	has(t, s.symptoms(SomeFailed),
		"problem project credentials credentials: nobody can be asked with them: the password does not open",
		"left-out project nodes/ placeholders: the addresses of nodes")
	s.env["SECRETS_PASS"] = password
	s.write("nodes/web1.nix", "[%%localhost.ipv4%%] [%%web2.overlayIp%%] [%%nope%%]\n")
	s.write("nix-infra/known_hosts", hostKeys(t, provision.NodeAlias("web1")))
	f.Stop()
	has(t, s.symptoms(SomeFailed, "web1"),
		"left-out project nodes/ placeholders: the addresses of nodes",
		"problem project web1 placeholders: nodes/web1.nix:1: unknown placeholder [%%nope%%]",
		"left-out project DIR/nix-infra/known_hosts host-keys: whether all of them",
		"problem controller "+f.URL+" reachable: can't reach",
		"left-out controller controller health: no controller answers")
	empty := newShell(t)
	found := empty.symptoms(SomeFailed)
	if len(found) == 0 || !strings.HasPrefix(found[0], "problem project DIR settings: it is not a project folder yet") {
		t.Errorf("%q", found)
	}
	if want := "problem project any-node placeholders: configuration.nix is missing"; !slices.ContainsFunc(found, func(f string) bool { return strings.HasPrefix(f, want) }) {
		t.Errorf("nothing begins with %q in %q", want, found)
	}
	if left, err := os.ReadDir(empty.dir); err != nil || len(left) != 0 {
		t.Errorf("it left something behind: %v, %v", left, err)
	}
}
