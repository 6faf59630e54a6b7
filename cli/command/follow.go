package command

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// hold is how long entries wait for earlier ones of other nodes: longer than an agent gathers them, and than they
// travel.
const hold = 500 * time.Millisecond

// merger puts what comes from several nodes in order of time.
type merger struct {
	hold    time.Duration
	pending []arrived
}

type arrived struct {
	node  string
	entry protocol.JournalEntry
	at    time.Time // when it came
}

func (m *merger) add(node string, entries []protocol.JournalEntry, now time.Time) {
	for _, e := range entries {
		m.pending = append(m.pending, arrived{node, e, now})
	}
}

// due takes out what has waited long enough, and all that is older than that by the nodes' clocks.
func (m *merger) due(now time.Time) []arrived {
	var newest time.Time
	waited := false
	for _, a := range m.pending {
		if now.Sub(a.at) >= m.hold {
			waited = true
			if a.entry.Time.After(newest) {
				newest = a.entry.Time
			}
		}
	}
	if !waited {
		return nil
	}
	slices.SortStableFunc(m.pending, func(a, b arrived) int { return a.entry.Time.Compare(b.entry.Time) })
	n := 0
	for n < len(m.pending) && !m.pending[n].entry.Time.After(newest) {
		n++
	}
	ready := slices.Clone(m.pending[:n])
	m.pending = slices.Delete(m.pending, 0, n)
	return ready
}

// news is what a node said.
type news struct {
	node string
	part protocol.JournalPart
	lost int // parts that did not arrive
}

func (a *app) followLogs(ctx context.Context, selectors []string, o logsOptions) error {
	q, err := a.question(ctx, selectors, o.asking)
	if err != nil {
		return err
	}
	defer q.session.Close()
	q.o.concurrency = 0 // all are followed at the same time, or the last would never be
	q.missed = func(node string, err error) { fmt.Fprintf(q.Stderr, "%s: %s\n", node, message(err)) }
	m := &merger{hold: hold}
	if len(q.nodes) == 1 {
		m.hold = 0
	}
	heard := make(chan news)
	shown := make(chan struct{})
	go func() {
		defer close(shown)
		q.showMerged(m, heard)
	}()
	parts := map[string]int{}
	err = put(ctx, q, protocol.FollowJournal, o.query, func(node string, number int, part protocol.JournalPart) {
		lost := max(0, number-parts[node]-1)
		parts[node] = number
		heard <- news{node, part, lost}
	})
	close(heard)
	<-shown
	return err
}

// showMerged shows what comes until nothing more does.
func (q *question) showMerged(m *merger, heard <-chan news) {
	tick := time.NewTicker(hold / 5)
	defer tick.Stop()
	show := func(ready []arrived) {
		for i := range ready {
			q.showEntry(ready[i].node, &ready[i].entry)
		}
	}
	for {
		select {
		case n, more := <-heard:
			if !more {
				m.hold = 0
				show(m.due(time.Now()))
				return
			}
			m.add(n.node, n.part.Entries, time.Now())
			if n.part.Dropped > 0 {
				fmt.Fprintf(q.Stderr, "%s: %d entries are missing here: they came faster than they could be sent\n", n.node, n.part.Dropped)
			}
			if n.lost > 0 {
				fmt.Fprintf(q.Stderr, "%s: entries are missing here: %s of the answer did not arrive\n", n.node, plural(n.lost, "part"))
			}
			if m.hold == 0 {
				show(m.due(time.Now()))
			}
		case <-tick.C:
			show(m.due(time.Now()))
		}
	}
}
