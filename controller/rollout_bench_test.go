package controller

import (
	"fmt"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

// BenchmarkRollout is what the controller does for a rollout over 1,000 nodes that end it as soon as they are told: taking it
// over, releasing, and the reports. Manifests, the broker and the nodes are not counted.
func BenchmarkRollout(b *testing.B) {
	for name, s := range map[string]protocol.Strategy{"at once": {}, "batches of 100": {Batch: "100"}, "20 at a time": {MaxUnavailable: "20"}} {
		b.Run(name, func(b *testing.B) { benchmarkRollout(b, s) })
	}
}

func benchmarkRollout(b *testing.B, s protocol.Strategy) {
	r := startRig(b)
	t := r.c.current.Load()
	const count = 1000
	node := func(i int) string { return fmt.Sprintf("n%04d", i) }
	for i := range count {
		t.fleet.putNode(protocol.NodeRecord{Name: node(i)})
		t.alive.Beat(node(i), protocol.Beat{Version: 1, Interval: 600})
	}
	var taken, released time.Duration
	serial := uint64(0)
	before := r.revision(b)
	for b.Loop() {
		serial++
		d := store.Deployment{ID: fmt.Sprintf("d%d", serial), By: "anna", Created: time.Now().UTC(), Mode: protocol.Switch, Strategy: s}
		items := make(map[string]store.Entry, count)
		for i := range count {
			items[node(i)] = store.Entry{Serial: serial, Digest: protocol.Digest([]byte(node(i))), Timeout: 60, Build: 60}
		}
		began := time.Now()
		t.changing.Lock()
		must(b, t.accept(b.Context(), d, items))
		t.changing.Unlock()
		taken += time.Since(began)
		var reports sync.WaitGroup
		slots := make(chan struct{}, nodeWorkers)
		told := map[string]bool{}
		for len(told) < count {
			for i := range count {
				if w, ok := t.fleet.wanted(node(i)); ok && w.Serial == serial && !told[node(i)] {
					told[node(i)] = true
					reports.Add(1)
					slots <- struct{}{}
					go func() {
						defer func() { <-slots; reports.Done() }()
						_, err := t.report(b.Context(), node(i), protocol.Encode(protocol.Report{Version: 1, Deployment: d.ID, Serial: serial,
							Mode: protocol.Switch, Phase: protocol.Confirmed, Ended: time.Now()}))
						must(b, err)
					}()
				}
			}
			time.Sleep(time.Millisecond)
		}
		released += time.Since(began)
		reports.Wait()
		eventually(b, "the rollout is done", func() bool {
			s, _, _ := t.summary(d.ID)
			return s.Rollout.State == protocol.RolloutDone
		})
	}
	b.ReportMetric(float64(taken.Milliseconds())/float64(b.N), "ms/taken-over")
	b.ReportMetric(float64(released.Milliseconds())/float64(b.N), "ms/all-released")
	b.ReportMetric(float64(r.revision(b)-before)/float64(b.N), "etcd-writes/op")
}
