//go:build linux

package e2e

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.yaml.in/yaml/v3"

	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// agentless puts the agent's program on a machine, as an image brings it: nothing of it runs.
func (f *fleet) agentless(nodes ...*lab.Node) {
	f.t.Helper()
	for _, n := range nodes {
		if err := n.CopyTo(filepath.Join(programs.dir, "nix-infra-agent"), "/usr/local/bin/nix-infra-agent", 0o755); err != nil {
			f.t.Fatal(err)
		}
	}
}

// joins runs join on a machine, with a token on its standard input.
func (f *fleet) joins(n *lab.Node, token string, more ...string) result {
	f.t.Helper()
	cmd := n.Command(f.ctx, append([]string{"nix-infra-agent", "join", "-"}, more...)...)
	cmd.Stdin = strings.NewReader(token + "\n")
	var out, errOut strings.Builder
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		f.t.Fatalf("join on %s: %v", n.Name, err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// token is one that is made and not waited for.
func (f *fleet) token(node string, more ...string) string {
	f.t.Helper()
	return strings.TrimSpace(f.must(append([]string{"enroll", "--token", node, "--detach"}, more...)...).out)
}

// TestEnrollToken: a machine becomes a node by a token, without SSH, and is deployed to. The token is good for it alone, for
// its name, and for its time.
func TestEnrollToken(t *testing.T) {
	f := newLab(t, "n1", "n2")
	f.enlist(nil)
	n1, n2 := f.nodes["n1"], f.nodes["n2"]
	f.agentless(n1, n2)

	cli := f.command("enroll", "--token", "n1", "--tag", "web")
	stdout, err := cli.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	var errOut strings.Builder
	cli.Stderr = &errOut
	if err := cli.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(stdout).ReadString('\n')
	if err != nil {
		t.Fatalf("no token: %v\n%s", err, &errOut)
	}
	text := strings.TrimSpace(line)
	token, err := protocol.ParseToken(text)
	if err != nil {
		t.Fatal(err)
	}

	// Who holds it can become nobody else.
	signer, key, err := token.Signer()
	if err != nil {
		t.Fatal(err)
	}
	thief := f.raw(signer, protocol.JoinInbox("n1", key))
	request, err := machine.Home{Dir: t.TempDir(), Role: protocol.Node}.Request("n2")
	if err != nil {
		t.Fatal(err)
	}
	message, err := token.Join(request)
	if err != nil {
		t.Fatal(err)
	}
	m, err := thief.Request(protocol.UpSubject("n1", protocol.UpJoin), protocol.Encode(message), time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if reply, err := protocol.Decode[protocol.Reply](m.Data); err != nil || reply.Refused == nil || reply.Refused.Code != protocol.Misaddressed {
		t.Errorf("a request to become n2 by the token for n1: %s (%v)", m.Data, err)
	}
	for _, subject := range []string{protocol.UpSubject("n2", protocol.UpJoin), protocol.UpSubject("n1", protocol.UpBeat), protocol.RequestSubject(protocol.ControllerName, protocol.ListNodes), protocol.RequestSubject("n1", protocol.Ping)} {
		thief.refused(subject, func() error { return thief.Publish(subject, []byte("{}")) })
	}
	other := *token
	other.Node = "n2"
	if r := f.joins(n2, other.String()); r.code != 2 || !strings.Contains(r.errOut, `about "n1"`) {
		t.Errorf("the token with another name in it: %v", r)
	}

	if r := f.joins(n1, text); r.code != 0 || !strings.Contains(r.out, "Its agent runs") {
		t.Fatalf("join: %v", r)
	}
	if err := cli.Wait(); err != nil {
		t.Fatalf("enroll --token: %v\n%s", err, &errOut)
	}
	for _, want := range []string{`"n1"`, "asks from " + f.lab.HostIP() + ", " + n1.IP, "n1: enrolled"} { // the thief is still there
		if !strings.Contains(errOut.String(), want) {
			t.Errorf("the operator does not see %q:\n%s", want, &errOut)
		}
	}
	if s := f.status()["n1"]; !s.Online {
		t.Errorf("n1 is %+v", s)
	}

	t.Run("used", func(t *testing.T) {
		f := f.as(t)
		if r := f.joins(n2, text); r.code != 2 || !strings.Contains(r.errOut, "another machine") || !strings.Contains(r.errOut, "(conflict)") {
			t.Errorf("by another machine: %v", r)
		}
		if r := f.joins(n1, text); r.code != 0 || !strings.Contains(r.out, "already") {
			t.Errorf("by the same one: %v", r)
		}
		if _, there := f.status()["n2"]; there {
			t.Error("n2 is a node")
		}
	})
	t.Run("ended", func(t *testing.T) {
		f := f.as(t)
		ended, _, err := f.keys().NewToken("n2", time.Now().Add(-time.Minute), token.Operator, token.CAPEM(), token.Controllers)
		if err != nil {
			t.Fatal(err)
		}
		if r := f.joins(n2, ended.String()); r.code != 2 || !strings.Contains(r.errOut, "(expired)") {
			t.Errorf("%v", r)
		}
	})
	t.Run("taken back", func(t *testing.T) {
		f := f.as(t)
		void := f.token("n2")
		f.must("enroll", "--revoke-token", "n2")
		if r := f.joins(n2, void); r.code != 2 || !strings.Contains(r.errOut, "(revoked)") {
			t.Errorf("%v", r)
		}
	})
	if _, err := n2.ReadFile(agentDir + "/enrolment.json"); err == nil {
		t.Error("n2 is enrolled")
	}

	f.write("nodes/n1.nix", service("came by itself", ""))
	f.must("deploy", "@web", "--timeout", "60s", "--settle", "1s")
	f.confirmed("n1")
	if log := f.exec(n1, "journalctl", "-u", "hello.service", "-o", "cat"); !strings.Contains(log, "came by itself") {
		t.Errorf("hello.service says %q", log)
	}
	if out := f.must("audit", "--action", "join", "--json").out; !strings.Contains(out, `"conflict"`) || !strings.Contains(out, `"ok"`) {
		t.Errorf("on record is %s", out)
	}
}

// behind keeps all from a machine that it did not ask for and, where ports are given, lets it connect to nothing else.
func (f *fleet) behind(n *lab.Node, ports string) {
	f.t.Helper()
	rules := "add table inet nat { chain in { type filter hook input priority 0; policy drop; iifname lo accept; ct state established,related accept; }; "
	if ports != "" {
		rules += "chain out { type filter hook output priority 0; policy drop; oifname lo accept; tcp dport " + ports + " accept; }; "
	}
	f.exec(n, "nft", rules+"}")
}

// boots does on a machine what cloud-init makes of user-data.
func (f *fleet) boots(n *lab.Node, userData string) {
	f.t.Helper()
	var data struct {
		Files []struct{ Path, Owner, Permissions, Content string } `yaml:"write_files"`
		Run   [][]string                                           `yaml:"runcmd"`
	}
	if err := yaml.Unmarshal([]byte(userData), &data); err != nil || len(data.Files) != 1 || len(data.Run) != 1 {
		f.t.Fatalf("user-data: %v\n%s", err, userData)
	}
	file := data.Files[0]
	if err := n.WriteFile(file.Path, []byte(file.Content), 0o600); err != nil || file.Permissions != "0600" {
		f.t.Fatalf("%v, permissions %s", err, file.Permissions)
	}
	if where := f.exec(n, "stat", "-f", "-c", "%T", file.Path); where != "tmpfs" {
		f.t.Errorf("the token is on a %s", where)
	}
	f.exec(n, append([]string{"systemd-run", "--unit=cloud-final", "--collect", "--"}, data.Run[0]...)...)
}

// TestBehindNAT: machines that accept no connection, one of which may open none but to port 443, become nodes and are used
// as any other.
func TestBehindNAT(t *testing.T) {
	f := newLab(t, "nat", "only443")
	f.enlist(nil)
	nat, only443 := f.nodes["nat"], f.nodes["only443"]
	f.agentless(nat, only443)
	f.behind(nat, "")
	f.behind(only443, "443")
	for _, n := range []*lab.Node{nat, only443} {
		ctx, cancel := context.WithTimeout(f.ctx, 2*time.Second)
		if conn, err := f.lab.Dial(ctx, "tcp", n.IP+":22"); err == nil {
			conn.Close()
			t.Errorf("%s accepts connections, so that this test shows nothing", n.Name)
		}
		cancel()
	}
	if out, err := only443.Exec(f.ctx, "timeout", "2", "bash", "-c", "exec 3<>/dev/tcp/"+f.ctl.IP+"/4222"); err == nil {
		t.Errorf("only443 reaches port 4222: %s", out)
	}

	for _, n := range []*lab.Node{nat, only443} {
		f.boots(n, f.token(n.Name, "--cloud-init")+"\n")
	}
	for _, n := range []*lab.Node{nat, only443} {
		f.eventually(soon, func() string {
			out := f.must("enroll", "--pending", "--json").out
			if !strings.Contains(out, fmt.Sprintf(`"node":%q,"state":"asks"`, n.Name)) {
				return n.Name + " asks: " + out
			}
			return ""
		})
		f.must("enroll", "--pending", n.Name)
	}
	f.write("nodes/nat.nix", service("hello from nat", ""))
	f.write("nodes/only443.nix", service("hello from only443", ""))
	f.must("deploy", "all", "--timeout", "60s", "--settle", "1s")
	f.confirmed("nat", "only443")
	for _, name := range []string{"nat", "only443"} {
		if r := f.must("cmd", "--target="+name, "cat /proc/sys/kernel/hostname"); !strings.Contains(r.out, name) {
			t.Errorf("cmd on %s: %v", name, r)
		}
		boot := f.exec(f.nodes[name], "cat", "/proc/sys/kernel/random/boot_id")
		if r := f.cli("ssh", name, "--pin", "--ssh-key", f.lab.SSHKey(), "--", "cat /proc/sys/kernel/random/boot_id"); r.code != 0 || r.out != boot+"\n" {
			t.Errorf("ssh to %s: %v", name, r)
		}
	}
	connections := f.exec(only443, "ss", "-Htn", "state", "established", "dst", f.ctl.IP)
	if strings.TrimSpace(connections) == "" {
		t.Error("only443 has no connection to the controller")
	}
	for line := range strings.Lines(connections) {
		if !strings.HasSuffix(strings.TrimSpace(line), f.ctl.IP+":443") {
			t.Errorf("only443 is connected otherwise: %s", line)
		}
	}
}
