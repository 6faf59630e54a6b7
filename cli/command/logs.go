package command

import (
	"context"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// entryDocument is an entry of a node's journal in --json.
type entryDocument struct {
	Node string `json:"node"`
	protocol.JournalEntry
}

// priorities are syslog's, by number.
var priorities = []string{"emerg", "alert", "crit", "err", "warning", "notice", "info", "debug"}

type logsOptions struct {
	asking
	query                  protocol.JournalQuery
	since, until, priority string
	follow                 bool
}

func (a *app) logsCommand() *cobra.Command {
	var o logsOptions
	c := &cobra.Command{
		Use:   "logs [SELECTOR]...",
		Short: "Show the journals of nodes, and follow them",
		Long: `Show the newest entries of the journals of nodes (all, if none is selected), node by node as they answer. With
--follow, go on with what comes, of all nodes in order of time, until Ctrl-C.

A time is an age (90s, 15m, 2h, 3d), a date (2026-01-31), or a date and a time (2026-01-31 15:04, 2026-01-31T15:04:05Z).
Without a zone it is by the clock here.`,
		Example: `  nix-infra logs web1 --unit nginx --since 15m
  nix-infra logs @web --follow --priority err
  nix-infra logs all --grep 'out of memory' --boot 0 --json
  nix-infra logs db1 --unit 'postgres*' --lines 1000`,
		RunE: func(c *cobra.Command, args []string) error {
			if err := o.complete(time.Now()); err != nil {
				return err
			}
			if o.follow {
				return a.followLogs(c.Context(), args, o)
			}
			return a.logs(c.Context(), args, o)
		},
	}
	f := c.Flags()
	f.StringSliceVarP(&o.query.Units, "unit", "u", nil, "only of these units, by name or glob; a name without a type is a service's")
	f.StringVar(&o.since, "since", "", "only entries from this time on")
	f.StringVar(&o.until, "until", "", "only entries up to this time")
	f.StringVarP(&o.priority, "priority", "p", "", "only entries that are so important or more: "+strings.Join(priorities, ", ")+" or 0 to 7")
	f.StringVarP(&o.query.Grep, "grep", "g", "", "only entries whose message matches this regular expression (PCRE2)")
	f.StringVar(&o.query.Boot, "boot", "", "only of one boot: 0 is this one, -1 the one before, or a boot id")
	f.StringSliceVarP(&o.query.Identifiers, "identifier", "t", nil, "only of programs with these syslog identifiers")
	f.IntVarP(&o.query.Lines, "lines", "n", 100, fmt.Sprintf("so many of the newest entries of each node, at most %d", protocol.MaxLines))
	f.StringVar(&o.query.Before, "before", "", "only entries before this cursor, of one node, as it was said where there were more")
	f.BoolVarP(&o.follow, "follow", "f", false, "go on with what comes")
	o.flags(c)
	return c
}

// complete makes the query of what was given.
func (o *logsOptions) complete(now time.Time) error {
	for i, u := range o.query.Units {
		if !strings.ContainsAny(u, ".*?[") {
			o.query.Units[i] = u + ".service"
		}
	}
	for _, t := range []struct {
		name, text string
		into       *int64
	}{{"since", o.since, &o.query.Since}, {"until", o.until, &o.query.Until}} {
		if t.text == "" {
			continue
		}
		at, err := moment(t.text, now)
		if err != nil {
			return fmt.Errorf("--%s: %w", t.name, err)
		}
		*t.into = at.UnixMicro()
	}
	if o.priority != "" {
		n := slices.Index(priorities, o.priority)
		if n < 0 {
			var err error
			if n, err = strconv.Atoi(o.priority); err != nil {
				return fmt.Errorf("--priority %q: use %s or 0 to 7", o.priority, strings.Join(priorities, ", "))
			}
		}
		o.query.Priority = &n
	}
	if o.follow && (o.until != "" || o.query.Before != "") {
		return fmt.Errorf("--follow goes on, and takes no --until and no --before")
	}
	return o.query.Validate()
}

// moment reads a time, or an age.
func moment(s string, now time.Time) (time.Time, error) {
	if d, err := project.ParseAge(s); err == nil {
		return now.Add(-d), nil
	}
	for _, layout := range []string{time.RFC3339, "2006-01-02T15:04:05", time.DateTime, "2006-01-02 15:04", time.DateOnly} {
		if t, err := time.ParseInLocation(layout, s, time.Local); err == nil {
			return t, nil
		}
	}
	return time.Time{}, fmt.Errorf("%q is no time; use such as 15m, 3d, 2026-01-31 or 2026-01-31T15:04:05Z", s)
}

func (a *app) logs(ctx context.Context, selectors []string, o logsOptions) error {
	q, err := a.question(ctx, selectors, o.asking)
	if err != nil {
		return err
	}
	defer q.session.Close()
	if o.query.Before != "" && len(q.nodes) != 1 {
		return fmt.Errorf("--before is a place in the journal of one node, and %s are selected", plural(len(q.nodes), "node"))
	}
	return put(ctx, q, protocol.ReadJournal, o.query, func(node string, _ int, part protocol.JournalPart) {
		for i := range part.Entries {
			q.showEntry(node, &part.Entries[i])
		}
		if part.Next != "" && len(part.Entries) < o.query.Lines || part.Next != "" && a.json {
			q.cut(node, fmt.Sprintf("only %d entries fit into an answer; see the older ones with --before '%s'", len(part.Entries), part.Next), part.Next)
		}
	})
}

func (q *question) showEntry(node string, e *protocol.JournalEntry) {
	if q.json {
		q.document(entryDocument{node, *e})
		return
	}
	q.print(node, q.entryLines(e)...)
}

// entryLines are an entry as people read it. Its message may have several lines; each of them is cleaned.
func (q *question) entryLines(e *protocol.JournalEntry) []string {
	head := e.Time.Local().Format("Jan 02 15:04:05.000") + " " + ui.Clean(first(e.Identifier, e.Unit))
	if e.PID > 0 {
		head += fmt.Sprintf("[%d]", e.PID)
	}
	colour := ui.Plain
	switch {
	case e.Priority >= 0 && e.Priority <= 3:
		colour = ui.Red
	case e.Priority == 4:
		colour = ui.Yellow
	}
	message := strings.TrimRight(e.Message, "\n")
	if e.Cut > 0 {
		message += fmt.Sprintf(" … (%d bytes more)", e.Cut)
	}
	var lines []string
	for i, l := range strings.Split(message, "\n") {
		l = q.out.Paint(colour, ui.Clean(l))
		if i == 0 {
			l = q.out.Paint(ui.Dim, head+":") + " " + l
		} else {
			l = "    " + l
		}
		lines = append(lines, l)
	}
	return lines
}
