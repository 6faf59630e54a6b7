package liveness

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

// book remembers what was written. It stands for etcd where the clock has to be turned; the real one
// is in package controller's tests.
type book struct {
	mu     sync.Mutex
	known  map[string]store.Sighting
	saves  int // batches
	writes int // sightings
	fail   bool
	lost   []int
}

func (b *book) Sightings(context.Context) (map[string]store.Sighting, error) {
	return b.known, nil
}

func (b *book) Save(_ context.Context, changed []store.Sighting) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.fail {
		return errors.New("no etcd")
	}
	b.saves++
	b.writes += len(changed)
	if b.known == nil {
		b.known = map[string]store.Sighting{}
	}
	for _, s := range changed {
		b.known[s.Node] = s
	}
	return nil
}

func (b *book) SaveLast(_ context.Context, all []store.Sighting) error {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, s := range all {
		b.known[s.Node] = s
	}
	return nil
}

func (b *book) Renew(context.Context) ([]int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	lost := b.lost
	b.lost = nil
	return lost, nil
}

func (b *book) counts() (saves, writes int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.saves, b.writes
}

func (b *book) online(node string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.known[node].Online
}

func track(t testing.TB, b Book, cfg Config) (*Tracker, func()) {
	t.Helper()
	if cfg.Interval == 0 {
		cfg.Interval = 10 * time.Second
	}
	tr, err := New(context.Background(), cfg, b, slog.New(slog.NewTextHandler(io.Discard, nil)))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { tr.Run(ctx); close(done) }()
	return tr, func() { cancel(); <-done }
}

func isOnline(tr *Tracker, node string) bool {
	s, _ := tr.State(node)
	return s.Online
}

func TestLostAndBack(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &book{}
		tr, stop := track(t, b, Config{})
		defer stop()
		tr.Beat("slow", protocol.Beat{Interval: 10})
		tr.Beat("fast", protocol.Beat{Interval: 1})
		tr.Beat("silent", protocol.Beat{}) // says no interval
		tr.Beat("liar", protocol.Beat{Interval: -4})
		time.Sleep(4900 * time.Millisecond)
		if !isOnline(tr, "fast") {
			t.Error("lost before the least grace")
		}
		time.Sleep(time.Second)
		if isOnline(tr, "fast") || b.online("fast") {
			t.Error("fast is not lost after 5 s")
		}
		time.Sleep(18 * time.Second) // 23.9 s
		for _, n := range []string{"slow", "silent", "liar"} {
			if !isOnline(tr, n) {
				t.Errorf("%s is lost before 2.5 intervals", n)
			}
		}
		seen := time.Now()
		tr.Beat("slow", protocol.Beat{Interval: 10})
		time.Sleep(2 * time.Second)
		if isOnline(tr, "silent") || isOnline(tr, "liar") || !isOnline(tr, "slow") || b.online("silent") {
			t.Error("after 2.5 intervals")
		}
		time.Sleep(25 * time.Second)
		if s, _ := tr.State("slow"); s.Online || !s.Seen.Equal(seen) {
			t.Errorf("%+v", s)
		}
		tr.Beat("slow", protocol.Beat{Interval: 10})
		time.Sleep(time.Second)
		if !isOnline(tr, "slow") || !b.online("slow") {
			t.Error("slow is not back")
		}
	})
}

func TestWritesOnlyChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &book{}
		tr, stop := track(t, b, Config{})
		defer stop()
		const nodes = 1000
		beats := func(change string) {
			for i := range nodes {
				tr.Beat(fmt.Sprintf("n%d", i), protocol.Beat{Interval: 10, FailedUnits: []string{"a"}, Reason: change,
					Vitals: protocol.Vitals{Uptime: time.Now().Unix()}})
			}
			time.Sleep(10 * time.Second)
		}
		beats("")
		saves, writes := b.counts()
		if writes != nodes || saves > 2 {
			t.Fatalf("%d writes in %d batches", writes, saves)
		}
		for range 100 {
			beats("")
		}
		if _, w := b.counts(); w != nodes {
			t.Fatalf("a quiet fleet caused %d writes", w-nodes)
		}
		beats("changed")
		if _, w := b.counts(); w != 2*nodes {
			t.Fatalf("%d writes after all changed", w)
		}
		b.mu.Lock()
		b.lost = []int{store.LeaseOf("n5")}
		b.mu.Unlock()
		beats("changed")
		beats("changed")
		beats("changed")
		if _, w := b.counts(); w <= 2*nodes || w >= 3*nodes {
			t.Fatalf("%d writes after a lease was lost", w)
		}
		time.Sleep(time.Minute)
		s2, _ := b.counts()
		if b.online("n5") || s2 > saves+10 {
			t.Fatalf("all lost at once: %d batches", s2)
		}
	})
}

func TestStartsFromTheBook(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		b := &book{known: map[string]store.Sighting{
			"quiet": {Node: "quiet", Online: true, Seen: now.Add(-30 * 24 * time.Hour), Beat: protocol.Beat{Interval: 10}},
			"back":  {Node: "back", Online: true, Seen: now.Add(-time.Minute), Beat: protocol.Beat{Interval: 10}},
			"gone":  {Node: "gone", Seen: now.Add(-time.Hour), Beat: protocol.Beat{Kernel: "6.1"}},
		}}
		tr, stop := track(t, b, Config{Floor: now.Add(-5 * time.Second)})
		if s, ok := tr.State("gone"); !ok || s.Online || s.Beat.Kernel != "6.1" || !s.Seen.Equal(now.Add(-time.Hour)) {
			t.Errorf("%+v", s)
		}
		tr.Beat("back", protocol.Beat{Interval: 10})
		time.Sleep(26 * time.Second)
		// A crash must not make a node that was there until then look lost for a month.
		if s, _ := tr.State("quiet"); s.Online || !s.Seen.Equal(now.Add(-5*time.Second)) {
			t.Errorf("%+v", s)
		}
		tr.Beat("back", protocol.Beat{Interval: 10})
		last := time.Now()
		time.Sleep(time.Second)
		stop()
		if s := b.known["back"]; !s.Seen.Equal(last) {
			t.Errorf("a clean stop left %v, want %v", s.Seen, last)
		}
	})
}

func TestKeepsTryingToWrite(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		b := &book{fail: true}
		tr, stop := track(t, b, Config{})
		defer stop()
		tr.Beat("n1", protocol.Beat{Interval: 60})
		tr.Beat("n2", protocol.Beat{Interval: 60})
		time.Sleep(10 * time.Second)
		tr.Forget("n2")
		b.mu.Lock()
		b.fail = false
		b.mu.Unlock()
		time.Sleep(5 * time.Second)
		if !b.online("n1") || b.online("n2") {
			t.Errorf("%+v", b.known)
		}
	})
}

// BenchmarkBeats is 10,000 quiet nodes that beat.
func BenchmarkBeats(b *testing.B) {
	tr, stop := track(b, &book{}, Config{})
	defer stop()
	names := make([]string, 10_000)
	for i := range names {
		names[i] = fmt.Sprintf("n%05d", i)
	}
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		tr.Beat(names[i%len(names)], protocol.Beat{Interval: 10, Kernel: "6.18", FailedUnits: []string{"a.service"}})
	}
}

// Changed is told of what comes, goes or has news, and of nothing else.
func TestChanges(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var mu sync.Mutex
		var told []string
		tr, stop := track(t, &book{}, Config{Changed: func(node string, before, after State) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, fmt.Sprintf("%s %v/%s %v/%s", node, before.Online, before.Beat.Phase, after.Online, after.Beat.Phase))
		}})
		defer stop()
		want := func(what ...string) {
			t.Helper()
			synctest.Wait()
			mu.Lock()
			defer mu.Unlock()
			if !slices.Equal(told, what) {
				t.Errorf("told %q, want %q", told, what)
			}
			told = nil
		}
		tr.Beat("n1", protocol.Beat{Interval: 10})
		want("n1 false/ true/")
		time.Sleep(time.Second)
		tr.Beat("n1", protocol.Beat{Interval: 10, Vitals: protocol.Vitals{Uptime: 7}})
		want()
		tr.Beat("n1", protocol.Beat{Interval: 10, Phase: protocol.Building})
		want("n1 true/ true/building")
		time.Sleep(26 * time.Second)
		want("n1 true/building false/building")
		tr.Beat("n1", protocol.Beat{Interval: 10, Phase: protocol.Building})
		want("n1 false/building true/building")
	})
}

// Who is there is known when all that may be have beaten, or had the time to come back.
func TestSettled(t *testing.T) {
	for name, c := range map[string]struct {
		known map[string]store.Sighting
		anew  bool
		beats []string
		want  time.Duration
	}{
		"nobody is known":           {want: 0},
		"kept track of":             {known: map[string]store.Sighting{"on": {Node: "on", Online: true}, "off": {Node: "off"}}, want: 0},
		"they come back":            {known: map[string]store.Sighting{"on": {Node: "on", Online: true}, "off": {Node: "off"}}, anew: true, beats: []string{"on"}, want: time.Second},
		"one does not":              {known: map[string]store.Sighting{"on": {Node: "on", Online: true}, "two": {Node: "two", Online: true}}, anew: true, beats: []string{"on"}, want: 37500 * time.Millisecond},
		"nobody kept track":         {known: map[string]store.Sighting{"x": {Node: "x", Unsure: true}}, want: 37500 * time.Millisecond},
		"nobody did, and it beats":  {known: map[string]store.Sighting{"x": {Node: "x", Unsure: true}}, beats: []string{"x"}, want: time.Second},
		"nobody did, and it is out": {known: map[string]store.Sighting{"x": {Node: "x", Unsure: true}}, beats: []string{""}, want: time.Second},
	} {
		synctest.Test(t, func(t *testing.T) {
			began := time.Now()
			tr, stop := track(t, &book{known: c.known}, Config{Anew: c.anew})
			defer stop()
			go func() {
				time.Sleep(time.Second)
				for _, n := range c.beats {
					if n == "" {
						tr.Forget("x")
					} else {
						tr.Beat(n, protocol.Beat{Interval: 10})
					}
				}
			}()
			<-tr.Settled()
			if took := time.Since(began); took != c.want {
				t.Errorf("%s: settled after %s, want %s", name, took, c.want)
			}
			time.Sleep(2 * time.Second)
		})
	}
}

func TestQuarantined(t *testing.T) {
	tr, stop := track(t, &book{}, Config{})
	defer stop()
	tr.Beat("n1", protocol.Beat{Interval: 10, Quarantine: []string{"a", "b"}})
	tr.Beat("n2", protocol.Beat{Interval: 10, Quarantine: slices.Repeat([]string{"c"}, protocol.MaxQuarantine+1)})
	tr.Beat("n3", protocol.Beat{Interval: 10, Quarantine: append(slices.Repeat([]string{"d"}, protocol.MaxQuarantine), "too many")})
	if q := tr.Quarantined(); len(q) != 4 || q["a"] != "n1" || q["c"] != "n2" || q["d"] != "n3" {
		t.Errorf("%v", q)
	}
	tr.Forget("n1")
	if q := tr.Quarantined(); len(q) != 2 {
		t.Errorf("after n1 went: %v", q)
	}
}
