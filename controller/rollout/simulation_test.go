package rollout

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"runtime"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// plan is a strategy as the watcher understands it.
type plan struct {
	canary, batch, unavailable, mayFail number
	policy                              protocol.OnFailure
	soak                                time.Duration
	at                                  time.Time
	window                              bool
	from, to                            int // minutes of the day
	order                               []string
}

func (p *plan) strategy() protocol.Strategy {
	s := protocol.Strategy{
		Canary: p.canary.amount(), Batch: p.batch.amount(), MaxUnavailable: p.unavailable.amount(), MaxFailures: p.mayFail.amount(),
		OnFailure: p.policy, Soak: int(p.soak / time.Second), At: p.at, Order: p.order,
	}
	if p.window {
		s.Windows = []protocol.Window{{From: p.from, To: p.to}}
	}
	return s
}

type sim struct {
	*world
	deployments []*deployment
	term        int       // of the leader
	leaderless  time.Time // until
	crashes     float64   // chance that a leader dies, at each point where that matters
	tally       *tally
}

// tally counts what happened, so that a simulation in which nothing does is no proof.
type tally struct {
	sync.Mutex
	fleets, machines, asked, released, leaders int
	seen                                       map[string]int
}

func (c *tally) saw(what string) {
	c.Lock()
	c.seen[what]++
	c.Unlock()
}

// random is a source of chance whose seed is printed, and can be given.
func random(t *testing.T) (*rand.Rand, uint64) {
	seed := rand.Uint64()
	if given := os.Getenv("ROLLOUT_SEED"); given != "" {
		var err error
		if seed, err = strconv.ParseUint(given, 10, 64); err != nil {
			t.Fatalf("ROLLOUT_SEED: %v", err)
		}
	}
	t.Logf("ROLLOUT_SEED=%d repeats it", seed)
	return rand.New(rand.NewPCG(seed, 0)), seed
}

// TestSimulation carries out rollouts over random fleets, in which everything goes wrong that can. ROLLOUT_SEED and
// ROLLOUT_FLEET, as printed, repeat one of them.
func TestSimulation(t *testing.T) {
	_, seed := random(t)
	fleets, only := 1000, os.Getenv("ROLLOUT_FLEET")
	if short := testing.Short(); only == "" && (short || raceDetector) {
		fleets = 100
		t.Logf("%d fleets instead of 1000: short %t, race detector %t", fleets, short, raceDetector)
	}
	next := make(chan int)
	count := &tally{seen: map[string]int{}}
	var workers sync.WaitGroup
	for range runtime.GOMAXPROCS(0) {
		workers.Go(func() {
			for fleet := range next {
				if err := simulate(seed, fleet, count); err != nil && !t.Failed() {
					t.Errorf("ROLLOUT_SEED=%d ROLLOUT_FLEET=%d: %v", seed, fleet, err)
				}
			}
		})
	}
	for fleet := range fleets {
		if !t.Failed() && (only == "" || only == strconv.Itoa(fleet)) {
			next <- fleet
		}
	}
	close(next)
	workers.Wait()
	t.Logf("%d fleets of %d machines: asked %d times, %d releases, %d leaders; %v",
		count.fleets, count.machines, count.asked, count.released, count.leaders, count.seen)
	if fleets < 1000 || only != "" || t.Failed() {
		return // what is rare may not have happened
	}
	for _, what := range []string{"done", "stopped", "aborted", "rolled-back", "trailing", "paused by somebody", "paused by failures",
		"resumed", "superseded", "leader lost before it wrote", "leader lost before it released", "leader lost between batches"} {
		if count.seen[what] == 0 {
			t.Errorf("%q never happened: the simulation proves nothing about it", what)
		}
	}
}

// simulate runs one fleet until all its rollouts have ended, or a rule is broken.
func simulate(seed uint64, fleet int, count *tally) (err error) {
	defer func() {
		if v := recover(); v != nil {
			cry, ok := v.(violation)
			if !ok {
				panic(v)
			}
			err = fmt.Errorf("%s", cry)
		}
	}()
	rng := rand.New(rand.NewPCG(seed, uint64(fleet)))
	size := int(math.Pow(10, 4*math.Pow(rng.Float64(), 3))) // most are small, some have thousands
	if fleet%250 == 0 {
		size = 10_000
	}
	w := &world{Rand: rng, now: start, tick: time.Second, quarantine: map[int]int{}, flaky: math.Pow(rng.Float64(), 4)}
	if size > 100 {
		w.tick = time.Minute
	}
	for i := range size {
		m := &machine{name: fmt.Sprintf("m%05d", i), up: true}
		for _, tag := range []string{"a", "b", "c"} {
			if rng.IntN(4) == 0 {
				m.tags = append(m.tags, tag)
			}
		}
		w.machines = append(w.machines, m)
	}
	s := &sim{world: w, tally: count, crashes: 0.1 * math.Pow(rng.Float64(), 2)}
	if rng.IntN(2) == 0 {
		for range rng.IntN(size + 1) {
			w.darken(w.anyone(), w.between(time.Minute, 4*time.Hour))
		}
	}
	for range rng.IntN(10 + size/20) {
		w.in(w.between(0, 2*time.Hour), w.mishap)
	}
	s.accept(w.machines, s.anyPlan(size))
	for range rng.IntN(3) {
		w.in(w.between(0, time.Hour), func() { s.accept(s.anySubset(), s.anyPlan(size)) })
	}
	for range rng.IntN(6) {
		w.in(w.between(0, 2*time.Hour), s.meddle)
	}
	s.run()
	count.Lock()
	defer count.Unlock()
	count.fleets++
	count.machines += size
	count.leaders += s.term + 1
	return nil
}

func (s *sim) anySubset() []*machine {
	part := s.Float64()
	var some []*machine
	for _, m := range s.machines {
		if s.chance(part) && !m.removed && !m.locked {
			some = append(some, m)
		}
	}
	return some
}

// anyPlan is a random one that does not take a big fleet through thousands of steps.
func (s *sim) anyPlan(size int) plan {
	amount := func(least int) number {
		switch s.IntN(4) {
		case 0:
			return number{n: least + s.IntN(size)}
		case 1:
			return number{n: 3 + s.IntN(98), share: true}
		case 2:
			return number{n: least + s.IntN(1+size/10)}
		}
		return number{}
	}
	p := plan{
		canary: amount(0), batch: amount(1 + size/40), unavailable: amount(1 + size/40), mayFail: amount(0),
		policy: []protocol.OnFailure{protocol.StopOnFailure, protocol.PauseOnFailure, protocol.RollbackOnFailure}[s.IntN(3)],
	}
	if s.chance(0.5) {
		p.soak = s.between(0, 10*time.Minute).Truncate(time.Second)
	}
	if s.chance(0.2) {
		p.at = s.now.Add(s.between(0, 6*time.Hour))
	}
	if s.chance(0.2) {
		p.window, p.from = true, s.IntN(1440)
		p.to = (p.from + 5 + s.IntN(600)) % 1440
	}
	if s.chance(0.3) {
		p.order = []string{"b", "a"}
	}
	return p
}

// run goes from one thing that happens to the next, until nothing does.
func (s *sim) run() {
	for steps := 0; ; steps++ {
		var live *deployment
		for i := 0; i < len(s.deployments); i++ { // they may grow more
			d := s.deployments[i]
			if !d.remembered().State.Ended() || s.chance(0.01) {
				d.lead()
			}
			d.attend()
			if !d.remembered().State.Ended() {
				live = d
			}
		}
		if steps == 100_000 && live != nil {
			live.cry("it does not end")
		}
		at, more := s.upcoming()
		if !more {
			if live != nil {
				live.cry("it stands still: %+v", live.remembered())
			}
			break
		}
		s.now = at
		s.happen()
	}
	for _, d := range s.deployments {
		d.lead()
		for _, share := range d.shares {
			if share.released && share.end == open && !share.gone {
				d.cry("%s is on its way for ever", share.name)
			}
		}
	}
}

// upcoming is when something happens next, in the world or by a rollout's own wish.
func (s *sim) upcoming() (at time.Time, more bool) {
	if len(s.queue) > 0 {
		at, more = s.queue[0].at, true
	}
	for _, d := range s.deployments {
		if d.wake.After(s.now) && (!more || d.wake.Before(at)) {
			at, more = d.wake, true
		}
	}
	return at, more
}
