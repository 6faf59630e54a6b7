package controller

import (
	"context"
	"fmt"
	"reflect"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/controller/liveness"
	"github.com/nix-infra/nix-infra/controller/rollout"
	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

// Between two passes the engine rests for as long as several passes take, so that it never takes more than a share of a
// core, and a thousand reports at once are one pass.
const (
	restFactor = 9
	minRest    = 2 * time.Millisecond
	maxRest    = 100 * time.Millisecond
	retryRound = time.Second // after something could not be recorded
)

// maxStep is how many nodes are released before the planner, which looks at each node of the fleet, is asked again although
// nothing happened. Where something did, it is asked before the next batch.
const maxStep = 10 * store.MaxRelease

// rollouts carries out the rollouts that have not ended. It looks at one when something happened that may matter to it, asks
// the planner, remembers what that says, and releases, a batch at a time. All that it knows is in the fleet's record and
// the beats, so that the next leader goes on from there.
type rollouts struct {
	t    *term
	wake chan struct{}
	due  map[string]time.Time // when to look at a rollout although nothing happens; of run alone

	mu    sync.Mutex
	dirty map[string]bool // rollouts to look at
}

func newRollouts(t *term) *rollouts {
	return &rollouts{t: t, wake: make(chan struct{}, 1), due: map[string]time.Time{}, dirty: map[string]bool{}}
}

// touch has rollouts looked at soon.
func (r *rollouts) touch(ids ...string) {
	if len(ids) == 0 {
		return
	}
	r.mu.Lock()
	for _, id := range ids {
		r.dirty[id] = true
	}
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

func (r *rollouts) touchAll()             { r.touch(r.t.fleet.unfinished()...) }
func (r *rollouts) touchNode(name string) { r.touch(r.t.fleet.underway(name)...) }

// changed is told by the beats. Most of their news are nothing to a rollout.
func (r *rollouts) changed(node string, before, after liveness.State) {
	a, b := &before.Beat, &after.Beat
	if !slices.Equal(a.Quarantine, b.Quarantine) {
		r.touchAll()
	} else if before.Online != after.Online || a.Phase != b.Phase || a.Serial != b.Serial || a.Deployment != b.Deployment ||
		(len(a.Degraded) > 0) != (len(b.Degraded) > 0) {
		r.touchNode(node)
	}
}

// run goes on until ctx is done, or until etcd fails.
func (r *rollouts) run(ctx context.Context) {
	select {
	case <-ctx.Done():
		return
	case <-r.t.alive.Settled():
	}
	r.touchAll()
	timer := time.NewTimer(0)
	defer timer.Stop()
	rest := minRest
	for {
		select {
		case <-ctx.Done():
			return
		case <-r.wake:
		case <-timer.C:
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(rest):
		}
		began := time.Now()
		if err := r.pass(ctx); err != nil {
			if ctx.Err() == nil {
				r.t.log.Error("rollouts", "error", err)
			}
			return // the term ends
		}
		rest = min(max(restFactor*time.Since(began), minRest), maxRest)
		timer.Reset(r.idle())
	}
}

// idle is until when nothing is due.
func (r *rollouts) idle() time.Duration {
	wait := time.Hour
	for _, at := range r.due {
		wait = min(wait, time.Until(at))
	}
	return max(0, wait)
}

// pass takes each rollout that has to be looked at as far as it goes, a batch of each at a time.
func (r *rollouts) pass(ctx context.Context) error {
	ids := r.take()
	for len(ids) > 0 {
		var more []string
		for _, id := range ids {
			again, err := r.step(ctx, id)
			if err != nil {
				return fmt.Errorf("deployment %s: %w", id, err)
			}
			if again {
				more = append(more, id)
			}
		}
		ids = append(more, r.take()...)
		slices.Sort(ids)
		ids = slices.Compact(ids)
	}
	return nil
}

func (r *rollouts) take() []string {
	now := time.Now()
	r.mu.Lock()
	defer r.mu.Unlock()
	for id, at := range r.due {
		if !now.Before(at) {
			r.dirty[id] = true
		}
	}
	ids := make([]string, 0, len(r.dirty))
	for id := range r.dirty {
		ids = append(ids, id)
	}
	clear(r.dirty)
	slices.Sort(ids)
	return ids
}

// step asks the planner about a rollout, remembers what it says, and releases, a batch at a time; again: there may be more to
// release, and the planner is to be asked again before that. An error is etcd's.
func (r *rollouts) step(ctx context.Context, id string) (again bool, err error) {
	t := r.t
	t.changing.Lock()
	defer t.changing.Unlock()
	delete(r.due, id)
	d, c, lacksBack := t.inspect(id)
	switch {
	case d == nil:
		return false, nil
	case lacksBack:
		return false, r.takeBack(ctx, d)
	case d.rollout.State.Ended():
		return false, nil
	}
	was, now := *d.rollout, time.Now()
	decision := rollout.Next(was, c.nodes, now)
	for _, at := range []time.Time{decision.Next, c.nextLost} {
		if next, ok := r.due[id]; !at.IsZero() && (!ok || at.Before(next)) {
			r.due[id] = at
		}
	}
	release := decision.Release[:min(len(decision.Release), maxStep)]
	if why := t.fleet.news(d, &was, &decision.Rollout, release); why != "" {
		if err := t.audit.record(ctx, protocol.AuditRecord{Request: id, Action: protocol.SteerRollout, Outcome: "ok", Reason: short(why, 1000)}); err != nil {
			// What can't be recorded is not done.
			t.log.Error("a rollout waits", "deployment", id, "for", why, "error", err)
			r.due[id] = now.Add(retryRound)
			return false, nil
		}
	}
	if !reflect.DeepEqual(decision.Rollout, was) {
		if err := t.remember(ctx, id, decision.Rollout); err != nil {
			return false, err
		}
	}
	if decision.Rollout.State == protocol.RolloutRolledBack {
		return false, r.takeBack(ctx, d)
	}
	for batch := range slices.Chunk(release, store.MaxRelease) {
		if r.touched(id) {
			return true, nil // what was decided may not hold any more
		}
		if err := t.release(ctx, d, batch, now); err != nil {
			return false, err
		}
	}
	return len(decision.Release) > len(release), nil
}

// touched tells whether a rollout has to be looked at.
func (r *rollouts) touched(id string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.dirty[id]
}

// inspect is a deployment with a rollout, nil where there is none, and what its nodes do where that can still matter.
func (t *term) inspect(id string) (d *deployment, c census, lacksBack bool) {
	t.fleet.mu.RLock()
	defer t.fleet.mu.RUnlock()
	d = t.fleet.deployments[id]
	if d == nil || d.rollout == nil {
		return nil, c, false
	}
	if !d.rollout.State.Ended() {
		c = t.census(d, time.Now())
	}
	return d, c, t.fleet.lacksBack(d)
}

// news is what has to be on record of a decision: a change of state, that a wave begins, and who gets it after their wave.
func (f *fleet) news(d *deployment, was, is *rollout.Rollout, batch []string) string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var lines []string
	if is.State != was.State {
		line := "now " + string(is.State)
		if is.Reason != "" {
			line += ": " + is.Reason
		}
		lines = append(lines, line)
	}
	if is.Wave != was.Wave {
		nodes := 0
		for _, p := range d.parts {
			if p.Wave == is.Wave {
				nodes++
			}
		}
		lines = append(lines, fmt.Sprintf("wave %d begins, of %d nodes", is.Wave, nodes))
	}
	late := slices.DeleteFunc(slices.Clone(batch), func(n string) bool {
		w := d.parts[n].Wave
		return w > was.Wave || w == is.Wave && was.State != protocol.RolloutTrailing
	})
	if len(late) > 0 {
		lines = append(lines, "released after their wave: "+strings.Join(late, ", "))
	}
	return strings.Join(lines, "; ")
}

// remember keeps where a rollout stands from now on. t.changing is held.
func (t *term) remember(ctx context.Context, id string, r rollout.Rollout) error {
	if err := t.lead.PutRollout(ctx, id, r); err != nil {
		t.mustRecover() // whether it was made is not known
		return err
	}
	t.fleet.settle(id, r)
	t.log.Info("rollout", "deployment", id, "state", r.State, "wave", r.Wave, "reason", r.Reason)
	return nil
}

// release lets up to store.MaxRelease nodes have their part of a deployment, and tells them. t.changing is held.
func (t *term) release(ctx context.Context, d *deployment, nodes []string, now time.Time) error {
	items := make(map[string]store.Entry, len(nodes))
	t.fleet.mu.RLock()
	for _, n := range nodes {
		e := d.parts[n].Entry
		e.Released = now.UTC()
		items[n] = e
	}
	t.fleet.mu.RUnlock()
	if err := t.lead.Release(ctx, d.Deployment, items); err != nil {
		t.mustRecover() // whether it was made is not known
		return err
	}
	t.fleet.release(d.ID, items)
	for _, n := range nodes {
		t.look(n, items[n].Desired(d.Deployment), false)
	}
	return nil
}

// takeBack takes over the deployment that takes another one back: with the ways back that were signed with it, on the nodes
// that have it or are on their way. Those that failed went back by themselves. t.changing is held.
func (r *rollouts) takeBack(ctx context.Context, d *deployment) error {
	t, now := r.t, time.Now()
	items := map[string]store.Entry{}
	t.fleet.mu.RLock()
	for _, name := range d.names {
		s, p := t.standing(d, name, now).Status, d.parts[name]
		if s == rollout.Succeeded || s == rollout.Underway {
			items[name] = store.Entry{Digest: p.Back, Serial: p.Serial + 1, Timeout: p.Timeout, Build: p.Build}
		}
	}
	t.fleet.mu.RUnlock()
	if len(items) == 0 {
		return nil
	}
	back := store.Deployment{ID: protocol.BackID(d.ID), By: d.By, Created: now.UTC(), Mode: protocol.Switch, Undoes: d.ID,
		Strategy: protocol.Strategy{MaxUnavailable: d.Strategy.MaxUnavailable, MaxFailures: "100%"}}
	err := t.audit.record(ctx, protocol.AuditRecord{Request: back.ID, Action: protocol.Deploy, Outcome: "ok",
		Reason: fmt.Sprintf("takes %s back on %d nodes", d.ID, len(items))})
	if err == nil {
		err = t.accept(ctx, back, items)
	}
	if err != nil {
		t.log.Error("a deployment can't be taken back yet", "deployment", d.ID, "error", err)
		r.due[d.ID] = now.Add(retryRound)
	}
	return nil
}

// steer is somebody pausing, resuming or aborting a rollout.
func (t *term) steer(ctx context.Context, order *protocol.Verified) (any, error) {
	o, err := payload[protocol.RolloutOrder](order)
	if err != nil {
		return nil, err
	}
	t.changing.Lock()
	defer t.changing.Unlock()
	d, c, _ := t.inspect(o.ID)
	if d == nil {
		return nil, protocol.Refuse(protocol.Unknown, "no rollout of deployment %s is on record (any more); a dry-activate has none", o.ID)
	}
	for _, node := range d.names {
		if err := order.Sender.Reach(node); err != nil {
			return nil, err
		}
	}
	was := *d.rollout
	is, err := rollout.Steer(was, c.nodes, o.Verb, order.Sender.Name, time.Now())
	if err != nil {
		return nil, protocol.Refuse(protocol.Conflict, "%v", err)
	}
	if !reflect.DeepEqual(is, was) {
		if err := t.remember(ctx, o.ID, is); err != nil {
			return nil, err
		}
	}
	t.rollouts.touch(o.ID)
	s, _, _ := t.summary(o.ID)
	return s, nil
}
