//go:build linux

package e2e

import (
	"bufio"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/e2e/testos"
)

// inventory lists machines of the lab in the project's servers.yaml, as this user's.
func (f *fleet) inventory(user string, nodes ...*lab.Node) {
	f.t.Helper()
	servers := "servers:\n"
	for _, n := range nodes {
		f.nodes[n.Name] = n
		servers += fmt.Sprintf("  %s: { ip: %s, ssh_key: %s, username: %s }\n", n.Name, n.IP, f.lab.SSHKey(), user)
	}
	f.write("servers.yaml", servers)
}

// plain boots machines before anybody made them NixOS, where admin may sudo and root may not log in, and lists them.
func (f *fleet) plain(names ...string) {
	f.t.Helper()
	nodes, err := f.lab.StartWith(f.ctx, lab.NodeOptions{Plain: true, SudoUser: "admin"}, names...)
	if err != nil {
		f.t.Fatal(err)
	}
	f.inventory("admin", nodes...)
	f.write("infect.sh", lab.InfectScript)
}

// bootstrap is provision for machines of the lab, with what else it is told.
func (f *fleet) bootstrap(names []string, more ...string) []string {
	return slices.Concat([]string{"provision"}, names, []string{"--infect-script", filepath.Join(f.project, "infect.sh"), "--wait", soon.String(), "--batch"}, more)
}

// confirmed waits until nodes are said to run what was deployed, as they do: a report and the beat beside it come one after the
// other.
func (f *fleet) confirmed(names ...string) {
	f.t.Helper()
	f.eventually(soon, func() string {
		all := f.status()
		for _, name := range names {
			if s := all[name]; s.State != "confirmed" || !s.Online || s.Closure != f.running(f.nodes[name]) {
				return fmt.Sprintf("%s is %+v", name, s)
			}
		}
		return ""
	})
}

// TestProvisionSelfHosted: two machines with Debian and sshd become nodes that run their configuration. One logs in as a
// user who may sudo; one of them can be reached from another machine only.
func TestProvisionSelfHosted(t *testing.T) {
	f := bareLab(t)
	f.copyProject()
	f.plain("web1", "inner")
	gate, err := f.lab.Start(f.ctx, "gate")
	if err != nil {
		t.Fatal(err)
	}
	inner := f.nodes["inner"]
	f.exec(inner, "nft", "add table inet wall; add chain inet wall in { type filter hook input priority 0; }; add rule inet wall in tcp dport 22 ip saddr != "+gate[0].IP+" reject")
	names := []string{"web1", "inner"}
	for _, name := range names {
		f.write("nodes/"+name+".nix", service("this is "+name, ""))
	}
	if r := f.cli(f.bootstrap([]string{"inner"}, "--no-deploy", "--dry-run")...); r.code != 0 || !strings.Contains(r.out, "nothing was made") {
		t.Errorf("the dry run: %v", r)
	}
	f.setting("provision: { jump: root@" + gate[0].IP + " }")

	r := f.must(f.bootstrap(names)...)
	f.confirmed(names...)
	for _, name := range names {
		for _, phase := range []string{"reach", "look", "convert", "reboot", "verify", "agent", "heartbeat"} {
			if !strings.Contains(r.out, name+": "+phase+": ") {
				t.Errorf("%s did not go through %s:\n%s", name, phase, r.out)
			}
		}
		f.says(f.nodes[name], f.running(f.nodes[name]), "this is "+name)
		if got := f.exec(f.nodes[name], "cat", "/etc/nixos/networking.nix"); !strings.Contains(got, f.nodes[name].IP) {
			t.Errorf("%s has lost its own networking.nix: %q", name, got)
		}
	}
	if came := f.exec(gate[0], "sh", "-c", "journalctl -o cat -t sshd -t sshd-session | grep -c 'Accepted publickey for root'"); came == "0" {
		t.Error("nobody went through the gate")
	}
	if r := f.must(f.bootstrap(names, "--no-deploy")...); strings.Count(r.out, ": enrolled before\n") != 2 {
		t.Errorf("once more: %v", r)
	}
}

// setting adds to the project's settings.
func (f *fleet) setting(text string) {
	f.t.Helper()
	file := filepath.Join(f.project, "nix-infra.yaml")
	old, err := os.ReadFile(file)
	if err != nil {
		f.t.Fatal(err)
	}
	f.write("nix-infra.yaml", strings.TrimRight(string(old), "\n")+"\n"+text+"\n")
}

// TestProvisionResumes kills the program in each phase, each time on the way of another machine, has one run bring in them all,
// kills that, too, when it deploys, and has the next one finish.
func TestProvisionResumes(t *testing.T) {
	f := bareLab(t)
	f.copyProject()
	// By the machine: what is said when it is killed. The conversion of held waits in its middle until the next run.
	kills := map[string]string{
		"ctl": "controller: upload", "m-reach": "reach: ", "m-look": "look: ", "m-convert": "convert: ", "m-held": "convert: the conversion script runs",
		"m-reboot": "reboot: ", "m-verify": "verify: ", "m-agent": "agent: upload", "m-keys": "agent: hand over", "m-beat": "heartbeat: ",
	}
	names := []string{"ctl", "m-reach", "m-look", "m-convert", "m-held", "m-reboot", "m-verify", "m-agent", "m-keys", "m-beat"}
	f.plain(names...)
	held := f.nodes["m-held"]
	f.exec(held, "touch", "/run/lab-infect-hold")

	// The controller first: the others need one.
	f.killAt(syscall.SIGKILL, "ctl", kills["ctl"])
	f.must(f.bootstrap([]string{"ctl"}, "--no-deploy")...)
	// It hears of nobody until all are killed: none is in before.
	var addresses []string
	for _, name := range names[1:] {
		addresses = append(addresses, f.nodes[name].IP)
	}
	f.exec(f.nodes["ctl"], "nft", "add table inet deaf { chain in { type filter hook input priority -10; ip saddr { "+strings.Join(addresses, ", ")+" } reject; }; }")
	var runs sync.WaitGroup
	for _, name := range names[1:] {
		runs.Go(func() {
			signal := syscall.SIGKILL
			if name == "m-look" {
				signal = syscall.SIGINT
			}
			f.killAt(signal, name, kills[name])
		})
	}
	runs.Wait()
	f.exec(f.nodes["ctl"], "nft", "delete table inet deaf")
	if t.Failed() {
		return
	}
	if got := f.exec(held, "systemctl", "is-active", "nix-infra-convert.service"); got != "active" {
		t.Errorf("without the program, the conversion is %s", got)
	}
	released := false
	f.kill(syscall.SIGKILL, f.command(f.bootstrap(names)...), func(line string) bool {
		if line == "m-held: convert: the conversion is under way" { // and not made anew
			f.exec(held, "rm", "/run/lab-infect-hold")
			released = true
		}
		return line == "rollout running"
	})
	if !released {
		t.Fatal("the conversion of m-held was not gone on with")
	}
	f.must(f.bootstrap(names)...)
	f.confirmed(names...)
	if left, err := os.ReadDir(filepath.Join(f.project, "nix-infra", "provision")); err == nil {
		t.Errorf("remembered are still %v", left)
	}
}

// killAt has the program bring a machine in, and ends it when it says something of it.
func (f *fleet) killAt(signal syscall.Signal, name, says string) {
	said := f.kill(signal, f.command(f.bootstrap([]string{name}, "--no-deploy")...), func(line string) bool { return strings.HasPrefix(line, name+": "+says) })
	if strings.Contains(said, "enrolled in") {
		f.t.Errorf("%s was not ended at %q:\n%s", name, says, said)
	}
}

// kill runs the program, ends it at a line that it says, and gives all that it said.
func (f *fleet) kill(signal syscall.Signal, cmd *exec.Cmd, at func(line string) bool) string {
	out, err := cmd.StdoutPipe()
	if err == nil {
		err = cmd.Start()
	}
	if err != nil {
		f.t.Error(err)
		return ""
	}
	var said []string
	killed := false
	for lines := bufio.NewScanner(out); lines.Scan(); {
		said = append(said, lines.Text())
		if !killed && at(lines.Text()) {
			killed = true
			if err := cmd.Process.Signal(signal); err != nil {
				f.t.Error(err)
			}
		}
	}
	err = cmd.Wait()
	if !killed || err == nil {
		f.t.Errorf("%v was not ended (%v):\n%s", cmd.Args, err, strings.Join(said, "\n"))
	}
	return strings.Join(said, "\n")
}

// TestHostKeyChanged: a machine with another host key than the one that was pinned is not talked to.
func TestHostKeyChanged(t *testing.T) {
	f := bareLab(t)
	f.copyProject()
	f.plain("web1")
	node := f.nodes["web1"]
	only := func() result { return f.cli("provision", "web1", "--method", "none", "--no-deploy", "--batch") }
	if r := only(); r.code != 1 || !strings.Contains(r.errOut, "method none converts nothing") {
		t.Fatalf("the first contact: %v", r)
	}
	f.exec(node, "sh", "-c", "rm /etc/ssh/ssh_host_*; ssh-keygen -q -t ed25519 -N '' -f /etc/ssh/ssh_host_ed25519_key; systemctl restart ssh")
	logins := func() string {
		return f.exec(node, "sh", "-c", "journalctl --sync; journalctl -o cat | grep -c 'Accepted publickey' || true")
	}
	before := logins()
	r := only()
	if r.code != 1 || !strings.Contains(r.errOut, "web1: reach: ") || !strings.Contains(r.errOut, "another host key") || !strings.Contains(r.errOut, "known_hosts, line") {
		t.Errorf("with another host key: %v", r)
	}
	if after := logins(); after != before {
		t.Errorf("there were %s logins before, and %s after it", before, after)
	}
	if err := os.Remove(filepath.Join(f.project, "nix-infra", "known_hosts")); err != nil {
		t.Fatal(err)
	}
	if r := only(); !strings.Contains(r.errOut, "method none converts nothing") {
		t.Errorf("after the pin was removed: %v", r)
	}
}

// TestTwentyNodes bootstraps 20 machines in one go: from machines that run NixOS, and no controller, to nodes that run their
// configuration.
func TestTwentyNodes(t *testing.T) {
	f := bareLab(t)
	f.copyProject()
	var names []string
	for i := range 20 {
		names = append(names, fmt.Sprintf("n%02d", i+1))
	}
	nodes, err := f.lab.Start(f.ctx, names...)
	if err != nil {
		t.Fatal(err)
	}
	f.inventory("root", nodes...)
	for _, name := range names {
		f.write("nodes/"+name+".nix", service("this is "+name, ""))
	}
	began := time.Now()
	r := f.must(slices.Concat([]string{"provision"}, names, []string{"--method", "none", "--wait", soon.String(), "--batch", "--json"})...)
	took := time.Since(began)
	f.confirmed(names...)
	for _, name := range []string{"n01", "n20"} {
		f.says(f.nodes[name], f.running(f.nodes[name]), "this is "+name)
	}
	begun, before, enrolled := map[string]bool{}, 0, 0 // before: so many had begun when the first ended
	for line := range strings.Lines(r.out) {
		var d struct{ Event, Name, State string }
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		begun[d.Name] = true
		if d.Event == "machine" && d.State == "enrolled" {
			if enrolled++; enrolled == 1 {
				before = len(begun)
			}
		}
	}
	if before != len(names) {
		t.Errorf("the first was in when only %d had begun", before)
	}
	if enrolled != len(names) {
		t.Errorf("%d machines are said to be enrolled", enrolled)
	}
	t.Logf("20 machines in %s", took.Round(100*time.Millisecond))
}

// TestSSHClosed: where the project says so, SSH is closed to the world once its configuration is deployed, and open through
// the agent; and what keeps it open is found.
func TestSSHClosed(t *testing.T) {
	f := bareLab(t)
	if err := initProject(f.project, "--template", "fleet", "--name", "lab"); err != nil {
		t.Fatal(err)
	}
	f.creds = f.project + ".creds"
	lock, err := testos.FlakeLock(testos.DefaultVersion)
	if err != nil {
		t.Fatal(err)
	}
	f.write("flake.lock", string(lock))
	nodes, err := f.lab.Start(f.ctx, "web1")
	if err != nil {
		t.Fatal(err)
	}
	f.inventory("root", nodes...)
	node := nodes[0]
	f.opens(node, 22) // before anything is deployed
	r := f.must("provision", "web1", "--method", "none", "--batch")
	if !strings.Contains(r.out, "SSH is closed to the world on 1 node, and open to nix-infra ssh") {
		t.Errorf("it does not say that SSH is closed: %v", r)
	}
	f.isClosed(node, "after the deploy")

	f.exec(node, "nft", "flush", "ruleset") // as somebody does by hand; a deployment of what runs changes nothing of it
	if r := f.cli("provision", "web1", "--method", "none", "--batch"); r.code != 1 || !strings.Contains(r.errOut, "port 22 of "+node.IP+" takes connections from here") {
		t.Errorf("with a firewall that is gone: %v", r)
	}
}
