package controller

import (
	"time"

	"github.com/nix-infra/nix-infra/controller/rollout"
	"github.com/nix-infra/nix-infra/protocol"
)

// lostSlack is how much longer than its manifest allows a node may be away before it counts as lost.
const lostSlack = 90 * time.Second

// superseded is the phase under which Deployment.Count has nodes that will not end a deployment any more,
// because a newer one came.
const superseded protocol.Phase = "superseded"

// standing is how far a node is with its part of a deployment.
type standing struct {
	rollout.Node
	phase  protocol.Phase // what it reported, or what it beats; "": nothing was heard yet
	by     string         // the deployment that came after, before this one ended here
	lostAt time.Time      // when it counts as lost if it stays away; zero: it is not on its way, or it is there
}

// standing judges by the record, the node's reports and its beats. The fleet's lock is held.
func (t *term) standing(d *deployment, node string, now time.Time) standing {
	p := d.parts[node]
	record, enrolled := t.fleet.nodes[node]
	alive, _ := t.alive.State(node)
	beat := &alive.Beat
	beatsIt := beat.Deployment == d.ID && beat.Serial == p.Serial
	s := standing{phase: p.phase}
	if s.phase == "" && beatsIt {
		s.phase = beat.Phase
	}
	s.Node = rollout.Node{Name: node, Wave: p.Wave, Online: alive.Online, Locked: record.Lock != nil}

	// A dry-activate is superseded by nothing. A node's own word that it is further concerns nobody else.
	newer := false
	if c := t.fleet.claims[node]; d.Mode != protocol.DryActivate && c.deployment != d.ID {
		newer = true
		if !s.phase.Ended() {
			s.by = c.deployment
		}
	}
	gone := !enrolled || newer
	switch {
	case p.held():
		if gone || beat.Serial > p.Serial || beat.Serial == p.Serial && !beatsIt {
			s.Status = rollout.Left
		}
	case s.phase.Succeeded() && gone:
		s.Status = rollout.Taken
	case s.phase.Succeeded():
		s.Status = rollout.Succeeded
		s.Degraded = beatsIt && beat.Phase.Succeeded() && len(beat.Degraded) > 0
	case s.phase.Ended():
		s.Status = rollout.Failed
	case gone || beat.Serial > p.Serial || t.fleet.desired[node].Deployment != d.ID:
		s.Status = rollout.Taken
	default:
		s.Status = rollout.Underway
		if !alive.Online {
			s.lostAt = lostAt(&p, s.phase, alive.Seen)
			s.Lost = !now.Before(s.lostAt)
		}
	}
	return s
}

// lostAt is when a node that is away has had the time that its manifest gives it.
func lostAt(p *part, phase protocol.Phase, seen time.Time) time.Time {
	since := p.Released
	if seen.After(since) {
		since = seen
	}
	patience := lostSlack + time.Duration(p.Timeout)*time.Second
	switch phase {
	case protocol.Activating, protocol.Checking, protocol.Confirming, protocol.Rebooting, protocol.RollingBack:
	default:
		patience += time.Duration(p.Build) * time.Second
	}
	return since.Add(patience)
}

// census is what is known of all nodes of a deployment at a time.
type census struct {
	nodes    []rollout.Node         // for the planner
	count    map[protocol.Phase]int // for people
	nextLost time.Time              // when the next node counts as lost if it stays away; zero: none will
}

// census looks at each node of a deployment. The fleet's lock is held.
func (t *term) census(d *deployment, now time.Time) census {
	c := census{nodes: make([]rollout.Node, len(d.names)), count: map[protocol.Phase]int{}}
	closures := false // of nodes that have yet to get theirs
	for i, name := range d.names {
		s := t.standing(d, name, now)
		c.nodes[i] = s.Node
		if s.lostAt.After(now) && (c.nextLost.IsZero() || s.lostAt.Before(c.nextLost)) {
			c.nextLost = s.lostAt
		}
		closures = closures || s.Status == rollout.Held && d.parts[name].Closure != ""
		if s.by != "" {
			s.phase = superseded
		}
		c.count[s.phase]++
	}
	if !closures {
		return c
	}
	quarantined := t.alive.Quarantined()
	for i := range c.nodes {
		n := &c.nodes[i]
		_, bad := quarantined[d.parts[n.Name].Closure]
		n.Quarantined = n.Status == rollout.Held && bad
	}
	return c
}

// summary is a deployment without its nodes, and what the planner says of these.
func (t *term) summary(id string) (protocol.Deployment, rollout.Decision, bool) {
	t.fleet.mu.RLock()
	defer t.fleet.mu.RUnlock()
	d, ok := t.fleet.deployments[id]
	if !ok {
		return protocol.Deployment{}, rollout.Decision{}, false
	}
	now := time.Now()
	c := t.census(d, now)
	s := protocol.Deployment{ID: d.ID, By: d.By, Created: d.Created, Mode: d.Mode, Strategy: d.Strategy, Undoes: d.Undoes, Count: c.count}
	var decision rollout.Decision
	if d.rollout == nil {
		s.Rollout = d.dryStatus(c, now)
	} else {
		decision = rollout.Next(*d.rollout, c.nodes, now)
		s.Rollout = t.status(d, decision)
	}
	last := 0
	for i := range c.nodes {
		last = max(last, c.nodes[i].Wave)
	}
	s.Rollout.Waves = make([]int, last)
	for _, p := range d.parts {
		if p.Wave > 0 {
			s.Rollout.Waves[p.Wave-1]++
		}
		if !p.held() {
			s.Rollout.Released++
		}
	}
	return s, decision, true
}

// status is where a rollout stands. The fleet's lock is held.
func (t *term) status(d *deployment, decision rollout.Decision) protocol.RolloutStatus {
	r := d.rollout
	s := protocol.RolloutStatus{State: r.State, Reason: r.Reason, By: r.By, Since: r.Since, Next: decision.Next, Wave: r.Wave,
		Unavailable: decision.Unavailable, Failures: decision.Failures, MaxFailures: decision.MaxFailures}
	if !r.State.Ended() && !t.settled() {
		s.Reason = "the controller has just started, and waits for the nodes to come back"
	}
	if back := protocol.BackID(d.ID); t.fleet.deployments[back] != nil {
		s.Back = back
	}
	return s
}

// dryStatus is that of a dry-activate: everybody was let have it at once, until it expires.
func (d *deployment) dryStatus(c census, now time.Time) protocol.RolloutStatus {
	s := protocol.RolloutStatus{State: protocol.RolloutDone, Since: d.Created, Wave: 1, MaxFailures: len(d.parts)}
	for phase, n := range c.count {
		switch {
		case phase.Ended() && !phase.Succeeded():
			s.Failures += n
		case !phase.Ended() && now.Before(d.dryUntil()):
			s.State = protocol.RolloutRunning
		}
	}
	return s
}

// settled tells whether it is known by now which nodes are there.
func (t *term) settled() bool {
	select {
	case <-t.alive.Settled():
		return true
	default:
		return false
	}
}
