// Package liveness knows which nodes are alive. Beats stay in memory; only what changed is written
// down, in batches, so that a quiet fleet of any size writes nothing.
package liveness

import (
	"container/heap"
	"context"
	"log/slog"
	"reflect"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

// Timing. A node is lost when its beat is later than graceFactor intervals, and not sooner than minGrace.
const (
	graceFactor = 2.5
	awaitFactor = 1.5 // of the grace, for nodes that have to find their way back
	minGrace    = 5 * time.Second
	maxInterval = time.Hour
	saveEvery   = 250 * time.Millisecond
	retryAfter  = 2 * time.Second
)

// Book is where changes are written down; store.Term is one.
type Book interface {
	Sightings(ctx context.Context) (map[string]store.Sighting, error)
	Save(ctx context.Context, changed []store.Sighting) error
	SaveLast(ctx context.Context, all []store.Sighting) error
	Renew(ctx context.Context) (lost []int, err error)
}

// Config says how to judge.
type Config struct {
	Interval time.Duration // for beats that don't say when the next one is due
	// Floor is when somebody last kept track: a node that the book has as online was seen until then.
	Floor time.Time
	// Anew says that the nodes have to find their way back, since their connections ended with the controller before.
	Anew bool
	// Changed is told when a node comes or goes, and of beats with news. It must be quick. May be nil.
	Changed func(node string, before, after State)
}

// Tracker follows the nodes of a fleet. It is safe for concurrent use.
type Tracker struct {
	cfg  Config
	book Book
	log  *slog.Logger

	mu      sync.Mutex
	nodes   map[string]*node
	due     deadlines
	changed map[string]bool
	wake    chan struct{} // the soonest deadline, or the first change, is a new one

	awaited map[string]bool // nodes that may be there although nothing was heard of them yet
	settled chan struct{}   // closed when none is awaited any more

	saving sync.Mutex // so that nothing is written of a node after Forget
}

type node struct {
	store.Sighting
	vitals   protocol.Vitals
	deadline time.Time // of the next beat; may be later than the one that the heap sorts by
	sorted   time.Time
	index    int // in the heap, -1: not there
}

// State is what is known of a node.
type State struct {
	Online bool
	Seen   time.Time
	Beat   protocol.Beat
}

// New makes a tracker that starts from what the book says. Nodes that were online get the time of one
// beat to show that they still are.
func New(ctx context.Context, cfg Config, book Book, log *slog.Logger) (*Tracker, error) {
	known, err := book.Sightings(ctx)
	if err != nil {
		return nil, err
	}
	t := &Tracker{cfg: cfg, book: book, log: log, nodes: make(map[string]*node, len(known)),
		changed: map[string]bool{}, wake: make(chan struct{}, 1), awaited: map[string]bool{}, settled: make(chan struct{})}
	now := time.Now()
	for name, s := range known {
		n := &node{Sighting: s, index: -1}
		t.nodes[name] = n
		if s.Unsure || s.Online && cfg.Anew {
			t.awaited[name] = true
		}
		if !s.Online {
			continue
		}
		if n.Seen.Before(cfg.Floor) {
			n.Seen = cfg.Floor
		}
		n.deadline = now.Add(t.grace(s.Beat.Interval))
		t.schedule(n)
	}
	t.settle()
	return t, nil
}

// Settled is closed as soon as it can be told who is there: when all that may be have beaten, or had the time for it.
// Before, a node that does not seem to be online may be on its way back from a restart of the controller.
func (t *Tracker) Settled() <-chan struct{} { return t.settled }

// settle closes settled when nobody is awaited. t.mu is held, or nobody else has t.
func (t *Tracker) settle() {
	if t.awaited != nil && len(t.awaited) == 0 {
		t.awaited = nil
		close(t.settled)
	}
}

// grace is how long after a beat a node counts as online. The interval is in seconds, and a node's own word.
func (t *Tracker) grace(interval int) time.Duration {
	d := time.Duration(interval) * time.Second
	if interval <= 0 || interval > int(maxInterval/time.Second) {
		d = t.cfg.Interval
	}
	return max(minGrace, time.Duration(graceFactor*float64(d)))
}

// Beat takes note of a heartbeat. The caller vouches for the name.
func (t *Tracker) Beat(name string, b protocol.Beat) {
	vitals := b.Vitals
	b.Vitals = protocol.Vitals{}
	now := time.Now()
	before, news := t.note(name, b, vitals, now)
	if news && t.cfg.Changed != nil {
		t.cfg.Changed(name, before, State{Online: true, Seen: now, Beat: b})
	}
}

func (t *Tracker) note(name string, b protocol.Beat, vitals protocol.Vitals, now time.Time) (before State, news bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[name]
	if n == nil {
		n = &node{Sighting: store.Sighting{Node: name}, index: -1}
		t.nodes[name] = n
	}
	if !n.Online || !reflect.DeepEqual(n.Beat, b) {
		before, news = n.state(now), true
		n.Beat = b
		t.mark(name)
	} else if !now.Before(n.deadline) {
		before, news = n.state(now), true // it was late, and State said so
	}
	if t.awaited[name] {
		delete(t.awaited, name)
		t.settle()
	}
	n.Online, n.Seen, n.vitals = true, now, vitals
	n.deadline = now.Add(t.grace(b.Interval))
	// A later deadline is found out when the earlier one comes up: a beat then costs no heap operation.
	if n.index < 0 || n.deadline.Before(n.sorted) {
		t.schedule(n)
	}
	return before, news
}

// Forget drops a node, before it is removed from the book.
func (t *Tracker) Forget(name string) {
	t.saving.Lock()
	defer t.saving.Unlock()
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[name]
	if n == nil {
		return
	}
	if n.index >= 0 {
		heap.Remove(&t.due, n.index)
	}
	delete(t.nodes, name)
	delete(t.changed, name)
	delete(t.awaited, name)
	t.settle()
}

// State tells what is known of a node; false: it was never seen.
func (t *Tracker) State(name string) (State, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	n := t.nodes[name]
	if n == nil {
		return State{}, false
	}
	s := n.state(time.Now())
	s.Beat.Vitals = n.vitals
	return s, true
}

// state is right even while the writing down is stuck. It lacks the vitals.
func (n *node) state(now time.Time) State {
	return State{Online: n.Online && now.Before(n.deadline), Seen: n.Seen, Beat: n.Beat}
}

// Quarantined are the closures that are in quarantine on some node, and on which one.
func (t *Tracker) Quarantined() map[string]string {
	t.mu.Lock()
	defer t.mu.Unlock()
	all := map[string]string{}
	for name, n := range t.nodes {
		for _, closure := range n.Beat.Quarantine[:min(len(n.Beat.Quarantine), protocol.MaxQuarantine)] {
			all[closure] = name
		}
	}
	return all
}

// mark puts a node on the list of what has to be written. t.mu is held.
func (t *Tracker) mark(name string) {
	if len(t.changed) == 0 {
		t.rouse()
	}
	t.changed[name] = true
}

func (t *Tracker) rouse() {
	select {
	case t.wake <- struct{}{}:
	default:
	}
}

// schedule sorts a node by its deadline. t.mu is held.
func (t *Tracker) schedule(n *node) {
	n.sorted = n.deadline
	if n.index < 0 {
		heap.Push(&t.due, n)
	} else {
		heap.Fix(&t.due, n.index)
	}
	if n.index == 0 {
		t.rouse()
	}
}

// expire declares lost who is due, and tells when to come back; zero: nobody is awaited.
func (t *Tracker) expire(now time.Time) time.Time {
	lost, next := t.overdue(now)
	for _, s := range lost {
		t.log.Info("lost a node", "node", s.Node, "last_seen", s.Seen)
		if t.cfg.Changed != nil {
			t.cfg.Changed(s.Node, State{Online: true, Seen: s.Seen, Beat: s.Beat}, State{Seen: s.Seen, Beat: s.Beat})
		}
	}
	return next
}

func (t *Tracker) overdue(now time.Time) (lost []store.Sighting, next time.Time) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for len(t.due) > 0 {
		n := t.due[0]
		switch {
		case n.sorted.After(now):
			return lost, n.sorted
		case n.deadline.After(now):
			n.sorted = n.deadline
			heap.Fix(&t.due, 0)
		default:
			heap.Pop(&t.due)
			n.Online = false
			t.mark(n.Node)
			lost = append(lost, n.Sighting)
		}
	}
	return lost, time.Time{}
}

// Run judges and writes until ctx is done, and then writes when everybody was last seen.
func (t *Tracker) Run(ctx context.Context) {
	renew := time.NewTicker(store.RenewEvery)
	defer renew.Stop()
	timer := time.NewTimer(0)
	defer timer.Stop()
	giveUp := time.NewTimer(time.Duration(awaitFactor * float64(t.grace(0))))
	defer giveUp.Stop()
	for {
		select {
		case <-ctx.Done():
			t.close()
			return
		case <-renew.C:
			t.renew(ctx)
		case <-t.wake:
		case <-giveUp.C:
			t.mu.Lock()
			clear(t.awaited)
			t.settle()
			t.mu.Unlock()
		case <-timer.C:
		}
		next := t.expire(time.Now())
		wait := time.Hour
		if !next.IsZero() {
			wait = time.Until(next)
		}
		if t.pending() {
			// What changes together is written together.
			pause(ctx, saveEvery)
			if !t.save(ctx) {
				pause(ctx, retryAfter)
			}
			wait = 0
		}
		timer.Reset(max(wait, 0))
	}
}

func (t *Tracker) pending() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return len(t.changed) > 0
}

func (t *Tracker) renew(ctx context.Context) {
	lost, err := t.book.Renew(ctx)
	if err != nil {
		t.log.Warn("heartbeats", "error", err)
	}
	if len(lost) == 0 {
		return
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	for name, n := range t.nodes {
		for _, l := range lost {
			if n.Online && store.LeaseOf(name) == l {
				t.mark(name)
			}
		}
	}
}

// save writes what changed. What could not be written is tried again.
func (t *Tracker) save(ctx context.Context) bool {
	t.saving.Lock()
	defer t.saving.Unlock()
	t.mu.Lock()
	batch := make([]store.Sighting, 0, len(t.changed))
	for name := range t.changed {
		batch = append(batch, t.nodes[name].Sighting)
	}
	clear(t.changed)
	t.mu.Unlock()
	if len(batch) == 0 {
		return true
	}
	err := t.book.Save(ctx, batch)
	if err == nil {
		return true
	}
	t.log.Warn("can't write the heartbeats down, trying again", "error", err)
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, s := range batch {
		if t.nodes[s.Node] != nil {
			t.mark(s.Node)
		}
	}
	return false
}

// close leaves the next controller the times that only this one knows.
func (t *Tracker) close() {
	ctx, cancel := context.WithTimeout(context.Background(), 3*time.Second)
	defer cancel()
	t.save(ctx)
	t.mu.Lock()
	var online []store.Sighting
	for _, n := range t.nodes {
		if n.Online {
			online = append(online, n.Sighting)
		}
	}
	t.mu.Unlock()
	if err := t.book.SaveLast(ctx, online); err != nil {
		t.log.Warn("can't write down when nodes were last seen", "error", err)
	}
}

func pause(ctx context.Context, d time.Duration) {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	}
}

// deadlines is a heap of nodes, the one that is due first on top.
type deadlines []*node

func (d deadlines) Len() int           { return len(d) }
func (d deadlines) Less(i, j int) bool { return d[i].sorted.Before(d[j].sorted) }
func (d deadlines) Swap(i, j int) {
	d[i], d[j] = d[j], d[i]
	d[i].index, d[j].index = i, j
}

// Push and Pop are heap.Interface's.
func (d *deadlines) Push(x any) {
	n := x.(*node)
	n.index = len(*d)
	*d = append(*d, n)
}

// Pop removes the last one.
func (d *deadlines) Pop() any {
	old := *d
	n := old[len(old)-1]
	n.index = -1
	old[len(old)-1] = nil
	*d = old[:len(old)-1]
	return n
}
