//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/e2e/testos"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

const (
	password     = "swarm"
	credentials  = "admin.creds"
	readyWithin  = 2 * time.Minute
	onlineWithin = 5 * time.Minute
	enrolling    = 16 // nodes at once
)

// fleet is a project folder, its controller and its nodes.
type fleet struct {
	dir        string
	controller *exec.Cmd
	exited     chan error // of the controller
	authority  *provision.Authority
	admin      *client.Client
	nodes      []string  // names
	agents     []*agents // processes, which run all of them
}

// newFleet builds the programs, makes a project and starts its controller.
func newFleet(ctx context.Context, dir string) (_ *fleet, err error) {
	f := &fleet{dir: dir, exited: make(chan error, 1)}
	defer func() {
		if err != nil {
			f.close()
		}
	}()
	for _, program := range []string{"cli/nix-infra", "controller/nix-infra-controller"} {
		build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", f.path(filepath.Base(program)), "github.com/nix-infra/nix-infra/"+program)
		build.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := build.CombinedOutput(); err != nil {
			return nil, fmt.Errorf("building %s: %w\n%s", program, err, out)
		}
	}
	address, err := freeAddress()
	if err != nil {
		return nil, err
	}
	if err := testos.WriteProject(f.path("project")); err != nil {
		return nil, err
	}
	if _, err := f.run(f.cli(ctx, "init", "--fleet", "swarm", "--controller", "tls://"+address, "--nixos-version", testos.DefaultVersion, "--batch")); err != nil {
		return nil, err
	}
	if err := f.startController(ctx, address); err != nil {
		return nil, err
	}
	return f, f.openAuthority(ctx, address)
}

func (f *fleet) path(elements ...string) string {
	return filepath.Join(append([]string{f.dir}, elements...)...)
}

func freeAddress() (string, error) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	return l.Addr().String(), l.Close()
}

// cli is the command line, not started yet.
func (f *fleet) cli(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, f.path("nix-infra"), append([]string{"-d", f.path("project")}, args...)...)
	cmd.Env = append(os.Environ(), "SECRETS_PASS="+password, "NO_COLOR=1")
	if f.admin != nil { // from then on as CI does it: the project's own keys take a second of CPU to open, on purpose
		cmd.Env = append(cmd.Env, "NIX_INFRA_CREDS="+f.path(credentials))
	}
	return cmd
}

// run runs a command to its end; the error has its last words.
func (f *fleet) run(cmd *exec.Cmd) ([]byte, error) {
	var said bytes.Buffer
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		return out, fmt.Errorf("%v: %w\n%s%s", cmd.Args, err, tail(out), tail(said.Bytes()))
	}
	return out, nil
}

// tail is the end of what a command printed.
func tail(out []byte) []byte {
	const most = 2000 // bytes
	return out[max(0, len(out)-most):]
}

func (f *fleet) startController(ctx context.Context, address string) error {
	dir := f.path("controller")
	program := func(args ...string) *exec.Cmd {
		return exec.CommandContext(ctx, f.path("nix-infra-controller"), append(args, "--dir", dir)...)
	}
	request, err := f.run(program("request", "--name", "ctl"))
	if err != nil {
		return err
	}
	enrol := f.cli(ctx, "enroll", "--controller", "--request", "-")
	enrol.Stdin = bytes.NewReader(request)
	answer, err := f.run(enrol)
	if err != nil {
		return err
	}
	load := program("load", "-")
	load.Stdin = bytes.NewReader(answer)
	if _, err := f.run(load); err != nil {
		return err
	}
	config := fmt.Sprintf("broker: { listen: %q, websocket: \"\" }\n", address)
	if err := os.WriteFile(filepath.Join(dir, "controller.yaml"), []byte(config), 0o600); err != nil {
		return err
	}
	log, err := os.Create(f.path("controller.log"))
	if err != nil {
		return err
	}
	defer log.Close()
	f.controller = program("run")
	f.controller.Stdout, f.controller.Stderr = log, log
	f.controller.Cancel = func() error { return f.controller.Process.Signal(syscall.SIGTERM) }
	if err := f.controller.Start(); err != nil {
		return err
	}
	go func() { f.exited <- f.controller.Wait() }()
	return nil
}

// openAuthority opens the project's keys and, as its admin, the connection to the controller.
func (f *fleet) openAuthority(ctx context.Context, address string) error {
	v := vault.New(f.path("project", "nix-infra", "keys"), func() (string, error) { return password, nil })
	secrets := map[string][]byte{}
	for _, entry := range []string{"fleet", "ca", "admin"} {
		data, err := v.Get(entry)
		if err != nil {
			return err
		}
		secrets[entry] = data
	}
	keys := &protocol.FleetKeys{}
	if err := json.Unmarshal(secrets["fleet"], keys); err != nil {
		return err
	}
	// The account that the project published: another one of the same keys would be news to the controller.
	data, err := os.ReadFile(f.path("project", "nix-infra", "fleet.json"))
	if err != nil {
		return err
	}
	var project struct {
		Public protocol.Public `json:"public"`
	}
	if err := json.Unmarshal(data, &project); err != nil {
		return err
	}
	ca, err := provision.ParseCA(secrets["ca"])
	if err != nil {
		return err
	}
	url := "tls://" + address
	f.authority = &provision.Authority{Keys: keys, Public: project.Public, CA: ca, Controllers: []string{url}}
	if err := os.WriteFile(f.path(credentials), secrets["admin"], 0o600); err != nil {
		return err
	}
	signer, claims, err := protocol.ParseCredentials(secrets["admin"])
	if err != nil {
		return err
	}
	for deadline := time.Now().Add(readyWithin); ; {
		f.admin, err = client.Connect(ctx, client.Config{URLs: []string{url}, CA: ca.Public(), Signer: signer, Name: claims.Name})
		if err == nil {
			if _, err = f.admin.ListNodes(ctx); err == nil {
				return nil
			}
			f.admin.Close()
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case exit := <-f.exited:
			log, _ := os.ReadFile(f.path("controller.log"))
			return fmt.Errorf("the controller ended: %v\n%s", exit, log)
		case <-time.After(50 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("the controller does not answer: %w", err)
		}
	}
}

// grow enrols nodes until there are n, as their machines, their operator and the controller do; runs their agents, and
// returns when the controller has heard of each. It tells what the two took.
func (f *fleet) grow(ctx context.Context, n int) (enrolled, online time.Duration, err error) {
	began, first := time.Now(), len(f.nodes)
	enrol, within := errgroup.WithContext(ctx)
	enrol.SetLimit(enrolling)
	for i := first; i < n; i++ {
		f.nodes = append(f.nodes, nameOf(i))
		enrol.Go(func() error { return f.enrol(within, nameOf(i)) })
	}
	if err := enrol.Wait(); err != nil {
		return 0, 0, err
	}
	enrolled = time.Since(began)
	began = time.Now()
	most, err := agentsPerProcess()
	if err != nil {
		return 0, 0, err
	}
	for ; first < n; first += most {
		a, err := startAgents(f.path("nodes"), first, min(most, n-first))
		if err != nil {
			return 0, 0, fmt.Errorf("can't run agents: %w", err)
		}
		f.agents = append(f.agents, a)
		if _, err := a.order("started"); err != nil {
			return 0, 0, err
		}
	}
	err = f.awaitAll(ctx)
	return enrolled, time.Since(began), err
}

func (f *fleet) enrol(ctx context.Context, name string) error {
	home := machine.Home{Dir: f.path("nodes", name), Role: protocol.Node}
	request, err := home.Request(name)
	if err != nil {
		return err
	}
	answer, err := f.authority.Sign(request, nil, time.Now())
	if err != nil {
		return err
	}
	if _, err := home.Load(protocol.Encode(answer)); err != nil {
		return err
	}
	record := protocol.NodeRecord{Name: name, Key: request.Key, XKey: request.XKey, JWT: answer.User, System: request.System, Enrolled: time.Now().UTC()}
	return f.admin.Controller(ctx, protocol.PutNode, record, nil)
}

// awaitAll waits until the controller has heard of every node.
func (f *fleet) awaitAll(ctx context.Context) error {
	for deadline := time.Now().Add(onlineWithin); ; {
		states, err := f.admin.ListNodes(ctx)
		if err != nil {
			return err
		}
		online := 0
		for i := range states {
			if states[i].Online {
				online++
			}
		}
		if online == len(f.nodes) {
			return nil
		}
		if time.Now().After(deadline) {
			return fmt.Errorf("%d of %d agents are online after %s", online, len(f.nodes), onlineWithin)
		}
		for _, a := range f.agents {
			select {
			case err := <-a.exited:
				return fmt.Errorf("agents ended: %v", err)
			default:
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// close ends all that runs.
func (f *fleet) close() {
	if f.admin != nil {
		f.admin.Close()
	}
	for _, a := range f.agents {
		a.close()
	}
	if f.controller != nil && f.controller.Process != nil {
		_ = f.controller.Process.Signal(syscall.SIGTERM) // it may have ended
		<-f.exited
	}
}
