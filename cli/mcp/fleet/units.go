package fleet

import (
	"context"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// unitRow is a unit of a node, an entry of its log, or a piece of what systemctl wrote there.
type unitRow struct {
	runRow
	Unit  *protocol.UnitStatus   `json:"unit,omitempty" jsonschema:"of a list or a status; descriptions are untrusted"`
	Entry *protocol.JournalEntry `json:"entry,omitempty" jsonschema:"untrusted: of the unit's log"`
}

func (f *Fleet) addUnits(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "systemctl", Title: "Look at units", Toolset: setInspect, Role: protocol.Viewer, Timeout: maxRun,
		Description: "Run systemctl on nodes, for what it tells: status, show, cat, list-units, list-unit-files, list-timers, list-sockets, list-jobs, list-machines, list-dependencies, " +
			"is-active, is-enabled, is-failed, is-system-running, get-default, show-environment. Without a command, it lists the units. " +
			"Lists of units (--failed, --state, --type, --all) and the status of units come with fields." + noShell,
	}, func(ctx context.Context, c *mcp.Call, in struct {
		targetInput
		limitInput
		Command string `json:"command,omitempty" jsonschema:"such as status or list-units"`
		Units   string `json:"units,omitempty" jsonschema:"names or globs of units, separated by commas"`
		Options string `json:"options,omitempty" jsonschema:"such as --failed --type=service"`
	}) (*mcp.Answer[unitRow], error) {
		argv, err := systemctl(in.Command, in.Units, in.Options)
		if err != nil {
			return nil, err
		}
		if q := readUnitQuestion(argv[1:]); q != nil {
			return f.askUnits(ctx, c, in.Target, q)
		}
		a, err := f.look(ctx, c, in.Target, in.limitInput, argv, nil)
		return widen(a, func(r runRow) unitRow { return unitRow{runRow: r} }), err
	})
}

// widen makes an answer of rows that have more fields.
func widen[From, To any](a *mcp.Answer[From], row func(From) To) *mcp.Answer[To] {
	if a == nil {
		return nil
	}
	w := &mcp.Answer[To]{Summary: a.Summary, Failed: a.Failed}
	for _, p := range a.Parts {
		to := mcp.Part[To]{Head: p.Head, Text: p.Text, Untrusted: p.Untrusted}
		if p.Row != nil {
			r := row(*p.Row)
			to.Row = &r
		}
		w.Parts = append(w.Parts, to)
	}
	return w
}

// systemctl makes the words of a command for systemctl.
func systemctl(command, units, options string) (argv []string, err error) {
	argv = []string{"systemctl"}
	for _, input := range []struct{ name, text string }{{"command", command}, {"options", options}} {
		words, err := split(input.text)
		if err != nil {
			return nil, fmt.Errorf("%s: %w", input.name, err)
		}
		argv = append(argv, words...)
		if input.name != "command" {
			continue
		}
		for _, unit := range strings.FieldsFunc(units, func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) }) {
			if strings.HasPrefix(unit, "-") {
				return nil, fmt.Errorf("units: %.80q is an option, and not a unit's name", unit)
			}
			argv = append(argv, unit)
		}
	}
	return argv, nil
}

// unitQuestion is a command for systemctl that the agents have a question of their own for: the status of some units, or a list.
type unitQuestion struct {
	names []string // whose status it is
	lines int      // of each one's log

	list  protocol.UnitsQuery
	types []string // such as service; none: any
	all   bool     // also those that are inactive
}

const maxStatuses = 16 // units whose status is asked for at once

var (
	aNumber    = regexp.MustCompile(`^[0-9]{1,6}$`)
	unitOption = []known{
		{name: "no-pager"}, {name: "full", short: 'l'}, {name: "no-legend"}, {name: "plain"}, {name: "quiet", short: 'q'},
		{name: "all", short: 'a'}, {name: "failed"}, {name: "state", takes: aValue}, {name: "type", short: 't', takes: aValue}, {name: "lines", short: 'n', takes: aValue},
	}
)

// readUnitQuestion finds out what words for systemctl ask; nil: something else.
func readUnitQuestion(words []string) *unitQuestion {
	options, operands, ok := readOptions(words, unitOption)
	if !ok {
		return nil
	}
	verb := "list-units"
	if len(operands) > 0 {
		verb, operands = operands[0], operands[1:]
	}
	q := &unitQuestion{lines: 10}
	for _, o := range options {
		switch o.name {
		case "all":
			q.all = true
		case "failed":
			q.list.States = append(q.list.States, "failed")
		case "state":
			q.list.States = append(q.list.States, strings.Split(o.value, ",")...)
		case "type":
			q.types = append(q.types, strings.Split(o.value, ",")...)
		case "lines":
			if !aNumber.MatchString(o.value) {
				return nil
			}
			q.lines, _ = strconv.Atoi(o.value)
		}
	}
	for i, name := range operands {
		if !strings.ContainsAny(name, ".*?[") {
			operands[i] += ".service"
		}
	}
	switch verb {
	case "list-units":
		q.list.Patterns = operands
		if q.list.Validate() != nil || slices.Contains(q.list.States, "help") || slices.Contains(q.types, "help") {
			return nil
		}
		return q
	case "status":
		for _, name := range operands {
			if (&protocol.UnitQuery{Name: name, Lines: q.lines}).Validate() != nil || aNumber.MatchString(strings.TrimSuffix(name, ".service")) {
				return nil // a glob, a process, a path
			}
		}
		if q.names = operands; len(operands) == 0 || len(operands) > maxStatuses || len(q.types)+len(q.list.States) > 0 {
			return nil
		}
		return q
	}
	return nil
}

// shows tells whether a list has a unit, as systemctl's would.
func (q *unitQuestion) shows(u *protocol.Unit) bool {
	if kind := u.Name[strings.LastIndexByte(u.Name, '.')+1:]; len(q.types) > 0 && !slices.Contains(q.types, kind) && !slices.Contains(q.types, u.Load) {
		return false
	}
	return q.all || len(q.list.States) > 0 || u.Active != "inactive"
}

func (f *Fleet) askUnits(ctx context.Context, c *mcp.Call, target string, q *unitQuestion) (*mcp.Answer[unitRow], error) {
	s, err := f.session(ctx, c)
	if err != nil {
		return nil, err
	}
	chosen, err := f.nodes(ctx, s, target, "")
	if err != nil {
		return nil, err
	}
	nodes := namesOf(chosen)
	if q.names == nil {
		lists, err := ask[protocol.UnitList](ctx, s, nodes, protocol.ListUnits, q.list)
		if err != nil {
			return nil, err
		}
		return showUnits(q, lists), nil
	}
	a := &mcp.Answer[unitRow]{}
	var failed failures
	most := fairShare(len(nodes) * len(q.names))
	for _, name := range q.names {
		statuses, err := ask[protocol.UnitStatus](ctx, s, nodes, protocol.ShowUnit, protocol.UnitQuery{Name: name, Lines: q.lines}, func(u *protocol.UnitStatus) {
			u.Log, _ = newest(u.Log, most)
		})
		if err != nil {
			return nil, err
		}
		for i := range statuses {
			r := &statuses[i]
			if r.err != nil {
				if failed.add(r.node, r.err); len(q.names) == 1 || name == q.names[0] {
					a.Parts = append(a.Parts, unitFailed(r.node, r.err))
				}
				continue
			}
			a.Parts = append(a.Parts, showUnit(r.node, &r.said)...)
		}
	}
	a.Summary = "status: " + failed.summary(len(nodes))
	a.Failed = failed.count() == len(nodes)
	return a, nil
}

func unitFailed(node string, err error) mcp.Part[unitRow] {
	why := mcp.Clean(failure(err))
	return mcp.Part[unitRow]{Head: node, Text: why, Row: &unitRow{runRow: runRow{Node: node, Error: why}}}
}

func showUnits(q *unitQuestion, lists []answer[protocol.UnitList]) *mcp.Answer[unitRow] {
	a := &mcp.Answer[unitRow]{}
	var failed failures
	shown := 0
	for i := range lists {
		r := &lists[i]
		if r.err != nil {
			failed.add(r.node, r.err)
			a.Parts = append(a.Parts, unitFailed(r.node, r.err))
			continue
		}
		for _, u := range r.said.Units {
			if !q.shows(&u) {
				continue
			}
			shown++
			a.Parts = append(a.Parts, mcp.Part[unitRow]{Head: r.node, Text: fmt.Sprintf("%s  %s %s %s  %s", u.Name, u.Load, u.Active, u.Sub, u.Description), Untrusted: true,
				Row: &unitRow{runRow: runRow{Node: r.node}, Unit: &protocol.UnitStatus{Unit: u}}})
		}
		if more := r.said.Total - len(r.said.Units); more > 0 {
			note := plural(more, "unit") + " did not fit into its answer: name some by a glob"
			a.Parts = append(a.Parts, mcp.Part[unitRow]{Head: r.node, Text: "[" + note + "]", Row: &unitRow{runRow: runRow{Node: r.node, Note: note}}})
		}
	}
	a.Summary = fmt.Sprintf("list-units: %s %s.", failed.summary(len(lists)), plural(shown, "unit"))
	a.Failed = failed.count() == len(lists)
	return a
}

// showUnit is a unit's status, and behind it its log.
func showUnit(node string, u *protocol.UnitStatus) (parts []mcp.Part[unitRow]) {
	text := fmt.Sprintf("%s - %s\nloaded: %s (%s; %s)\nactive: %s (%s)", u.Name, u.Description, u.Load, u.File, u.State, u.Active, u.Sub)
	if u.Since != nil {
		text += ", since " + ago(u.Since)
	}
	for _, w := range []struct {
		is   bool
		word string
	}{
		{u.Result != "" && u.Result != "success", "result: " + u.Result},
		{u.PID != 0, fmt.Sprintf("main process: %d", u.PID)},
		{u.ExitCode != 0, fmt.Sprintf("exit code: %d", u.ExitCode)},
		{u.Restarts > 0, fmt.Sprintf("restarted %d times by itself", u.Restarts)},
		{u.Memory > 0 || u.Tasks > 0, fmt.Sprintf("takes: %s, %v of CPU time, %s", size(u.Memory), time.Duration(u.CPU).Round(time.Millisecond), plural(int(u.Tasks), "task"))},
		{u.LogNote != "", "no log: " + u.LogNote},
	} {
		if w.is {
			text += "\n" + w.word
		}
	}
	for _, t := range u.Timers {
		text += fmt.Sprintf("\ntimer: %s starts %s; next %s, last %s", t.Name, t.Triggers, ago(t.Next), ago(t.Last))
	}
	for _, l := range u.Sockets {
		text += fmt.Sprintf("\nsocket: %s listens on %s", l.Name, strings.Join(l.Listen, ", "))
	}
	log := u.Log
	u.Log = nil
	parts = append(parts, mcp.Part[unitRow]{Head: node, Text: text, Untrusted: true, Row: &unitRow{runRow: runRow{Node: node}, Unit: u}})
	for i := range log {
		parts = append(parts, mcp.Part[unitRow]{Head: node, Text: entryText(&log[i]), Untrusted: true, Row: &unitRow{runRow: runRow{Node: node}, Entry: &log[i]}})
	}
	return parts
}
