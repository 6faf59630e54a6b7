//go:build linux

package e2e

import (
	"bufio"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"golang.org/x/sys/unix"
	"google.golang.org/grpc"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// takeover is how long nobody may lead after a leader's death: its session with etcd lasts 5 s, and the rest is for
// the new one to read what it needs, on a machine that runs six others and may be slow.
const takeover = 40 * time.Second

// startHub runs the NATS and the etcd that the controllers share, on the operator's side.
func (f *fleet) startHub() {
	f.t.Helper()
	dir := f.t.TempDir()
	identity := func(args ...string) []byte {
		f.t.Helper()
		out, err := exec.CommandContext(f.ctx, filepath.Join(programs.dir, "nix-infra-controller"), append(args, "--dir", dir)...).Output()
		if err != nil {
			f.t.Fatalf("nix-infra-controller %v: %v", args, err)
		}
		return out
	}
	request, answer := filepath.Join(dir, "request"), filepath.Join(dir, "answer")
	if err := os.WriteFile(request, identity("request", "--name", "hub"), 0o600); err != nil {
		f.t.Fatal(err)
	}
	f.must("enroll", "--controller", "--request", request, "--answer", answer)
	identity("load", answer)
	hub := f.lab.Command(f.ctx, programs.hub, dir, f.lab.HostIP())
	hub.Stderr = f.t.Output()
	out, err := hub.StdoutPipe()
	if err != nil {
		f.t.Fatal(err)
	}
	if err := hub.Start(); err != nil {
		f.t.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		f.t.Fatalf("the hub says %q, %v", line, err)
	}
}

// leader is the controller that leads, by the election in etcd.
func (f *fleet) leader(etcd *clientv3.Client) string {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, soon)
	defer cancel()
	r, err := etcd.Get(ctx, "/nix-infra/leader/", clientv3.WithFirstCreate()...) // of all that take part, the first leads
	if err != nil {
		f.t.Fatal(err)
	}
	if len(r.Kvs) == 0 {
		return ""
	}
	return string(r.Kvs[0].Value)
}

// TestLeaderFailover: the machine of the leading controller loses its power in the middle of a wave, and another one
// goes on with the rollout, which the operator who watches does not even notice.
func TestLeaderFailover(t *testing.T) {
	controllers, nodes := []string{"ctl", "c2", "c3"}, []string{"n1", "n2", "n3"}
	f := newLab(t, append(controllers[1:], nodes...)...)
	hub := "tls://" + f.lab.HostIP() + ":4222"
	if err := makeProject(f.project, "--controller", hub); err != nil {
		t.Fatal(err)
	}
	f.creds = f.project + ".creds"
	f.startHub()
	config := fmt.Sprintf("broker: { external: [%s] }\netcd: { external: { endpoints: [http://%s:2379] } }\n", hub, f.lab.HostIP())
	for _, c := range controllers {
		n := f.lab.Node(c)
		if err := n.WriteFile("/var/lib/nix-infra-controller/controller.yaml", []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
		f.must("enroll", c, "--controller", "--ssh", "root@"+n.IP, "--ssh-key", f.lab.SSHKey())
	}
	f.enrollAll(nodes)
	etcd, err := clientv3.New(clientv3.Config{Endpoints: []string{"http://" + f.lab.HostIP() + ":2379"}, DialOptions: []grpc.DialOption{
		grpc.WithContextDialer(func(ctx context.Context, address string) (net.Conn, error) { return f.lab.Dial(ctx, "tcp", address) })}})
	if err != nil {
		t.Fatal(err)
	}
	defer etcd.Close()

	for _, n := range nodes {
		f.write("nodes/"+n+".nix", service("survives", held))
	}
	deploy := f.command("deploy", "all", "--batch=1", "--timeout", "60s", "--settle", "1s")
	said := make(chan []byte, 1)
	ended := make(chan error, 1)
	go func() {
		out, err := deploy.CombinedOutput()
		said <- out
		ended <- err
	}()
	f.waitState("n1", soon, "building", func(s status) bool { return s.State == "building" })
	first := f.leader(etcd)
	if err := f.lab.Node(first).Kill(f.ctx); err != nil {
		t.Fatal(err)
	}
	killed := monotonic(t)
	f.release(nodes...)
	out := <-said
	if err := <-ended; err != nil {
		t.Fatalf("the deploy did not end as if nothing had happened: %v\n%s", err, out)
	}
	if second := f.leader(etcd); second == "" || second == first {
		t.Errorf("%q led, and %q does", first, second)
	}
	id := f.status()["n1"].Deployment
	var before *lab.Node
	for _, name := range nodes {
		n := f.nodes[name]
		if s := f.status()[name]; s.State != "confirmed" || s.Deployment != id || s.Closure != f.running(n) {
			t.Errorf("%s: %+v", name, s)
		}
		if before != nil {
			due, began := max(f.confirmedAt(before, id), killed), f.acceptedAt(n, id)
			if began < f.confirmedAt(before, id) {
				t.Errorf("%s began before %s had proven it", name, before.Name)
			}
			if late := time.Duration(began-due) * time.Microsecond; began > due && late > takeover {
				t.Errorf("%s began %s after it could have", name, late)
			}
		}
		before = n
	}
	if got := f.rollout(id); got.State != "done" || len(got.Waves) != 3 {
		t.Errorf("%+v", got)
	}
}

// monotonic is the clock of __MONOTONIC_TIMESTAMP, in microseconds.
func monotonic(t *testing.T) uint64 {
	t.Helper()
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		t.Fatal(err)
	}
	return uint64(now.Nano() / 1000)
}
