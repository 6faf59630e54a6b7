package command

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// unitDocument is a unit of a node in `units --json`.
type unitDocument struct {
	Node string `json:"node"`
	protocol.Unit
}

func (a *app) unitsCommand() *cobra.Command {
	var o asking
	var query protocol.UnitsQuery
	var failed bool
	c := &cobra.Command{
		Use:   "units [SELECTOR]...",
		Short: "List the systemd units of nodes",
		Long: `List the systemd units that nodes (all, if none is selected) have loaded, with their states: load, active and
sub state, in systemd's words.`,
		Example: `  nix-infra units web1
  nix-infra units --failed
  nix-infra units @web --pattern 'nginx*' --state running
  nix-infra units all --failed --json | jq -r '"\(.node) \(.name)"'`,
		RunE: func(c *cobra.Command, args []string) error {
			if failed {
				query.States = append(query.States, "failed")
			}
			if err := query.Validate(); err != nil {
				return err
			}
			return a.units(c.Context(), args, query, o)
		},
	}
	f := c.Flags()
	f.BoolVar(&failed, "failed", false, "only units that failed; the same as --state failed")
	f.StringSliceVar(&query.States, "state", nil, "only units in one of these load, active or sub states")
	f.StringSliceVar(&query.Patterns, "pattern", nil, "only units whose name matches one of these globs")
	f.IntVar(&query.Limit, "limit", 0, "at most so many units a node; 0: as many as an answer carries")
	f.StringVar(&query.After, "after", "", "only units whose names come after this one")
	o.flags(c)
	return c
}

func (a *app) units(ctx context.Context, selectors []string, query protocol.UnitsQuery, o asking) error {
	q, err := a.question(ctx, selectors, o)
	if err != nil {
		return err
	}
	defer q.session.Close()
	return put(ctx, q, protocol.ListUnits, query, func(node string, _ int, list protocol.UnitList) {
		var rows [][]ui.Cell
		for _, u := range list.Units {
			if a.json {
				a.document(unitDocument{node, u})
				continue
			}
			row := ui.Text(u.Name, u.Load, u.Active, u.Sub, u.Description)
			row[2].Colour = unitColour(u.Active)
			rows = append(rows, row)
		}
		q.print(node, q.columns(rows)...)
		if list.Next != "" {
			q.cut(node, fmt.Sprintf("%s not shown; see them with --after %s", plural(list.Total-len(list.Units), "more unit"), list.Next), list.Next)
		}
	})
}

func unitColour(active string) ui.Colour {
	switch active {
	case "active":
		return ui.Green
	case "failed":
		return ui.Red
	case "activating", "deactivating", "reloading":
		return ui.Yellow
	}
	return ui.Plain
}

// unitStatusDocument is a unit of a node in `unit --json`.
type unitStatusDocument struct {
	Node string `json:"node"`
	protocol.UnitStatus
}

func (a *app) unitCommand() *cobra.Command {
	var o asking
	var lines int
	c := &cobra.Command{
		Use:   "unit NAME [SELECTOR]...",
		Short: "Show a systemd unit of nodes: state, dependencies, timers, sockets and recent log",
		Long: `Show a systemd unit of nodes (all, if none is selected): its state, what it needs and what needs it, the timers
and sockets that start it, and its recent log. A name without a type is a service's.`,
		Example: `  nix-infra unit nginx web1
  nix-infra unit nginx.service @web --lines 0
  nix-infra unit backup.timer db1 --json`,
		Args: func(_ *cobra.Command, args []string) error {
			if len(args) == 0 {
				return fmt.Errorf("show which unit? Name it (nix-infra unit nginx web1)")
			}
			return nil
		},
		RunE: func(c *cobra.Command, args []string) error {
			query := protocol.UnitQuery{Name: args[0], Lines: lines}
			if !strings.Contains(query.Name, ".") {
				query.Name += ".service"
			}
			if err := query.Validate(); err != nil {
				return err
			}
			q, err := a.question(c.Context(), args[1:], o)
			if err != nil {
				return err
			}
			defer q.session.Close()
			return put(c.Context(), q, protocol.ShowUnit, query, func(node string, _ int, u protocol.UnitStatus) {
				if a.json {
					a.document(unitStatusDocument{node, u})
					return
				}
				q.showUnit(node, &u)
			})
		},
	}
	c.Flags().IntVarP(&lines, "lines", "n", 10, fmt.Sprintf("entries of its log, at most %d", protocol.MaxUnitLog))
	o.flags(c)
	return c
}

func (q *question) showUnit(node string, u *protocol.UnitStatus) {
	var rows [][]ui.Cell
	row := func(name, value string) {
		if value != "" {
			rows = append(rows, []ui.Cell{{Text: name, Colour: ui.Bold}, {Text: value}})
		}
	}
	state := fmt.Sprintf("%s (%s)", u.Active, u.Sub)
	if u.Since != nil {
		state += " since " + u.Since.Local().Format(time.DateTime)
	}
	if u.Result != "" && u.Result != "success" {
		state += ", result " + u.Result
	}
	row("unit", u.Name+" - "+u.Description)
	rows = append(rows, []ui.Cell{{Text: "state", Colour: ui.Bold}, {Text: state, Colour: unitColour(u.Active)}})
	row("loaded", strings.TrimSuffix(fmt.Sprintf("%s, %s, %s", u.Load, u.State, u.File), ", "))
	if u.PID > 0 {
		row("main process", fmt.Sprint(u.PID))
	}
	if u.ExitCode != 0 {
		row("exit code", fmt.Sprint(u.ExitCode))
	}
	if u.Restarts > 0 {
		row("restarts", fmt.Sprint(u.Restarts))
	}
	if u.Memory > 0 || u.Tasks > 0 {
		row("takes", fmt.Sprintf("%s, %s of CPU time, %s", size(u.Memory), time.Duration(u.CPU).Round(time.Millisecond), plural(int(u.Tasks), "task")))
	}
	for _, word := range slices.Sorted(maps.Keys(u.Dependencies)) {
		row(word, strings.Join(u.Dependencies[word], " "))
	}
	for _, t := range u.Timers {
		row("timer", fmt.Sprintf("%s starts %s; next %s, last %s", t.Name, t.Triggers, when(t.Next), when(t.Last)))
	}
	for _, s := range u.Sockets {
		row("socket", fmt.Sprintf("%s listens on %s; %d connections, %d accepted", s.Name, strings.Join(s.Listen, ", "), s.Connections, s.Accepted))
	}
	q.print(node, q.columns(rows)...)
	for i := range u.Log {
		q.print(node, q.entryLines(&u.Log[i])...)
	}
	if u.LogNote != "" {
		q.print(node, "no log: "+ui.Clean(u.LogNote))
	}
}

func when(t *time.Time) string {
	if t == nil {
		return "never"
	}
	return t.Local().Format(time.DateTime)
}
