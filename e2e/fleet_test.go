//go:build linux

// Package e2e tests the three programs on real nodes: real systemd, real Nix, real NATS, real etcd, real
// sshd. fleet_test.go boots a lab and enrols its nodes; each other file is a subject.
package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/e2e/lab"
	"github.com/nix-infra/nix-infra/e2e/testos"
)

// programs are the binaries under test, built once by TestMain.
var programs struct {
	dir   string // nix-infra, nix-infra-agent, nix-infra-controller, as `make build` makes them
	crash string // an agent that kills itself at a step (e2e/crashagent)
	next  string // the agent again, with version "next"
	evil  string // a broker that was broken into (e2e/evilbroker)
	hub   string // a NATS and an etcd for several controllers (e2e/hub)
}

func TestMain(m *testing.M) { os.Exit(run(m)) }

func run(m *testing.M) int {
	if err := lab.Available(); err != nil {
		if os.Getenv("CI") != "" {
			fmt.Fprintln(os.Stderr, "the lab is required in CI, and it can't run here:", err)
			return 1
		}
		fmt.Fprintln(os.Stderr, "LEFT OUT: all tests on real nodes, because", err)
		return 0
	}
	dir, err := os.MkdirTemp("", "nix-infra-e2e-")
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	defer os.RemoveAll(dir)
	programs.dir = dir
	programs.crash = filepath.Join(dir, "crash-agent")
	programs.next = filepath.Join(dir, "next-agent")
	programs.evil = filepath.Join(dir, "evilbroker")
	programs.hub = filepath.Join(dir, "hub")
	for _, b := range []struct{ out, pkg, version string }{
		{filepath.Join(dir, "nix-infra"), "cli/nix-infra", "under-test"},
		{filepath.Join(dir, "nix-infra-agent"), "agent/nix-infra-agent", "under-test"},
		{filepath.Join(dir, "nix-infra-controller"), "controller/nix-infra-controller", "under-test"},
		{programs.crash, "e2e/crashagent", "under-test"},
		{programs.next, "agent/nix-infra-agent", "next"},
		{programs.evil, "e2e/evilbroker", "under-test"},
		{programs.hub, "e2e/hub", "under-test"},
	} {
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags", "-s -w -X github.com/nix-infra/nix-infra/protocol.build="+b.version, "-o", b.out, "../"+b.pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			fmt.Fprintf(os.Stderr, "can't build %s: %v\n%s", b.pkg, err, out)
			return 1
		}
	}
	return m.Run()
}

// password opens the project's private keys.
const password = "correct horse"

// fleet is a lab with a controller and enrolled nodes, and the project folder that they belong to.
type fleet struct {
	t       *testing.T
	ctx     context.Context
	lab     *lab.Lab
	project string
	creds   string // file of the admin's credentials, "": the CLI opens the project's own
	ctl     *lab.Node
	nodes   map[string]*lab.Node
}

// newFleet boots a controller and nodes, makes a project, and enrols them all over SSH.
func newFleet(t *testing.T, names ...string) *fleet {
	t.Helper()
	f := newLab(t, names...)
	f.must("init", "--fleet", "lab", "--controller", "tls://"+f.ctl.IP+":4222", "--controller", "wss://"+f.ctl.IP+":443", "--nixos-version", testos.DefaultVersion, "--batch")
	f.openCredentials()
	f.must("enroll", "ctl", "--controller", "--ssh", "root@"+f.ctl.IP, "--ssh-key", f.lab.SSHKey(), "--batch")
	for _, n := range names {
		f.enroll(n)
	}
	return f
}

// newLab boots the machines and makes an empty project folder.
func newLab(t *testing.T, names ...string) *fleet {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	l, err := lab.Open(ctx, lab.Options{Name: labName(t), OwnerPID: os.Getpid(), Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	f := &fleet{t: t, ctx: ctx, lab: l, project: t.TempDir(), nodes: map[string]*lab.Node{}}
	t.Cleanup(func() {
		if t.Failed() {
			f.dump()
		}
		ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := l.Down(ctx); err != nil {
			t.Error(err)
		}
	})
	if _, err := l.Start(ctx, append([]string{"ctl"}, names...)...); err != nil {
		t.Fatal(err)
	}
	f.ctl = l.Node("ctl")
	for _, n := range names {
		f.nodes[n] = l.Node(n)
	}
	if err := testos.WriteProject(f.project); err != nil {
		t.Fatal(err)
	}
	return f
}

// labName is the test's name and process as a DNS label of at most 32 characters.
func labName(t *testing.T) string {
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(strings.TrimPrefix(t.Name(), "Test")))
	return fmt.Sprintf("%s-%d", strings.Trim(name[:min(len(name), 20)], "-"), os.Getpid())
}

// dump shows what the machines have to say about a failed test.
func (f *fleet) dump() {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	defer cancel()
	for _, n := range f.lab.Nodes() {
		unit := "nix-infra-agent.service"
		if n.Name == "ctl" || n.Name == "c2" || n.Name == "c3" {
			unit = "nix-infra-controller.service"
		}
		out, err := n.Exec(ctx, "journalctl", "--no-pager", "-n", "150", "-o", "short-precise", "-u", unit, "-u", "nix-infra-activate-*", "-u", "nix-infra-revert-*")
		f.t.Logf("---- %s (%v)\n%s", n.Name, err, out)
	}
}

func (f *fleet) enroll(name string, more ...string) {
	f.t.Helper()
	f.must(append([]string{"enroll", name, "--ssh", "root@" + f.lab.Node(name).IP, "--ssh-key", f.lab.SSHKey(), "--batch"}, more...)...)
}

// join boots one more machine and enrols it.
func (f *fleet) join(name string, more ...string) *lab.Node {
	f.t.Helper()
	nodes, err := f.lab.Start(f.ctx, name)
	if err != nil {
		f.t.Fatal(err)
	}
	f.nodes[name] = nodes[0]
	f.enroll(name, more...)
	return nodes[0]
}

// openCredentials lets the CLI speak as the project's admin without asking the vault, whose password is made to take its
// time: a test asks a hundred times.
func (f *fleet) openCredentials() {
	f.t.Helper()
	f.creds = filepath.Join(f.t.TempDir(), "admin.creds")
	if err := os.WriteFile(f.creds, f.secret("admin"), 0o600); err != nil {
		f.t.Fatal(err)
	}
}

// secret is an entry of the project's vault.
func (f *fleet) secret(entry string) []byte {
	f.t.Helper()
	v := vault.New(filepath.Join(f.project, "nix-infra", "keys"), func() (string, error) { return password, nil })
	data, err := v.Get(entry)
	if err != nil {
		f.t.Fatal(err)
	}
	return data
}

// result is how a run of the CLI ended.
type result struct {
	code        int
	out, errOut string
}

func (r result) String() string {
	return fmt.Sprintf("exit %d\nstdout: %s\nstderr: %s", r.code, r.out, r.errOut)
}

// command is the CLI on the operator's side, not started yet.
func (f *fleet) command(args ...string) *exec.Cmd {
	cmd := f.lab.Command(f.ctx, append([]string{filepath.Join(programs.dir, "nix-infra"), "-d", f.project}, args...)...)
	cmd.Env = append(os.Environ(), "SECRETS_PASS="+password, "HOME="+f.project, "NO_COLOR=1", "NIX_INFRA_CREDS="+f.creds)
	return cmd
}

// cli runs the CLI to its end.
func (f *fleet) cli(args ...string) result {
	f.t.Helper()
	cmd := f.command(args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		f.t.Fatalf("nix-infra %s: %v", strings.Join(args, " "), err)
	}
	return result{cmd.ProcessState.ExitCode(), out.String(), errOut.String()}
}

// must runs the CLI and wants exit 0.
func (f *fleet) must(args ...string) result {
	f.t.Helper()
	r := f.cli(args...)
	if r.code != 0 {
		f.t.Fatalf("nix-infra %s: %v", strings.Join(args, " "), r)
	}
	return r
}

// status is a line of `status --json`, as docs/json.md has it.
type status struct {
	Node        string    `json:"node"`
	State       string    `json:"state"`
	Online      bool      `json:"online"`
	Generation  int       `json:"generation"`
	Closure     string    `json:"closure"`
	Deployment  string    `json:"deployment"`
	Serial      uint64    `json:"serial"`
	Reason      string    `json:"reason"`
	LastSeen    time.Time `json:"last_seen"`
	FailedUnits []string  `json:"failed_units"`
	Agent       string    `json:"agent"`
}

func (f *fleet) status() map[string]status {
	f.t.Helper()
	all := map[string]status{}
	for line := range strings.Lines(f.must("status", "--json").out) {
		var s status
		if err := json.Unmarshal([]byte(line), &s); err != nil {
			f.t.Fatalf("status --json: %q: %v", line, err)
		}
		all[s.Node] = s
	}
	return all
}

// eventually polls until ok says that there is nothing left to wait for ("").
func (f *fleet) eventually(within time.Duration, ok func() string) {
	f.t.Helper()
	deadline := time.Now().Add(within)
	for {
		missing := ok()
		if missing == "" {
			return
		}
		if time.Now().After(deadline) {
			f.t.Fatalf("after %v still: %s", within, missing)
		}
		select {
		case <-f.ctx.Done():
			f.t.Fatalf("the test ran out of time; still: %s", missing)
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// waitState waits until a node's status satisfies the condition.
func (f *fleet) waitState(node string, within time.Duration, what string, ok func(status) bool) status {
	f.t.Helper()
	var last status
	f.eventually(within, func() string {
		if last = f.status()[node]; ok(last) {
			return ""
		}
		return fmt.Sprintf("%s is not %s: %+v", node, what, last)
	})
	return last
}

// write puts a file into the project folder.
func (f *fleet) write(path, content string) {
	f.t.Helper()
	full := filepath.Join(f.project, path)
	if err := os.MkdirAll(filepath.Dir(full), 0o755); err != nil {
		f.t.Fatal(err)
	}
	if err := os.WriteFile(full, []byte(content), 0o644); err != nil {
		f.t.Fatal(err)
	}
}

// exec runs a command on a node and wants it to succeed.
func (f *fleet) exec(n *lab.Node, argv ...string) string {
	f.t.Helper()
	out, err := n.Exec(f.ctx, argv...)
	if err != nil {
		f.t.Fatalf("%s: %v", n.Name, err)
	}
	return strings.TrimSpace(string(out))
}

// running is the closure that a node runs, asked of the node itself.
func (f *fleet) running(n *lab.Node) string {
	f.t.Helper()
	return f.exec(n, "readlink", "-f", "/run/current-system")
}

// bootDefault is the closure of the system profile and of the boot loader, which must agree.
func (f *fleet) bootDefault(n *lab.Node) string {
	f.t.Helper()
	profile := f.exec(n, "readlink", "-f", "/nix/var/nix/profiles/system")
	if loader := f.exec(n, "readlink", "-f", "/boot/testos/default"); loader != profile {
		f.t.Errorf("%s: the boot loader has %s, the profile %s", n.Name, loader, profile)
	}
	return profile
}

// service is a node's configuration with one long-running unit, hello.service.
func service(message, more string) string {
	return fmt.Sprintf(`{ ... }: {
  infrastructure.hello = { enable = true; message = %q; };
  %s
}
`, message, more)
}

// failing is a unit that fails shortly after it was started: an activation that succeeds, and a system that
// does not hold.
const failing = `units."broken.service" = {
    unit.Description = "fails";
    service = { Type = "exec"; ExecStart = "/bin/sh -c 'echo about to fail; exit 7'"; };
  };`
