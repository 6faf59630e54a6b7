// Command lab boots real nodes on this machine, for people: the same labs that the end-to-end tests use.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"text/tabwriter"
	"time"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

const usage = `lab: real nodes on one machine, each with its own systemd, Nix, sshd, address and disk

usage: lab [--name LAB] COMMAND

  up N [NODE…]         N nodes, n1 to nN, and others by name; those that there are keep their disks
  renew N [NODE…]      the same after down: N nodes with new disks
  down                 remove the lab, disks included
  list                 all labs and their nodes
  exec NODE -- CMD…    run a command on a node, as root, without the network
  ssh NODE [-- CMD…]   the same over SSH
  run -- CMD…          run a command here, but in the lab's network: the operator's side
  cut NODE             pull the node's cable
  heal NODE            plug it in again
  reboot NODE          reboot in good order
  stop NODE            shut down in good order
  kill NODE            cut the power
  start NODE           power on, with the disk as it was
  key                  the private key's file that root accepts on every node
  gc                   remove labs whose owner, a test that crashed, is gone

The lab's name is --name, or else $LAB, or else "lab". $LAB_DIR (/var/lib/nix-infra-lab) holds disks, $LAB_CACHE
(/var/cache/nix-infra-lab) the nodes' root file system, $LAB_PACKAGES names more Debian packages for it.

examples:
  lab up 3
  lab exec n1 -- systemctl status
  lab cut n2; lab exec n1 -- ping -c1 -W1 n2; lab heal n2
  lab run -- curl http://10.77.0.11:8080/
  lab --name other up 2
  lab down
`

// The commands that need a lab, and those that need a node of it, too.
var (
	onLab   = []string{"down", "run", "key"}
	onNodes = []string{"exec", "ssh", "cut", "heal", "reboot", "kill", "start", "stop"}
)

// bound is for commands that should take seconds; what the user runs has none.
const bound = 10 * time.Minute

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	stop()
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		os.Exit(exit.ExitCode())
	case err != nil:
		fmt.Fprintln(os.Stderr, "lab: "+strings.TrimPrefix(err.Error(), "lab: "))
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, stdout, stderr io.Writer) error {
	name := os.Getenv("LAB")
	if name == "" {
		name = "lab"
	}
	flags := flag.NewFlagSet("lab", flag.ContinueOnError)
	flags.SetOutput(io.Discard)
	flags.StringVar(&name, "name", name, "")
	if err := flags.Parse(args); errors.Is(err, flag.ErrHelp) {
		_, err := io.WriteString(stdout, usage)
		return err
	} else if err != nil {
		return fmt.Errorf("%w; `lab --help` shows what there is", err)
	}
	if flags.NArg() == 0 {
		return errors.New("which command? `lab --help` shows what there is")
	}
	verb, rest := flags.Arg(0), flags.Args()[1:]
	bounded, cancel := context.WithTimeout(ctx, bound)
	defer cancel()
	switch verb {
	case "help":
		_, err := io.WriteString(stdout, usage)
		return err
	case "up":
		return up(bounded, name, rest, stdout, stderr)
	case "renew":
		return renew(bounded, name, rest, stdout, stderr)
	case "list":
		return list(stdout)
	case "gc":
		reaped, err := lab.Reap(bounded, stderr)
		fmt.Fprintf(stdout, "%d removed\n", len(reaped))
		return err
	}
	if !slices.Contains(onLab, verb) && !slices.Contains(onNodes, verb) {
		return fmt.Errorf("there is no command %q; `lab --help` shows those that there are", verb)
	}
	l, err := lab.Attach(name)
	if err != nil && (verb != "down" || l == nil) {
		return err
	}
	switch verb {
	case "down":
		return l.Down(bounded)
	case "key":
		_, err := fmt.Fprintln(stdout, l.SSHKey())
		return err
	case "run":
		if len(rest) > 0 && rest[0] == "--" {
			rest = rest[1:]
		}
		if len(rest) == 0 {
			return errors.New("run what? as in: lab run -- ping -c1 n1")
		}
		return foreground(l.Command(ctx, rest...))
	}
	return onNode(ctx, bounded, l, verb, rest)
}

func up(ctx context.Context, name string, args []string, stdout, stderr io.Writer) error {
	if len(args) == 0 {
		return errors.New("up how many? as in: lab up 3")
	}
	count, err := strconv.Atoi(args[0])
	if err != nil || count < 1 {
		return fmt.Errorf("up %s: not a number of nodes", args[0])
	}
	for _, other := range args[1:] {
		if _, err := strconv.Atoi(other); err == nil {
			return fmt.Errorf("up how many? %s or %s? The others are names", args[0], other)
		}
	}
	l, err := lab.Open(ctx, lab.Options{Name: name, Log: stderr})
	if err != nil {
		return err
	}
	var names []string
	for i := range count {
		names = append(names, fmt.Sprintf("n%d", i+1))
	}
	if _, err := l.Start(ctx, append(names, args[1:]...)...); err != nil {
		return err
	}
	return show(stdout, l)
}

// renew removes the lab, if there is one, and makes it again.
func renew(ctx context.Context, name string, args []string, stdout, stderr io.Writer) error {
	l, err := lab.Attach(name)
	switch {
	case errors.Is(err, lab.ErrNoLab):
	case l == nil:
		return err
	default: // one that is damaged, too
		if err := l.Down(ctx); err != nil {
			return err
		}
	}
	return up(ctx, name, args, stdout, stderr)
}

func list(stdout io.Writer) error {
	names, err := lab.List()
	if err != nil {
		return err
	}
	for _, name := range names {
		l, err := lab.Attach(name)
		if err != nil {
			return err
		}
		if err := show(stdout, l); err != nil {
			return err
		}
	}
	return nil
}

func show(w io.Writer, l *lab.Lab) error {
	table := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	for _, n := range l.Nodes() {
		state := "off"
		if n.Running() {
			state = "running"
		}
		fmt.Fprintf(table, "%s\t%s\t%s\t%s\n", l.Name(), n.Name, n.IP, state)
	}
	return table.Flush()
}

func onNode(ctx, bounded context.Context, l *lab.Lab, verb string, args []string) error {
	if len(args) == 0 {
		return fmt.Errorf("%s which node?", verb)
	}
	n := l.Node(args[0])
	if n == nil {
		var names []string
		for _, n := range l.Nodes() {
			names = append(names, n.Name)
		}
		return fmt.Errorf("lab %s has no node %q; it has %s", l.Name(), args[0], strings.Join(names, ", "))
	}
	argv := args[1:]
	if len(argv) > 0 && argv[0] == "--" {
		argv = argv[1:]
	}
	if len(argv) > 0 && verb != "exec" && verb != "ssh" {
		return fmt.Errorf("%s takes one node, and nothing after it", verb)
	}
	switch verb {
	case "exec":
		if len(argv) == 0 {
			return fmt.Errorf("exec what? as in: lab exec %s -- systemctl status", n.Name)
		}
		return foreground(n.Command(ctx, argv...))
	case "ssh":
		return foreground(l.Command(ctx, append([]string{"ssh", "-i", l.SSHKey(), "-o", "BatchMode=yes",
			"-o", "ConnectTimeout=5", "-o", "LogLevel=ERROR", "-o", "StrictHostKeyChecking=no",
			"-o", "UserKnownHostsFile=/dev/null", "root@" + n.IP}, argv...)...))
	case "cut":
		return n.Cut(bounded)
	case "heal":
		return n.Heal(bounded)
	case "reboot":
		return n.Reboot(bounded)
	case "kill":
		return n.Kill(bounded)
	case "start":
		return n.Boot(bounded)
	default:
		return n.Stop(bounded)
	}
}

// foreground becomes the command, so that the terminal, its signals and the exit status are the command's own.
func foreground(cmd *exec.Cmd) error {
	if cmd.Err != nil {
		return cmd.Err
	}
	env := cmd.Env
	if env == nil {
		env = os.Environ()
	}
	if err := syscall.Exec(cmd.Path, cmd.Args, env); err != nil {
		return fmt.Errorf("%s: %w", cmd.Path, err)
	}
	return nil
}
