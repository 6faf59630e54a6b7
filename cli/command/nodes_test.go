package command

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// answers is a node that answers an action with body, and refuses all others.
func answers(action protocol.Action, body any) fleettest.Script {
	return fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
		if o.Action != action {
			return nil, protocol.Refuse(protocol.Unknown, "no action %q here", o.Action)
		}
		return body, nil
	}}
}

func TestGenerations(t *testing.T) {
	s, f := newFleet(t)
	created := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	f.Add("web1").Script(answers(protocol.ListGenerations, protocol.GenerationList{Generations: []protocol.Generation{
		{Number: 42, Closure: system("b"), Created: created, NixOS: "25.11", Running: true, Current: true, Deployment: "d2"},
		{Number: 41, Closure: system("a"), Created: created, Booted: true},
		{Closure: system("bad"), Quarantine: "web.service failed\x1b[2J"},
	}}))
	out := s.must("generations", "web1")
	for _, want := range []string{"web1  42   runs, boots next  25.11", "web1  41   booted", "web1  -    quarantined", system("a"), "web.service failed\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	docs := documents(t, s.must("generations", "web1", "--json"))
	if len(docs) != 3 || docs[0]["generation"] != 42.0 || docs[0]["running"] != true || docs[0]["created"] != "2026-01-02T03:04:05Z" || docs[2]["quarantine"] != "web.service failed\x1b[2J" {
		t.Errorf("documents: %v", docs)
	}
	f.Add("web2").Vanish()
	f.Add("db1").Script(answers(protocol.Ping, nil))
	r := s.run("generations", "all")
	if r.status != SomeFailed || !strings.Contains(r.stderr, "nix-infra: not all nodes did it:\n  refused: db1: no action \"generations\" here (unknown)\n  no answer from web2\n") || !strings.Contains(r.out, system("a")) {
		t.Errorf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
	if r = s.run("generations", "web1", "web2"); r.status != Unanswered {
		t.Errorf("status %d", r.status)
	}
	s.expect(Refused, "list the generations of which nodes?", "generations")
}

func TestGC(t *testing.T) {
	s, f := newFleet(t)
	asked := make(chan protocol.GarbageRequest, 10)
	for i, n := range []string{"web1", "web2"} {
		f.Add(n).Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
			r, err := protocol.Decode[protocol.GarbageRequest](o.Payload)
			if err != nil || o.Action != protocol.CollectGarbage {
				t.Errorf("%s: %v", o.Action, err)
			}
			asked <- r
			return protocol.GarbageReport{Removed: []protocol.Generation{{Number: 3}, {Number: 4}}, Kept: 5, Paths: 7, Freed: int64(i+1) << 30}, nil
		}})
	}
	out := s.must("gc", "all")
	for _, want := range []string{"web1: 1.0 GiB freed; 2 generations removed (3 4), 5 stay\n", "web2: 2.0 GiB freed", "\n3.0 GiB freed by removing 4 generations\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in\n%s", want, out)
		}
	}
	if r := <-asked; r != (protocol.GarbageRequest{OlderThan: 14 * 24 * 3600, Keep: 5}) || <-asked != r {
		t.Errorf("asked for %+v", r)
	}
	if out = s.must("gc", "web1", "--dry-run", "--older-than", "2w", "--keep", "1"); !strings.Contains(out, "web1: 2 generations would go (3 4), 5 stay\n2 generations would go\n") {
		t.Errorf("--dry-run:\n%s", out)
	}
	if r := <-asked; r != (protocol.GarbageRequest{OlderThan: 14 * 24 * 3600, Keep: 1, DryRun: true}) {
		t.Errorf("asked for %+v", r)
	}
	docs := documents(t, s.must("gc", "web1", "--json"))
	if len(docs) != 1 || docs[0]["freed"] != float64(1<<30) || docs[0]["paths"] != 7.0 || docs[0]["kept"] != 5.0 || len(docs[0]["removed"].([]any)) != 2 {
		t.Errorf("documents: %v", docs)
	}
	f.Add("db1").Script(answers(protocol.Ping, nil))
	r := s.run("gc", "all")
	if r.status != SomeFailed || !strings.Contains(r.out, "db1: refused or failed\n3.0 GiB freed") || r.stderr != "nix-infra: refused: db1: no action \"gc\" here (unknown)\n" {
		t.Errorf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
	s.expect(Refused, "--older-than: \"14\" is no age", "gc", "all", "--older-than", "14")
	s.expect(Refused, "--keep -1", "gc", "all", "--keep", "-1")
	s.expect(Refused, "collect the garbage of which nodes?", "gc")
}

// A node that is at it is waited for, and whoever asked is told who did not get done.
func TestGCIsWaitedFor(t *testing.T) {
	s, f := newFleet(t)
	hold := make(chan struct{})
	t.Cleanup(func() { close(hold) })
	f.Add("web1").Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) { <-hold; return protocol.GarbageReport{}, nil }})
	r := s.run("gc", "web1", "--timeout", "300ms")
	if r.status != Unanswered || !strings.Contains(r.stderr, "no answer from web1") {
		t.Errorf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
}

func TestAge(t *testing.T) {
	for text, want := range map[string]time.Duration{"14d": 14 * 24 * time.Hour, "2w": 14 * 24 * time.Hour, "12h": 12 * time.Hour, "0": 0, "90m": 90 * time.Minute, "0d": 0} {
		if got, err := project.ParseAge(text); err != nil || got != want {
			t.Errorf("%s: %s, %v", text, got, err)
		}
	}
	for _, bad := range []string{"", "d", "14", "-1d", "1.5d", "-1h", "1ms", "99999d", "1y", "w"} {
		if got, err := project.ParseAge(bad); err == nil {
			t.Errorf("%q is %s", bad, got)
		}
	}
}

func TestDriftCommand(t *testing.T) {
	s, f := newFleet(t)
	for _, n := range []string{"web1", "web2", "db1"} {
		f.Add(n)
	}
	s.must("deploy", "all")
	if out := s.must("drift"); out != "no drift on 3 nodes\n" {
		t.Errorf("%q", out)
	}
	byHand := system("by-hand")
	f.Change("web2", func(n *protocol.NodeState) {
		b := *n.Beat
		b.Confirmed, b.Closure, b.Profile, b.Generation = b.Closure, byHand, byHand, 9
		n.Beat = &b
	})
	r := s.run("drift")
	if r.status != SomeFailed || !strings.Contains(r.out, "somebody switched to "+byHand+" by hand (generation 9)") || !strings.Contains(r.stderr, "1 of 3 nodes drift") || strings.Contains(r.out, "web1") {
		t.Errorf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
	r = s.run("drift", "--json")
	docs := documents(t, r.out)
	if r.status != SomeFailed || len(docs) != 1 || docs[0]["node"] != "web2" || docs[0]["closure"] != byHand || docs[0]["booted"] != byHand || docs[0]["confirmed"] == byHand {
		t.Errorf("status %d: %v", r.status, docs)
	}
	s.must("drift", "web1", "db1")
}

func TestRollback(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	s.must("deploy", "web1")
	for _, c := range []struct {
		args []string
		want protocol.Rollback
	}{
		{nil, protocol.Rollback{}},
		{[]string{"--to", "41"}, protocol.Rollback{Generation: 41}},
		{[]string{"--to", system("web1")}, protocol.Rollback{Path: system("web1")}},
	} {
		before := f.Record("web1").Desired.Serial
		out := s.must(append([]string{"rollback", "web1"}, c.args...)...)
		m := f.Manifest("web1")
		if m.Rollback == nil || *m.Rollback != c.want || m.Mode != protocol.Switch || m.Serial != before+1 || len(m.Files) != 0 || !strings.Contains(out, "1 confirmed") {
			t.Errorf("%v: %+v\n%s", c.args, m, out)
		}
	}
	for _, bad := range []string{"0", "-1", "x", "/etc", "/nix/store/x"} {
		s.expect(Refused, fmt.Sprintf("--to %q", bad), "rollback", "web1", "--to", bad)
	}
	s.expect(Refused, "roll which nodes back?", "rollback")
}

// strategyOf is how a deployment was to reach its nodes.
func strategyOf(t *testing.T, f *fleettest.Fleet, id string) protocol.Strategy {
	t.Helper()
	all := f.Deployments()
	i := slices.IndexFunc(all, func(d protocol.Deployment) bool { return d.ID == id })
	if i < 0 {
		t.Fatalf("there is no deployment %s", id)
	}
	return all[i].Strategy
}

func TestReboot(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1", "web")
	f.Add("web2", "web")
	s.must("reboot", "@web")
	m := f.Manifest("web1")
	if m.Mode != protocol.Reboot || m.Rollback != nil || m.Closure != nil || len(m.Files) != 0 || m.Serial != 1 {
		t.Errorf("%+v", m)
	}
	// One at a time, unless somebody says so.
	if got := strategyOf(t, f, m.Deployment); got.MaxUnavailable != "1" {
		t.Errorf("strategy %+v", got)
	}
	s.must("reboot", "@web", "--max-unavailable", "50%")
	if got := strategyOf(t, f, f.Manifest("web1").Deployment); got.MaxUnavailable != "50%" {
		t.Errorf("strategy %+v", got)
	}
	s.expect(Refused, "--on-failure rollback goes with --mode switch", "reboot", "@web", "--on-failure", "rollback")
}
