package command

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
)

// sshOptions are how the system's ssh is run.
type sshOptions struct {
	targets []string
	user    string // "": root
	sshKey  string
	port    int // of the node's sshd; 0: 22
	tty     bool
	pin     bool
	asks    bool // ssh may ask for a passphrase or a password
}

func (a *app) sshCommand() *cobra.Command {
	var o sshOptions
	c := &cobra.Command{
		Use:   "ssh NODE [-- COMMAND...]",
		Short: "Open a shell on a node, by SSH through its agent",
		Long: `Open a shell on a node, or have its shell run a command, by this machine's ssh and the node's sshd. The way there is a
tunnel to the node's agent, so that nothing of the node has to be reachable. It ends at the node whose keys the
project proves, and ssh takes only the host key that was pinned in nix-infra/known_hosts at enrolment.

A node that was enrolled without SSH has no host key there. With --pin, the one that its sshd shows through the
tunnel is pinned, in place of one that was before.

The exit status is ssh's: the command's, or 255 where ssh itself failed.`,
		Example: `  nix-infra ssh web1
  nix-infra ssh web1 -- systemctl status nginx
  nix-infra ssh web1 --user admin --tty -- sudo htop
  nix-infra ssh db1 --pin`,
		RunE: func(c *cobra.Command, args []string) error {
			node, command, err := oneNode("ssh", o.targets, args)
			if err != nil {
				return err
			}
			return a.ssh(c.Context(), node, command, o)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&o.targets, "target", nil, "the `node`, in place of NODE; of several, the first")
	f.StringVar(&o.user, "user", "root", "user on the node")
	f.StringVar(&o.sshKey, "ssh-key", "", "SSH key file, or the name of a key in the project's ssh folder (default: the project's, and ssh's own)")
	f.IntVar(&o.port, "port", 22, "port of the node's sshd")
	f.BoolVarP(&o.tty, "tty", "t", false, "give the command a terminal")
	f.BoolVar(&o.pin, "pin", false, "pin the host key that the node's sshd shows now")
	return c
}

// oneNode tells the node from what follows it. With --target, whose first node counts, all words follow.
func oneNode(command string, targets, args []string) (node string, rest []string, err error) {
	named := strings.FieldsFunc(strings.Join(targets, " "), func(r rune) bool { return r == ' ' || r == ',' })
	switch {
	case len(named) > 0:
		node, rest = named[0], args
	case len(args) > 0:
		node, rest = args[0], args[1:]
	default:
		return "", nil, fmt.Errorf("which node? Name it (nix-infra %s web1)", command)
	}
	if err := protocol.CheckName(node); err != nil {
		return "", nil, fmt.Errorf("%s goes to one node, by its name: %w", command, err)
	}
	return node, rest, nil
}

func (a *app) ssh(ctx context.Context, name string, words []string, o sshOptions) error {
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	node, err := s.Node(ctx, name)
	if err != nil {
		return err
	}
	o.asks = !a.batch
	way, err := a.sshTo(ctx, s, node, o)
	if err != nil {
		return err
	}
	defer way.Close()
	cmd := way.command(ctx, words...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = a.Stdin, a.Stdout, a.Stderr
	err = cmd.Run()
	var exited *exec.ExitError
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return ctx.Err()
	case errors.As(err, &exited):
		return &outcome{status: max(exited.ExitCode(), SomeFailed)} // by a signal: -1
	}
	return err
}

// sshWay is the system's ssh to one node, through tunnels of this process, which ssh gets to by a socket that nobody
// else can use: so no process but this one has credentials, or asks for a password.
type sshWay struct {
	program string
	options []string
	node    string
	dir     string // of the socket
	socket  net.Listener
	end     context.CancelFunc
	ended   chan struct{} // no tunnel is left
}

// sshTo opens the way, with a first tunnel already there; it is to be closed when no ssh runs any more.
func (a *app) sshTo(ctx context.Context, s *session, node *protocol.NodeState, o sshOptions) (*sshWay, error) {
	program, err := exec.LookPath("ssh")
	if err != nil {
		return nil, errors.New("there is no ssh on this machine; install OpenSSH's client")
	}
	to := &tunnels{s, node, net.JoinHostPort("127.0.0.1", strconv.Itoa(cmp.Or(o.port, 22)))}
	if o.pin {
		if err := a.pin(ctx, to); err != nil {
			return nil, err
		}
	}
	alias, err := provision.PinnedAs(a.own(knownHostsFile), node.Name, node.IPv4)
	if err != nil {
		return nil, err
	}
	if alias == "" {
		return nil, fmt.Errorf("no host key of %s is pinned in %s, as it was enrolled without SSH; nix-infra ssh %s --pin pins the one that its sshd shows through the tunnel, which ends at %s for certain",
			node.Name, a.own(knownHostsFile), node.Name, node.Name)
	}
	opened, err := to.open(ctx)
	if err != nil {
		return nil, err
	}
	w := &sshWay{program: program, node: node.Name}
	if err := w.listen(); err != nil {
		giveUp(opened)
		return nil, err
	}
	if w.options, err = a.sshArguments(w.socket.Addr().String(), alias, s.me.project, o); err != nil {
		giveUp(opened)
		w.unlisten()
		return nil, err
	}
	ctx, w.end = context.WithCancel(ctx)
	w.ended = make(chan struct{})
	go func() {
		defer close(w.ended)
		a.serveSSH(ctx, w.socket, to, opened)
	}()
	return w, nil
}

// listen makes the socket, in a folder of this user's own.
func (w *sshWay) listen() (err error) {
	if w.dir, err = os.MkdirTemp("", "nix-infra-ssh-"); err != nil {
		return err
	}
	if w.socket, err = net.Listen("unix", w.dir+"/socket"); err != nil {
		os.RemoveAll(w.dir)
		return fmt.Errorf("can't make a socket for ssh, whose path must be short (TMPDIR is %s): %w", os.TempDir(), err)
	}
	return nil
}

// sshEndTime is how long ssh may take to end when it is told to.
const sshEndTime = 2 * time.Second

// command is ssh on that way, with what the user's shell on the node shall run; none: an interactive shell. Its stdin,
// stdout and stderr are the caller's to set.
func (w *sshWay) command(ctx context.Context, words ...string) *exec.Cmd {
	args := append(slices.Clone(w.options), w.node)
	if len(words) > 0 {
		args = append(append(args, "--"), words...)
	}
	cmd := exec.CommandContext(ctx, w.program, args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = sshEndTime
	return cmd
}

func (w *sshWay) unlisten() {
	w.socket.Close()
	os.RemoveAll(w.dir)
}

// Close ends what still runs on it.
func (w *sshWay) Close() {
	w.end()
	w.unlisten()
	select {
	case <-w.ended:
	case <-time.After(lastWords):
	}
}
