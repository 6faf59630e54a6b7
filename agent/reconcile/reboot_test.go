package reconcile

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// reboot is a manifest that brings no system.
func (r *rig) reboot(serial uint64) *protocol.Manifest {
	m := r.manifest(serial, protocol.Reboot, "reboot")
	m.Files = nil
	return m
}

// stage deploys a system in mode boot.
func (r *rig) stage(l *life, serial uint64, content string) {
	r.t.Helper()
	r.m.proven[store(content)] = true // mode boot writes what is unproven, by its nature
	if s := r.deploy(l, r.manifest(serial, protocol.Boot, content)); s.Phase != protocol.Staged {
		r.t.Fatalf("state %+v", s)
	}
}

// tend is a life after the other, with a boot wherever one was ordered, until the reboot that the look is about
// ended. With killAt the agent is killed right after that many steps from here on, and then comes what happens
// then.
func (r *rig) tend(look protocol.Look, killAt int, then func(*rig)) (State, *life) {
	from, booted := len(r.steps), r.m.rebooted()
	live := func() *life {
		left := 0
		if killAt > 0 {
			left = killAt - (len(r.steps) - from)
		}
		l := r.start(left)
		l.Look(look) // the controller goes on telling what is wanted
		return l
	}
	l := live()
	for range 2000 {
		time.Sleep(500 * time.Millisecond)
		synctest.Wait()
		select {
		case <-l.done:
			killAt = 0
			if n := r.m.rebooted(); n > booted {
				booted = n
				r.m.powerCut()
			} else if then != nil {
				then(r)
			}
			l = live()
			continue
		default:
		}
		if n := r.m.rebooted(); n > booted {
			booted = n
			l.stop()
			r.m.powerCut()
			l = live()
		}
		if s := l.State(); s.Deployment == fmt.Sprintf("d-%d-reboot", look.Serial) && s.Phase.Ended() {
			time.Sleep(2 * time.Second)
			break
		}
	}
	return l.State(), l
}

func TestReboot(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		l.Look(r.publish(r.reboot(2)))
		time.Sleep(5 * time.Second)
		if s := l.State(); s.Phase != protocol.Rebooting || r.m.rebooted() != 1 {
			t.Fatalf("%d reboots, state %+v", r.m.rebooted(), s)
		}
		l.stop()
		r.m.powerCut()
		l = r.start(0)
		if s := l.settle(2); s.Phase != protocol.Confirmed || s.Reason != "" || s.Deployment != "d-2-reboot" {
			t.Errorf("state %+v", s)
		}
		l.stop()
		r.runs(good, good)
		if report := r.c.last(); report.Before != store(good) || report.Closure != store(good) || report.Mode != protocol.Reboot || report.Built {
			t.Errorf("report %+v", report)
		}
		// It deployed nothing: the history and the source tree are as they were.
		l = r.start(0)
		defer l.stop()
		if h := l.History(); len(h) != 1 || h[0].Deployment != "d-1-good" || r.inEtc("dir/configuration.nix") != good {
			t.Errorf("history %+v", h)
		}
		r.m.mu.Lock()
		r.m.effects = nil
		r.m.mu.Unlock()
		r.confirm(l, r.manifest(3, protocol.Switch, good))
		if r.did("build") {
			t.Error("what runs was built again")
		}
	})
}

// A machine that boots with a failed unit, or without its network, has nothing to go back to.
func TestRebootNotProven(t *testing.T) {
	for name, c := range map[string]struct {
		broken func(m *machine)
		reason string
	}{
		"unit":    {func(m *machine) { m.failed = append(m.failed, "app.service") }, "newly failed: app.service"},
		"network": {func(m *machine) { m.offline = true }, "no route to host"},
		"system":  {func(m *machine) { m.running = store("other") }, "booted " + store("other")},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				l.Look(r.publish(r.reboot(1)))
				time.Sleep(5 * time.Second)
				l.stop()
				r.m.powerCut()
				r.m.mu.Lock()
				c.broken(r.m)
				r.m.mu.Unlock()
				l = r.start(0)
				defer l.stop()
				s := l.settle(1)
				if s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, c.reason) || !strings.Contains(s.Reason, "nothing to go back to") {
					t.Errorf("state %+v", s)
				}
				if n := r.m.rebooted(); n != 1 || len(l.Quarantined()) != 0 {
					t.Errorf("%d reboots, quarantine %v", n, l.Quarantined())
				}
			})
		})
	}
}

func TestRebootRefused(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		r.confirm(l, r.manifest(1, protocol.Test, good))
		if s := r.deploy(l, r.reboot(2)); s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, store("old")+" would boot") {
			t.Errorf("state %+v", s)
		}
		if n := r.m.rebooted(); n != 0 {
			t.Errorf("%d reboots", n)
		}
	})
}

// A reboot that doesn't come fails. A staged system waits on, and is proven after whichever boot comes.
func TestRebootDoesNotCome(t *testing.T) {
	for _, failures := range []int{0, 100} {
		t.Run(fmt.Sprintf("%d failures", failures), func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				r.stage(l, 1, good)
				r.m.mu.Lock()
				r.m.failures["reboot"] = failures
				r.m.mu.Unlock()
				l.Look(r.publish(r.reboot(2)))
				time.Sleep(2 * time.Second)
				l.stop() // restarted, it waits no longer
				l = r.start(0)
				time.Sleep(rebootTime)
				s := l.State()
				if s.Serial != 2 || s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, "reboot") {
					t.Errorf("state %+v", s)
				}
				r.runs("old", good)
				l.stop()
				r.m.powerCut()
				l = r.start(0)
				defer l.stop()
				time.Sleep(20 * time.Second)
				if s := l.State(); s.Phase != protocol.Confirmed || s.Deployment != "d-1-good" || s.Serial != 2 {
					t.Errorf("state %+v", s)
				}
				r.runs(good, good)
			})
		})
	}
}

// What is staged is taken over by the reboot, and ends with it.
func TestRebootIntoStaged(t *testing.T) {
	for content, want := range map[string]protocol.Phase{good: protocol.Confirmed, badUnit: protocol.RolledBack} {
		t.Run(content, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				r.stage(l, 1, content)
				l.stop()
				s, l := r.tend(r.publish(r.reboot(2)), 0, nil)
				defer l.stop()
				if s.Phase != want || s.Deployment != "d-2-reboot" {
					t.Errorf("state %+v", s)
				}
				staged, superseded := r.c.reports[0], r.c.reports[1]
				if staged.Phase != protocol.Staged || superseded.Deployment != "d-1-"+content || superseded.Phase != protocol.Staged ||
					!strings.Contains(superseded.Reason, "superseded by deployment d-2-reboot") {
					t.Errorf("reports %+v", r.c.reports)
				}
				if report := r.c.last(); report.Before != store("old") || report.Closure != store(content) {
					t.Errorf("report %+v", report)
				}
				if content != good {
					r.runs("old", "old")
					if q := l.Quarantined(); len(q) != 1 || r.m.rebooted() != 2 || r.inEtc("flake.nix") != "" {
						t.Errorf("quarantine %v, %d reboots", q, r.m.rebooted())
					}
					return
				}
				r.runs(good, good)
				h := l.History()[0]
				if r.inEtc("dir/configuration.nix") != good || h.Deployment != "d-2-reboot" || h.Closure != store(good) || h.Before != store("old") {
					t.Errorf("history %+v", h)
				}
				// The files that it is made of are known, whichever manifest they came with.
				r.confirm(l, r.manifest(3, protocol.Switch, "better"))
				r.confirm(l, r.rollback(4, protocol.Rollback{Before: "d-3-better"}))
				if r.inEtc("dir/configuration.nix") != good {
					t.Errorf("the source tree shows %s", r.inEtc("dir/configuration.nix"))
				}
			})
		})
	}
}

// Killed after each journalled step, an agent goes on, whatever is staged and whatever comes in between.
func TestRebootKilledAtEveryStep(t *testing.T) {
	const nothing = ""
	for content, want := range map[string]protocol.Phase{nothing: protocol.Confirmed, good: protocol.Confirmed, badUnit: protocol.RolledBack} {
		ordered := func(r *rig) protocol.Look {
			if content != nothing {
				l := r.start(0)
				r.stage(l, 1, content)
				l.stop()
			}
			return r.publish(r.reboot(2))
		}
		var steps []string
		t.Run("undisturbed/"+content, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				look := ordered(r)
				from := len(r.steps)
				s, l := r.tend(look, 0, nil)
				l.stop()
				steps = slices.Clone(r.steps[from:])
				if s.Phase != want {
					t.Errorf("state %+v", s)
				}
			})
		})
		if len(steps) < 4 {
			t.Fatalf("only %q", steps)
		}
		for n := range steps {
			for name, then := range map[string]func(r *rig){
				"restarted":     nil,
				"restartedLate": func(*rig) { time.Sleep(2 * rebootTime) },
				"powerCut":      func(r *rig) { r.m.powerCut() },
			} {
				t.Run(fmt.Sprintf("%s/%d-%s/%s", content, n+1, steps[n], name), func(t *testing.T) {
					t.Parallel()
					bubble(t, func(t *testing.T, r *rig) {
						s, l := r.tend(ordered(r), n+1, then)
						defer l.stop()
						switch {
						case name == "restartedLate" && content != nothing && s.Phase == protocol.FailedPhase:
							r.runs("old", content) // the reboot did not come, and it is staged as before
						case name == "restartedLate" && (s.Phase == protocol.FailedPhase || s.Phase == protocol.RolledBack):
							r.runs("old", "old") // not proven in time
						case s.Phase != want:
							t.Errorf("state %+v", s)
						case content == good:
							r.runs(good, good)
						default:
							r.runs("old", "old")
						}
						if report := r.c.last(); report.Serial != 2 || report.Phase != s.Phase {
							t.Errorf("report %+v, state %+v", report, s)
						}
					})
				})
			}
		}
	}
}
