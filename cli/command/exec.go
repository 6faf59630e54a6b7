package command

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

// Ways to run a command.
const (
	viaAgent = "agent"
	viaSSH   = "ssh"
)

// allowIt is what there is to do where the policy of a node does not allow a command.
const allowIt = "its configuration can allow it (docs/policy.md), and --via=ssh needs no such leave"

type execOptions struct {
	asking
	targets []string
	limit   time.Duration
	via     string
	shell   bool
	merge   bool
	sshKey  string
	older   bool // the command is the earlier tool's, in whose scripts nixos-rebuild is how a deployment ends

	argv []string // what to run, as it was given in words
	text string   // or in a text
}

func (a *app) execCommand() *cobra.Command { return a.commandCommand(false) }

// commandCommand is exec, or what the earlier tool had in its place.
func (a *app) commandCommand(older bool) *cobra.Command {
	o := execOptions{older: older}
	c := &cobra.Command{
		Use:     "exec [flags] SELECTOR... -- PROGRAM [ARG]...",
		Aliases: []string{"cmd"}, DisableFlagsInUseLine: true,
		Short: "Run a command on nodes",
		Long: `Run a command on nodes, and show what it writes as it comes. What may be run is what each node's policy allows
(docs/policy.md); there is no shell, and what stands behind -- reaches the program word by word.

With --target, the words are a text instead, which is taken apart as a shell does it, but nothing more. Behind a | in it
are programs of this machine: they run here, over the output of each node, and the last one's exit status counts. Text
that only a shell can carry out is run by one where the node's policy allows that (allowShell), for an admin. With
--via=ssh, which NIX_INFRA_VIA=ssh makes the default, root's shell on the nodes runs it, by SSH through their agents.

Ctrl-C ends what runs on the nodes. The exit status is 0 where everything exited with 0, 1 where something did not,
2 where the nodes refused it and nothing was run, and 3 where some did not answer.`,
		Example: `  nix-infra exec @web -- systemctl status nginx
  nix-infra exec web1 web2 -- journalctl -u nginx --since today --no-pager
  nix-infra cmd --target="web1 web2" "ps aux | grep nginx"
  nix-infra cmd --target=web1 --via=ssh "cd /var/lib/app && ls | wc -l"
  nix-infra exec all --json -- uname -r`,
		RunE: func(c *cobra.Command, args []string) error {
			selectors, err := o.read(args, c.ArgsLenAtDash())
			if err != nil {
				return err
			}
			if r, ok := parseRebuild(first(o.text, strings.Join(o.argv, " "))); ok && o.older {
				return a.rebuildNodes(c.Context(), selectors, r)
			}
			return a.exec(c.Context(), selectors, &o)
		},
	}
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error {
		return fmt.Errorf("%w; an option of the command that is to run stands behind --, or in quotes with --target; see nix-infra exec --help", err)
	})
	f := c.Flags()
	f.StringArrayVar(&o.targets, "target", nil, "`nodes`, as a selector; what is left are the words of the command; repeatable")
	f.DurationVar(&o.limit, "timeout", 0, "how long it may run; 0: as long as the node's policy lets it")
	f.DurationVar(&o.timeout, "wait", 30*time.Second, "how long a node may take to begin")
	f.StringVar(&o.via, "via", "", "agent, or ssh: root's shell, through the agent's tunnel (default $NIX_INFRA_VIA, else agent)")
	f.BoolVar(&o.shell, "shell", false, "run it by a shell, where the node's policy allows that")
	f.BoolVar(&o.merge, "merge", false, "print to stdout what nodes write to stderr, too")
	f.StringVar(&o.sshKey, "ssh-key", "", "with --via=ssh: the key below ssh/ (default $SSH_KEY, else the project's)")
	o.manyFlags(f)
	return c
}

// read tells the selectors from what is to run. dash is how many words stand before the --, -1 without one.
func (o *execOptions) read(args []string, dash int) (selectors []string, err error) {
	switch older := len(o.targets) > 0; {
	case dash < 0 && !older:
		return nil, errors.New("run what? It stands behind -- (nix-infra exec web1 -- systemctl status nginx)")
	case dash < 0:
		o.text = strings.Join(args, " ")
	case dash == len(args):
		return nil, errors.New("run what? Nothing stands behind the --")
	case older && len(args) == dash+1:
		selectors, o.text = args[:dash], args[dash]
	default:
		selectors, o.argv = args[:dash], args[dash:]
	}
	if o.text = strings.TrimSpace(o.text); o.text == "" && o.argv == nil {
		return nil, errors.New(`run what? Its words stand beside --target (nix-infra cmd --target="web1 web2" "systemctl status nginx")`)
	}
	selectors = append(slices.Clone(o.targets), selectors...)
	return selectors, someNodes("run it on which nodes?", "exec")(nil, selectors)
}

func (a *app) exec(ctx context.Context, selectors []string, o *execOptions) error {
	limit, err := seconds("--timeout", o.limit)
	if err != nil {
		return err
	}
	if o.timeout <= 0 {
		return fmt.Errorf("--wait %v: use more than 0", o.timeout)
	}
	me, err := a.identity()
	if err != nil {
		return err
	}
	via, err := viaOf(o.via, me)
	if err != nil {
		return err
	}
	w, err := o.work(limit, me, via)
	if err != nil {
		return err
	}
	q, err := a.questionAs(ctx, me, selectors, o.asking)
	if err != nil {
		return err
	}
	defer q.session.Close()
	if via == viaSSH {
		_, err = q.runSSH(ctx, o.shellText(), w, sshOptions{user: "root", sshKey: o.sshKey})
	} else {
		_, err = q.run(ctx, w)
	}
	return err
}

// viaOf is the way that a flag or the environment names.
func viaOf(flag string, me *identity) (string, error) {
	via := first(first(flag, me.project.Env.Get("NIX_INFRA_VIA")), viaAgent)
	if via != viaAgent && via != viaSSH {
		return "", fmt.Errorf("--via or NIX_INFRA_VIA is %q: use agent or ssh", via)
	}
	return via, nil
}

// seconds reads a flag of whole seconds, up to what a run may take.
func seconds(flag string, d time.Duration) (int, error) {
	if d < 0 || d > protocol.MaxRunTime*time.Second || d%time.Second != 0 {
		return 0, fmt.Errorf("%s %v: use whole seconds, up to %v", flag, d, protocol.MaxRunTime*time.Second)
	}
	return int(d.Seconds()), nil
}

// work is what the nodes are asked to run.
func (o *execOptions) work(limit int, me *identity, via string) (work, error) {
	w := work{merge: o.merge}
	if via == viaSSH {
		if limit > 0 {
			return w, errors.New("--timeout is for what an agent runs; by SSH, nothing ends it but Ctrl-C")
		}
		return w, nil
	}
	argv, shell := o.argv, o.shell
	var syntax *rule.ShellSyntax
	if argv == nil && !shell {
		commands, err := rule.SplitPipes(o.text)
		switch {
		case errors.As(err, &syntax):
			shell = true
		case err != nil:
			return w, err
		default:
			argv, w.pipe = commands[0], commands[1:]
		}
	}
	if !shell {
		order := protocol.CommandOrder{Argv: argv, Timeout: limit}
		w.action, w.payload = protocol.RunCommand, func(string) any { return order }
		w.instead = allowIt
		return w, errors.Join(order.Validate(), checkPrograms(w.pipe))
	}
	w.instead = "--via=ssh needs no such leave"
	if syntax != nil {
		w.instead = fmt.Sprintf("to do without a shell: %s (character %d, %q); and %s", syntax.Instead, syntax.At, syntax.Char, w.instead)
	}
	if !me.Role.AtLeast(protocol.LeastRole(protocol.RunShell)) {
		return w, fmt.Errorf("this takes a shell, which only an admin may have run, and %s is %s; %s", me.Name, me.Role, w.instead)
	}
	order := protocol.ShellOrder{Text: o.shellText(), Timeout: limit}
	w.action, w.payload = protocol.RunShell, func(string) any { return order }
	return w, order.Validate()
}

// shellText is what to run, for a shell.
func (o *execOptions) shellText() string {
	switch {
	case o.argv == nil:
		return o.text
	case o.shell && len(o.argv) == 1:
		return o.argv[0]
	}
	return quoteWords(o.argv)
}

// quoteWords makes a text of which any POSIX shell makes these words.
func quoteWords(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = "'" + strings.ReplaceAll(w, "'", `'\''`) + "'"
	}
	return strings.Join(quoted, " ")
}
