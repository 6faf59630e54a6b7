package rollout

import (
	"fmt"
	"math/rand/v2"
	"reflect"
	"slices"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// anyRollout is one in some state or other, of nodes that look like anything: also what no rollout comes to.
func anyRollout(rng *rand.Rand) (Rollout, []Node) {
	amounts := []protocol.Amount{"", "0", "1", "2", "5", "10%", "50%", "100%"}
	s := protocol.Strategy{
		MaxUnavailable: amounts[rng.IntN(len(amounts))],
		MaxFailures:    amounts[rng.IntN(len(amounts))],
		OnFailure:      []protocol.OnFailure{"", "stop", "pause", "rollback"}[rng.IntN(4)],
		Soak:           rng.IntN(2) * 60,
	}
	if rng.IntN(4) == 0 {
		s.At = start.Add(time.Duration(rng.IntN(120)-60) * time.Minute)
	}
	if rng.IntN(4) == 0 {
		s.Windows = []protocol.Window{{From: rng.IntN(1440), To: rng.IntN(1440)}}
	}
	r := New(s, start)
	r.State = []protocol.RolloutState{scheduled, running, running, running, trailing, paused, stopped, aborted, rolledBack, done}[rng.IntN(10)]
	r.Forgiven = rng.IntN(3)

	var names []string
	for name := range looks {
		names = append(names, name)
	}
	slices.Sort(names) // a seed makes the same nodes each time
	waves := 1 + rng.IntN(4)
	if r.Wave = rng.IntN(waves + 1); r.Wave > 0 && rng.IntN(2) == 0 {
		r.Settled = start.Add(-time.Duration(rng.IntN(120)) * time.Second)
	}
	var nodes []Node
	for i := range rng.IntN(12) {
		n := looks[names[rng.IntN(len(names))]]
		if rng.IntN(2) == 0 {
			n = looks["held"]
		}
		n.Name, n.Wave = fmt.Sprint("n", i), 1+rng.IntN(waves)
		nodes = append(nodes, n)
	}
	return r, nodes
}

// What Next decides is enough: carried out, wholly or in part, it decides just the rest.
func TestNextDecidesNothingMore(t *testing.T) {
	rng, seed := random(t)
	for i := range 50_000 {
		r, nodes := anyRollout(rng)
		given := slices.Clone(nodes)
		d := Next(r, nodes, start)
		if !reflect.DeepEqual(nodes, given) {
			t.Fatalf("seed %d, case %d: the nodes were changed", seed, i)
		}
		if same := Next(r, nodes, start); !reflect.DeepEqual(same, d) {
			t.Fatalf("seed %d, case %d: it is no function of its arguments: %+v, then %+v", seed, i, d, same)
		}
		for carried := range len(d.Release) + 1 {
			if carried > 0 {
				n := &nodes[slices.IndexFunc(nodes, func(n Node) bool { return n.Name == d.Release[carried-1] })]
				n.Status = Underway
			}
			again := Next(d.Rollout, nodes, start)
			if !reflect.DeepEqual(again.Rollout, d.Rollout) || !slices.Equal(again.Release, d.Release[carried:]) || !again.Next.Equal(d.Next) {
				t.Fatalf("seed %d, case %d: %+v of %v\ndecides %+v,\nand with %d carried out %+v", seed, i, r, given, d, carried, again)
			}
			if again.Failures != d.Failures || again.Unavailable != d.Unavailable+carried {
				t.Fatalf("seed %d, case %d: %d failures and %d unavailable, with %d carried out %d and %d", seed, i,
					d.Failures, d.Unavailable, carried, again.Failures, again.Unavailable)
			}
		}
	}
}

// BenchmarkNext asks about 10,000 nodes in the middle of a rollout: every node of the first half ended, some are passed over.
func BenchmarkNext(b *testing.B) {
	nodes := make([]Node, 10_000)
	for i := range nodes {
		look := "held"
		switch {
		case i%20 == 0:
			look = "off"
		case i < len(nodes)/2:
			look = "ok"
		}
		nodes[i] = looks[look]
		nodes[i].Name, nodes[i].Wave = fmt.Sprintf("node%05d", i), 1+i/100
	}
	r := New(protocol.Strategy{MaxUnavailable: "1%", MaxFailures: "1%"}, start)
	r.State, r.Wave = running, 50
	b.ReportAllocs()
	for b.Loop() {
		if d := Next(r, nodes, start); len(d.Release) != 95 {
			b.Fatalf("%d released", len(d.Release))
		}
	}
}
