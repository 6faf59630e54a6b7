//go:build linux

package e2e

import (
	"encoding/json"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// deployed gives a node a configuration that says the message, and says which closure that is.
func (f *fleet) deployed(node, message string) string {
	f.t.Helper()
	f.write("nodes/"+node+".nix", service(message, ""))
	f.must("deploy", node, "--timeout", "60s", "--settle", "1s")
	return f.running(f.nodes[node])
}

// says checks what runs on a node: the closure, its boot default, and what the service of that closure says.
func (f *fleet) says(n *lab.Node, closure, message string) {
	f.t.Helper()
	if got := f.running(n); got != closure {
		f.t.Errorf("%s runs %s, want %s", n.Name, got, closure)
	}
	if got := f.bootDefault(n); got != closure {
		f.t.Errorf("%s boots %s, want %s", n.Name, got, closure)
	}
	f.eventually(soon, func() string { // the journal has its words a moment after the unit counts as started
		log := f.exec(n, "journalctl", "-b", "_SYSTEMD_UNIT=hello.service", "-o", "cat", "--no-pager", "-n", "1")
		if log == message {
			return ""
		}
		return fmt.Sprintf("%s says %q, want %q", n.Name, log, message)
	})
}

// cantBuild makes a node unable to evaluate and to build, and has it ask a binary cache that counts.
func (f *fleet) cantBuild(n *lab.Node) (asked *atomic.Int64) {
	f.t.Helper()
	listener, err := f.lab.Listen(f.ctx, "tcp", f.lab.HostIP()+":0")
	if err != nil {
		f.t.Fatal(err)
	}
	f.t.Cleanup(func() { listener.Close() })
	asked = &atomic.Int64{}
	go func() {
		for {
			conn, err := listener.Accept()
			if err != nil {
				return
			}
			asked.Add(1)
			conn.Close()
		}
	}()
	conf := f.exec(n, "cat", "/etc/nix/nix.conf")
	conf += fmt.Sprintf("\nrestrict-eval = true\nmax-jobs = 0\nsubstituters = http://%s:%d\n", f.lab.HostIP(), listener.Addr().(*net.TCPAddr).Port)
	if err := n.WriteFile("/etc/nix/nix.conf", []byte(conf), 0o644); err != nil {
		f.t.Fatal(err)
	}
	return asked
}

// TestRollbackOffline: what a node ran before is there. Going back to it evaluates and builds nothing, and asks no cache.
func TestRollbackOffline(t *testing.T) {
	f := newFleet(t, "n1")
	node := f.nodes["n1"]
	one, two, three := f.deployed("n1", "one"), f.deployed("n1", "two"), f.deployed("n1", "three")
	generation := f.status()["n1"].Generation
	asked := f.cantBuild(node)
	f.write("nodes/n1.nix", service("four", ""))
	if r := f.cli("deploy", "n1", "--timeout", "60s", "--settle", "1s"); r.code != 1 {
		t.Fatalf("the node can still build, so that this test would show nothing: %v", r)
	}
	f.exec(node, "rm", "-rf", "/root/.cache")
	asked.Store(0)

	back := func(want, message string, to ...string) {
		t.Helper()
		f.must(append([]string{"rollback", "n1", "--timeout", "60s", "--settle", "1s"}, to...)...)
		f.says(node, want, message)
		if s := f.status()["n1"]; s.State != "confirmed" || s.Closure != want {
			t.Errorf("%+v", s)
		}
		if got := f.exec(node, "cat", "/etc/nixos/n1.nix"); !strings.Contains(got, `"`+message+`"`) {
			t.Errorf("/etc/nixos does not show what runs: %s", got)
		}
	}
	back(two, "two")
	back(one, "one", "--to", one)
	back(three, "three", "--to", fmt.Sprint(generation))
	if n := asked.Load(); n != 0 {
		t.Errorf("a binary cache was asked %d times", n)
	}
	if r := f.cli("rollback", "n1", "--to", "4711", "--timeout", "60s", "--settle", "1s"); r.code != 1 || f.running(node) != three {
		t.Errorf("a rollback to a generation that there is not: %v", r)
	}
}

// TestGCKeeps: gc removes old generations, and never what runs, booted, boots next, is the way back, or is evidence.
func TestGCKeeps(t *testing.T) {
	f := newFleet(t, "n1")
	node := f.nodes["n1"]
	booted := f.running(node)
	one, two, three := f.deployed("n1", "one"), f.deployed("n1", "two"), f.deployed("n1", "three")
	f.write("nodes/n1.nix", service("bad", failing))
	if r := f.cli(f.deployArgs("n1")...); r.code != 1 {
		t.Fatal(r)
	}
	f.isBack(node, three)
	var bad struct {
		Closure string `json:"closure"`
	}
	lines := strings.Split(strings.TrimSpace(f.must("deployment", "show", f.status()["n1"].Deployment, "--json").out), "\n")
	if err := json.Unmarshal([]byte(lines[len(lines)-1]), &bad); err != nil || bad.Closure == "" {
		t.Fatalf("which closure was bad? %v: %s", err, lines)
	}
	there := func(closure string) bool {
		_, err := node.Exec(f.ctx, "nix-store", "--check-validity", closure)
		return err == nil
	}
	f.must("gc", "n1", "--older-than", "0s", "--keep", "1", "--dry-run")
	if !there(one) {
		t.Error("a dry run removed something")
	}
	r := f.must("gc", "n1", "--older-than", "0s", "--keep", "1", "--json")
	if there(one) {
		t.Errorf("%s is still there: %v", one, r)
	}
	for what, closure := range map[string]string{"booted": booted, "the way back": two, "runs": three, "in quarantine": bad.Closure} {
		if !there(closure) {
			t.Errorf("%s (%s) was removed: %v", closure, what, r)
		}
	}
	if !strings.Contains(r.out, `"freed":`) || strings.Contains(r.out, `"freed":0,`) || strings.Contains(r.out, `"freed":0}`) {
		t.Errorf("it does not say how much was freed: %v", r)
	}
	f.says(node, three, "three")

	// The way back can be gone, what was let out of quarantine is evidence no more.
	f.must("rollback", "n1", "--timeout", "60s", "--settle", "1s")
	f.says(node, two, "two")
	f.must("node", "release", "n1")
	f.must("gc", "n1", "--older-than", "0s", "--keep", "1")
	if there(bad.Closure) {
		t.Errorf("%s was let out of quarantine and is kept", bad.Closure)
	}
	if !there(two) || !there(booted) {
		t.Error("what runs or booted was removed")
	}
}

// TestDrift: the four ways in which a node comes to run something else than what was deployed.
func TestDrift(t *testing.T) {
	f := newFleet(t, "n1")
	node := f.nodes["n1"]
	one, two := f.deployed("n1", "one"), f.deployed("n1", "two")
	// drifts waits until the drift of n1 is told so; with "" until there is none.
	drifts := func(says string) {
		t.Helper()
		f.eventually(soon, func() string {
			r := f.cli("drift", "n1", "--json")
			if (r.code == 0) != (says == "") || (r.out == "") != (says == "") || !strings.Contains(r.out, says) {
				return fmt.Sprintf("want %q: %v", says, r)
			}
			return ""
		})
	}
	drifts("")

	f.exec(node, one+"/bin/switch-to-configuration", "test")
	drifts("by hand, without making it the boot default")
	f.exec(node, "nix-env", "--profile", "/nix/var/nix/profiles/system", "--set", one)
	f.exec(node, one+"/bin/switch-to-configuration", "switch")
	drifts("switched to " + one + " by hand")
	f.exec(node, "nix-env", "--profile", "/nix/var/nix/profiles/system", "--set", two)
	f.exec(node, two+"/bin/switch-to-configuration", "switch")
	drifts("")

	f.exec(node, "ln", "-s", one, "/boot/testos/once")
	if err := node.Reboot(f.ctx); err != nil {
		t.Fatal(err)
	}
	if got := f.running(node); got != one {
		t.Fatalf("the boot menu brought %s", got)
	}
	drifts("an older generation")
	if err := node.Reboot(f.ctx); err != nil {
		t.Fatal(err)
	}
	drifts("")

	f.write("nodes/n1.nix", service("bad", failing))
	f.cli(f.deployArgs("n1")...)
	f.isBack(node, two)
	drifts("rolled back")
}
