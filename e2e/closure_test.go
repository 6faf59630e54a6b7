//go:build linux

package e2e

import (
	"bytes"
	"errors"
	"net"
	"net/http"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// operator is a machine with Nix from which is deployed: it has the project and the CLI.
type operator struct {
	*lab.Node
	f *fleet
}

// operatorMachine boots it, and brings it the project as it is now.
func (f *fleet) operatorMachine() *operator {
	f.t.Helper()
	nodes, err := f.lab.Start(f.ctx, "op")
	if err != nil {
		f.t.Fatal(err)
	}
	o := &operator{nodes[0], f}
	if err := o.CopyTo(filepath.Join(programs.dir, "nix-infra"), "/usr/local/bin/nix-infra", 0o755); err != nil {
		f.t.Fatal(err)
	}
	var project bytes.Buffer
	pack := exec.CommandContext(f.ctx, "tar", "-C", f.project, "-c", ".")
	pack.Stdout = &project
	if err := pack.Run(); err != nil {
		f.t.Fatal(err)
	}
	unpack := o.Command(f.ctx, "sh", "-c", "mkdir -p /root/project && tar -C /root/project -x")
	unpack.Stdin = &project
	if out, err := unpack.CombinedOutput(); err != nil {
		f.t.Fatalf("%v: %s", err, out)
	}
	return o
}

func (o *operator) write(path, content string) {
	o.f.t.Helper()
	if err := o.WriteFile("/root/project/"+path, []byte(content), 0o644); err != nil {
		o.f.t.Fatal(err)
	}
}

// cli runs the CLI there.
func (o *operator) cli(args ...string) result {
	o.f.t.Helper()
	cmd := o.Command(o.f.ctx, append([]string{"env", "SECRETS_PASS=correct horse", "NO_COLOR=1", "nix-infra", "-d", "/root/project"}, args...)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		o.f.t.Fatal(err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// serveCache serves a folder of the operator's machine by HTTP and counts the NARs that it gave away.
func (o *operator) serveCache(dir string) (url string, nars *atomic.Int64) {
	o.f.t.Helper()
	listener, err := o.f.lab.Listen(o.f.ctx, "tcp", o.f.lab.HostIP()+":0")
	if err != nil {
		o.f.t.Fatal(err)
	}
	nars = &atomic.Int64{}
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		data, err := o.ReadFile(filepath.Join(dir, filepath.Clean("/"+r.URL.Path)))
		if err != nil {
			http.NotFound(w, r)
			return
		}
		if strings.Contains(r.URL.Path, ".nar") && !strings.HasSuffix(r.URL.Path, ".narinfo") {
			nars.Add(1)
		}
		w.Write(data) //nolint:errcheck // whoever asked may have gone
	})}
	go server.Serve(listener) //nolint:errcheck // it ends when it is closed
	o.f.t.Cleanup(func() { server.Close() })
	return "http://" + listener.Addr().(*net.TCPAddr).String(), nars
}

// TestClosureFromCache: systems that were built elsewhere reach nodes that can neither evaluate nor build, through a
// binary cache, and only with the fleet's signature.
func TestClosureFromCache(t *testing.T) {
	f := newFleet(t, "n1", "n2")
	old := f.proven("n1", "n2")
	n1, n2 := f.nodes["n1"], f.nodes["n2"]
	op := f.operatorMachine()
	url, nars := op.serveCache("/srv")
	settings := f.exec(op.Node, "cat", "/root/project/nix-infra.yaml")
	op.write("nix-infra.yaml", settings+"\ncache: { push: 'file:///srv/cache', pull: [ '"+url+"/cache' ] }\n")
	times := []string{"--timeout", "60s", "--settle", "1s"}
	deploy := func(args ...string) result {
		t.Helper()
		return op.cli(append(append([]string{"deploy"}, args...), times...)...)
	}
	for _, n := range []*lab.Node{n1, n2} {
		f.cantBuild(n)
		op.write("nodes/"+n.Name+".nix", service("from the cache", ""))
		if r := deploy(n.Name); r.code != 1 {
			t.Fatalf("%s can still build, so that this test would show nothing: %v", n.Name, r)
		}
	}

	r := deploy("n1", "--build=local")
	if r.code != 0 {
		t.Fatal(r)
	}
	good := f.running(n1)
	f.says(n1, good, "from the cache")
	if good == old["n1"] || nars.Load() == 0 {
		t.Errorf("%s runs, and %d NARs were fetched", good, nars.Load())
	}
	if sigs := f.exec(n1, "nix", "path-info", "--sigs", good); !strings.Contains(sigs, "lab-1:") || strings.Contains(sigs, "ultimate") {
		t.Errorf("it was not brought by signature, but built there: %s", sigs)
	}
	if got := f.exec(n1, "cat", "/etc/nixos/n1.nix"); !strings.Contains(got, "from the cache") {
		t.Errorf("/etc/nixos does not show what runs: %s", got)
	}

	// One that is in a cache already, to another node.
	if r := deploy("n2", "--build=cache", good); r.code != 0 || f.running(n2) != good {
		t.Errorf("n2 runs %s: %v", f.running(n2), r)
	}

	// Signed by somebody else, or by nobody: refused before anything is switched, and nothing of it stays.
	f.exec(op.Node, "sh", "-c", "cp -r /etc/nixos /root/tree && echo '{ ... }: { etc.\"forged\".text = \"\"; }' >/root/tree/op.nix && nix key generate-secret --key-name lab-1 >/root/forger.key")
	forged := f.exec(op.Node, "sh", "-c", `nix build --no-link --print-out-paths 'path:/root/tree#nixosConfigurations."op".config.system.build.toplevel' 2>/root/build.log`)
	for name, store := range map[string]string{"forged": "file:///srv/forged?secret-key=/root/forger.key", "unsigned": "file:///srv/unsigned"} {
		f.exec(op.Node, "nix", "copy", "--to", store, forged)
		pid := f.mainPID(n1)
		r := deploy("n1", "--build=cache", forged, "--cache-pull", url+"/"+name)
		if r.code != 1 || !strings.Contains(r.out+r.errOut, "signature") {
			t.Errorf("%s: %v", name, r)
		}
		if s := f.status()["n1"]; s.State != "failed" || f.running(n1) != good || f.bootDefault(n1) != good || f.mainPID(n1) != pid {
			t.Errorf("%s: %+v; runs %s", name, s, f.running(n1))
		}
		if out, err := n1.Exec(f.ctx, "nix-store", "--check-validity", forged); err == nil {
			t.Errorf("%s is in the store of n1: %s", name, out)
		}
	}

	// What one node rolled back from, no other one gets.
	op.write("nodes/n1.nix", service("bad", failing))
	if r := deploy("n1", "--build=local"); r.code != 1 {
		t.Errorf("a system that fails: %v", r)
	}
	f.isBack(n1, good)
	lines := strings.Split(strings.TrimSpace(f.must("deployment", "show", f.status()["n1"].Deployment, "--json").out), "\n")
	_, bad, _ := strings.Cut(lines[len(lines)-1], `"closure":"`)
	bad, _, _ = strings.Cut(bad, `"`)
	pid := f.mainPID(n2)
	if r := deploy("n2", "--build=cache", bad); r.code != 1 || !strings.Contains(r.out+r.errOut, "quarantine") {
		t.Errorf("%s is in quarantine on n1, and is deployed to n2: %v", bad, r)
	}
	id := f.latest()
	if got := f.rollout(id); got.State != "stopped" || got.Released != 0 || got.Failures != 1 {
		t.Errorf("%+v", got)
	}
	f.untouched(n2, good, pid, id)
}
