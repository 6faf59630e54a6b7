//go:build linux

package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"net"
	"net/http"
	"os/exec"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/provision"
	provider "github.com/nix-infra/nix-infra/cli/provision/hetzner"
	"github.com/nix-infra/nix-infra/e2e/hetzner"
	"github.com/nix-infra/nix-infra/e2e/lab"
)

// labMachines are the servers of the fake Hetzner: plain nodes of a lab.
type labMachines struct {
	ctx context.Context
	lab *lab.Lab
}

func (m *labMachines) Make(name, keys string) (string, error) {
	nodes, err := m.lab.Make(m.ctx, lab.NodeOptions{Plain: true, AuthorizedKeys: keys}, name)
	if err != nil {
		return "", err
	}
	return nodes[0].IP, nil
}

func (m *labMachines) Boot(name string) error   { return m.lab.Node(name).Boot(m.ctx) }
func (m *labMachines) Remove(name string) error { return m.lab.Remove(m.ctx, name) }

// atHetzner is a fleet whose machines come from a fake of Hetzner's API.
type atHetzner struct {
	*fleet
	fake     *hetzner.Fake
	endpoint string // as the CLI reaches it
}

func (f *fleet) atHetzner(o hetzner.Options) *atHetzner {
	f.t.Helper()
	o.Token, o.Machines = "secret", &labMachines{f.ctx, f.lab}
	h := &atHetzner{fleet: f, fake: hetzner.New(o)}
	l, err := f.lab.Listen(f.ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		f.t.Fatal(err)
	}
	h.endpoint = "http://" + l.Addr().String() + "/v1"
	go h.fake.Serve(f.t.Context(), l)
	return h
}

// command is the CLI with the token.
func (h *atHetzner) command(args ...string) *exec.Cmd {
	cmd := h.fleet.command(args...)
	cmd.Env = append(cmd.Env, "HCLOUD_TOKEN=secret", "HCLOUD_ENDPOINT="+h.endpoint)
	return cmd
}

// cli runs it.
func (h *atHetzner) cli(args ...string) result {
	h.t.Helper()
	cmd := h.command(args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if err := cmd.Run(); err != nil && cmd.ProcessState == nil {
		h.t.Fatalf("nix-infra %s: %v", strings.Join(args, " "), err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

func (h *atHetzner) must(args ...string) result {
	h.t.Helper()
	r := h.cli(args...)
	if r.code != 0 {
		h.t.Fatalf("nix-infra %s: %v", strings.Join(args, " "), r)
	}
	return r
}

// count is how many requests there were of a kind.
func (h *atHetzner) count(kind func(hetzner.Request) bool) int {
	n := 0
	for _, r := range h.fake.Log() {
		if kind(r) {
			n++
		}
	}
	return n
}

func ordersServer(r hetzner.Request) bool {
	return r.Method == http.MethodPost && r.Path == "/v1/servers"
}

// TestProvisionHetzner goes from nothing at all, but a project folder, to three nodes that run their configuration, by one
// command, also where that was killed while the machines were made. The API is slow, gives two entries a page, and lets few
// requests through.
func TestProvisionHetzner(t *testing.T) {
	f := bareLab(t)
	f.copyProject()
	h := f.atHetzner(hetzner.Options{ActionTime: 500 * time.Millisecond, PerPage: 2, Requests: 12, Refill: 200 * time.Millisecond})
	names := []string{"web1", "web2", "db1"}
	for _, name := range names {
		f.write("nodes/"+name+".nix", service("this is "+name, ""))
	}
	f.write("infect.sh", lab.InfectScript)
	command := append([]string{"provision"}, names...)
	command = append(command, "--placement-group", "spread", "--infect-script", f.project+"/infect.sh", "--batch")

	dry := h.must(append(command, "--dry-run", "--json")...)
	var planned []string
	for line := range strings.Lines(dry.out) {
		var d struct {
			Event, Name, State, Type, Monthly string
			Missing                           int
		}
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatalf("%q: %v", line, err)
		}
		planned = append(planned, strings.Join(strings.Fields(d.Event+" "+d.Name+" "+d.State+" "+d.Type+" "+d.Monthly), " "))
	}
	if want := []string{"planned web1 missing cpx22 8.14 EUR", "planned web2 missing cpx22 8.14 EUR", "planned db1 missing cpx22 8.14 EUR", "plan 24.41 EUR a month"}; !slices.Equal(planned, want) {
		t.Errorf("the dry run says %q, not %q", planned, want)
	}
	if n := h.count(func(r hetzner.Request) bool { return r.Method != http.MethodGet }); n != 0 || len(f.lab.Nodes()) != 0 {
		t.Fatalf("the dry run made something: %d requests that change, %d machines", n, len(f.lab.Nodes()))
	}

	h.kill(syscall.SIGKILL, h.command(command...), func(line string) bool { return strings.HasPrefix(line, "db1: create: ordering") })
	for _, s := range h.fake.Servers() {
		if s.Labels["nix-infra/fleet"] != "lab" || s.Labels["nix-infra/node"] != s.Name {
			t.Errorf("the run that was killed left %s with the labels %v", s.Name, s.Labels)
		}
	}
	h.must(command...)
	for _, s := range h.fake.Servers() {
		if s.Labels["nix-infra/fleet"] != "lab" || s.Labels["nix-infra/node"] != s.Name || s.PlacementGroup == nil {
			t.Errorf("%s was made as %+v", s.Name, s)
		}
	}
	for _, name := range names {
		n := f.lab.Node(name)
		f.nodes[name] = n
		if got := f.exec(n, "sh", "-c", "systemctl is-active hello; systemctl show -P Description hello; hostname; cat /run/current-system/nixos-version"); !strings.HasPrefix(got, "active\nsays this is "+name+"\n"+name+"\n25.11") {
			t.Errorf("%s runs %q", name, got)
		}
	}
	f.confirmed(names...)
	if orders, limited := h.count(ordersServer), h.count(func(r hetzner.Request) bool { return r.Status == http.StatusTooManyRequests }); orders < 3 || limited == 0 || len(h.fake.Servers()) != 3 {
		t.Errorf("%d servers were ordered, %d requests were too many, %d servers are there", orders, limited, len(h.fake.Servers()))
	}

	orders := h.count(ordersServer)
	h.must(append(command, "--no-deploy")...)
	if h.count(ordersServer) != orders {
		t.Error("the same command orders again what is there")
	}
}

// TestDestroy takes one machine out of the fleet and has it deleted, and another one out of the fleet only.
func TestDestroy(t *testing.T) {
	f := newFleet(t, "n1", "n2", "n3")
	h := f.atHetzner(hetzner.Options{ActionTime: 200 * time.Millisecond})
	h.adopt("n1", "n2")

	if r := h.cli("destroy", "n1"); r.code != 2 || !strings.Contains(r.errOut, "nothing was done") {
		t.Fatalf("with nobody to type the name: %v", r)
	}
	r := h.must("destroy", "n1", "--batch")
	if !strings.Contains(r.out, "n1: out of the fleet; deleted at hetzner") || f.lab.Node("n1") != nil || len(h.fake.Servers()) != 1 {
		t.Errorf("n1 is still there: %v", r)
	}
	f.must("destroy", "n2", "--keep-server", "--batch")
	all := f.status()
	if len(all) != 1 || !all["n3"].Online {
		t.Errorf("in the fleet are %+v", all)
	}
	// Its agent still runs, and is nobody any more: its connection was ended, and it is let in no more.
	n2 := f.nodes["n2"]
	f.eventually(soon, func() string {
		return f.exec(n2, "sh", "-c", "ss -Htn state established dst "+f.ctl.IP)
	})
	if got := f.exec(n2, "systemctl", "is-active", "nix-infra-agent"); got != "active" {
		t.Errorf("n2's agent is %s: its server was to be kept", got)
	}
	if out, err := exec.CommandContext(f.ctx, "grep", "-c", "n1@nix-infra", f.project+"/nix-infra/known_hosts").CombinedOutput(); err == nil {
		t.Errorf("n1's host key is still pinned %s times", bytes.TrimSpace(out))
	}
	if r := h.must("destroy", "n1", "--batch"); !strings.Contains(r.out, "there is nothing of it any more") {
		t.Errorf("once more: %v", r)
	}
}

// adopt has machines that are there be servers of the fleet.
func (h *atHetzner) adopt(names ...string) {
	h.t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0") // for this process
	if err != nil {
		h.t.Fatal(err)
	}
	go h.fake.Serve(h.t.Context(), l)
	p, err := provider.New(provider.Options{Token: "secret", Fleet: "lab", Endpoint: "http://" + l.Addr().String() + "/v1"})
	if err != nil {
		h.t.Fatal(err)
	}
	key, err := exec.Command("cat", h.project+"/ssh/nixinfra.pub").Output()
	if err != nil {
		h.t.Fatal(err)
	}
	order := provision.Order{Fleet: "lab", Names: names, SSHKey: provision.SSHKey{Name: "nixinfra", PublicKey: string(key)}}
	if _, err := p.Create(h.ctx, order, func(string, string) {}); err != nil {
		h.t.Fatal(err)
	}
}
