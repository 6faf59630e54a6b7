package command

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/provision/sshtest"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// comesUp has a node beat as soon as the controller knows it, as its agent would.
func comesUp(t *testing.T, f *fleettest.Fleet, name string, before *protocol.NodeState) {
	go func() {
		for t.Context().Err() == nil {
			if r := f.Record(name); r != nil && (before == nil || r.Enrolled.After(before.Enrolled)) {
				f.Change(name, func(s *protocol.NodeState) {
					now := time.Now().UTC()
					s.Online, s.LastSeen, s.Beat = true, &now, &protocol.Beat{Version: 1}
				})
				return
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
}

func TestEnrollOverSSH(t *testing.T) {
	s, f := newFleet(t)
	h := sshtest.Start(t)
	binary := h.Program(t, "nix-infra-agent", "node")
	args := []string{"enroll", "web1", "--ssh", "admin@" + h.Address, "--ssh-key", h.KeyFile, "--agent-binary", binary}
	comesUp(t, f, "web1", nil)
	enrolled := s.run(append(args, "--tag", "web", "--tag", "eu")...)
	const taken = "the host key of web1 was not known, and the one that was shown is pinned: "
	if enrolled.status != OK || !strings.Contains(enrolled.stderr, taken) {
		t.Fatalf("%+v", enrolled)
	}
	out := enrolled.out
	for _, step := range []string{"connect to the controller", "upload nix-infra-agent", "make its keys", "sign", "install and start", "wait for its first sign of life", "web1: enrolled"} {
		if !strings.Contains(out, step) {
			t.Errorf("the step %q is not shown:\n%s", step, out)
		}
	}
	m, err := machine.Home{Dir: h.Path("/var/lib/nix-infra-agent"), Role: protocol.Node}.Open()
	if err != nil {
		t.Fatal(err)
	}
	r := f.Record("web1")
	key, _ := m.Key.PublicKey()
	if r.Key != key || r.XKey == "" || r.IPv4 == "127.0.0.1" || !slices.Equal(r.Tags, []string{"eu", "web"}) || r.By != "alice" || r.System != "x86_64-linux" {
		t.Errorf("registered as %+v", r.NodeRecord)
	}
	if !slices.Equal(m.Answer.Controllers, []string{f.URL}) {
		t.Errorf("the machine was told of %v", m.Answer.Controllers)
	}

	comesUp(t, f, "web1", r) // again: the keys and the tags stay
	if r := s.run(args...); r.status != OK || strings.Contains(r.stderr, taken) {
		t.Errorf("%+v", r)
	}
	if again := f.Record("web1"); again.Key != key || !slices.Equal(again.Tags, r.Tags) {
		t.Errorf("enrolled again, it is %+v", again.NodeRecord)
	}
	h.ChangeHostKey(t)
	s.expect(Refused, "another host key", args...)
}

func TestEnrollThatIsNeverHeardOf(t *testing.T) {
	s, f := newFleet(t)
	h := sshtest.Start(t)
	r := s.run("enroll", "web1", "--ssh", h.Address, "--ssh-key", h.KeyFile, "--agent-binary", h.Program(t, "nix-infra-agent", "node"), "--wait", "300ms")
	if r.status != Unanswered || !strings.Contains(r.stderr, "nothing was heard") || !strings.Contains(r.out, "last line of the log") {
		t.Errorf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
	if strings.Contains(r.out, "\x1b") {
		t.Error("the machine's log reaches the terminal as it is")
	}
	if f.Record("web1") == nil {
		t.Error("not registered")
	}
}

func TestEnrollFailureNamesTheStep(t *testing.T) {
	s, f := newFleet(t)
	h := sshtest.Start(t)
	h.FailSystemctl()
	r := s.run("enroll", "web1", "--ssh", h.Address, "--ssh-key", h.KeyFile, "--agent-binary", h.Program(t, "nix-infra-agent", "node"))
	if r.status != Refused || !strings.Contains(r.stderr, "install and start nix-infra-agent.service: systemctl daemon-reload") {
		t.Errorf("status %d\n%s", r.status, r.stderr)
	}
	f.Stop()
	s.expect(Refused, "can't reach the controller", "enroll", "web2", "--ssh", h.Address, "--ssh-key", h.KeyFile, "--agent-binary", "/nonexistent")
}

func TestEnrollController(t *testing.T) {
	s, f := newFleet(t)
	h := sshtest.Start(t)
	out := s.must("enroll", "--controller", "ctl", "--ssh", h.Address, "--ssh-key", h.KeyFile, "--controller-binary", h.Program(t, "nix-infra-controller", "controller"), "--address", "ctl.example.org")
	if !strings.Contains(out, "ctl: answers") {
		t.Errorf("it does not say that it answers:\n%s", out)
	}
	m, err := machine.Home{Dir: h.Path("/var/lib/nix-infra-controller"), Role: protocol.Controller}.Open()
	if err != nil {
		t.Fatal(err)
	}
	for _, host := range []string{"ctl", "ctl.example.org", "localhost", "127.0.0.1"} {
		if err := m.Certificate.Leaf.VerifyHostname(host); err != nil {
			t.Error(err)
		}
	}
	if f.Record("ctl") != nil {
		t.Error("a controller was registered as a node")
	}
}

// The first controller of a project that names none says where it is.
func TestEnrollFirstController(t *testing.T) {
	s := newShell(t)
	s.must("init")
	h := sshtest.Start(t)
	r := s.run("enroll", "--controller", "ctl", "--ssh", h.Address, "--ssh-key", h.KeyFile, "--controller-binary", h.Program(t, "nix-infra-controller", "controller"), "--wait", "100ms")
	if r.status != Unanswered || !strings.Contains(r.stderr, "was set up and started") {
		t.Errorf("status %d\n%s", r.status, r.stderr)
	}
	if got := s.read("nix-infra.yaml"); !strings.Contains(got, "tls://127.0.0.1:4222") || !strings.Contains(got, "wss://127.0.0.1:443") {
		t.Errorf("the settings don't name it:\n%s", got)
	}
}

func TestEnrollByFile(t *testing.T) {
	s, f := newFleet(t)
	home := machine.Home{Dir: t.TempDir(), Role: protocol.Node}
	request, err := home.Request("web2")
	if err != nil {
		t.Fatal(err)
	}
	s.stdin = string(protocol.Encode(request))
	answer := s.must("enroll", "--request", "-", "--tag", "web")
	if _, err := home.Load([]byte(answer)); err != nil {
		t.Fatalf("the machine does not take the answer: %v", err)
	}
	if r := f.Record("web2"); r == nil || r.Key != request.Key || !slices.Equal(r.Tags, []string{"web"}) {
		t.Errorf("registered as %+v", r)
	}
	s.expect(Refused, "the request is for web2", "enroll", "web3", "--request", "-")
	s.expect(Refused, "is a node's", "enroll", "--controller", "--request", "-")

	other, err := machine.Home{Dir: t.TempDir(), Role: protocol.Node}.Request("web2")
	if err != nil {
		t.Fatal(err)
	}
	s.stdin = string(protocol.Encode(other))
	if r := s.run("enroll", "--request", "-"); r.status != Refused || r.out != "" || !strings.Contains(r.stderr, "nothing was signed") {
		t.Errorf("another key under the same name: status %d\n%s%s", r.status, r.out, r.stderr)
	}

	request.IPv4 = "192.0.2.66" // changed on the way
	s.stdin = string(protocol.Encode(request))
	s.expect(Refused, "not signed by the key that it names", "enroll", "--request", "-")
}

func TestEnrollByFileWithoutController(t *testing.T) {
	s, f := newFleet(t)
	home := machine.Home{Dir: t.TempDir(), Role: protocol.Node}
	request, err := home.Request("web2")
	if err != nil {
		t.Fatal(err)
	}
	in, out := filepath.Join(t.TempDir(), "request"), filepath.Join(t.TempDir(), "answer")
	if err := os.WriteFile(in, protocol.Encode(request), 0o600); err != nil {
		t.Fatal(err)
	}
	s.must("enroll", "--request", in, "--answer", out, "--offline")
	if f.Record("web2") != nil {
		t.Error("--offline registered it")
	}
	f.Stop()
	r := s.run("enroll", "--request", in, "--answer", out)
	if r.status != Unanswered || !strings.Contains(r.stderr, "run the same command again") {
		t.Errorf("status %d\n%s", r.status, r.stderr)
	}
	answer, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := home.Load(bytes.TrimSpace(answer)); err != nil {
		t.Error(err)
	}
}
