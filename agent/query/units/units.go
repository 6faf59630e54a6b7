// Package units tells of systemd's units: List the ones that it has loaded, Show one with what belongs to it.
//
// bus.go asks systemd over D-Bus. Of a unit's hundreds of properties only those named here leave the machine: others,
// such as its environment, may hold secrets.
package units

import (
	"context"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// Properties are a unit's, by systemd's names; values as D-Bus has them.
type Properties map[string]any

// Systemd is what is asked of systemd.
type Systemd interface {
	// List gives the loaded units that have any of the states and match any of the patterns; none are all.
	List(ctx context.Context, states, patterns []string) ([]protocol.Unit, error)
	// Properties gives those that a unit has as a kind, which is Unit or the type of unit, such as Service.
	// A unit that is not there has the LoadState not-found.
	Properties(ctx context.Context, unit, kind string) (Properties, error)
	Close() error
}

// Log reads the newest entries of the journal.
type Log func(ctx context.Context, q protocol.JournalQuery) (protocol.JournalPart, error)

// List lists units in order of name, as many as are wanted and an answer carries.
func List(ctx context.Context, s Systemd, q protocol.UnitsQuery) (protocol.UnitList, error) {
	list := protocol.UnitList{Units: []protocol.Unit{}}
	all, err := s.List(ctx, q.States, q.Patterns)
	if err != nil {
		return list, err
	}
	all = slices.DeleteFunc(all, func(u protocol.Unit) bool { return u.Name <= q.After })
	slices.SortFunc(all, func(a, b protocol.Unit) int { return strings.Compare(a.Name, b.Name) })
	list.Total = len(all)
	size := 0
	for _, u := range all {
		u.Description = line(u.Description, 200)
		size += len(u.Name) + len(u.Description)*5/4 + len(u.Load) + len(u.Active) + len(u.Sub) + 100
		if len(list.Units) > 0 && (len(list.Units) == q.Limit || size > protocol.MaxAnswer) {
			list.Next = list.Units[len(list.Units)-1].Name
			break
		}
		list.Units = append(list.Units, u)
	}
	return list, nil
}

// line shortens what somebody wrote to a line of at most n bytes.
func line(s string, n int) string {
	s = strings.Join(strings.Fields(s), " ")
	return strings.ToValidUTF8(s[:min(len(s), n)], "")
}

// dependencies are the words of systemd for what units are to each other.
var dependencies = []string{"Requires", "Requisite", "Wants", "BindsTo", "PartOf", "RequiredBy", "WantedBy", "BoundBy", "Conflicts", "Before", "After", "Triggers", "TriggeredBy", "OnFailure"}

const (
	maxDependencies = 200 // of each word
	maxTriggers     = 20
)

// Show tells of one unit. Its log may be missing, and a note says why then.
func Show(ctx context.Context, s Systemd, log Log, q protocol.UnitQuery) (*protocol.UnitStatus, error) {
	p, err := s.Properties(ctx, q.Name, "Unit")
	if err != nil {
		return nil, err
	}
	u := &protocol.UnitStatus{Unit: protocol.Unit{Name: p.text("Id"), Description: line(p.text("Description"), 1000), Load: p.text("LoadState"), Active: p.text("ActiveState"), Sub: p.text("SubState")},
		File: p.text("FragmentPath"), State: p.text("UnitFileState"), Since: p.time("StateChangeTimestamp"), Dependencies: map[string][]string{}}
	if u.Load == "not-found" {
		return nil, protocol.Refuse(protocol.Unknown, "there is no unit %s", q.Name)
	}
	for _, word := range dependencies {
		if names := p.list(word); len(names) > 0 {
			slices.Sort(names)
			u.Dependencies[word] = names[:min(len(names), maxDependencies)]
		}
	}
	kind := kindOf(u.Name)
	if kind != "" {
		own, err := s.Properties(ctx, u.Name, kind)
		if err != nil {
			return nil, err
		}
		u.Result, u.PID, u.ExitCode, u.Restarts = own.text("Result"), int(own.number("MainPID")), int(own.number("ExecMainStatus")), int(own.number("NRestarts"))
		u.Memory, u.CPU, u.Tasks = own.number("MemoryCurrent"), own.number("CPUUsageNSec"), own.number("TasksCurrent")
	}
	if err := triggers(ctx, s, u, p.list("TriggeredBy")); err != nil {
		return nil, err
	}
	if q.Lines > 0 {
		part, err := log(ctx, protocol.JournalQuery{Units: []string{u.Name}, Lines: q.Lines})
		u.Log, u.LogNext = part.Entries, part.Next
		if err != nil {
			u.LogNote = line(err.Error(), 500)
		}
	}
	return u, ctx.Err()
}

// triggers tells of the timers and sockets that the unit is, or that start it.
func triggers(ctx context.Context, s Systemd, u *protocol.UnitStatus, by []string) error {
	for i, name := range append([]string{u.Name}, by...) {
		if i > maxTriggers {
			break
		}
		kind := kindOf(name)
		if kind != "Timer" && kind != "Socket" {
			continue
		}
		p, err := s.Properties(ctx, name, kind)
		if err != nil {
			return err
		}
		if kind == "Timer" {
			u.Timers = append(u.Timers, protocol.Timer{Name: name, Triggers: p.text("Unit"), Last: p.time("LastTriggerUSec"), Next: p.next()})
		} else {
			u.Sockets = append(u.Sockets, protocol.Socket{Name: name, Listen: p.pairs("Listen"), Connections: p.number("NConnections"), Accepted: p.number("NAccepted")})
		}
	}
	return nil
}

// kindOf is D-Bus' word for the type of a unit, "" for those that have nothing that is told here.
func kindOf(name string) string {
	return map[string]string{"service": "Service", "socket": "Socket", "timer": "Timer", "mount": "Mount", "automount": "Automount", "swap": "Swap", "path": "Path", "scope": "Scope", "slice": "Slice"}[name[strings.LastIndexByte(name, '.')+1:]]
}

func (p Properties) text(name string) string {
	s, _ := p[name].(string)
	return s
}

func (p Properties) list(name string) []string {
	l, _ := p[name].([]string)
	return l
}

// number is 0 where there is none, or where systemd does not know, which is its largest number.
func (p Properties) number(name string) int64 {
	switch n := p[name].(type) {
	case int32:
		return int64(n)
	case uint32:
		return int64(n)
	case int64:
		return n
	case uint64:
		if n < 1<<63 {
			return int64(n)
		}
	}
	return 0
}

// time is nil where it is none: never, or not known.
func (p Properties) time(name string) *time.Time {
	n := p.number(name)
	if n == 0 {
		return nil
	}
	t := time.UnixMicro(n).UTC()
	return &t
}

// next is when a timer elapses: by the clock, or by the time since the machine was booted.
func (p Properties) next() *time.Time {
	next := p.time("NextElapseUSecRealtime")
	if after := p.number("NextElapseUSecMonotonic"); after > 0 {
		var now unix.Timespec
		if unix.ClockGettime(unix.CLOCK_MONOTONIC, &now) == nil {
			t := time.Now().Add(time.Duration(after)*time.Microsecond - time.Duration(now.Nano())).UTC().Round(time.Millisecond)
			if next == nil || t.Before(*next) {
				next = &t
			}
		}
	}
	return next
}

// pairs is a list of two words each.
func (p Properties) pairs(name string) []string {
	l, _ := p[name].([][]any)
	all := []string{}
	for _, pair := range l {
		if len(pair) == 2 {
			a, _ := pair[0].(string)
			b, _ := pair[1].(string)
			all = append(all, strings.TrimSpace(a+" "+b))
		}
	}
	return all
}
