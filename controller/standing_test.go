package controller

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nix-infra/nix-infra/controller/liveness"
	"github.com/nix-infra/nix-infra/controller/rollout"
	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

// blank is a book in which nothing is written.
type blank struct{}

func (blank) Sightings(context.Context) (map[string]store.Sighting, error) { return nil, nil }
func (blank) Save(context.Context, []store.Sighting) error                 { return nil }
func (blank) SaveLast(context.Context, []store.Sighting) error             { return nil }
func (blank) Renew(context.Context) ([]int, error)                         { return nil, nil }

// standingTerm is as much of a term as judging nodes needs: n1 was let have d1.
func standingTerm(t *testing.T) (*term, *deployment) {
	alive, err := liveness.New(t.Context(), liveness.Config{Interval: 10 * time.Second}, blank{}, testLog())
	must(t, err)
	f := &fleet{nodes: map[string]protocol.NodeRecord{"n1": {Name: "n1"}}, desired: map[string]protocol.Desired{}, dry: map[string][]dryRun{},
		deployments: map[string]*deployment{}, live: map[string]*deployment{}, claims: map[string]claim{}}
	tm := &term{fleet: f, alive: alive}
	begun := rollout.New(protocol.Strategy{}, time.Now())
	d := store.Deployment{ID: "d1", Mode: protocol.Switch, Created: time.Now()}
	e := store.Entry{Serial: 3, Wave: 1, Timeout: 60, Build: 600}
	f.accepted(d, map[string]store.Entry{"n1": e}, &begun)
	e.Released = time.Now()
	f.release("d1", map[string]store.Entry{"n1": e})
	return tm, f.deployments["d1"]
}

// A node that is away on its way has the time that its manifest gives it, and 90 s.
func TestLost(t *testing.T) {
	for phase, patience := range map[protocol.Phase]time.Duration{
		"": 750 * time.Second, protocol.Fetching: 750 * time.Second, protocol.Building: 750 * time.Second,
		protocol.Activating: 150 * time.Second, protocol.Checking: 150 * time.Second, protocol.Rebooting: 150 * time.Second, protocol.RollingBack: 150 * time.Second,
	} {
		synctest.Test(t, func(t *testing.T) {
			tm, d := standingTerm(t)
			time.Sleep(time.Second)
			seen := time.Now()
			if phase == "" {
				seen = seen.Add(-time.Second) // never: from the release on
			} else {
				tm.alive.Beat("n1", protocol.Beat{Interval: 10, Serial: 3, Deployment: "d1", Phase: phase})
				if c := tm.census(d, time.Now()); c.nodes[0].Lost || !c.nodes[0].Online || !c.nextLost.IsZero() {
					t.Errorf("%q, online: %+v", phase, c)
				}
			}
			time.Sleep(time.Minute)
			if c := tm.census(d, time.Now()); c.nodes[0].Lost || c.nodes[0].Online || !c.nextLost.Equal(seen.Add(patience)) {
				t.Errorf("%q, away: %+v, want lost at %s", phase, c, seen.Add(patience))
			}
			time.Sleep(time.Until(seen.Add(patience - 1)))
			if tm.census(d, time.Now()).nodes[0].Lost {
				t.Errorf("%q is lost too early", phase)
			}
			time.Sleep(time.Nanosecond)
			if c := tm.census(d, time.Now()); !c.nodes[0].Lost || c.nodes[0].Status != rollout.Underway || !c.nextLost.IsZero() {
				t.Errorf("%q is not lost: %+v", phase, c)
			}
			tm.alive.Beat("n1", protocol.Beat{Interval: 10, Serial: 3, Deployment: "d1", Phase: protocol.Confirmed})
			if n := tm.census(d, time.Now()).nodes[0]; n.Lost || n.Status != rollout.Succeeded {
				t.Errorf("back: %+v", n)
			}
		})
	}
}

func TestStanding(t *testing.T) {
	on := func(b protocol.Beat) protocol.Beat { b.Serial, b.Deployment = 3, "d1"; return b }
	for name, c := range map[string]struct {
		beat   protocol.Beat
		report protocol.Phase
		after  func(*fleet)
		want   rollout.Node
		phase  protocol.Phase
		by     string
	}{
		"on its way":        {beat: on(protocol.Beat{Phase: protocol.Building}), want: rollout.Node{Status: rollout.Underway}, phase: protocol.Building},
		"beats its end":     {beat: on(protocol.Beat{Phase: protocol.FailedPhase}), want: rollout.Node{Status: rollout.Failed}, phase: protocol.FailedPhase},
		"reported":          {report: protocol.Staged, want: rollout.Node{Status: rollout.Succeeded}, phase: protocol.Staged},
		"degraded":          {beat: on(protocol.Beat{Phase: protocol.Confirmed, Degraded: []string{"x"}}), report: protocol.Confirmed, want: rollout.Node{Status: rollout.Succeeded, Degraded: true}, phase: protocol.Confirmed},
		"degraded before":   {beat: on(protocol.Beat{Phase: protocol.Checking, Degraded: []string{"x"}}), report: protocol.Confirmed, want: rollout.Node{Status: rollout.Succeeded}, phase: protocol.Confirmed},
		"further by itself": {beat: protocol.Beat{Serial: 4, Deployment: "x", Phase: protocol.Confirmed}, want: rollout.Node{Status: rollout.Taken}},
		"locked since":      {after: func(f *fleet) { f.putNode(protocol.NodeRecord{Name: "n1", Lock: &protocol.Lock{}}) }, want: rollout.Node{Status: rollout.Underway, Locked: true}},
		"removed":           {after: func(f *fleet) { f.removeNode("n1") }, want: rollout.Node{Status: rollout.Taken}},
		"enrolled anew": {after: func(f *fleet) { f.removeNode("n1"); f.putNode(protocol.NodeRecord{Name: "n1"}) },
			want: rollout.Node{Status: rollout.Taken}},
		"superseded":                    {beat: on(protocol.Beat{Phase: protocol.Building}), after: newer, want: rollout.Node{Status: rollout.Taken}, phase: protocol.Building, by: "d2"},
		"superseded after it succeeded": {report: protocol.Confirmed, after: newer, want: rollout.Node{Status: rollout.Taken}, phase: protocol.Confirmed},
		"superseded after it failed":    {report: protocol.RolledBack, after: newer, want: rollout.Node{Status: rollout.Failed}, phase: protocol.RolledBack},
	} {
		synctest.Test(t, func(t *testing.T) {
			tm, d := standingTerm(t)
			c.beat.Interval = 60
			tm.alive.Beat("n1", c.beat)
			if c.report != "" {
				e := d.parts["n1"].Entry
				e.Report = &protocol.Report{Phase: c.report}
				tm.fleet.setPart("d1", "n1", partOf(e, 0))
			}
			if c.after != nil {
				c.after(tm.fleet)
			}
			c.want.Name, c.want.Wave, c.want.Online = "n1", 1, true
			if s := tm.standing(d, "n1", time.Now()); s.Node != c.want || s.phase != c.phase || s.by != c.by {
				t.Errorf("%s: %+v", name, s)
			}
		})
	}
}

func newer(f *fleet) {
	begun := rollout.New(protocol.Strategy{}, time.Now())
	f.accepted(store.Deployment{ID: "d2", Mode: protocol.Switch, Created: time.Now()}, map[string]store.Entry{"n1": {Serial: 4, Wave: 1}}, &begun)
}

// Which deployments are forgotten: never the newest, never one that goes on, and those that trail only where nothing else helps.
func TestSurplus(t *testing.T) {
	f := &fleet{dry: map[string][]dryRun{}, deployments: map[string]*deployment{}, live: map[string]*deployment{}, claims: map[string]claim{}}
	began := time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)
	add := func(i int, state protocol.RolloutState) {
		r := rollout.Rollout{State: state}
		f.accepted(store.Deployment{ID: fmt.Sprintf("d%03d", i), Mode: protocol.Switch, Created: began.Add(time.Duration(i) * time.Second)},
			map[string]store.Entry{"n1": {Serial: uint64(i + 1), Wave: 1}}, &r)
	}
	add(0, protocol.RolloutRunning)
	add(1, protocol.RolloutTrailing)
	add(2, protocol.RolloutPaused)
	add(3, protocol.RolloutDone)
	for i := 4; i < maxDeployments; i++ {
		add(i, protocol.RolloutTrailing)
	}
	if gone := f.surplus(); gone != nil {
		t.Errorf("within bounds, %v go", gone)
	}
	add(maxDeployments, protocol.RolloutRunning)
	if gone := f.surplus(); !slices.Equal(gone, []string{"d003"}) {
		t.Errorf("one too many: %v", gone)
	}
	add(maxDeployments+1, protocol.RolloutDone)
	add(maxDeployments+2, protocol.RolloutTrailing)
	if gone := f.surplus(); !slices.Equal(gone, []string{"d003", "d201", "d001"}) {
		t.Errorf("three too many: %v", gone)
	}
	f.dropDeployment("d202")
	if c := f.claims["n1"]; c.deployment != "d201" || c.serial != 202 || c.highest != 202 {
		t.Errorf("after the newest went: %+v", c)
	}
}

// A rollout that is forgotten while it waits for a node is ended first, on record.
func TestForgottenWhileItTrails(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	r.node(admin, "n1")
	admin.roll(t, "d1", 1, protocol.Strategy{}, "n1")
	admin.stands(t, "d1", protocol.RolloutTrailing)
	term := r.c.current.Load()
	term.changing.Lock()
	must(t, term.drop(t.Context(), "d1"))
	term.changing.Unlock()
	all := r.auditRecords(t)
	if !slices.ContainsFunc(all, func(a protocol.AuditRecord) bool {
		return a.Request == "d1" && a.User == "" && a.Reason == "now aborted: nodes are still away, and too many newer deployments are on record"
	}) {
		t.Error("it is not on record")
	}
	for _, prefix := range []string{"/nix-infra/rollouts/", "/nix-infra/deployments/"} {
		if g := value[*clientv3.GetResponse](t)(r.c.Store().Client().Get(t.Context(), prefix, clientv3.WithPrefix())); len(g.Kvs) != 0 {
			t.Errorf("left below %s: %v", prefix, g.Kvs)
		}
	}
	_, err := admin.ask(protocol.ShowDeployment, protocol.DeploymentQuery{ID: "d1"})
	wantCode(t, err, protocol.Unknown)
}
