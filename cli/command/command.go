// Package command is the command line of nix-infra: the tree of commands, what they print, and with
// which status they end.
//
// Start here: Run is one whole invocation. app.go opens what commands need (project, vault,
// connection); every command has a file of its own.
package command

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

// Exit statuses.
const (
	OK          = 0
	SomeFailed  = 1   // it was carried out, and did not work everywhere
	Refused     = 2   // refused, or bad input: nothing was done
	Unanswered  = 3   // some did not answer, or are offline and follow later
	Interrupted = 130 // by Ctrl-C
)

// Environment is all that a run takes from outside.
type Environment struct {
	Stdin          io.Reader
	Stdout, Stderr io.Writer
	Getenv         func(string) string
	VaultOptions   []vault.Option // how init encrypts; tests take less time for it
}

// app is one run.
type app struct {
	Environment
	dir, envFile, creds, colour string
	batch, debug, json          bool

	out     *ui.Terminal // stdout
	keys    *vault.Vault
	secrets *vault.Secrets
	answers *bufio.Reader // what is typed: one for all questions, or the first would have the answers of the others

	interrupted <-chan struct{}
	log         *slog.Logger // stderr, with --debug
}

// Run runs one command line (without the program's name) and gives its exit status. Cancelling ctx is
// Ctrl-C.
func Run(ctx context.Context, args []string, e Environment) int {
	a := &app{Environment: e, interrupted: ctx.Done()}
	root := a.root()
	root.SetArgs(joinBatch(root, args))
	err := root.ExecuteContext(ctx)
	if err != nil {
		if text := message(err); text != "" {
			io.WriteString(e.Stderr, "nix-infra: "+text+"\n")
		}
	}
	return status(ctx, err)
}

// outcome ends a run with a status other than Refused. Err may be nil: everything was said.
type outcome struct {
	status int
	err    error
}

func (o *outcome) Error() string {
	if o.err == nil {
		return ""
	}
	return o.err.Error()
}

func (o *outcome) Unwrap() error { return o.err }

func status(ctx context.Context, err error) int {
	var o *outcome
	switch {
	case err == nil:
		return OK
	case errors.As(err, &o):
		return o.status
	case ctx.Err() != nil:
		return Interrupted
	case errors.Is(err, client.ErrNoAnswer):
		return Unanswered
	}
	return Refused
}

// errorList is errors that are worth a line each.
type errorList struct {
	heading string
	errs    []error
}

// shownErrors is how many lines an errorList takes.
const shownErrors = 20

func (l *errorList) Error() string {
	lines := []string{l.heading}
	for _, err := range l.errs[:min(len(l.errs), shownErrors)] {
		lines = append(lines, "  "+message(err))
	}
	if more := len(l.errs) - shownErrors; more > 0 {
		lines = append(lines, fmt.Sprintf("  and %d more", more))
	}
	return strings.Join(lines, "\n")
}

// message is an error on one line; of a refusal, the code too. Nodes and controllers have a say in
// these texts, so they are cleaned.
func message(err error) string {
	if errors.Is(err, context.Canceled) {
		return "interrupted"
	}
	var l *errorList
	if errors.As(err, &l) {
		return l.Error()
	}
	var r *protocol.Refusal
	text := strings.Join(strings.Fields(ui.Clean(strings.ReplaceAll(err.Error(), "\n", "; "))), " ")
	if errors.As(err, &r) && text != "" {
		text = "refused: " + text + " (" + ui.Clean(string(r.Code)) + ")"
	}
	return text
}

func (a *app) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "nix-infra",
		Short: "Deploy to and run a fleet of NixOS machines",
		Long: `Deploy to and run a fleet of NixOS machines that pull, prove and, where they can't, roll back by themselves.

Nodes are named by selectors: names and globs (web1, web*; separated by spaces or commas), @tag,
key=value on facts (system=x86_64-linux, state=lost), all, and not in front of any of them.

Exit status: 0 all succeeded, 1 some failed, 2 refused or bad input, 3 some did not answer or are
offline and follow later, 130 interrupted.`,
		Example: `  nix-infra init --template fleet --name shop
  nix-infra provision web1 web2 --dry-run
  nix-infra enroll db1 --ssh root@192.0.2.10 --tag db
  nix-infra deploy @db
  nix-infra status`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },

		SilenceErrors: true, SilenceUsage: true,
		PersistentPreRunE: func(*cobra.Command, []string) error { return a.prepare() },
	}
	root.SetIn(a.Stdin)
	root.SetOut(a.Stdout)
	root.SetErr(a.Stderr)
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		if c.HasSubCommands() && c.Flags().NArg() > 0 { // flags of a command that there is none of
			if err := c.ValidateArgs(c.Flags().Args()); err != nil {
				return err
			}
		}
		return errors.New(err.Error() + "; see " + c.CommandPath() + " --help")
	})
	f := root.PersistentFlags()
	f.StringVarP(&a.dir, "working-dir", "d", ".", "the project's folder")
	f.StringVar(&a.envFile, "env", "", "file with environment variables (default: .env in the project's folder)")
	f.BoolVar(&a.batch, "batch", false, "never ask anything")
	f.BoolVar(&a.debug, "debug", false, "say on stderr what is being done")
	f.BoolVar(&a.json, "json", false, "print one JSON document a line")
	f.StringVar(&a.creds, "creds", "", "credentials file (default: $NIX_INFRA_CREDS, else the admin credentials in the project)")
	f.StringVar(&a.colour, "color", "auto", "colours: auto, always or never")
	for _, g := range []struct {
		title    string
		commands []*cobra.Command
	}{
		{"The project:", []*cobra.Command{a.initCommand(), a.doctorCommand(), a.secretsCommand(), a.storeSecretCommand(), a.accessCommand(), a.auditCommand(),
			a.lockCommand(), a.unlockCommand(), a.sshKeyCommand(), a.whoamiCommand(), a.mcpCommand()}},
		{"Machines:", []*cobra.Command{a.provisionCommand(true), a.enrollCommand(), a.migrateCommand(), a.destroyCommand(), a.nodesCommand(), a.nodeCommand()}},
		{"Deployments:", []*cobra.Command{a.deployCommand(), a.diffCommand(), a.rolloutCommand(), a.deploymentsCommand(), a.deploymentCommand(), a.rollbackCommand(),
			a.upgradeCommand(), a.rebootCommand(), a.driftCommand(), a.generationsCommand(), a.gcCommand()}},
		{"Questions:", []*cobra.Command{a.statusCommand(), a.pingCommand(), a.unitsCommand(), a.unitCommand(), a.logsCommand(), a.statsCommand(), a.filesCommand(), a.factsCommand()}},
		{"On the nodes:", []*cobra.Command{a.execCommand(), a.actionCommand(), a.sshCommand(), a.portForwardCommand(false), a.tunnelCommand(), a.uploadCommand(), a.etcdCommand()}},
		{"In the words of the earlier tool:", []*cobra.Command{a.initMachineCommand(), a.updateCommand(true), a.deployAppsCommand(true), a.initControlCommand(true),
			a.updateControlCommand(true), a.initNodeCommand(true), a.updateNodeCommand(true), a.group("fleet", false), a.group("cluster", true)}},
	} {
		root.AddGroup(&cobra.Group{ID: g.title, Title: g.title})
		for _, c := range g.commands {
			c.GroupID = g.title
		}
		root.AddCommand(g.commands...)
	}
	root.AddCommand(a.versionCommand(), registryCommand())
	explainWords(root)
	negatable(root)
	return root
}

func (a *app) prepare() (err error) {
	a.out, err = ui.New(a.Stdout, a.colour, a.Getenv)
	level := slog.LevelError + 1
	if a.debug {
		level = slog.LevelDebug
	}
	a.log = slog.New(slog.NewTextHandler(a.Stderr, &slog.HandlerOptions{Level: level}))
	return err
}

// document prints a JSON document on a line of its own.
func (a *app) document(d any) {
	a.Stdout.Write(append(protocol.Encode(d), '\n'))
}

// say prints for people, and nothing with --json.
func (a *app) say(format string, args ...any) {
	if !a.json {
		a.out.Printf(format, args...)
	}
}

// ago says how long ago something was, in one short word.
func ago(t *time.Time, now time.Time) string {
	if t == nil {
		return "never"
	}
	d := max(0, now.Sub(*t))
	switch {
	case d < 2*time.Minute:
		return d.Truncate(time.Second).String()
	case d < 2*time.Hour:
		return strconv.Itoa(int(d.Minutes())) + "m"
	case d < 48*time.Hour:
		return strconv.Itoa(int(d.Hours())) + "h"
	}
	return strconv.Itoa(int(d.Hours())/24) + "d"
}
