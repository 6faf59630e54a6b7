// Package lab boots real nodes on one machine: Debian with systemd as PID 1, sshd and Nix, each with its own
// network namespace, address, disk and boot id, on a switch of their own. They can be cut off, rebooted, and
// have their power cut. It needs Linux and root, and installs the Debian packages that it needs.
//
//	l, err := lab.Open(ctx, lab.Options{Name: "mytest", OwnerPID: os.Getpid()})
//	defer l.Down(context.Background())
//	nodes, err := l.Start(ctx, "c1", "n1", "n2")
//	out, err := nodes[0].Exec(ctx, "systemctl", "is-system-running")
//
// A lab is a folder, a cgroup and a few network namespaces, all named after it; lab.json in the folder is the
// only state, so that the command `lab` and a test can work on the same one, and so that what a crash left
// behind is found and removed. Labs of different names share nothing but the read-only root file system.
package lab

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
)

// Options say which lab to open.
type Options struct {
	// Name is a DNS label; the zero value means "lab".
	Name string
	// Log gets a line for each step that takes a while; nil means nowhere.
	Log io.Writer
	// OwnerPID is the process that the lab belongs to: when that is gone, the next Open or Reap removes the
	// lab. Zero means nobody: the lab stays until Down.
	OwnerPID int
}

// NodeOptions say what is special about nodes when they are made; they keep it for life.
type NodeOptions struct {
	// DiskMiB bounds the node's disk (what it writes over the shared root file system); zero means no bound.
	DiskMiB int
	// Plain is a machine before anybody made it NixOS: Debian with sshd and sudo, without Nix. InfectScript, run there
	// as root, has its next boot be an ordinary node.
	Plain bool
	// SudoUser is a user of a plain node who may do everything by sudo, without a password; root may not log in then.
	SudoUser string
	// AuthorizedKeys are the keys that let root, or that user, in by SSH, as such a file has them; empty means the lab's.
	AuthorizedKeys string
}

// Lab is a switch with nodes on it.
type Lab struct {
	name string
	dir  string
	log  io.Writer

	mu    sync.Mutex
	state state
	nodes map[string]*Node
}

var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?$`)

// ErrNoLab is what Attach answers when there is no such lab.
var ErrNoLab = errors.New("no such lab")

// Open makes the lab, or attaches to it when it exists. The first one ever takes about a minute, for packages
// and the root file system; later ones a fraction of a second. Labs whose owner died are removed on the way.
func Open(ctx context.Context, o Options) (*Lab, error) {
	if o.Name == "" {
		o.Name = "lab"
	}
	if o.Log == nil {
		o.Log = io.Discard
	}
	if !label.MatchString(o.Name) {
		return nil, fmt.Errorf("lab: name %q: use up to 32 lower-case letters, digits and inner hyphens", o.Name)
	}
	if err := Available(); err != nil {
		return nil, err
	}
	if err := installHostPackages(ctx, o.Log); err != nil {
		return nil, err
	}
	if err := allowWatches(o.Log); err != nil {
		return nil, err
	}
	if _, err := Reap(ctx, o.Log); err != nil {
		fmt.Fprintf(o.Log, "%v\n", err) // a dead lab that resists is no reason to refuse a live one
	}
	unlock, err := lock(ctx, lockFile(o.Name))
	if err != nil {
		return nil, err
	}
	defer unlock()
	l, err := attach(o.Name, o.Log)
	switch {
	case errors.Is(err, ErrNoLab):
		if l, err = create(ctx, o); err != nil {
			return nil, err
		}
	case err != nil:
		return nil, err
	}
	if err := l.ensureSwitch(ctx); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(l.cgroup(), 0o755); err != nil {
		return nil, fmt.Errorf("lab %s: %w", l.name, err)
	}
	return l, nil
}

// Attach finds a lab that exists, and makes nothing.
func Attach(name string) (*Lab, error) {
	if err := Available(); err != nil {
		return nil, err
	}
	if !label.MatchString(name) {
		return nil, fmt.Errorf("lab: name %q: use up to 32 lower-case letters, digits and inner hyphens", name)
	}
	return attach(name, io.Discard)
}

func attach(name string, log io.Writer) (*Lab, error) {
	l := &Lab{name: name, dir: filepath.Join(stateDir(), name), log: log, nodes: map[string]*Node{}}
	return l, l.load()
}

// create makes the lab's folder. The caller holds the lab's lock.
func create(ctx context.Context, o Options) (*Lab, error) {
	image, err := ensureImage(ctx, o.Log)
	if err != nil {
		return nil, err
	}
	l := &Lab{name: o.Name, dir: filepath.Join(stateDir(), o.Name), log: o.Log, nodes: map[string]*Node{}}
	// Without a lab.json this is what a killed create left: nothing can run there.
	if err := os.RemoveAll(l.dir); err != nil {
		return nil, fmt.Errorf("lab %s: %w", o.Name, err)
	}
	if err := os.MkdirAll(l.dir, 0o755); err != nil {
		return nil, fmt.Errorf("lab %s: %w", o.Name, err)
	}
	if _, err := run(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "lab "+o.Name, "-f", l.SSHKey()); err != nil {
		return nil, fmt.Errorf("lab %s: %w", o.Name, err)
	}
	l.state = state{Layers: image.system, PlainLayers: image.plain, NextIndex: 1}
	if o.OwnerPID != 0 {
		l.state.Owner = o.OwnerPID
		l.state.OwnerStarted = processStarted(o.OwnerPID)
	}
	return l, l.save()
}

// Make makes these nodes where they don't exist, and boots none.
func (l *Lab) Make(ctx context.Context, o NodeOptions, names ...string) ([]*Node, error) {
	return l.ensureNodes(ctx, o, names)
}

// Start makes these nodes where they don't exist, boots those that don't run, all at once, and returns when
// every one has finished booting and answers on its SSH port.
func (l *Lab) Start(ctx context.Context, names ...string) ([]*Node, error) {
	return l.StartWith(ctx, NodeOptions{}, names...)
}

// StartWith is Start for nodes out of the ordinary.
func (l *Lab) StartWith(ctx context.Context, o NodeOptions, names ...string) ([]*Node, error) {
	nodes, err := l.Make(ctx, o, names...)
	if err != nil {
		return nil, err
	}
	errs := make([]error, len(nodes))
	var wg sync.WaitGroup
	for i, n := range nodes {
		wg.Go(func() { errs[i] = n.Boot(ctx) })
	}
	wg.Wait()
	return nodes, errors.Join(errs...)
}

// Remove takes a node away for good, disk and all: a later one of its name is another machine, of another address.
func (l *Lab) Remove(ctx context.Context, name string) error {
	unlock, err := lock(ctx, lockFile(l.name))
	if err != nil {
		return err
	}
	defer unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.loadLocked(); err != nil {
		return err
	}
	n := l.nodes[name]
	if n == nil {
		return nil
	}
	if err := n.Kill(ctx); err != nil {
		return err
	}
	removeCgroup(n.cgroup())
	delete(l.nodes, name)
	l.state.Nodes = slices.DeleteFunc(l.state.Nodes, func(s nodeState) bool { return s.Name == name })
	if err := l.save(); err != nil {
		return err
	}
	_, _ = run(ctx, "ip", "netns", "del", filepath.Base(n.netns())) // there is none where it never booted
	if err := os.RemoveAll(n.dir()); err != nil {
		return fmt.Errorf("node %s: %w", name, err)
	}
	return l.writeHosts(ctx)
}

// Node returns the node of that name, or nil when there is none.
func (l *Lab) Node(name string) *Node {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nodes[name] == nil {
		_ = l.loadLocked() // another process may have made it since
	}
	return l.nodes[name]
}

// Nodes returns all nodes, in the order in which they were made.
func (l *Lab) Nodes() []*Node {
	l.mu.Lock()
	defer l.mu.Unlock()
	_ = l.loadLocked()
	nodes := make([]*Node, 0, len(l.state.Nodes))
	for _, s := range l.state.Nodes {
		nodes = append(nodes, l.nodes[s.Name])
	}
	return nodes
}

// Name is the lab's name.
func (l *Lab) Name() string { return l.name }

// SSHKey is the path of the private key that root accepts on every node of this lab.
func (l *Lab) SSHKey() string { return filepath.Join(l.dir, "id") }

// HostIP is the address of the switch: where a program started with Command can listen for the nodes.
func (l *Lab) HostIP() string { return network + ".1" }

// Command is a command on the operator's side: on this machine, with this environment and these files, but
// in the switch's network. It and what it leaves behind die with the lab; it alone with ctx.
func (l *Lab) Command(ctx context.Context, argv ...string) *exec.Cmd {
	return grouped(ctx, filepath.Join(l.cgroup(), "operator"), append([]string{"--net=" + l.switchNS(), "--"}, argv...))
}

// Down removes the lab: processes, network, disks. It works on half-made and half-removed ones too.
func (l *Lab) Down(ctx context.Context) error {
	unlock, err := lock(ctx, lockFile(l.name))
	if err != nil {
		return err
	}
	defer unlock()
	return l.remove(ctx)
}

// remove does it. The caller holds the lab's lock.
func (l *Lab) remove(ctx context.Context) error {
	if err := killCgroup(ctx, l.cgroup()); err != nil {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	removeCgroup(l.cgroup())
	_ = os.Remove(filepath.Dir(l.cgroup())) // the root of all labs, if this was the last
	if err := l.removeNetwork(ctx); err != nil {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	// lab.json last: as long as it is there, somebody will find this lab and finish the job.
	entries, err := os.ReadDir(l.dir)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	for _, e := range entries {
		if e.Name() == stateFile {
			continue
		}
		if err := os.RemoveAll(filepath.Join(l.dir, e.Name())); err != nil {
			return fmt.Errorf("lab %s: %w", l.name, err)
		}
	}
	if err := os.RemoveAll(l.dir); err != nil {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	if err := os.Remove(lockFile(l.name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	return removeGuardRoute(ctx)
}
