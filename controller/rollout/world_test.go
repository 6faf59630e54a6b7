package rollout

import (
	"container/heap"
	"fmt"
	"math/rand/v2"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// The world of the simulation: machines that fail, vanish and come back, and what deployments did to them. It knows
// nothing of planning.

// patience is how long a released machine that is offline may take to come back by itself.
const patience = 10 * time.Minute

type machine struct {
	name    string
	tags    []string
	up      bool
	back    time.Time // when it is up again, unless it is dead
	dead    bool      // never again up; somebody removes it
	removed bool
	locked  bool
	newest  *share // of the newest deployment that names it
	refuses []int  // closures that it rolled back from
}

type end int

const (
	open end = iota
	confirmed
	failedEarly // before anything was switched
	wentBack
)

// share is one deployment's part in one machine.
type share struct {
	*machine
	wave     int
	closure  int // 0: not known
	released bool
	at       time.Time // released
	end      end
	ended    time.Time
	degraded bool
	gone     bool // removed, or a newer deployment has the machine
	excused  bool // it was seen away, in quarantine or lost, so that waves don't wait for it
}

// number is an amount of machines, as the checks understand it.
type number struct {
	n     int
	share bool
}

func (a number) amount() protocol.Amount {
	if a.share {
		return protocol.Amount(fmt.Sprintf("%d%%", a.n))
	}
	return protocol.Amount(fmt.Sprint(a.n))
}

func (a number) down(total int) int {
	if a.share {
		return total * a.n / 100
	}
	return min(a.n, total)
}

type event struct {
	at    time.Time
	order int // of those at the same time
	do    func()
}

type events []event

func (e events) Len() int { return len(e) }
func (e events) Less(i, j int) bool {
	return e[i].at.Before(e[j].at) || e[i].at.Equal(e[j].at) && e[i].order < e[j].order
}
func (e events) Swap(i, j int) { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)   { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := (*e)[len(*e)-1]
	*e = (*e)[:len(*e)-1]
	return last
}

type world struct {
	*rand.Rand
	now        time.Time
	tick       time.Duration // things happen at multiples of it only, so that many happen at once
	machines   []*machine
	queue      events
	scheduled  int
	quarantine map[int]int // closure: on how many machines
	flaky      float64     // of releases, how many fail by the machine's fault
}

// in schedules something, at the next tick at least d away.
func (w *world) in(d time.Duration, do func()) {
	at := w.now.Add(d + w.tick - 1).Truncate(w.tick)
	w.scheduled++
	heap.Push(&w.queue, event{at, w.scheduled, do})
}

// happen lets happen what is due.
func (w *world) happen() {
	for len(w.queue) > 0 && !w.queue[0].at.After(w.now) {
		heap.Pop(&w.queue).(event).do()
	}
}

func (w *world) chance(p float64) bool { return w.Float64() < p }

// between is a random time from one to another.
func (w *world) between(from, to time.Duration) time.Duration {
	return from + time.Duration(w.Int64N(int64(to-from)+1))
}

func (w *world) anyone() *machine { return w.machines[w.IntN(len(w.machines))] }

// darken takes a machine offline for a while.
func (w *world) darken(m *machine, d time.Duration) {
	m.up = false
	if back := w.now.Add(d); back.After(m.back) {
		m.back = back
	}
	w.in(d, func() { m.up = !m.dead && !m.removed && !m.back.After(w.now) })
}

func (w *world) kill(m *machine) {
	m.dead, m.up = true, false
	w.in(w.between(time.Minute, 4*time.Hour), func() { w.remove(m) })
}

func (w *world) remove(m *machine) {
	w.release(m)
	m.removed, m.up = true, false
	if m.newest != nil {
		m.newest.gone = true
	}
}

// release lets all closures out of a machine's quarantine.
func (w *world) release(m *machine) {
	for _, closure := range m.refuses {
		w.quarantine[closure]--
	}
	m.refuses = nil
}

// begin is what a machine does with what was released to it.
func (w *world) begin(s *share, bad bool) {
	s.released, s.at = true, w.now
	w.in(patience, func() {}) // somebody looks whether it is lost
	takes := w.between(time.Second, 5*time.Minute)
	fate := confirmed
	switch {
	case bad:
		fate = wentBack
	case w.chance(w.flaky / 4):
		fate = wentBack
	case w.chance(w.flaky / 2):
		fate = failedEarly
	}
	switch {
	case w.chance(w.flaky / 4):
		w.in(takes/2, func() { w.darken(s.machine, w.between(time.Minute, 2*patience)) })
	case w.chance(w.flaky / 8):
		w.in(takes/2, func() { w.kill(s.machine) })
	}
	w.in(takes, func() { w.finish(s, fate) })
}

func (w *world) finish(s *share, fate end) {
	switch {
	case s.gone || s.dead:
		return
	case !s.up: // its report arrives when it is back
		w.in(max(s.back.Sub(w.now), w.tick), func() { w.finish(s, fate) })
		return
	}
	s.end, s.ended = fate, w.now
	switch {
	case fate == wentBack && s.closure != 0:
		s.refuses = append(s.refuses, s.closure)
		w.quarantine[s.closure]++
	case fate == confirmed && w.chance(w.flaky/8):
		w.in(w.between(time.Second, 10*time.Minute), func() { w.degrade(s) })
	case fate == confirmed && w.chance(w.flaky/8):
		w.in(w.between(time.Second, 10*time.Minute), func() { w.darken(s.machine, w.between(time.Minute, time.Hour)) })
	}
}

func (w *world) degrade(s *share) {
	s.degraded = true
	if w.chance(0.5) {
		w.in(w.between(time.Minute, 10*time.Minute), func() { s.degraded = false })
	}
}

// mishap is something that befalls the fleet and has nothing to do with a deployment.
func (w *world) mishap() {
	m := w.anyone()
	switch w.IntN(10) {
	case 0, 1, 2:
		w.darken(m, w.between(time.Second, 2*time.Hour))
	case 3, 4:
		m.locked = true
		w.in(w.between(time.Minute, 2*time.Hour), func() { m.locked = false })
	case 5:
		if !m.dead {
			w.kill(m)
		}
	case 6:
		if s := m.newest; s != nil && s.end == confirmed {
			w.degrade(s)
		}
	case 7:
		for _, m := range w.machines {
			w.release(m)
		}
	case 8: // a site is cut off, in one way or the other
		if w.chance(0.2) {
			part, d := w.Float64(), w.between(time.Second, time.Hour)
			for _, m := range w.machines {
				if w.chance(part) {
					w.darken(m, d)
				}
			}
		}
	case 9:
		if !m.removed {
			w.remove(m)
		}
	}
}
