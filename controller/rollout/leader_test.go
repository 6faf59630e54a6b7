package rollout

import (
	"encoding/json"
	"reflect"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// The controllers of the simulation, one after the other, and the people who steer.

type deployment struct {
	*sim
	id     int
	plan   plan
	shares []*share
	byName map[string]*share
	bad    map[int]bool // closures that no machine keeps

	stored []byte  // the Rollout, in etcd
	known  Rollout // the same, in the memory of the leader of a term
	term   int
	wake   time.Time
	nodes  []Node // as last observed

	memory
	paused    bool // by somebody
	resumed   int  // times
	awaited   bool // somebody is about to look at what is paused
	takenBack bool
}

// memory is what the watcher remembers of decisions that were written down; those of a leader that died before are void.
type memory struct {
	forgiven int
	tripped  bool // too many had failed, and nobody resumed it
	through  bool // all waves are
}

// accept takes a deployment over: what older ones had of its machines is the new one's.
func (s *sim) accept(machines []*machine, p plan) *deployment {
	d := &deployment{sim: s, id: len(s.deployments), plan: p, byName: map[string]*share{}, bad: map[int]bool{}, term: -1}
	closures, first := s.IntN(4), 10*d.id+1
	if d.id > 0 && s.chance(0.3) {
		first -= 10 // those of the deployment before
	}
	if s.chance(0.2) && closures > 0 {
		d.bad[first] = true
	}
	var members []Member
	for _, m := range machines {
		if m.newest != nil {
			m.newest.gone = true
		}
		m.newest = &share{machine: m}
		if closures > 0 {
			m.newest.closure = first + s.IntN(closures)
		}
		d.shares = append(d.shares, m.newest)
		d.byName[m.name] = m.newest
		members = append(members, Member{Name: m.name, Tags: m.tags})
	}
	strategy := p.strategy()
	if err := strategy.Validate(); err != nil {
		d.cry("%v", err)
	}
	for i, wave := range Waves(members, strategy) {
		for _, name := range wave {
			d.byName[name].wave = i + 1
		}
	}
	d.store(New(strategy, s.now))
	if d.id > 0 {
		s.tally.saw("superseded")
	}
	s.deployments = append(s.deployments, d)
	return d
}

func (d *deployment) store(r Rollout) {
	var err error
	if d.stored, err = json.Marshal(r); err != nil {
		d.cry("%v", err)
	}
	d.known, d.term = r, d.sim.term
}

// remembered is the rollout as the leader knows it; a new one reads it.
func (d *deployment) remembered() Rollout {
	if d.term != d.sim.term {
		d.known, d.term = Rollout{}, d.sim.term
		if err := json.Unmarshal(d.stored, &d.known); err != nil {
			d.cry("%v", err)
		}
	}
	return d.known
}

// observe is a controller's look at the fleet.
func (d *deployment) observe() []Node {
	d.nodes = d.nodes[:0]
	for _, s := range d.shares {
		n := Node{Name: s.name, Wave: s.wave, Online: s.up, Locked: s.locked}
		switch {
		case s.end == failedEarly || s.end == wentBack:
			n.Status = Failed
		case s.gone && s.released:
			n.Status = Taken
		case s.gone:
			n.Status = Left
		case !s.released:
			n.Quarantined = s.refused(d.world)
		case s.end == confirmed:
			n.Status, n.Degraded = Succeeded, s.degraded
		default:
			n.Status, n.Lost = Underway, s.lost(d.world)
		}
		d.nodes = append(d.nodes, n)
	}
	return d.nodes
}

// crash lets the leader die, sometimes. The next one knows what is in etcd.
func (s *sim) crash(point string) bool {
	if !s.chance(s.crashes) {
		return false
	}
	s.tally.saw("leader lost " + point)
	s.term++
	s.leaderless = s.now.Add(s.between(s.tick, 40*time.Second+s.tick))
	s.in(s.leaderless.Sub(s.now), func() {})
	return true
}

// lead carries a deployment's decisions out, batch by batch, and asks again before each.
func (d *deployment) lead() {
	for !d.now.Before(d.leaderless) {
		before := d.remembered()
		v, nodes := d.see(), d.observe()
		next := Next(before, nodes, d.now)
		d.tally.Lock()
		d.tally.asked++
		d.tally.Unlock()
		remembered := d.memory
		d.watch(before, next, v)
		if d.chance(0.02) {
			d.askAgain(next)
		}
		if !reflect.DeepEqual(before, next.Rollout) {
			if d.crash("before it wrote") {
				d.memory = remembered
				return
			}
			d.store(next.Rollout)
			if state := next.Rollout.State; state != before.State {
				d.tally.saw(string(state))
			}
			if d.crash("before it released") {
				return
			}
		}
		d.wake = next.Next
		if len(next.Release) == 0 {
			return
		}
		v = d.see()
		for _, name := range next.Release[:min(len(next.Release), 50)] {
			s := d.byName[name]
			d.watchRelease(s, &v)
			d.begin(s, d.bad[s.closure])
		}
		d.tally.Lock()
		d.tally.released += min(len(next.Release), 50)
		d.tally.Unlock()
		if len(next.Release) > 50 {
			if d.crash("between batches") {
				return
			}
			if d.chance(0.1) { // the world doesn't wait
				d.now = d.now.Add(d.tick)
				d.happen()
			}
		}
	}
}

// askAgain checks that a decision, carried out at once, is followed by no other.
func (d *deployment) askAgain(next Decision) {
	nodes := slices.Clone(d.nodes)
	released := map[string]bool{}
	for _, name := range next.Release {
		released[name] = true
	}
	for i := range nodes {
		if released[nodes[i].Name] {
			nodes[i].Status = Underway
		}
	}
	if again := Next(next.Rollout, nodes, d.now); len(again.Release) > 0 || !reflect.DeepEqual(again.Rollout, next.Rollout) {
		d.cry("%+v is followed by %+v, releasing %v", next.Rollout, again.Rollout, again.Release)
	}
}

// attend sees to what waits for somebody: a rollout that is paused, or one that is to be taken back.
func (d *deployment) attend() {
	switch r := d.remembered(); {
	case r.State == paused && !d.awaited:
		d.awaited = true
		d.in(d.between(time.Minute, 30*time.Minute), func() {
			d.awaited = false
			if d.resumed++; d.resumed > 5 || d.chance(0.2) {
				d.steer(abort)
			} else {
				d.steer(resume)
			}
		})
	case r.State == rolledBack && !d.takenBack:
		d.takenBack = true
		var machines []*machine
		for _, s := range d.shares {
			if s.released && !s.gone && (s.end == open || s.end == confirmed) {
				machines = append(machines, s.machine)
			}
		}
		d.accept(machines, plan{unavailable: d.plan.unavailable, mayFail: number{n: 100, share: true}, policy: protocol.StopOnFailure})
	}
}

// meddle steers some rollout, whether that makes sense or not.
func (s *sim) meddle() {
	d := s.deployments[s.IntN(len(s.deployments))]
	d.steer([]protocol.Verb{pause, pause, pause, resume, abort}[s.IntN(5)])
}

func (d *deployment) steer(v protocol.Verb) {
	if d.now.Before(d.leaderless) {
		d.in(10*time.Second, func() { d.steer(v) })
		return
	}
	before, see := d.remembered(), d.see()
	r, err := Steer(before, d.observe(), v, "ann", d.now)
	if before.State.Ended() {
		if (err == nil) != (v == abort && before.State == aborted) || !reflect.DeepEqual(r, before) {
			d.cry("it had ended as %s; to %s it makes %+v, %v", before.State, v, r, err)
		}
		return
	}
	if err != nil {
		d.cry("%s: %v", v, err)
	}
	switch {
	case v == pause && before.State != paused:
		d.paused = true
		d.tally.saw("paused by somebody")
	case v == resume && before.State == paused:
		d.tally.saw("resumed")
		d.paused = false
		if d.plan.policy == protocol.PauseOnFailure {
			d.tripped = false
			if may := d.plan.mayFail.down(len(d.shares)); see.failing-min(d.forgiven, see.failing) > may {
				d.forgiven = see.failing
			}
		}
	case v == abort:
		d.tally.saw("aborted")
	}
	d.store(r)
}
