package rollout

import (
	"fmt"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// New is the rollout of a deployment that was just taken over.
func New(s protocol.Strategy, now time.Time) Rollout {
	return Rollout{Strategy: s, State: protocol.RolloutScheduled, Since: instant(now)}
}

// Next says where a rollout stands now and what is to be released. It is a function of its arguments alone: asked again with
// what it decided carried out, it decides nothing more.
//
// nodes are all nodes that the deployment named, whatever became of them, in the order in which those of a wave are to be
// released; those that come back after their wave go first. Of a rollout that has ended, only the counts and the explanations
// are made.
func Next(r Rollout, nodes []Node, now time.Time) Decision {
	now = instant(now)
	opens := opening(&r.Strategy, now)
	c := count(&r, nodes)
	var next time.Time
	if !r.State.Ended() {
		r.Forgiven = min(r.Forgiven, c.failures) // one that came back and fails again is a new failure
		r, next = stand(r, &c, opens, now)
		if r.through(c.last) != c.through {
			c = count(&r, nodes) // what becomes of confirmed nodes counts no longer
			r.Forgiven = min(r.Forgiven, c.failures)
		}
	}
	d := Decision{
		Rollout:     r,
		Next:        next,
		Unavailable: c.unavailable,
		Failures:    max(0, c.failures-r.Forgiven),
		MaxFailures: r.Strategy.MaxFailures.Floor(len(nodes)),
	}
	if r.releases() && !opens.After(now) {
		d.Release = pick(nodes, r.Wave, room(&r.Strategy, &c))
	}
	d.Failing, d.Passed = explain(r.State, c.through, nodes)
	return d
}

// Steer pauses, resumes or aborts; the next Next decides how it goes on from there. What does not fit the state is an error
// that says so; what is so already is none.
func Steer(r Rollout, nodes []Node, v protocol.Verb, by string, now time.Time) (Rollout, error) {
	now = instant(now)
	if r.State.Ended() {
		if v == protocol.AbortRollout && r.State == protocol.RolloutAborted {
			return r, nil
		}
		return r, fmt.Errorf("the rollout has ended, it can't be told to %s: %s since %s: %s",
			v, r.State, r.Since.Format(time.RFC3339), r.Reason)
	}
	switch paused := r.State == protocol.RolloutPaused; {
	case v == protocol.AbortRollout:
		r = r.become(protocol.RolloutAborted, by+" aborted it", now)
	case v == protocol.PauseRollout && !paused:
		r = r.become(protocol.RolloutPaused, by+" paused it", now)
	case v == protocol.ResumeRollout && paused:
		c := count(&r, nodes)
		// A rollout that stops or goes back doesn't begin its budget anew because somebody had paused it.
		if r.Strategy.OnFailure == protocol.PauseOnFailure && tooMany(&r, &c) {
			r.Forgiven = c.failures
		}
		r = r.become(r.course(c.last), "", now)
	case v == protocol.PauseRollout || v == protocol.ResumeRollout:
		return r, nil
	default:
		return r, fmt.Errorf("a rollout can't be told to %.40q: use pause, resume or abort", string(v))
	}
	r.By = by
	return r, nil
}

// stand moves a rollout that has not ended to where it stands now, and says when it goes on by itself.
func stand(r Rollout, c *census, opens, now time.Time) (Rollout, time.Time) {
	due := !opens.After(now)
	if (due || r.Wave > 0) && tooMany(&r, c) {
		switch {
		case r.Strategy.OnFailure == protocol.RollbackOnFailure:
			return r.become(protocol.RolloutRolledBack, c.blame(&r), now), time.Time{}
		case r.Strategy.OnFailure != protocol.PauseOnFailure:
			return r.become(protocol.RolloutStopped, c.blame(&r), now), time.Time{}
		case c.held > 0 && r.State != protocol.RolloutPaused:
			return r.become(protocol.RolloutPaused, c.blame(&r), now), time.Time{}
		}
	}
	if c.held == 0 && c.underway == 0 {
		return r.become(protocol.RolloutDone, c.outcome(), now), time.Time{}
	}
	if r.State == protocol.RolloutPaused {
		return r, time.Time{}
	}

	next, reason := advance(&r, c, opens, now)
	if !due && c.ready(r.Wave) > 0 {
		reason = "waits for a maintenance window"
		if next.IsZero() || opens.Before(next) {
			next = opens
		}
	}
	if r.through(c.last) {
		if c.held == c.quarantined && c.underway == 0 {
			return r.become(protocol.RolloutDone, c.outcome(), now), time.Time{}
		}
		if reason == "" {
			reason = "all waves are through; waits for nodes that are away or on their way"
		}
	}
	return r.become(r.course(c.last), reason, now), next
}

// advance goes from wave to wave as far as they are through, and says what the next one waits for, and until when.
func advance(r *Rollout, c *census, opens, now time.Time) (until time.Time, reason string) {
	for !r.through(c.last) {
		if r.Wave > 0 {
			if w := c.waves[r.Wave]; r.Settled.IsZero() {
				if w.ready+w.busy > 0 {
					return time.Time{}, ""
				}
				if w.released > 0 || r.Wave >= c.last {
					r.Settled = now // once through, nodes that come back don't hold it up
				}
			}
			if r.Wave >= c.last {
				return time.Time{}, ""
			}
			// A wave that no node got has not settled, and does not soak.
			if soaked := r.Settled.Add(time.Duration(r.Strategy.Soak) * time.Second); soaked.After(now) {
				return soaked, fmt.Sprintf("wave %d is through and soaks", r.Wave)
			}
		}
		switch {
		case r.Strategy.At.After(now) && r.Wave == 0:
			return opens, "waits for its time"
		case opens.After(now):
			return opens, "waits for a maintenance window"
		}
		r.Wave, r.Settled = r.Wave+1, time.Time{}
	}
	return time.Time{}, ""
}

// pick names up to room nodes that are ready and whose wave has begun.
func pick(nodes []Node, wave, room int) []string {
	var names []string
	for _, returned := range []bool{true, false} {
		for i := range nodes {
			n := &nodes[i]
			if len(names) >= room {
				return names
			}
			if n.ready() && n.Wave <= wave && returned == (n.Wave < wave) {
				names = append(names, n.Name)
			}
		}
	}
	return names
}

// room is how many more nodes may be on their way.
func room(s *protocol.Strategy, c *census) int {
	if s.MaxUnavailable.Ceil(c.nodes) == 0 {
		return c.nodes
	}
	return max(1, s.MaxUnavailable.Floor(c.nodes)) - c.unavailable
}

func tooMany(r *Rollout, c *census) bool {
	return c.failures-r.Forgiven > r.Strategy.MaxFailures.Floor(c.nodes)
}

// opening is when something may be released: now, or else the first time after it at which the rollout's own time has come and
// one of its windows is open.
func opening(s *protocol.Strategy, now time.Time) time.Time {
	t := now
	if s.At.After(t) {
		t = instant(s.At)
	}
	var first time.Time
	for i := range s.Windows {
		open, next := s.Windows[i].Open(t)
		if open {
			return t
		}
		if first.IsZero() || next.Before(first) {
			first = next
		}
	}
	if first.IsZero() {
		return t
	}
	return instant(first)
}

// instant is t as it is read back by another controller.
func instant(t time.Time) time.Time { return t.Round(0).UTC() }

// through tells whether all waves are.
func (r *Rollout) through(last int) bool { return r.Wave >= last && !r.Settled.IsZero() }

// course is the state of a rollout that goes on by itself.
func (r *Rollout) course(last int) protocol.RolloutState {
	switch {
	case r.Wave == 0:
		return protocol.RolloutScheduled
	case r.through(last):
		return protocol.RolloutTrailing
	default:
		return protocol.RolloutRunning
	}
}

func (r *Rollout) releases() bool {
	return r.State == protocol.RolloutRunning || r.State == protocol.RolloutTrailing
}

func (r Rollout) become(s protocol.RolloutState, reason string, now time.Time) Rollout {
	if r.State != s {
		r.State, r.Since = s, now
	}
	r.Reason = reason
	return r
}
