package main

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"runtime/debug"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/coreos/go-systemd/v22/journal"
	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/audit"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// maxAnswer bounds an enrolment answer, in bytes.
const maxAnswer = 1 << 20

// command is the whole command line.
func command(in io.Reader, out, errs io.Writer) *cobra.Command {
	var dir string
	run := runCommand(&dir, errs)
	root := &cobra.Command{
		Use:   "nix-infra-agent",
		Short: "Brings this machine to the state that its operator signed, and proves it or goes back",
		Long: "Brings this machine to the state that its operator signed, and proves it or goes back.\n\n" +
			"Without a command it runs as a service does. To make a machine a node:\n" +
			"join with a token; or request, have the operator answer, load, start. When no controller can be reached:\n" +
			"status, rollback, apply.",
		Example: `  nix-infra-agent join /run/nix-infra/token
  nix-infra-agent request --name web-1 --out request.json
  nix-infra-agent load answer.json
  systemctl start nix-infra-agent
  nix-infra-agent status`,
		Args:          cobra.NoArgs,
		SilenceErrors: true,
		SilenceUsage:  true,
		RunE:          run.RunE,
	}
	root.PersistentFlags().StringVar(&dir, "dir", agent.DefaultDir, "folder of the node's identity and state")
	root.AddCommand(run, requestCommand(&dir), loadCommand(&dir), joinCommand(&dir), statusCommand(&dir), applyCommand(&dir), rollbackCommand(&dir), versionCommand())
	root.SetIn(in)
	root.SetOut(out)
	root.SetErr(errs)
	return root
}

func runCommand(dir *string, errs io.Writer) *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Be the agent of this machine until SIGTERM (the default)",
		Example: `  nix-infra-agent
  nix-infra-agent run --dir /var/lib/nix-infra-agent`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			watchdog, err := daemon.SdWatchdogEnabled(false)
			if err != nil {
				return fmt.Errorf("the service manager's WATCHDOG_USEC: %w", err)
			}
			o := agent.Options{Dir: *dir, Log: slog.New(slog.NewTextHandler(errs, &slog.HandlerOptions{ReplaceAttr: withoutTime})), Watchdog: watchdog}
			if os.Getenv("NOTIFY_SOCKET") != "" {
				o.Notify, o.Settle = notify(o.Log), giveBack
			}
			// An agent's live memory is a megabyte or two: collecting it often costs little, and idle agents stay small.
			debug.SetGCPercent(50)
			if journald, err := journal.StderrIsJournalStream(); err == nil && journald {
				o.Journal = journalOf(o.Log)
			}
			return agent.Run(c.Context(), o)
		},
	}
}

// withoutTime leaves the time to journald, which has its own.
func withoutTime(groups []string, a slog.Attr) slog.Attr {
	if len(groups) == 0 && a.Key == slog.TimeKey && os.Getenv("JOURNAL_STREAM") != "" {
		return slog.Attr{}
	}
	return a
}

func notify(log *slog.Logger) func(string) {
	return func(line string) {
		if _, err := daemon.SdNotify(false, line); err != nil {
			log.Warn("the service manager can't be told", "what", line, "error", err)
		}
	}
}

func journalOf(log *slog.Logger) audit.Journal {
	return func(message string, fields map[string]string) {
		if err := journal.Send(message, journal.PriNotice, fields); err != nil {
			log.Info(message, "request", fields["NIX_INFRA_REQUEST"], "error", err)
		}
	}
}

func requestCommand(dir *string) *cobra.Command {
	var name, file string
	c := &cobra.Command{
		Use:   "request --name NAME",
		Short: "Print a request to become the node NAME, one line of JSON for the operator",
		Long: "Print a request to become the node NAME, one line of JSON for the operator. The first call makes\n" +
			"this machine's keys; they stay here. The request holds nothing secret.",
		Example: `  nix-infra-agent request --name web-1
  nix-infra-agent request --name web-1 --out request.json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if name == "" {
				return errors.New("which node is this to become? Say --name NAME")
			}
			r, err := agent.Home(*dir).Request(name)
			if err != nil {
				return err
			}
			line := append(protocol.Encode(r), '\n')
			if file != "" {
				return atomicfile.Write(file, line, 0o644)
			}
			_, err = c.OutOrStdout().Write(line)
			return err
		},
	}
	c.Flags().StringVar(&name, "name", "", "the node's name: lower-case letters, digits, inner hyphens")
	c.Flags().StringVar(&file, "out", "", "write to this file instead")
	return c
}

func loadCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use:   "load [FILE|-]",
		Short: "Load the operator's answer, from a file or from standard input",
		Long: "Load the operator's answer, from a file or from standard input. It must be for this machine's keys;\n" +
			"the first one pins the operator, and no other's is taken after it.",
		Example: `  nix-infra-agent load answer.json
  ssh operator nix-infra enroll … | nix-infra-agent load -`,
		Args: cobra.MaximumNArgs(1),
		RunE: func(c *cobra.Command, args []string) error {
			data, err := read(c.InOrStdin(), args)
			if err != nil {
				return err
			}
			a, err := agent.Home(*dir).Load(data)
			if err != nil {
				return err
			}
			_, err = fmt.Fprintf(c.OutOrStdout(), "This machine is the node %s of operator %s.\nStart its agent: systemctl enable --now nix-infra-agent\n", a.Name, a.Fleet.Operator)
			return err
		},
	}
}

func read(in io.Reader, args []string) ([]byte, error) {
	if len(args) == 1 && args[0] != "-" {
		f, err := os.Open(args[0])
		if err != nil {
			return nil, fmt.Errorf("can't read the answer: %w", err)
		}
		defer f.Close()
		in = f
	}
	data, err := io.ReadAll(io.LimitReader(in, maxAnswer+1))
	if err != nil {
		return nil, fmt.Errorf("can't read the answer: %w", err)
	}
	if len(data) > maxAnswer {
		return nil, errors.New("the answer is too long to be one")
	}
	return data, nil
}

func statusCommand(dir *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "status",
		Short: "Show who this machine is, where its last deployment stands and what it can go back to; needs no network",
		Example: `  nix-infra-agent status
  nix-infra-agent status --json`,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			s, err := agent.ReadStatus(*dir)
			if err != nil {
				return err
			}
			if asJSON {
				return json.NewEncoder(c.OutOrStdout()).Encode(s)
			}
			return printStatus(c.OutOrStdout(), s)
		},
	}
	c.Flags().BoolVar(&asJSON, "json", false, "one JSON document")
	return c
}

func printStatus(out io.Writer, s *agent.Status) error {
	running, deploy := "no", "nothing was deployed"
	if s.Running {
		running = "yes"
	}
	if s.Deploy.Phase != "" {
		deploy = fmt.Sprintf("%s (serial %d): %s", s.Deploy.Deployment, s.Deploy.Serial, s.Deploy.Phase)
	}
	if s.Deploy.Reason != "" {
		deploy += ": " + s.Deploy.Reason
	}
	var b strings.Builder
	line := func(name, format string, args ...any) {
		fmt.Fprintf(&b, "%-12s %s\n", name, printable(fmt.Sprintf(format, args...)))
	}
	line("node", "%s", s.Node)
	line("operator", "%s", s.Operator)
	line("controllers", "%s", strings.Join(s.Controllers, " "))
	line("agent runs", "%s", running)
	line("deployment", "%s", deploy)
	if s.Closure != "" {
		line("runs", "%s", s.Closure)
		if s.Booted != s.Closure {
			line("booted", "%s", s.Booted)
		}
		line("boots next", "%s (generation %d)", s.Profile, s.Generation)
	}
	if s.Drift != "" {
		line("drift", "%s", s.Drift)
	}
	for _, q := range s.Quarantine {
		line("quarantine", "%s: rolled back from in deployment %s: %s", q.Closure, q.Deployment, q.Reason)
	}
	for _, c := range s.History {
		line("confirmed", "%s  %s  %s  %s", c.Time.Format(time.RFC3339), c.Deployment, c.Mode, c.Closure)
	}
	_, err := io.WriteString(out, b.String())
	return err
}

func versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "version",
		Short: "Print the version",
		Args:  cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			_, err := fmt.Fprintf(c.OutOrStdout(), "nix-infra-agent %s (protocol %d)\n", protocol.Build(), protocol.Version)
			return err
		},
	}
}
