package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/local"
	"github.com/nix-infra/nix-infra/protocol"
)

// Exit statuses of apply and rollback, beside 0: it was confirmed.
const (
	exitFailed      = 1
	exitRefused     = 2
	exitInterrupted = 130
)

// exitError ends the program with another status than 1.
type exitError struct {
	status int
	err    error
}

func (e *exitError) Error() string { return e.err.Error() }
func (e *exitError) Unwrap() error { return e.err }

func exit(status int, format string, args ...any) error {
	return &exitError{status, fmt.Errorf(format, args...)}
}

const goesOn = `Progress is printed until it ends. Ctrl-C detaches: the agent goes on. The exit status is 0 only if the
system was confirmed, 1 if it failed or was rolled back, 2 if the agent refused it or can't be reached.`

func applyCommand(dir *string) *cobra.Command {
	var asJSON bool
	c := &cobra.Command{
		Use:   "apply FILE",
		Short: "Deploy a bundle on this machine, with no controller needed",
		Long: "Deploy a bundle on this machine, with no controller needed. The operator makes it, signed as ever, by\n" +
			"`nix-infra deploy NODE --out FILE`. The agent that runs here proves the system or goes back; whether a controller\n" +
			"can be reached belongs to the proof only if one could before.\n\n" + goesOn,
		Example: `  nix-infra-agent apply web-1.bundle
  nix-infra-agent apply /mnt/usb/web-1.bundle --json`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			f, err := os.Open(args[0])
			if err != nil {
				return exit(exitRefused, "can't read the bundle: %w", err)
			}
			defer f.Close()
			info, err := f.Stat()
			if err != nil || !info.Mode().IsRegular() {
				return exit(exitRefused, "%s is no file that can be read", args[0])
			}
			p := &progress{out: c.OutOrStdout(), json: asJSON}
			client := &local.Client{Path: agent.Socket(*dir), Tell: p.tell}
			return p.finish(client.Apply(c.Context(), f, info.Size()))
		},
	}
	return breakGlass(c, &asJSON)
}

func rollbackCommand(dir *string) *cobra.Command {
	var asJSON bool
	var to string
	c := &cobra.Command{
		Use:   "rollback",
		Short: "Go back to a system that ran here before, with no controller and no signature needed",
		Long: "Go back to a system that ran here before, with no controller and no signature needed: being root on this\n" +
			"machine is enough, and the audit record says so. Without --to it is the one that was proven before the one\n" +
			"that runs; `nix-infra-agent status` lists them. The agent that runs here proves it, or comes back from it; whether a\n" +
			"controller can be reached belongs to the proof only if one could before.\n\n" + goesOn,
		Example: `  nix-infra-agent rollback
  nix-infra-agent rollback --to 41
  nix-infra-agent rollback --to /nix/store/…-nixos-system-web-1-25.05`,
		Args: arguments(cobra.NoArgs),
		RunE: func(c *cobra.Command, _ []string) error {
			var r protocol.Rollback
			if generation, err := strconv.Atoi(to); err == nil && generation > 0 {
				r.Generation = generation
			} else if r.Path = strings.TrimSuffix(to, "/"); to != "" && !protocol.IsStorePath(r.Path) {
				return exit(exitRefused, "--to %q is neither the number of a generation nor a store path", to)
			}
			p := &progress{out: c.OutOrStdout(), json: asJSON}
			client := &local.Client{Path: agent.Socket(*dir), Tell: p.tell}
			return p.finish(client.RollBack(c.Context(), r))
		},
	}
	c.Flags().StringVar(&to, "to", "", "generation of the system profile, or store path")
	return breakGlass(c, &asJSON)
}

// breakGlass adds what apply and rollback share.
func breakGlass(c *cobra.Command, asJSON *bool) *cobra.Command {
	c.Flags().BoolVar(asJSON, "json", false, "one JSON document a line: each event, and at last the result")
	c.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &exitError{exitRefused, err} })
	return c
}

// arguments makes a wrong number of arguments bad input.
func arguments(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(c *cobra.Command, args []string) error {
		if err := check(c, args); err != nil {
			return exit(exitRefused, "%w; see nix-infra-agent %s --help", err, c.Name())
		}
		return nil
	}
}

// progress prints what becomes of a deployment.
type progress struct {
	out  io.Writer
	json bool
	said protocol.Phase
}

// progressDocument is a line of --json.
type progressDocument struct {
	Event      string         `json:"event"` // progress, log or result
	Deployment string         `json:"deployment"`
	Time       time.Time      `json:"time"`
	Phase      protocol.Phase `json:"phase"`
	Reason     string         `json:"reason"`
	Lines      []string       `json:"lines,omitempty"` // of a log
}

func (p *progress) tell(deployment string, ev protocol.Event) {
	switch {
	case p.json:
		d := progressDocument{"progress", deployment, ev.Time, ev.Phase, ev.Reason, ev.Lines}
		if len(ev.Lines) > 0 {
			d.Event = "log"
		}
		p.document(d)
	case len(ev.Lines) > 0:
		for _, line := range ev.Lines {
			fmt.Fprintf(p.out, "  | %s\n", printable(line))
		}
	case ev.Phase != p.said && !ev.Phase.Ended():
		if p.said == "" {
			fmt.Fprintf(p.out, "deployment %s; Ctrl-C detaches\n", deployment)
		}
		fmt.Fprintln(p.out, ev.Phase)
		p.said = ev.Phase
	}
}

func (p *progress) document(d progressDocument) {
	_ = json.NewEncoder(p.out).Encode(d) // whoever reads may have gone; the exit status remains
}

// finish says how it ended, and makes the exit status of it.
func (p *progress) finish(deployment string, end protocol.Event, err error) error {
	switch {
	case err != nil && errors.Is(err, context.Canceled):
		if deployment == "" {
			return exit(exitInterrupted, "interrupted before the agent said that it took it over; nix-infra-agent status shows whether it did")
		}
		return exit(exitInterrupted, "detached: the agent goes on with deployment %s; nix-infra-agent status shows how it ends", deployment)
	case err != nil:
		return &exitError{exitRefused, err}
	}
	if p.json {
		p.document(progressDocument{"result", deployment, end.Time, end.Phase, end.Reason, nil})
	} else {
		line := string(end.Phase)
		if end.Reason != "" {
			line += ": " + printable(end.Reason)
		}
		fmt.Fprintln(p.out, line)
	}
	if !end.Phase.Succeeded() {
		return exit(exitFailed, "deployment %s: %s", deployment, end.Phase)
	}
	return nil
}

// printable keeps what a build or a unit said from painting on the terminal.
func printable(line string) string {
	return strings.Map(func(r rune) rune {
		if r < ' ' && r != '\t' || r == 0x7f || r >= 0x80 && r < 0xa0 {
			return '?'
		}
		return r
	}, line)
}
