package rollout

import (
	"reflect"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// looks are what a node may look like to the controller.
var looks = map[string]Node{
	"held":     {Status: Held, Online: true},
	"off":      {Status: Held},
	"locked":   {Status: Held, Online: true, Locked: true},
	"sick":     {Status: Held, Online: true, Quarantined: true},
	"sickoff":  {Status: Held, Quarantined: true},
	"way":      {Status: Underway, Online: true},
	"waylock":  {Status: Underway, Online: true, Locked: true},
	"dark":     {Status: Underway}, // offline, but not for long
	"lost":     {Status: Underway, Lost: true},
	"ok":       {Status: Succeeded, Online: true},
	"oklost":   {Status: Succeeded},
	"degraded": {Status: Succeeded, Online: true, Degraded: true},
	"failed":   {Status: Failed, Online: true},
	"left":     {Status: Left, Online: true},
	"taken":    {Status: Taken, Online: true},
}

// fleet makes nodes n1, n2 and so on of "wave:look" words; a word may be repeated, "wave:look*3".
func fleet(words string) []Node {
	var nodes []Node
	for _, word := range strings.Fields(words) {
		wave, look, _ := strings.Cut(word, ":")
		look, times, repeated := strings.Cut(look, "*")
		count := 1
		if repeated {
			count, _ = strconv.Atoi(times)
		}
		n, ok := looks[look]
		if !ok {
			panic(look)
		}
		n.Wave, _ = strconv.Atoi(wave)
		for range count {
			n.Name = "n" + strconv.Itoa(len(nodes)+1)
			nodes = append(nodes, n)
		}
	}
	return nodes
}

// start is a Monday, at noon.
var start = time.Date(2024, 7, 1, 12, 0, 0, 0, time.UTC)

// play is a rollout from step to step, its decisions carried out as the controller would.
type play struct {
	*testing.T
	r     Rollout
	nodes []Node
	now   time.Time
	last  Decision
}

func begin(t *testing.T, s protocol.Strategy, words string) *play {
	if err := s.Validate(); err != nil {
		t.Fatal(err)
	}
	return &play{T: t, r: New(s, start), nodes: fleet(words), now: start}
}

// look gives nodes another look, in "name:look" words.
func (p *play) look(words string) *play {
	p.Helper()
	for _, word := range strings.Fields(words) {
		name, look, _ := strings.Cut(word, ":")
		i, _ := strconv.Atoi(name[1:])
		n, ok := looks[look]
		if !ok {
			p.Fatalf("no look %q", look)
		}
		n.Name, n.Wave = p.nodes[i-1].Name, p.nodes[i-1].Wave
		p.nodes[i-1] = n
	}
	return p
}

func (p *play) after(d time.Duration) *play {
	p.now = p.now.Add(d)
	return p
}

// next asks what is next, wants it to be a state and nodes, carries it out, and asks again, which must change nothing.
func (p *play) next(state protocol.RolloutState, release string) *play {
	p.Helper()
	d := Next(p.r, p.nodes, p.now)
	if d.Rollout.State != state || strings.Join(d.Release, " ") != release {
		p.Fatalf("%s (%s), wave %d, releasing %v; want %s, %q", d.Rollout.State, d.Rollout.Reason, d.Rollout.Wave, d.Release, state, release)
	}
	p.r, p.last = d.Rollout, d
	for _, name := range d.Release {
		p.look(name + ":way")
	}
	again := Next(p.r, p.nodes, p.now)
	if len(again.Release) > 0 || !reflect.DeepEqual(again.Rollout, d.Rollout) {
		p.Fatalf("asked again, it is %+v, releasing %v; it was %+v", again.Rollout, again.Release, d.Rollout)
	}
	return p
}

func (p *play) steer(v protocol.Verb, state protocol.RolloutState) *play {
	p.Helper()
	r, err := Steer(p.r, p.nodes, v, "ann", p.now)
	if err != nil {
		p.Fatalf("%s: %v", v, err)
	}
	if r.State != state {
		p.Fatalf("%s makes it %s, want %s", v, r.State, state)
	}
	p.r = r
	return p
}

// counts checks who counts as failed, of how many that may, and who is unavailable.
func (p *play) counts(failures, may, unavailable int) *play {
	p.Helper()
	if d := p.last; d.Failures != failures || d.MaxFailures != may || d.Unavailable != unavailable {
		p.Fatalf("%d failures of %d, %d unavailable; want %d of %d, %d", d.Failures, d.MaxFailures, d.Unavailable, failures, may, unavailable)
	}
	return p
}

// asksAt checks when it wants to be asked again, from now; 0 is not at all.
func (p *play) asksAt(d time.Duration) *play {
	p.Helper()
	var want time.Time
	if d > 0 {
		want = p.now.Add(d)
	}
	if !p.last.Next.Equal(want) {
		p.Fatalf("wants to be asked again at %v, want %v", p.last.Next, want)
	}
	return p
}

func (p *play) reason(part string) *play {
	p.Helper()
	if !strings.Contains(p.r.Reason, part) {
		p.Fatalf("reason %q does not say %q", p.r.Reason, part)
	}
	return p
}

const (
	scheduled  = protocol.RolloutScheduled
	running    = protocol.RolloutRunning
	trailing   = protocol.RolloutTrailing
	paused     = protocol.RolloutPaused
	stopped    = protocol.RolloutStopped
	aborted    = protocol.RolloutAborted
	rolledBack = protocol.RolloutRolledBack
	done       = protocol.RolloutDone
)

func TestWaveAfterWave(t *testing.T) {
	p := begin(t, protocol.Strategy{}, "1:held 2:held*2 3:held")
	p.next(running, "n1").counts(0, 0, 0).asksAt(0)
	p.next(running, "").counts(0, 0, 1)
	p.look("n1:ok").next(running, "n2 n3")
	p.look("n2:ok").next(running, "")
	p.look("n3:ok").next(running, "n4")
	p.look("n4:ok").next(done, "").reason("4 of 4")
	if !p.r.Since.Equal(start) || p.r.Wave != 3 {
		t.Errorf("ended as %+v", p.r)
	}
}

func TestZeroStrategy(t *testing.T) {
	begin(t, protocol.Strategy{}, "1:held*3").next(running, "n1 n2 n3").look("n1:ok n2:ok n3:ok").next(done, "")

	t.Run("the first failure stops it, for nodes that were offline", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:held*2 1:off").next(running, "n1 n2")
		p.look("n1:failed").next(stopped, "").reason("1 failed (n1), 0 may").counts(1, 0, 1)
		p.look("n3:held n2:ok").next(stopped, "")
	})
	t.Run("offline nodes get it later", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:held 1:off*2").next(running, "n1")
		p.look("n1:ok").next(trailing, "").asksAt(0)
		p.look("n2:held").next(trailing, "n2").look("n2:ok").next(trailing, "")
		p.look("n3:left").next(done, "").reason("2 of 3")
	})
}

func TestFailureBudget(t *testing.T) {
	for _, c := range []struct {
		name   string
		s      protocol.Strategy
		fleet  string // of three waves, the first of which was released
		state  protocol.RolloutState
		count  int
		reason string
	}{
		{"within the budget", protocol.Strategy{MaxFailures: "1"}, "1:failed 1:ok 2:held", running, 1, ""},
		{"over it", protocol.Strategy{MaxFailures: "1"}, "1:failed*2 2:held", stopped, 2, "2 failed (n1, n2), 1 may"},
		{"a long list of names is cut", protocol.Strategy{}, "1:failed*5 2:held", stopped, 5, "5 failed (n1, n2, n3 and 2 more), 0 may"},
		{"while others are on their way", protocol.Strategy{}, "1:failed 1:way 2:held", stopped, 1, "n1"},
		{"a share is rounded down", protocol.Strategy{MaxFailures: "30%"}, "1:failed*2 1:ok*4 2:held*3", running, 2, ""},
		{"and what is above it is too many", protocol.Strategy{MaxFailures: "30%"}, "1:failed*3 1:ok*3 2:held*3", stopped, 3, "3 failed"},
		{"all may fail", protocol.Strategy{MaxFailures: "100%"}, "1:failed*3 2:held", running, 3, ""},
		{"lost on its way", protocol.Strategy{}, "1:lost 2:held", stopped, 1, "n1"},
		{"offline, but not for long", protocol.Strategy{}, "1:dark 2:held", running, 0, ""},
		{"confirmed and lost", protocol.Strategy{}, "1:oklost 1:way 2:held", stopped, 1, "n1"},
		{"confirmed and degraded", protocol.Strategy{}, "1:degraded 1:way 2:held", stopped, 1, "n1"},
		{"in quarantine, of a later wave", protocol.Strategy{}, "1:way 3:sick", stopped, 1, "n2"},
		{"in quarantine, and offline", protocol.Strategy{}, "1:way 2:sickoff", stopped, 1, "n2"},
		{"passed over", protocol.Strategy{}, "1:way 1:off 1:locked 1:left 1:taken 2:held", running, 0, ""},
		{"rollback", protocol.Strategy{OnFailure: "rollback"}, "1:failed 1:ok 2:held", rolledBack, 1, "1 failed"},
		{"rollback of all, with nothing left to release", protocol.Strategy{OnFailure: "rollback"}, "1:failed 1:ok", rolledBack, 1, "1 failed"},
		{"pause", protocol.Strategy{OnFailure: "pause"}, "1:failed 1:ok 2:held", paused, 1, "1 failed"},
		{"pause, for nodes that may come back", protocol.Strategy{OnFailure: "pause"}, "1:failed 1:ok 2:off", paused, 1, "1 failed"},
		{"pause, for a quarantine that may be lifted", protocol.Strategy{OnFailure: "pause"}, "1:failed 1:ok 2:sick", paused, 2, "2 failed"},
		{"pause, with nothing left to release", protocol.Strategy{OnFailure: "pause"}, "1:failed 1:ok 1:way", running, 1, ""},
		{"pause, with everything ended", protocol.Strategy{OnFailure: "pause"}, "1:failed 1:ok 2:left", done, 1, "1 of 3"},
		{"stop, with everything ended", protocol.Strategy{}, "1:failed 1:ok", stopped, 1, "1 failed"},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := begin(t, c.s, c.fleet)
			p.r.State, p.r.Wave = running, 1
			d := Next(p.r, p.nodes, p.now)
			if d.Rollout.State != c.state || d.Failures != c.count || !strings.Contains(d.Rollout.Reason, c.reason) {
				t.Fatalf("%s (%s), %d failed; want %s (%s), %d", d.Rollout.State, d.Rollout.Reason, d.Failures, c.state, c.reason, c.count)
			}
			if c.state != running && len(d.Release) > 0 {
				t.Fatalf("it releases %v", d.Release)
			}
		})
	}
}

// A decision to release is checked anew before each batch of it.
func TestBudgetBetweenBatches(t *testing.T) {
	p := begin(t, protocol.Strategy{}, "1:held*4").next(running, "n1 n2 n3 n4")
	p.look("n1:failed n2:way n3:held n4:held").next(stopped, "")
}

func TestMaxUnavailable(t *testing.T) {
	for _, c := range []struct {
		name  string
		max   protocol.Amount
		fleet string
		want  string
		count int
	}{
		{"not said", "", "1:held*3", "n1 n2 n3", 0},
		{"0 is any number", "0", "1:held*3", "n1 n2 n3", 0},
		{"0% is any number", "0%", "1:held*3", "n1 n2 n3", 0},
		{"a number", "2", "1:held*3", "n1 n2", 0},
		{"a share, rounded down", "50%", "1:held*5", "n1 n2", 0},
		{"but to 1 at least", "1%", "1:held*5", "n1", 0},
		{"a share of all nodes, whatever became of them", "50%", "1:left*4 1:held*4", "n5 n6 n7 n8", 0},
		{"more than there are", "9", "1:held*3", "n1 n2 n3", 0},
		{"on their way", "3", "1:way 1:waylock 1:held*3", "n3", 2},
		{"on their way and offline", "2", "1:dark 1:held*3", "n2", 1},
		{"lost on it", "2", "1:lost 1:held*3", "n2", 1},
		{"confirmed and lost", "2", "1:oklost 1:held*3", "n2", 1},
		{"more than may be", "1", "1:oklost*2 1:held*3", "", 2},
		{"degraded is available", "1", "1:degraded 1:held*3", "n2", 0},
		{"failed is available", "1", "1:failed 1:held*3", "n2", 0},
		{"passed over is available", "1", "1:off 1:locked 1:taken 1:held*3", "n4", 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			p := begin(t, protocol.Strategy{MaxUnavailable: c.max, MaxFailures: "100%"}, c.fleet)
			p.next(running, c.want)
			if p.last.Unavailable != c.count {
				t.Errorf("%d unavailable, want %d", p.last.Unavailable, c.count)
			}
		})
	}
}

func TestMaxUnavailableHoldsTheWave(t *testing.T) {
	p := begin(t, protocol.Strategy{MaxUnavailable: "1"}, "1:held*2 2:held").next(running, "n1")
	p.look("n1:ok").next(running, "n2").look("n2:ok").next(running, "n3").look("n3:ok").next(done, "")
}

func TestPassedOver(t *testing.T) {
	t.Run("told, with why", func(t *testing.T) {
		p := begin(t, protocol.Strategy{MaxFailures: "100%"}, "1:off 1:locked 1:left 1:taken 1:sick 1:held").next(running, "n6")
		want := map[string]string{"n1": "offline", "n2": "locked",
			"n3": "removed, or a newer deployment has it", "n4": "removed, or a newer deployment has it"}
		if !reflect.DeepEqual(p.last.Passed, want) {
			t.Errorf("got %v", p.last.Passed)
		}
		if len(p.last.Failing) != 1 || !strings.Contains(p.last.Failing["n5"], "quarantine") {
			t.Errorf("failing: %v", p.last.Failing)
		}
	})
	t.Run("one that comes back while a later wave is running goes at once", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:off 1:held 2:held*2").next(running, "n2")
		p.look("n2:ok").next(running, "n3 n4")
		p.look("n1:held").next(running, "n1")
		p.look("n3:ok n4:ok n1:ok").next(done, "")
	})
	t.Run("and before those of that wave", func(t *testing.T) {
		p := begin(t, protocol.Strategy{MaxUnavailable: "1"}, "2:held*2 1:locked 1:held").next(running, "n4")
		p.look("n4:ok").next(running, "n1").look("n3:held").next(running, "")
		p.look("n1:ok").next(running, "n3").look("n3:ok").next(running, "n2").look("n2:ok").next(done, "")
	})
	t.Run("it counts like every other node then", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:off 1:held 2:held 3:held").next(running, "n2")
		p.look("n2:ok").next(running, "n3").look("n1:held").next(running, "n1")
		p.look("n1:failed n3:ok").next(stopped, "")
	})
	t.Run("but does not hold up a wave that is not its own", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:off 1:held 2:held 3:held").next(running, "n2")
		p.look("n2:ok").next(running, "n3").look("n1:held").next(running, "n1")
		p.look("n3:ok").next(running, "n4")
		p.look("n4:ok").next(trailing, "").look("n1:ok").next(done, "")
	})
	t.Run("one of a later wave waits for it", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:held 2:off").next(running, "n1")
		p.look("n2:held").next(running, "").look("n1:ok").next(running, "n2")
	})
	t.Run("a wave of nodes that are away is neither waited for nor soaks", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Soak: 60}, "1:off 1:locked 1:left 2:off 3:held").next(running, "n5")
		if p.r.Wave != 3 {
			t.Errorf("wave %d", p.r.Wave)
		}
	})
	t.Run("all of them", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Canary: "1", Soak: 60}, "1:off 2:locked*2").next(trailing, "").asksAt(0)
		p.look("n3:held").next(trailing, "n3").look("n3:ok n2:held n1:held").next(trailing, "n1 n2")
		p.look("n1:ok n2:ok").next(done, "")
	})
	t.Run("none will ever get it", func(t *testing.T) {
		begin(t, protocol.Strategy{}, "1:left*2 2:left").next(done, "").reason("0 of 3")
		begin(t, protocol.Strategy{At: start.Add(time.Hour)}, "1:left*2").next(done, "")
		begin(t, protocol.Strategy{}, "").next(done, "")
		begin(t, protocol.Strategy{}, "1:held 2:left").next(running, "n1").look("n1:taken").next(done, "")
	})
	t.Run("the rest of a wave is taken", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:held*2 2:held").next(running, "n1 n2")
		p.look("n1:ok n2:taken").next(running, "n3")
	})
	t.Run("a node that is locked on its way goes on", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:held 2:held").next(running, "n1")
		p.look("n1:waylock").next(running, "").counts(0, 0, 1)
		p.look("n1:ok").next(running, "n2")
	})
}

func TestQuarantine(t *testing.T) {
	t.Run("never released, nor waited for", func(t *testing.T) {
		p := begin(t, protocol.Strategy{MaxFailures: "1"}, "1:sick 1:held 2:held").next(running, "n2")
		p.look("n2:ok").next(running, "n3").look("n3:ok").next(done, "").counts(1, 1, 0)
		if p.last.Failing["n1"] == "" {
			t.Error("the node that did not get it is not explained")
		}
	})
	t.Run("lifted in time", func(t *testing.T) {
		p := begin(t, protocol.Strategy{MaxFailures: "1"}, "1:sick 1:held").next(running, "n2")
		p.look("n1:held").next(running, "n1").counts(0, 1, 1)
	})
	t.Run("before anything was released", func(t *testing.T) {
		begin(t, protocol.Strategy{}, "1:sick 1:held").next(stopped, "")
		p := begin(t, protocol.Strategy{At: start.Add(time.Hour)}, "1:sick 1:held").next(scheduled, "").counts(1, 0, 0)
		p.after(time.Hour).next(stopped, "")
	})
}

func TestLost(t *testing.T) {
	t.Run("does not hold its wave up, and counts no longer when it is back", func(t *testing.T) {
		p := begin(t, protocol.Strategy{MaxFailures: "1"}, "1:held*2 2:held").next(running, "n1 n2")
		p.look("n1:dark n2:ok").next(running, "").counts(0, 1, 1)
		p.look("n1:lost").next(running, "n3").counts(1, 1, 1)
		p.look("n3:ok").next(trailing, "").look("n1:way").next(trailing, "").counts(0, 1, 1)
		p.look("n1:ok").next(done, "")
	})
	t.Run("but takes up what may be unavailable", func(t *testing.T) {
		p := begin(t, protocol.Strategy{MaxFailures: "1", MaxUnavailable: "1"}, "1:held 2:held").next(running, "n1")
		p.look("n1:lost").next(running, "").look("n1:taken").next(running, "n2")
	})
	t.Run("for ever", func(t *testing.T) {
		p := begin(t, protocol.Strategy{MaxFailures: "1"}, "1:held").next(running, "n1")
		p.look("n1:lost").next(trailing, "").look("n1:taken").next(done, "")
	})
}
