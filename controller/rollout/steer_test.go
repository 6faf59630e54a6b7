package rollout

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	pause  = protocol.PauseRollout
	resume = protocol.ResumeRollout
	abort  = protocol.AbortRollout
)

func TestPauseAndResume(t *testing.T) {
	t.Run("running", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:held 2:held 3:held").next(running, "n1").after(time.Minute)
		p.steer(pause, paused).reason("ann paused it").look("n1:ok").next(paused, "").asksAt(0)
		if p.r.By != "ann" || !p.r.Since.Equal(start.Add(time.Minute)) {
			t.Errorf("paused as %+v", p.r)
		}
		p.steer(resume, running).next(running, "n2")
		if p.r.Forgiven != 0 {
			t.Errorf("%d forgiven", p.r.Forgiven)
		}
	})
	t.Run("scheduled", func(t *testing.T) {
		p := begin(t, protocol.Strategy{At: start.Add(time.Hour)}, "1:held").next(scheduled, "").steer(pause, paused).next(paused, "")
		p.after(2*time.Hour).next(paused, "").steer(resume, scheduled).next(running, "n1")
		p = begin(t, protocol.Strategy{At: start.Add(time.Hour)}, "1:held").steer(pause, paused).steer(resume, scheduled)
		p.next(scheduled, "").asksAt(time.Hour)
	})
	t.Run("soaking", func(t *testing.T) {
		p := begin(t, protocol.Strategy{Soak: 60}, "1:held 2:held").next(running, "n1").look("n1:ok").next(running, "")
		p.steer(pause, paused).after(30*time.Second).next(paused, "").steer(resume, running).next(running, "").asksAt(30 * time.Second)
		p.steer(pause, paused).after(time.Hour).next(paused, "").steer(resume, running).next(running, "n2")
	})
	t.Run("trailing", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:held 1:off").next(running, "n1").look("n1:ok").next(trailing, "")
		p.steer(pause, paused).look("n2:held n1:oklost").next(paused, "").counts(0, 0, 0)
		p.steer(resume, trailing).next(trailing, "n2")
	})
	t.Run("nothing left to do", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:held 2:held").next(running, "n1").steer(pause, paused)
		p.look("n1:ok n2:left").next(done, "")
	})
	t.Run("stop and rollback don't wait for it", func(t *testing.T) {
		for policy, state := range map[protocol.OnFailure]protocol.RolloutState{"": stopped, "stop": stopped, "rollback": rolledBack} {
			p := begin(t, protocol.Strategy{OnFailure: policy}, "1:held 2:held").next(running, "n1").steer(pause, paused)
			p.look("n1:failed").next(state, "")
		}
	})
	t.Run("nor can they be got round", func(t *testing.T) {
		p := begin(t, protocol.Strategy{}, "1:held 2:held").next(running, "n1").steer(pause, paused)
		p.look("n1:failed").steer(resume, running).next(stopped, "")
		p = begin(t, protocol.Strategy{MaxFailures: "1"}, "1:held*2 2:held").next(running, "n1 n2").look("n1:failed").next(running, "")
		p.steer(pause, paused).steer(resume, running).look("n2:failed").next(stopped, "")
	})
}

func TestForgiven(t *testing.T) {
	p := begin(t, protocol.Strategy{OnFailure: "pause", MaxFailures: "1"}, "1:held*3 2:held*3 3:held*4").next(running, "n1 n2 n3")
	p.look("n1:failed n2:failed").next(paused, "").reason("2 failed (n1, n2), 1 may").counts(2, 1, 1)
	p.look("n3:failed").next(paused, "").counts(3, 1, 0)
	p.steer(resume, running).next(running, "n4 n5 n6").counts(0, 1, 0) // all three are forgiven

	p.look("n4:failed").next(running, "").counts(1, 1, 2)
	p.look("n5:lost").next(paused, "").counts(2, 1, 2).reason("5 failed (n1, n2, n3 and 2 more), 1 may beside the 3 that were forgiven")
	p.steer(resume, running).look("n6:ok").next(running, "n7 n8 n9 n10").counts(0, 1, 1)

	p.look("n5:ok").next(running, "").counts(0, 1, 4) // what is well again was forgiven once
	p.look("n7:failed").next(running, "").counts(1, 1, 3)
	p.look("n8:failed").next(running, "").counts(2, 1, 2) // too many, but there is nothing left to hold back
	p.look("n9:ok n10:ok").next(done, "").counts(2, 1, 0)

	t.Run("before the first wave", func(t *testing.T) {
		p := begin(t, protocol.Strategy{OnFailure: "pause"}, "1:sick 1:held").next(paused, "")
		p.steer(resume, scheduled).next(running, "n2").look("n2:ok").next(done, "").counts(0, 0, 0)
	})
	t.Run("of what counts no longer when the waves are through", func(t *testing.T) {
		p := begin(t, protocol.Strategy{OnFailure: "pause"}, "1:held*2 2:off").next(running, "n1 n2").look("n1:degraded").next(paused, "")
		p.steer(resume, running).look("n2:ok").next(trailing, "").counts(0, 0, 0)
		p.look("n3:held").next(trailing, "n3")
		if p.r.Forgiven != 0 {
			t.Errorf("%d are still forgiven", p.r.Forgiven)
		}
	})
}

func TestAbort(t *testing.T) {
	for name, p := range map[string]*play{
		"scheduled": begin(t, protocol.Strategy{At: start.Add(time.Hour)}, "1:held").next(scheduled, ""),
		"running":   begin(t, protocol.Strategy{}, "1:held 2:held").next(running, "n1"),
		"trailing":  begin(t, protocol.Strategy{}, "1:off").next(trailing, ""),
		"paused":    begin(t, protocol.Strategy{}, "1:held 2:held").next(running, "n1").steer(pause, paused),
	} {
		t.Run(name, func(t *testing.T) {
			p.T = t
			p.steer(abort, aborted).reason("ann aborted it").next(aborted, "")
			p.look("n1:ok").after(24*time.Hour).next(aborted, "").asksAt(0)
		})
	}
	p := begin(t, protocol.Strategy{}, "1:held 2:held*2").next(running, "n1").steer(abort, aborted).look("n2:sick").next(aborted, "")
	if p.last.Passed["n3"] != "the rollout ended (aborted) before its turn" || !strings.Contains(p.last.Failing["n2"], "quarantine") {
		t.Errorf("passed %v, failing %v", p.last.Passed, p.last.Failing)
	}
	if _, explained := p.last.Passed["n1"]; explained {
		t.Error("a node on its way is passed over")
	}
}

func TestSteerWhatEnded(t *testing.T) {
	for state, p := range map[protocol.RolloutState]*play{
		stopped:    begin(t, protocol.Strategy{}, "1:held 2:held").next(running, "n1").look("n1:failed").next(stopped, ""),
		rolledBack: begin(t, protocol.Strategy{OnFailure: "rollback"}, "1:held").next(running, "n1").look("n1:failed").next(rolledBack, ""),
		done:       begin(t, protocol.Strategy{}, "1:held").next(running, "n1").look("n1:ok").next(done, ""),
		aborted:    begin(t, protocol.Strategy{}, "1:held").steer(abort, aborted),
	} {
		for _, v := range []protocol.Verb{pause, resume, abort} {
			r, err := Steer(p.r, p.nodes, v, "bob", p.now)
			if v == abort && state == aborted {
				if err != nil {
					t.Errorf("what is aborted can't be aborted: %v", err)
				}
			} else if err == nil || !strings.Contains(err.Error(), string(state)) || !strings.Contains(err.Error(), p.r.Reason) ||
				!strings.Contains(err.Error(), "2024-07-01T12:00:00Z") {
				t.Errorf("%s of a rollout that is %s: %v", v, state, err)
			}
			if !reflect.DeepEqual(r, p.r) {
				t.Errorf("%s of a rollout that is %s makes it %+v", v, state, r)
			}
		}
	}
}

func TestSteerToWhatIsSo(t *testing.T) {
	p := begin(t, protocol.Strategy{}, "1:held").next(running, "n1")
	before := p.r
	if p.steer(resume, running); !reflect.DeepEqual(p.r, before) {
		t.Errorf("resumed though not paused: %+v", p.r)
	}
	p.steer(pause, paused)
	before = p.r
	if p.after(time.Hour).steer(pause, paused); !reflect.DeepEqual(p.r, before) {
		t.Errorf("paused twice: %+v", p.r)
	}
	if _, err := Steer(p.r, p.nodes, "halt", "ann", p.now); err == nil || !strings.Contains(err.Error(), "use pause, resume or abort") {
		t.Errorf("an unknown verb: %v", err)
	}
}
