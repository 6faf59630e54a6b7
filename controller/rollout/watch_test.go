package rollout

import (
	"fmt"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// The watcher of the simulation: it looks at the world, never at what the planner was told, and cries out when a rule is broken.

// violation is what the watcher panics with.
type violation string

func (d *deployment) cry(format string, args ...any) {
	panic(violation(fmt.Sprintf("deployment %d at %s: ", d.id, d.sim.now.Format(time.DateTime)) + fmt.Sprintf(format, args...) +
		fmt.Sprintf("\nstrategy %+v, %d machines", d.plan, len(d.shares))))
}

// sight is what is to be seen of a deployment in the world.
type sight struct {
	failing, unavailable int
	held, begun          bool // some machine could get it yet; some has got it
	frontier             int  // no wave after it may have begun: it has not ended, or not soaked
}

func (s *share) away(w *world) bool {
	return !s.up || s.locked || s.refused(w)
}

func (s *share) refused(w *world) bool { return s.closure != 0 && w.quarantine[s.closure] > 0 }

func (s *share) lost(w *world) bool {
	return s.released && !s.gone && s.end == open && !s.up && w.now.Sub(s.at) >= patience
}

func (s *share) failing(w *world, through bool) bool {
	switch {
	case s.end == failedEarly || s.end == wentBack:
		return true
	case s.gone:
		return false
	case !s.released:
		return s.refused(w)
	case s.end == open:
		return s.lost(w)
	}
	return !through && (!s.up || s.degraded)
}

func (d *deployment) see() sight {
	v := sight{frontier: 1 << 30}
	for _, s := range d.shares {
		if s.failing(d.world, d.through) {
			v.failing++
		}
		v.begun = v.begun || s.released
		if s.gone {
			continue
		}
		v.held = v.held || !s.released
		if s.released && (s.end == open || s.end == confirmed && !s.up && !d.through) {
			v.unavailable++
		}
		if !s.released && s.away(d.world) || s.lost(d.world) {
			s.excused = true
		}
		if !s.excused && (s.end == open || d.now.Sub(s.ended) < d.plan.soak) {
			v.frontier = min(v.frontier, s.wave)
		}
	}
	return v
}

// watch checks a decision, made upon what was seen, before any of it is carried out.
func (d *deployment) watch(before Rollout, next Decision, v sight) {
	state := next.Rollout.State
	d.forgiven = min(d.forgiven, v.failing)
	may := d.plan.mayFail.down(len(d.shares))
	over := v.failing-d.forgiven > may
	if over && v.begun && !before.State.Ended() {
		d.tripped = true
		switch {
		case d.plan.policy == protocol.RollbackOnFailure && state != rolledBack,
			d.plan.policy == protocol.StopOnFailure && state != stopped,
			d.plan.policy == protocol.PauseOnFailure && v.held && state != paused:
			d.cry("%d failed, %d may beside %d, and it is %s", v.failing, may, d.forgiven, state)
		}
	}
	if !next.Next.IsZero() && !next.Next.After(d.now) {
		d.cry("it wants to be asked again at %s", next.Next)
	}
	if state != before.State {
		if state == paused {
			d.tally.saw("paused by failures")
		}
		switch {
		case before.State.Ended():
			d.cry("it had ended as %s, and is %s", before.State, state)
		case (state == stopped || state == rolledBack || state == paused) && !over:
			d.cry("it is %s (%s) with %d failed of %d that may beside %d", state, next.Rollout.Reason, v.failing, may, d.forgiven)
		case state == trailing && !d.through:
			d.watchThrough()
		case state == done:
			d.watchDone()
		case state == aborted:
			d.cry("nobody aborted it")
		}
		if state == trailing && !d.through {
			d.through = true
			v = d.see()
			d.forgiven = min(d.forgiven, v.failing)
		}
	}
	if f := max(0, v.failing-d.forgiven); next.Failures != f || next.MaxFailures != may || next.Unavailable != v.unavailable {
		// Of what ended, the planner may know already that all waves are through.
		if !state.Ended() {
			d.cry("it counts %d failed of %d, %d unavailable; there are %d of %d, %d",
				next.Failures, next.MaxFailures, next.Unavailable, f, may, v.unavailable)
		}
	}
	if len(next.Release) > 0 && (over || d.tripped) {
		d.cry("%d failed, %d may beside %d, and it releases %d", v.failing, may, d.forgiven, len(next.Release))
	}
	if state.Ended() {
		d.watchExplained(next)
	}
}

// watchRelease checks one release, right before it is done.
func (d *deployment) watchRelease(s *share, v *sight) {
	switch minute := d.now.Hour()*60 + d.now.Minute(); {
	case s.released || s.gone || s.away(d.world):
		d.cry("%s can't get it: %+v of %+v", s.name, *s, *s.machine)
	case d.paused:
		d.cry("%s gets it while it is paused", s.name)
	case d.now.Before(d.plan.at):
		d.cry("%s gets it before its time", s.name)
	case d.plan.window && !(minute >= d.plan.from && minute < d.plan.to) && !(d.plan.from > d.plan.to && (minute >= d.plan.from || minute < d.plan.to)):
		d.cry("%s gets it outside of the window", s.name)
	case s.wave > v.frontier:
		d.cry("%s of wave %d gets it, and wave %d has not ended or not soaked", s.name, s.wave, v.frontier)
	}
	v.unavailable++
	if most := d.plan.unavailable; most.n > 0 && v.unavailable > max(1, most.down(len(d.shares))) {
		d.cry("%d are unavailable with %s", v.unavailable, s.name)
	}
}

// watchThrough checks that no wave is left whose machines could be waited for.
func (d *deployment) watchThrough() {
	for _, s := range d.shares {
		if !s.gone && s.end == open && !s.excused {
			d.cry("%s is neither away nor has it ended, and all waves are said to be through", s.name)
		}
	}
}

func (d *deployment) watchDone() {
	for _, s := range d.shares {
		if !s.gone && s.end == open && (s.released || !s.refused(d.world)) {
			d.cry("%s has not ended, and it is done", s.name)
		}
	}
}

// watchExplained checks that what became of every machine in a rollout that ended is told once, and truly.
func (d *deployment) watchExplained(next Decision) {
	told := 0
	for _, s := range d.shares {
		failing, passed := next.Failing[s.name], next.Passed[s.name]
		if failing != "" {
			told++
		}
		if passed != "" {
			told++
		}
		reported := s.end == failedEarly || s.end == wentBack
		switch {
		case reported && (failing != "" || passed != ""),
			!reported && s.gone && (failing != "" || passed == ""),
			!reported && !s.gone && !s.released && s.refused(d.world) != (failing != ""),
			!reported && !s.gone && !s.released && !s.refused(d.world) && passed == "",
			!reported && !s.gone && s.released && passed != "",
			!reported && !s.gone && s.end == open && s.released && s.lost(d.world) != (failing != ""):
			d.cry("%s is %+v, explained as failing %q and passed over %q", s.name, *s, failing, passed)
		}
	}
	if told != len(next.Failing)+len(next.Passed) {
		d.cry("machines that it does not have are explained")
	}
	if next.Rollout.Reason == "" {
		d.cry("it ended as %s without a reason", next.Rollout.State)
	}
}
