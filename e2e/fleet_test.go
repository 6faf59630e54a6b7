//go:build linux

// Package e2e tests the three programs on real nodes: real systemd, real Nix, real NATS, real etcd, real
// sshd. main_test.go builds the programs, fleet_test.go boots a lab and enrols its nodes; each other file is a subject.
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
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// password opens the project's private keys.
const password = "correct horse"

// soon is the limit of what is waited for and comes within seconds where the machine has nothing else to do.
const soon = 2 * time.Minute

// fleet is a lab with a controller and enrolled nodes, and the project folder that they belong to.
type fleet struct {
	t       *testing.T
	ctx     context.Context
	lab     *lab.Lab
	project string
	creds   string // file of the admin's credentials
	ctl     *lab.Node
	nodes   map[string]*lab.Node
}

// newFleet boots a controller and nodes for one test, makes a project, and enrols them all over SSH.
func newFleet(t *testing.T, names ...string) *fleet {
	t.Helper()
	f := newLab(t, names...)
	f.enlist(names)
	return f
}

// newLab boots the machines and makes an empty project folder. Tests with a lab of their own wait more than they
// work, and run beside each other.
func newLab(t *testing.T, names ...string) *fleet {
	t.Helper()
	f := bareLab(t)
	f.start(names)
	return f
}

// bareLab is a lab without machines, and an empty folder for a project.
func bareLab(t *testing.T) *fleet {
	t.Helper()
	t.Parallel()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	t.Cleanup(cancel)
	f := openLab(t, ctx, labName(t.Name()), t.TempDir())
	t.Cleanup(func() {
		if t.Failed() {
			f.dump()
		}
		if err := f.down(); err != nil {
			t.Error(err)
		}
	})
	return f
}

// common is the fleet that tests share.
var common struct {
	once  sync.Once
	fleet *fleet
	ready bool
}

// shared is a fleet with the nodes n1 and n2 for tests that leave it as they found it, and come one after the other. It
// is booted for the first of them, and ends with the run.
func shared(t *testing.T) *fleet {
	t.Helper()
	common.once.Do(func() {
		project, err := os.MkdirTemp(programs.dir, "shared-")
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), 6*time.Minute) // the first lab of all makes the nodes' root file system
		defer cancel()
		f := openLab(t, ctx, labName("shared"), project)
		common.fleet = f
		names := []string{"n1", "n2"}
		f.start(names)
		f.enlist(names)
		common.ready = true
	})
	if !common.ready {
		t.Fatal("the fleet that tests share could not be made; the first of them says why")
	}
	f := common.fleet.as(t)
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Minute)
	f.ctx = ctx
	t.Cleanup(cancel)
	t.Cleanup(func() {
		if t.Failed() {
			f.dump()
		}
	})
	return f
}

func openLab(t *testing.T, ctx context.Context, name, project string) *fleet {
	t.Helper()
	l, err := lab.Open(ctx, lab.Options{Name: name, OwnerPID: os.Getpid(), Log: os.Stderr})
	if err != nil {
		t.Fatal(err)
	}
	return &fleet{t: t, ctx: ctx, lab: l, project: project, nodes: map[string]*lab.Node{}}
}

// start boots the machine of the controller and those of nodes.
func (f *fleet) start(names []string) {
	f.t.Helper()
	if _, err := f.lab.Start(f.ctx, append([]string{"ctl"}, names...)...); err != nil {
		f.t.Fatal(err)
	}
	f.ctl = f.lab.Node("ctl")
	for _, n := range names {
		f.nodes[n] = f.lab.Node(n)
	}
}

// enlist makes the project folder, and enrols the controller and the nodes.
func (f *fleet) enlist(names []string) {
	f.t.Helper()
	f.copyProject()
	f.must("enroll", "ctl", "--controller", "--ssh", "root@"+f.ctl.IP, "--ssh-key", f.lab.SSHKey(), "--batch")
	f.enrollAll(names)
}

// copyProject makes the folder a project that has no machines yet.
func (f *fleet) copyProject() {
	f.t.Helper()
	f.creds = programs.project + ".creds"
	if out, err := exec.CommandContext(f.ctx, "cp", "-a", programs.project+"/.", f.project).CombinedOutput(); err != nil {
		f.t.Fatalf("%v: %s", err, out)
	}
}

// down removes the lab.
func (f *fleet) down() error {
	ctx, cancel := context.WithTimeout(context.Background(), soon)
	defer cancel()
	return f.lab.Down(ctx)
}

// as is the same fleet in the hands of a part of the test.
func (f *fleet) as(t *testing.T) *fleet {
	part := *f
	part.t = t
	return &part
}

// labName is a test's name and this process as a DNS label of at most 32 characters.
func labName(test string) string {
	name := strings.ToLower(strings.NewReplacer("/", "-", "_", "-").Replace(strings.TrimPrefix(test, "Test")))
	return fmt.Sprintf("%s-%d", strings.Trim(name[:min(len(name), 20)], "-"), os.Getpid())
}

// dump shows what the machines have to say about a failed test.
func (f *fleet) dump() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	for _, n := range f.lab.Nodes() {
		out, err := n.Exec(ctx, "journalctl", "--no-pager", "-n", "200", "-o", "short-precise", "-u", "nix-infra-*")
		f.t.Logf("---- %s (%v)\n%s\n%s", n.Name, err, out, n.Trouble())
	}
}

func (f *fleet) enroll(name string, more ...string) {
	f.t.Helper()
	f.enrollAll([]string{name}, more...)
}

// enrollAll enrols nodes that are booted, at the same time.
func (f *fleet) enrollAll(names []string, more ...string) {
	f.t.Helper()
	errs := make([]error, len(names))
	var wg sync.WaitGroup
	for i, name := range names {
		wg.Go(func() {
			cmd := f.command(append([]string{"enroll", name, "--ssh", "root@" + f.lab.Node(name).IP, "--ssh-key", f.lab.SSHKey(), "--batch"}, more...)...)
			if out, err := cmd.CombinedOutput(); err != nil {
				errs[i] = fmt.Errorf("enroll %s: %w\n%s", name, err, out)
			}
		})
	}
	wg.Wait()
	if err := errors.Join(errs...); err != nil {
		f.t.Fatal(err)
	}
}

// join boots more machines and enrols them.
func (f *fleet) join(names []string, more ...string) {
	f.t.Helper()
	nodes, err := f.lab.Start(f.ctx, names...)
	if err != nil {
		f.t.Fatal(err)
	}
	for i, name := range names {
		f.nodes[name] = nodes[i]
	}
	f.enrollAll(names, more...)
}

// secret is an entry of the project's vault.
func (f *fleet) secret(entry string) []byte {
	f.t.Helper()
	data, err := openVault(f.project).Get(entry)
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
	return f.read(f.must("status", "--json"))
}

// read reads what status says.
func (f *fleet) read(r result) map[string]status {
	f.t.Helper()
	all := map[string]status{}
	for line := range strings.Lines(r.out) {
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

// waitState waits until a node's status satisfies the condition. The controller may be one that does not answer yet.
func (f *fleet) waitState(node string, within time.Duration, what string, ok func(status) bool) status {
	f.t.Helper()
	var last status
	f.eventually(within, func() string {
		r := f.cli("status", "--json")
		if r.code != 0 {
			return fmt.Sprintf("%s is not %s: %v", node, what, r)
		}
		if last = f.read(r)[node]; ok(last) {
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

// held is a build that goes on until release: a test does in the middle of it what it has to, however long that takes.
const held = `buildScript = "until [ -e /run/build-may-end ]; do sleep 0.1; done";`

// release lets builds that are held on nodes end, and those that are still to come.
func (f *fleet) release(nodes ...string) {
	f.t.Helper()
	for _, n := range nodes {
		if err := f.nodes[n].WriteFile("/run/build-may-end", nil, 0o644); err != nil {
			f.t.Fatal(err)
		}
	}
}

// answers waits until a node's agent answers, as after a boot: the status may be the last word of the one before.
func (f *fleet) answers(node string) {
	f.t.Helper()
	f.eventually(soon, func() string {
		if r := f.cli("ping", node); r.code != 0 {
			return r.String()
		}
		return ""
	})
}

// reaches says whether the operator's side can connect to a node's port. A port that is slow to answer counts as closed.
func (f *fleet) reaches(n *lab.Node, port int) bool {
	f.t.Helper()
	ctx, cancel := context.WithTimeout(f.ctx, 2*time.Second)
	defer cancel()
	conn, err := f.lab.Dial(ctx, "tcp", fmt.Sprintf("%s:%d", n.IP, port))
	if err != nil {
		return false
	}
	conn.Close()
	return true
}

// opens waits until it can.
func (f *fleet) opens(n *lab.Node, ports ...int) {
	f.t.Helper()
	for _, port := range ports {
		f.eventually(soon, func() string {
			if !f.reaches(n, port) {
				return fmt.Sprintf("port %d of %s can't be reached", port, n.Name)
			}
			return ""
		})
	}
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
