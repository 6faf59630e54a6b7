package command

import (
	"context"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

func TestExecViaSSH(t *testing.T) {
	s, f := newFleet(t)
	d := startSSHD(t, s.path("ssh", "nixinfra.pub"))
	if d.user != "root" {
		t.Skip("--via=ssh is root's on the node; the sshd of this test is another user's")
	}
	if _, err := exec.LookPath("setsid"); err != nil {
		without(t, "setsid")
	}
	var pins strings.Builder
	for _, name := range []string{"web1", "web2", "no", "away"} {
		pins.WriteString(provision.NodeAlias(name) + " " + d.hostKey + "\n")
	}
	s.write("nix-infra/known_hosts", pins.String())
	f.Add("web1").Script(fleettest.Script{Tunnels: d.toSSHD})
	f.Add("web2").Script(fleettest.Script{Tunnels: d.toSSHD})
	f.Add("no").Script(fleettest.Script{Tunnels: func(string) (func(*tunnel.Conn), error) {
		return nil, protocol.Refuse(protocol.Denied, "no tunnels here")
	}})
	f.Register("away")
	for _, c := range []struct {
		args        []string
		status      int
		out, stderr string
	}{
		{[]string{"cmd", "--via=ssh", "--target=web1", "for i in 1 2; do echo \"it's $i\"; done | wc -l; echo err >&2; cat"}, OK, "2\n", "err\n"},
		{[]string{"exec", "web1", "--via=ssh", "--", "printf", "%s;", "a  b", "it's", "$HOME", ""}, OK, "a  b;it's;$HOME;;", ""},
		{[]string{"cmd", "--via=ssh", "--target=web1", "exit 7"}, SomeFailed, "", "nix-infra: web1: exited with 7\n"},
		{[]string{"cmd", "--via=ssh", "--target=web1", "cat <<'X' | base64 -d\naGVsbG8K\nX\n"}, OK, "hello\n", ""},
		{[]string{"cmd", "--via=ssh", "--target=no", "true"}, Refused, "", "no tunnels here (denied)\n"},
		{[]string{"cmd", "--via=ssh", "--target=away", "true"}, Unanswered, "", "no answer from away\n"},
		{[]string{"cmd", "--via=ssh", "--target=web1", "--ssh-key=nobody", "true"}, SomeFailed, "", "there is no SSH key"},
		{[]string{"fleet", "cmd", "--target=web1", "echo out; echo err >&2"}, OK, "err\n", ""},
	} {
		s.env["NIX_INFRA_VIA"] = map[bool]string{true: "ssh"}[c.args[0] == "fleet"]
		r := s.run(c.args...)
		if r.status != c.status || !strings.Contains(r.out, c.out) || !strings.Contains(r.stderr, c.stderr) || c.out == "" && r.out != "" {
			t.Errorf("%q: %+v", c.args, r)
		}
	}
	delete(s.env, "NIX_INFRA_VIA")
	r := s.run("cmd", "--via=ssh", "--target=web1 web2 away", "echo $((6*7))")
	if r.status != Unanswered || !strings.Contains(r.out, "web1: 42\n") || !strings.Contains(r.out, "web2: 42\n") {
		t.Errorf("%+v", r)
	}
	docs := documents(t, s.run("cmd", "--via=ssh", "--target=web1", "--json", "echo x; exit 3").out)
	if len(docs) != 2 || docs[0]["text"] != "x\n" || docs[1]["exit"] != 3.0 || docs[1]["result"] != "exit-code" {
		t.Errorf("%v", docs)
	}

	// Ctrl-C ends what runs there, with its children, and what it says of that is heard.
	ctx, interrupt := context.WithCancel(t.Context())
	defer interrupt()
	out := &watched{}
	ended := make(chan run, 1)
	go func() {
		ended <- s.runContext(ctx, out, "cmd", "--via=ssh", "--target=web1", "trap 'echo bye; exit 1' TERM; sleep 1000 & echo $!; wait")
	}()
	out.await("\n")
	interrupt()
	r = <-ended
	child, rest, _ := strings.Cut(r.out, "\n")
	pid, err := strconv.Atoi(child)
	if r.status != Interrupted || err != nil || rest != "bye\n" {
		t.Fatalf("%+v, %v", r, err)
	}
	for deadline := time.Now().Add(time.Minute); syscall.Kill(pid, 0) == nil; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("a child of what was ended runs on")
		}
	}
}
