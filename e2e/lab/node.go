package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/nix-infra/nix-infra/e2e/testos"
)

// Node is one machine of a lab.
type Node struct {
	Name string
	IP   string

	lab     *Lab
	index   int
	diskMiB int
	plain   bool // when it was made
}

func newNode(l *Lab, s nodeState) *Node {
	return &Node{Name: s.Name, IP: fmt.Sprintf("%s.%d", network, 10+s.Index), lab: l, index: s.Index, diskMiB: s.DiskMiB, plain: s.Plain}
}

func (n *Node) dir() string    { return filepath.Join(n.lab.dir, "nodes", n.Name) }
func (n *Node) cgroup() string { return filepath.Join(n.lab.cgroup(), n.Name) }

// ensureNodes makes the folders of the nodes that are new, and tells every node of them.
func (l *Lab) ensureNodes(ctx context.Context, o NodeOptions, names []string) ([]*Node, error) {
	unlock, err := lock(ctx, lockFile(l.name))
	if err != nil {
		return nil, err
	}
	defer unlock()
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.loadLocked(); err != nil {
		return nil, err
	}
	var nodes, made []*Node
	if o.SudoUser != "" && (!o.Plain || !label.MatchString(o.SudoUser)) {
		return nil, fmt.Errorf("lab %s: user %q: only plain nodes have one, named by lower-case letters, digits and inner hyphens", l.name, o.SudoUser)
	}
	for _, name := range names {
		if !label.MatchString(name) {
			return nil, fmt.Errorf("lab %s: node name %q: use up to 32 lower-case letters, digits and inner hyphens", l.name, name)
		}
		n := l.nodes[name]
		if n == nil {
			if l.state.NextIndex > maxNodes {
				return nil, fmt.Errorf("lab %s: node %s would be number %d, and there are addresses for %d", l.name, name, l.state.NextIndex, maxNodes)
			}
			s := nodeState{Name: name, Index: l.state.NextIndex, DiskMiB: o.DiskMiB, Plain: o.Plain}
			l.state.NextIndex++
			l.state.Nodes = append(l.state.Nodes, s)
			n = newNode(l, s)
			l.nodes[name] = n
			made = append(made, n)
		}
		nodes = append(nodes, n)
	}
	for _, n := range made {
		if err := n.makeDisk(ctx, o); err != nil {
			return nil, err
		}
	}
	if len(made) == 0 {
		return nodes, nil
	}
	if err := l.writeHosts(ctx); err != nil {
		return nil, err
	}
	return nodes, l.save()
}

// writeHosts gives all nodes an /etc/hosts with all nodes: those that run now, the others at their next boot.
func (l *Lab) writeHosts(ctx context.Context) error {
	var hosts bytes.Buffer
	fmt.Fprintf(&hosts, "127.0.0.1 localhost\n%s operator\n", l.HostIP())
	for _, s := range l.state.Nodes {
		fmt.Fprintf(&hosts, "%s %s\n", l.nodes[s.Name].IP, s.Name)
	}
	for _, s := range l.state.Nodes {
		n := l.nodes[s.Name]
		if err := os.WriteFile(filepath.Join(n.dir(), "seed/etc/hosts"), hosts.Bytes(), 0o644); err != nil {
			return fmt.Errorf("node %s: %w", n.Name, err)
		}
		if n.leader() != 0 {
			if err := n.write(ctx, "/etc/hosts", bytes.NewReader(hosts.Bytes()), 0o644); err != nil {
				return err
			}
		}
	}
	return nil
}

// makeDisk makes the node's folder: an empty disk, and the seed that every boot copies onto it where newer,
// which is how the machine gets its identity.
func (n *Node) makeDisk(ctx context.Context, o NodeOptions) error {
	fail := func(err error) error { return fmt.Errorf("node %s: disk: %w", n.Name, err) }
	if err := os.RemoveAll(n.dir()); err != nil {
		return fail(err)
	}
	seed := filepath.Join(n.dir(), "seed")
	for _, dir := range []string{"upper", "work", "root", "disk", "containers", "seed/etc/ssh"} {
		if err := os.MkdirAll(filepath.Join(n.dir(), dir), 0o755); err != nil {
			return fail(err)
		}
	}
	keys := []byte(o.AuthorizedKeys)
	if len(keys) == 0 {
		var err error
		if keys, err = os.ReadFile(n.lab.SSHKey() + ".pub"); err != nil {
			return fail(err)
		}
	}
	if o.SudoUser != "" {
		// The user is made at the first boot, by the node's own useradd.
		if err := os.WriteFile(filepath.Join(n.dir(), "sudo-user"), []byte(o.SudoUser), 0o644); err != nil {
			return fail(err)
		}
		if err := os.WriteFile(filepath.Join(n.dir(), "sudo-keys"), keys, 0o644); err != nil {
			return fail(err)
		}
	} else {
		ssh := filepath.Join(seed, "root/.ssh")
		if err := errors.Join(os.Mkdir(filepath.Dir(ssh), 0o700), os.Mkdir(ssh, 0o700)); err != nil {
			return fail(err)
		}
		if err := os.WriteFile(filepath.Join(ssh, "authorized_keys"), keys, 0o600); err != nil {
			return fail(err)
		}
	}
	if err := os.WriteFile(filepath.Join(seed, "etc/hostname"), []byte(n.Name+"\n"), 0o644); err != nil {
		return fail(err)
	}
	if _, err := run(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "root@"+n.Name,
		"-f", filepath.Join(seed, "etc/ssh/ssh_host_ed25519_key")); err != nil {
		return fail(err)
	}
	if !n.plain {
		if err := testos.WriteBase(filepath.Join(seed, "etc/nixos"), testos.Values{NodeName: n.Name, SSHKey: string(keys)}); err != nil {
			return fail(err)
		}
	}
	if n.diskMiB > 0 {
		image := filepath.Join(n.dir(), "disk.img")
		if err := os.WriteFile(image, nil, 0o600); err != nil {
			return fail(err)
		}
		if err := os.Truncate(image, int64(n.diskMiB)<<20); err != nil {
			return fail(err)
		}
		// No journal and no reserve: nearly all of a small disk is for the node.
		if _, err := run(ctx, "mkfs.ext4", "-q", "-O", "^has_journal", "-m", "0", image); err != nil {
			return fail(err)
		}
	}
	return nil
}

// leader is the process that is PID 1 in the node, or 0 when the node is not running.
func (n *Node) leader() int {
	data, err := os.ReadFile(filepath.Join(n.cgroup(), "payload/init.scope/cgroup.procs"))
	if err != nil {
		return 0
	}
	// Children that systemd has just forked are in its group for a moment, too.
	for pid := range strings.Lines(string(data)) {
		pid = strings.TrimSpace(pid)
		status, _ := os.ReadFile(filepath.Join("/proc", pid, "status"))
		_, rest, _ := strings.Cut(string(status), "\nNSpid:")
		ids, _, _ := strings.Cut(rest, "\n")
		if fields := strings.Fields(ids); len(fields) > 1 && fields[len(fields)-1] == "1" {
			leader, _ := strconv.Atoi(pid)
			return leader
		}
	}
	return 0
}

// Running says whether the node has power.
func (n *Node) Running() bool { return populated(n.cgroup()) }

// nodeEnv is the clean environment of a command in a node, root's on NixOS as far as it goes.
var nodeEnv = []string{
	"PATH=/run/current-system/sw/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
	"HOME=/root", "USER=root", "LANG=C.UTF-8", "TERM=dumb",
}

// Command is a command on the node, as root, in all of its namespaces. It needs no network and no sshd, works
// while the node is cut off, and dies with ctx or with the node.
func (n *Node) Command(ctx context.Context, argv ...string) *exec.Cmd {
	leader := n.leader()
	args := append([]string{"-t", strconv.Itoa(leader), "-m", "-p", "-n", "-u", "-i", "-C", "-r", "-w", "--"}, argv...)
	// Below the payload, where the node's own systemd may move it on, and not in any of its units.
	cmd := grouped(ctx, filepath.Join(n.cgroup(), "payload/lab-exec"), args)
	cmd.Env = nodeEnv
	if leader == 0 {
		cmd.Err = fmt.Errorf("node %s is not running; start it first", n.Name)
	}
	return cmd
}

// Exec runs a command on the node and returns what it printed, on both outputs. The error says that, too.
func (n *Node) Exec(ctx context.Context, argv ...string) ([]byte, error) {
	out, err := n.Command(ctx, argv...).CombinedOutput()
	if err != nil {
		if ctx.Err() != nil {
			err = errors.Join(ctx.Err(), err)
		}
		return out, fmt.Errorf("node %s: %s: %w\n%s", n.Name, strings.Join(argv, " "), err, bytes.TrimSpace(out))
	}
	return out, nil
}

// ReadFile reads a file of the running node, as the node sees it.
func (n *Node) ReadFile(name string) ([]byte, error) {
	leader := n.leader()
	if leader == 0 {
		return nil, fmt.Errorf("node %s: read %s: it is not running; start it first", n.Name, name)
	}
	f, err := openInRoot(leader, name)
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", n.Name, err)
	}
	defer f.Close()
	data, err := io.ReadAll(f)
	if err != nil {
		return nil, fmt.Errorf("node %s: %w", n.Name, err)
	}
	return data, nil
}

// WriteFile replaces a file on the running node at once, folders above it included.
func (n *Node) WriteFile(name string, data []byte, mode os.FileMode) error {
	return n.write(context.Background(), name, bytes.NewReader(data), mode)
}

// CopyTo copies a file of this machine to the node.
func (n *Node) CopyTo(local, remote string, mode os.FileMode) error {
	f, err := os.Open(local)
	if err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	defer f.Close()
	return n.write(context.Background(), remote, f, mode)
}

func (n *Node) write(ctx context.Context, name string, from io.Reader, mode os.FileMode) error {
	const script = `umask 077; mkdir -p -m 755 "$(dirname "$1")"; cat >"$1.lab-new" && chmod "$2" "$1.lab-new" && mv -T "$1.lab-new" "$1" || { rm -f "$1.lab-new"; exit 1; }`
	cmd := n.Command(ctx, "sh", "-c", script, "sh", name, fmt.Sprintf("%04o", mode.Perm()))
	cmd.Stdin = from
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("node %s: write %s: %w: %s", n.Name, name, err, bytes.TrimSpace(out))
	}
	return nil
}
