package command

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestWhenWatchingEnds(t *testing.T) {
	now := time.Now()
	confirmed := follow{phase: protocol.Confirmed, settled: true, result: protocol.NodeResult{Phase: protocol.Confirmed, Released: true}}
	failed := follow{phase: protocol.FailedPhase, settled: true, result: protocol.NodeResult{Phase: protocol.FailedPhase, Released: true, Failed: true}}
	working := follow{phase: protocol.Building, awaited: true, result: protocol.NodeResult{Released: true}}
	lost := follow{phase: protocol.Building, awaited: true, lostAt: now.Add(-lostGrace), result: protocol.NodeResult{Released: true}}
	held := follow{result: protocol.NodeResult{Wave: 2}}
	away := follow{result: protocol.NodeResult{Wave: 2, Note: offline}}
	for name, c := range map[string]struct {
		rollout protocol.RolloutStatus
		nodes   []follow
		want    bool
	}{
		"all confirmed, whatever the state is":    {protocol.RolloutStatus{State: protocol.RolloutRunning}, []follow{confirmed, confirmed}, true},
		"one failed, which may have consequences": {protocol.RolloutStatus{State: protocol.RolloutRunning}, []follow{confirmed, failed}, false},
		"one failed, which had none":              {protocol.RolloutStatus{State: protocol.RolloutDone}, []follow{confirmed, failed}, true},
		"somebody works":                          {protocol.RolloutStatus{State: protocol.RolloutRunning}, []follow{confirmed, working}, false},
		"stopped, and somebody works":             {protocol.RolloutStatus{State: protocol.RolloutStopped}, []follow{failed, working, held}, false},
		"stopped":                                 {protocol.RolloutStatus{State: protocol.RolloutStopped}, []follow{failed, held}, true},
		"paused, and somebody works":              {protocol.RolloutStatus{State: protocol.RolloutPaused}, []follow{working, held}, false},
		"paused":                                  {protocol.RolloutStatus{State: protocol.RolloutPaused}, []follow{confirmed, held}, true},
		"the next wave is to come":                {protocol.RolloutStatus{State: protocol.RolloutRunning}, []follow{confirmed, held}, false},
		"soaks, the next wave is away":            {protocol.RolloutStatus{State: protocol.RolloutRunning, Next: now.Add(time.Hour)}, []follow{confirmed, away}, false},
		"scheduled":                               {protocol.RolloutStatus{State: protocol.RolloutScheduled, Next: now.Add(time.Hour)}, []follow{held, held}, false},
		"trailing":                                {protocol.RolloutStatus{State: protocol.RolloutTrailing}, []follow{confirmed, away}, true},
		"trailing, and one came back":             {protocol.RolloutStatus{State: protocol.RolloutTrailing}, []follow{confirmed, working, away}, false},
		"only lost ones are left":                 {protocol.RolloutStatus{State: protocol.RolloutRunning}, []follow{confirmed, lost, away}, true},
		"a lost one holds others up":              {protocol.RolloutStatus{State: protocol.RolloutRunning}, []follow{confirmed, lost, held}, false},
		"to be taken back by what is not there":   {protocol.RolloutStatus{State: protocol.RolloutRolledBack}, []follow{failed, held}, false},
		"taken back":                              {protocol.RolloutStatus{State: protocol.RolloutRolledBack, Back: "x-back"}, []follow{failed, held}, true},
	} {
		w := &watch{nodes: map[string]*follow{}, summary: protocol.Deployment{ID: "x", Rollout: c.rollout}}
		w.pace.changed = now
		for i := range c.nodes {
			w.nodes[fmt.Sprint(i)] = &c.nodes[i]
		}
		if got := w.done(now); got != c.want {
			t.Errorf("%s: done: %v", name, got)
		}
		if w.stale = true; w.done(now) {
			t.Errorf("%s: it ends although something new was not looked at", name)
		}
	}
	w := &watch{nodes: map[string]*follow{"1": &failed}, summary: protocol.Deployment{Rollout: protocol.RolloutStatus{State: protocol.RolloutRolledBack}}}
	if w.pace.changed = now.Add(-2 * reportGrace); !w.done(now) {
		t.Error("where nothing is to be taken back it waits for the way back")
	}
}

// summaryOf is a rollout with so many nodes that have ended and that have not.
func summaryOf(state protocol.RolloutState, wave int, waves []int, ended, open int) *protocol.Deployment {
	return &protocol.Deployment{ID: "x", Count: map[protocol.Phase]int{protocol.Confirmed: ended, "": open}, Rollout: protocol.RolloutStatus{State: state, Wave: wave, Waves: waves}}
}

func TestPaceOfNodes(t *testing.T) {
	var p pace
	start := time.Now()
	at := func(seconds int) time.Time { return start.Add(time.Duration(seconds) * time.Second) }
	one := []int{100}
	p.note(summaryOf(protocol.RolloutRunning, 1, one, 0, 100), at(0))
	if p.rate(at(5)) != 0 || p.left(at(5), &protocol.RolloutStatus{Waves: one}, 100) != 0 {
		t.Error("something is known before anything ended")
	}
	p.note(summaryOf(protocol.RolloutRunning, 1, one, 20, 80), at(10))
	if rate, left := p.rate(at(10)), p.left(at(10), &protocol.RolloutStatus{Waves: one}, 80); rate != 2 || left != 40*time.Second {
		t.Errorf("20 nodes in 10 s: %g a second, %s for the other 80", rate, left)
	}
	p.note(summaryOf(protocol.RolloutPaused, 1, one, 20, 80), at(20))
	if p.rate(at(20)) != 0 || p.left(at(20), &protocol.RolloutStatus{Waves: one}, 80) != 0 {
		t.Error("a paused rollout has a pace")
	}
}

// Of waves that take a minute each, whole ones count, with all that they wait for.
func TestPaceOfWaves(t *testing.T) {
	waves := []int{1, 10, 10, 10}
	for name, c := range map[string]struct {
		from int // second in which watching begins
		want map[int]time.Duration
	}{
		"from the beginning": {0, map[int]time.Duration{30: 0, 60: 3 * time.Minute, 90: 150 * time.Second, 125: 115 * time.Second}},
		"in the middle":      {70, map[int]time.Duration{70: 0, 130: 0, 180: time.Minute, 210: 30 * time.Second}},
	} {
		var p pace
		start := time.Now()
		for second := c.from; second < 240; second += 5 {
			now, wave, ended := start.Add(time.Duration(second)*time.Second), 1+second/60, 0
			for _, n := range waves[:wave-1] {
				ended += n
			}
			p.note(summaryOf(protocol.RolloutRunning, wave, waves, ended, 31-ended), now)
			if want, ok := c.want[second]; ok {
				if got := p.left(now, &protocol.RolloutStatus{Waves: waves}, 31-ended); got != want {
					t.Errorf("%s, after %d s: %s left, want %s", name, second, got, want)
				}
			}
		}
	}
}

func TestHead(t *testing.T) {
	now := time.Now()
	w := &watch{id: "x", nodes: map[string]*follow{}, summary: *summaryOf(protocol.RolloutRunning, 2, []int{1, 3, 3}, 2, 5)}
	w.summary.Rollout.Failures, w.summary.Rollout.MaxFailures = 1, 2
	w.nodes["n1"] = &follow{settled: true, phase: protocol.Confirmed, result: protocol.NodeResult{Wave: 1, Released: true, Phase: protocol.Confirmed}}
	w.nodes["n2"] = &follow{settled: true, phase: protocol.FailedPhase, result: protocol.NodeResult{Wave: 2, Released: true, Phase: protocol.FailedPhase}}
	w.nodes["n3"] = &follow{phase: protocol.Building, result: protocol.NodeResult{Wave: 2, Released: true}}
	w.nodes["n4"] = &follow{result: protocol.NodeResult{Wave: 2, Released: true}}
	w.nodes["n5"] = &follow{result: protocol.NodeResult{Wave: 3}}
	head := w.head(now)
	if len(head) != 2 || head[0] != bar(2, 7)+" 2 of 7 · wave 2 of 3 · 1 failed, 2 may" || head[1] != "wave 2: 1 building, 1 failed, 1 pending" {
		t.Errorf("%q", head)
	}
	w.summary.Rollout.State, w.summary.Rollout.Reason, w.summary.Rollout.Next = protocol.RolloutRunning, "wave 2 is through and soaks", now.Add(10*time.Minute)
	if head := w.head(now); len(head) != 3 || !strings.HasPrefix(head[2], "running, wave 2 of 3 (3 nodes): wave 2 is through and soaks, until ") || !strings.HasSuffix(head[2], " (10m0s)") {
		t.Errorf("%q", head)
	}
	for _, c := range []struct{ done, of, filled int }{{0, 0, 0}, {0, 7, 0}, {7, 7, 20}, {1, 2, 10}, {9, 7, 20}} {
		if b := bar(c.done, c.of); strings.Count(b, "█") != c.filled || strings.Count(b, "░") != 20-c.filled {
			t.Errorf("%d of %d: %s", c.done, c.of, b)
		}
	}
}

func TestStrategyText(t *testing.T) {
	for want, s := range map[string]protocol.Strategy{
		"all at once, stops when more than 0 failed":                                             {},
		"1 node first, then all others, pauses when more than 2 failed":                          {Canary: "1", MaxFailures: "2", OnFailure: protocol.PauseOnFailure},
		"10% of the nodes first, 25% of the nodes at a time, goes back when more than 0 failed":  {Canary: "10%", Batch: "25%", OnFailure: protocol.RollbackOnFailure},
		"all at once, in the order @db @web, 10m0s between waves, stops when more than 0 failed": {Canary: "0", Batch: "0%", Order: []string{"db", "web"}, Soak: 600},
		"all at once, at most 1 node on their way at once, stops when more than 5% failed, only mon 01:00-02:00 UTC, or 22:00-04:00 Europe/Stockholm": {MaxUnavailable: "1", MaxFailures: "5%",
			Windows: []protocol.Window{{Days: []time.Weekday{1}, From: 60, To: 120}, {From: 1320, To: 240, Zone: "Europe/Stockholm"}}},
	} {
		if got := strategyText(&s); got != want {
			t.Errorf("got  %s\nwant %s", got, want)
		}
	}
}
