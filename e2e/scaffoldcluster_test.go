//go:build linux

package e2e

import (
	"fmt"
	"path/filepath"
	"strings"
	"testing"
)

// TestScaffoldCluster: the cluster that init writes has an etcd that only machines with a certificate reach, in which what runs
// is registered while it runs. flannel and confd, which Debian has not got, are left out: the overlay's interface is the test's.
func TestScaffoldCluster(t *testing.T) {
	f := newScaffold(t, "cluster", "etcd001", "worker001")
	etcd, worker := f.nodes["etcd001"], f.nodes["worker001"]
	f.enrollAll([]string{"etcd001", "worker001"})
	f.feed(0, "hello", "secrets", "store", "hello.message")
	f.write("nodes/worker001.nix", `{ lib, ... }: {
  infrastructure.certs = { enable = true; caSecretName = "[%%secrets/cluster.ca%%]"; certSecretName = "[%%secrets/worker001.cert%%]"; keySecretName = "[%%secrets/worker001.key%%]"; };
  infrastructure.mesh = { ipv4 = "[%%localhost.ipv4%%]"; subscribe = [ "services" ]; };
  infrastructure.hello = { enable = true; messageSecretName = "[%%secrets/hello.message%%]"; };
  infrastructure.flannel.enable = lib.mkForce false;
  systemd.services.confd.enable = false;
}
`)
	f.makeCertificates()
	f.exec(worker, "sh", "-c", "ip link add flannel-wg type veth peer name overlay && ip address add 10.10.1.0/24 dev flannel-wg && ip link set flannel-wg up && ip link set overlay up")

	f.deploy("etcd001")
	f.deploy("worker001")
	keys := func() string { return f.must("etcd", "--target", "etcd001", "get --prefix /cluster").out }
	const instance = `/cluster/backends/hello/instances/worker001` + "\n" + `{"node":"worker001","ipv4":"10.10.1.0","port":8080}` + "\n"
	registered := func(want bool) {
		t.Helper()
		f.eventually(soon, func() string {
			if got := keys(); strings.Contains(got, instance) != want {
				return fmt.Sprintf("registered should be %v: %s", want, got)
			}
			return ""
		})
	}
	registered(true)
	if got := keys(); !strings.Contains(got, "/cluster/nodes/worker001\n"+`{"ipv4":"`+worker.IP+`","name":"worker001","services":["services"]}`) {
		t.Errorf("the node is not in the mesh: %s", got)
	}
	f.must("exec", "worker001", "--", "systemctl", "stop", "hello.service")
	registered(false)
	f.must("exec", "worker001", "--", "systemctl", "start", "hello.service")
	registered(true)

	if out, err := worker.Exec(f.ctx, "curl", "-sS", "--insecure", "--max-time", "60", "https://"+etcd.IP+":2379/version"); err == nil || !strings.Contains(string(out), "certificate required") {
		t.Errorf("etcd answers who has no certificate: %v, %s", err, out)
	}

	// HAProxy is there before anything is, and ends as told.
	f.get(worker, "http://127.0.0.1:8404/")
	f.exec(worker, "systemctl", "reload", "mesh-haproxy.service")
	f.get(worker, "http://127.0.0.1:8404/")
	f.exec(worker, "systemctl", "stop", "mesh-haproxy.service")
	if state := f.property(worker, "mesh-haproxy.service", "ActiveState"); state != "inactive" {
		t.Errorf("HAProxy, stopped, is %s", state)
	}
}

// makeCertificates has the project's own script make a certificate for each enrolled node.
func (f *fleet) makeCertificates() {
	f.t.Helper()
	args := []string{filepath.Join(f.project, "certs")}
	for name, n := range f.nodes {
		args = append(args, name+"="+n.IP)
	}
	cmd := f.lab.Command(f.ctx, args...)
	cmd.Env = append(f.command().Env, "NIX_INFRA="+filepath.Join(programs.dir, "nix-infra"))
	if out, err := cmd.CombinedOutput(); err != nil {
		f.t.Fatalf("certs: %v\n%s", err, out)
	}
}
