package units

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// fake is a systemd with these units, and their properties by name and kind.
type fake struct {
	units      []protocol.Unit
	properties map[string]Properties
	asked      string
}

func (f *fake) List(_ context.Context, states, patterns []string) ([]protocol.Unit, error) {
	f.asked = fmt.Sprint(states, patterns)
	return slices.Clone(f.units), nil
}

func (f *fake) Properties(_ context.Context, unit, kind string) (Properties, error) {
	if p, ok := f.properties[unit+" "+kind]; ok {
		return p, nil
	}
	return nil, errors.New("no such unit " + unit + " " + kind)
}

func (f *fake) Close() error { return nil }

func TestList(t *testing.T) {
	f := &fake{}
	for i := range 5000 {
		f.units = append(f.units, protocol.Unit{Name: fmt.Sprintf("u%04d.service", 4999-i), Description: strings.Repeat("word\n", 100), Load: "loaded", Active: "active", Sub: "running"})
	}
	query := protocol.UnitsQuery{States: []string{"failed"}, Patterns: []string{"u*"}}
	next, pages := 0, 0
	for {
		list, err := List(t.Context(), f, query)
		if err != nil {
			t.Fatal(err)
		}
		pages++
		if list.Total != 5000-next || len(protocol.Encode(list)) > protocol.MaxAnswer*5/4 {
			t.Errorf("page %d: total %d, %d bytes", pages, list.Total, len(protocol.Encode(list)))
		}
		for _, u := range list.Units {
			if u.Name != fmt.Sprintf("u%04d.service", next) || len(u.Description) > 200 || strings.Contains(u.Description, "\n") {
				t.Fatalf("after %d units %+v", next, u)
			}
			next++
		}
		if query.After = list.Next; list.Next == "" {
			break
		}
	}
	if next != 5000 || pages < 2 || f.asked != "[[failed] [u*]]" && f.asked != "[failed] [u*]" {
		t.Errorf("%d units on %d pages, asked %s", next, pages, f.asked)
	}
	list, err := List(t.Context(), f, protocol.UnitsQuery{Limit: 2, After: "u0010.service"})
	if err != nil || len(list.Units) != 2 || list.Units[0].Name != "u0011.service" || list.Next != "u0012.service" {
		t.Errorf("%+v, %v", list, err)
	}
}

func TestShow(t *testing.T) {
	soon := time.Now().Add(time.Hour).UnixMicro()
	f := &fake{properties: map[string]Properties{
		"a.service Unit": {"Id": "a.service", "Description": "A", "LoadState": "loaded", "ActiveState": "failed", "SubState": "failed", "FragmentPath": "/etc/a", "UnitFileState": "linked",
			"StateChangeTimestamp": uint64(1_700_000_000_000_000), "Requires": []string{"z", "b"}, "TriggeredBy": []string{"a.timer", "a.socket", "a.path"}, "Environment": []string{"SECRET=1"}},
		"a.service Service": {"Result": "exit-code", "MainPID": uint32(7), "ExecMainStatus": int32(3), "NRestarts": uint32(4), "MemoryCurrent": ^uint64(0), "CPUUsageNSec": uint64(5), "TasksCurrent": uint64(2), "Environment": []string{"SECRET=1"}},
		"a.timer Timer":     {"Unit": "a.service", "LastTriggerUSec": uint64(0), "NextElapseUSecRealtime": uint64(soon), "NextElapseUSecMonotonic": uint64(0)},
		"a.socket Socket":   {"Listen": [][]any{{"Stream", "0.0.0.0:80"}, {"Datagram"}}, "NConnections": uint32(1), "NAccepted": uint32(9)},
		"no.service Unit":   {"Id": "no.service", "LoadState": "not-found"},
		"x.device Unit":     {"Id": "x.device", "LoadState": "loaded", "ActiveState": "active"},
	}}
	log := func(_ context.Context, q protocol.JournalQuery) (protocol.JournalPart, error) {
		return protocol.JournalPart{Entries: []protocol.JournalEntry{{Message: fmt.Sprint(q.Units, q.Lines)}}, Next: "s=1;i=1"}, nil
	}
	u, err := Show(t.Context(), f, log, protocol.UnitQuery{Name: "a.service", Lines: 5})
	if err != nil {
		t.Fatal(err)
	}
	if u.Active != "failed" || u.File != "/etc/a" || u.State != "linked" || u.Result != "exit-code" || u.PID != 7 || u.ExitCode != 3 || u.Restarts != 4 || u.Memory != 0 || u.CPU != 5 || u.Tasks != 2 || u.Since.Unix() != 1_700_000_000 {
		t.Errorf("%+v", u)
	}
	if fmt.Sprint(u.Dependencies) != "map[Requires:[b z] TriggeredBy:[a.path a.socket a.timer]]" {
		t.Errorf("%v", u.Dependencies)
	}
	if len(u.Timers) != 1 || u.Timers[0].Triggers != "a.service" || u.Timers[0].Last != nil || u.Timers[0].Next.UnixMicro() != soon {
		t.Errorf("%+v", u.Timers)
	}
	if len(u.Sockets) != 1 || fmt.Sprint(u.Sockets[0]) != "{a.socket [Stream 0.0.0.0:80] 1 9}" {
		t.Errorf("%+v", u.Sockets)
	}
	if len(u.Log) != 1 || u.Log[0].Message != "[a.service] 5" || u.LogNext != "s=1;i=1" {
		t.Errorf("%+v", u.Log)
	}
	if strings.Contains(string(protocol.Encode(u)), "SECRET") {
		t.Error("the environment leaves the machine")
	}
	broken := func(context.Context, protocol.JournalQuery) (protocol.JournalPart, error) {
		return protocol.JournalPart{}, errors.New("no journal\nhere")
	}
	if u, err := Show(t.Context(), f, broken, protocol.UnitQuery{Name: "a.service", Lines: 1}); err != nil || u.LogNote != "no journal here" {
		t.Errorf("%+v, %v", u, err)
	}
	if u, err := Show(t.Context(), f, broken, protocol.UnitQuery{Name: "x.device"}); err != nil || u.Active != "active" || u.LogNote != "" {
		t.Errorf("%+v, %v", u, err)
	}
	if _, err := Show(t.Context(), f, log, protocol.UnitQuery{Name: "no.service"}); !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
		t.Errorf("%v", err)
	}
}
