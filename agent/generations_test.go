package agent

import (
	"fmt"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

func TestGarbage(t *testing.T) {
	now := time.Now()
	s := systems{Observation: reconcile.Observation{Generation: 8}, quarantine: map[string]reconcile.Quarantine{"/bad": {}}}
	for n := 9; n > 0; n-- { // the newest one is an hour old, and each one before an hour older
		s.generations = append(s.generations, nix.Generation{Number: n, Closure: fmt.Sprint("/", n), Created: now.Add(-time.Duration(10-n) * time.Hour)})
	}
	s.generations[6].Closure = "/bad" // 3
	keep := map[string]string{"/9": "runs", "/5": "is where a rollback goes to"}
	for name, c := range map[string]struct {
		q    protocol.GarbageRequest
		want string
	}{
		"all that nobody needs": {protocol.GarbageRequest{}, "[7 6 4 2 1]"},
		"some of the newest":    {protocol.GarbageRequest{Keep: 4}, "[4 2 1]"},
		"more than there are":   {protocol.GarbageRequest{Keep: 100}, "[]"},
		"by age":                {protocol.GarbageRequest{OlderThan: 6*3600 - 1}, "[4 2 1]"},
		"by both":               {protocol.GarbageRequest{OlderThan: 3600, Keep: 7}, "[2 1]"},
		"all are young":         {protocol.GarbageRequest{OlderThan: 1 << 30}, "[]"},
	} {
		got := []int{}
		for _, g := range s.garbage(keep, c.q, now) {
			got = append(got, g.Number)
		}
		if fmt.Sprint(got) != c.want {
			t.Errorf("%s: %v, want %s", name, got, c.want)
		}
	}
}

func TestListOfSystems(t *testing.T) {
	s := systems{Observation: reconcile.Observation{Generation: 2, Running: "/run", Booted: "/a"},
		generations: []nix.Generation{{Number: 2, Closure: "/b"}, {Number: 1, Closure: "/a"}},
		history:     []reconcile.Confirmation{{Deployment: "d-3", Closure: "/a"}, {Deployment: "d-2", Closure: "/b"}, {Deployment: "d-1", Closure: "/a"}},
		quarantine:  map[string]reconcile.Quarantine{"/y": {Reason: "why"}, "/x": {Reason: "because"}, "/b": {Reason: "bad"}}}
	want := []protocol.Generation{
		{Number: 2, Closure: "/b", Current: true, Deployment: "d-2", Quarantine: "bad"},
		{Number: 1, Closure: "/a", Booted: true, Deployment: "d-3"},
		{Closure: "/run", Running: true},
		{Closure: "/x", Quarantine: "because"},
		{Closure: "/y", Quarantine: "why"},
	}
	got := s.list()
	if fmt.Sprintf("%+v", got) != fmt.Sprintf("%+v", want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	s = systems{}
	if got := s.list(); got == nil || len(got) != 0 {
		t.Errorf("a machine of which nothing is known: %+v", got)
	}
}
