package reconcile

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// The agent is killed after each journal write there is, and what comes after is a restart at once, a
// restart after the deadline, or a loss of power. Each must end proven or on the old system.
func TestKilledAtEveryStep(t *testing.T) {
	after := map[string]func(r *rig){
		"restarted":     nil,
		"restartedLate": func(*rig) { time.Sleep(time.Minute) },
		"restartedMid":  func(*rig) { time.Sleep(1500 * time.Millisecond) },
		"powerCut":      func(r *rig) { r.m.powerCut() },
		"killedTwice": func(r *rig) {
			l := r.start(1)
			time.Sleep(2 * time.Second)
			l.stop()
		},
	}
	for mode, contents := range map[protocol.Mode][]string{
		protocol.Switch: {good, badUnit, lateUnit, hangs, cutNetwork, badBoot, dies},
		protocol.Test:   {good, badUnit},
	} {
		for _, content := range contents {
			steps := stepsOf(t, mode, content)
			for n := range steps {
				for name, then := range after {
					t.Run(fmt.Sprintf("%s/%s/%d-%s/%s", mode, content, n+1, steps[n], name), func(t *testing.T) {
						t.Parallel()
						bubble(t, func(t *testing.T, r *rig) { killed(t, r, mode, content, n+1, then) })
					})
				}
			}
		}
	}
}

// stepsOf are the journal writes of an undisturbed deploy.
func stepsOf(t *testing.T, mode protocol.Mode, content string) (steps []string) {
	t.Run(fmt.Sprintf("%s/%s/undisturbed", mode, content), func(t *testing.T) {
		bubble(t, func(t *testing.T, r *rig) {
			l := r.start(0)
			l.Look(r.publish(r.manifest(1, mode, content)))
			l.settle(1)
			l.stop()
			steps = slices.Clone(r.steps)
		})
	})
	if len(steps) < 6 {
		t.Fatalf("only %q", steps)
	}
	return steps
}

func killed(t *testing.T, r *rig, mode protocol.Mode, content string, n int, then func(*rig)) {
	l := r.start(n)
	look := r.publish(r.manifest(1, mode, content))
	l.Look(look)
	<-l.done
	if then != nil {
		then(r)
	}
	l = r.start(0)
	defer l.stop()
	time.Sleep(time.Second)
	l.Look(look) // the controller goes on telling what is wanted
	s := l.settle(1)
	switch s.Phase {
	case protocol.Confirmed:
		if content != good && (content != badBoot || mode != protocol.Test) {
			t.Errorf("a broken system was confirmed: %+v", s)
		}
		if mode == protocol.Test {
			running := behaviour(r.m.running) // a test does not survive a reboot, and was confirmed before it
			if running != "old" {
				r.runs(content, "old")
			}
			return
		}
		r.runs(good, good)
		if r.inEtc("dir/configuration.nix") != good {
			t.Error("confirmed, and the source tree is not in place")
		}
	case protocol.RolledBack:
		if content == good && then == nil {
			t.Errorf("a good system was given up because the agent was killed once: %+v", s)
		}
		r.runs("old", "old")
		if r.inEtc("dir/configuration.nix") != "" {
			t.Error("rolled back, and the source tree is in place")
		}
	default:
		t.Errorf("state %+v", s)
	}
	if report := r.c.last(); report.Phase != s.Phase || report.Serial != 1 {
		t.Errorf("report %+v, state %+v", report, s)
	}
	if l.j.Attempt != nil {
		t.Error("an attempt is left in the journal")
	}
}

// Without any agent the timer alone ends an unproven system.
func TestTimerAlone(t *testing.T) {
	for _, content := range []string{badUnit, hangs, cutNetwork} {
		t.Run(content, func(t *testing.T) {
			steps := stepsOf(t, protocol.Switch, content)
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(slices.Index(steps, "armed") + 1)
				l.Look(r.publish(r.manifest(1, protocol.Switch, content)))
				<-l.done
				// What the agent would have done next, and then never again anything.
				m := r.m
				m.mu.Lock()
				m.launch(l.j.Attempt.activation())
				m.mu.Unlock()
				time.Sleep(40 * time.Second)
				m.mu.Lock()
				defer m.mu.Unlock()
				if behaviour(m.running) != "old" || behaviour(m.boots) != "old" {
					t.Errorf("%s runs, effects %q", m.running, m.effects)
				}
			})
		})
	}
}

func TestDamagedJournal(t *testing.T) {
	for name, damage := range map[string]string{
		"empty": "", "cut": `{"v":1,"seen":`, "type": `{"v":1,"seen":"many"}`, "version": `{"v":9}`, "twice": `{"v":1}{"v":1}`,
		"attempt": `{"v":1,"attempt":{"phase":"sleeping"}}`,
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				l.Look(r.publish(r.manifest(5, protocol.Switch, good)))
				l.settle(5)
				l.stop()
				must(t, os.WriteFile(filepath.Join(r.dir, journalFile), []byte(damage), 0o600))
				l = r.start(0)
				defer l.stop()
				if s := l.State(); !strings.Contains(s.Reason, "damaged") {
					t.Errorf("state %+v", s)
				}
				if aside, _ := filepath.Glob(filepath.Join(r.dir, journalFile+".damaged-*")); len(aside) != 1 {
					t.Errorf("set aside: %v", aside)
				}
				// The serial that was seen is not forgotten with it.
				l.Look(r.publish(r.manifest(4, protocol.Switch, badUnit)))
				time.Sleep(10 * time.Second)
				r.runs(good, good)
				l.Look(r.publish(r.manifest(6, protocol.Switch, good)))
				if s := l.settle(6); s.Phase != protocol.Confirmed || s.Reason != "" {
					t.Errorf("state %+v", s)
				}
			})
		})
	}
}

// The disk is full from the nth write on, for a while or for good.
func TestFullDisk(t *testing.T) {
	for n := 1; n <= 24; n++ {
		for _, content := range []string{good, badUnit} {
			t.Run(fmt.Sprintf("%s/%d", content, n), func(t *testing.T) {
				bubble(t, func(t *testing.T, r *rig) {
					writes, write := 0, r.write
					r.write = func(path string, data []byte, mode os.FileMode) error {
						r.m.mu.Lock()
						writes++
						full := writes >= n
						r.m.mu.Unlock()
						if full {
							return &os.PathError{Op: "write", Path: path, Err: syscall.ENOSPC}
						}
						return write(path, data, mode)
					}
					l := r.start(0)
					l.Look(r.publish(r.manifest(1, protocol.Switch, content)))
					time.Sleep(2 * time.Minute)
					s := l.State()
					r.m.mu.Lock()
					full, running, boots := writes >= n, behaviour(r.m.running), behaviour(r.m.boots)
					r.m.mu.Unlock()
					if full && !strings.Contains(s.Reason, syscall.ENOSPC.Error()) {
						t.Errorf("the disk is full and nobody is told: %+v", s)
					}
					if running != boots || running != good && running != "old" {
						t.Errorf("%s runs and %s boots, state %+v", running, boots, s)
					}
					l.stop()
					r.write = write
					l = r.start(0)
					defer l.stop()
					l.Look(r.publish(r.manifest(2, protocol.Switch, good+"er")))
					if s := l.settle(2); s.Phase != protocol.Confirmed {
						t.Errorf("after the disk was freed: %+v", s)
					}
				})
			})
		}
	}
}

func TestReportsAreDeliveredLater(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		l.Look(r.publish(r.manifest(1, protocol.Switch, good)))
		l.settle(1)
		l.stop()
		r.m.mu.Lock()
		r.m.running = store(cutNetwork) // whatever it is, the controller is out of reach
		r.m.mu.Unlock()
		l = r.start(0)
		l.report(protocol.Report{Version: 1, Deployment: "d", Phase: protocol.FailedPhase, Ended: l.now()})
		time.Sleep(time.Minute)
		l.stop()
		r.m.mu.Lock()
		r.m.running = store(good)
		r.m.mu.Unlock()
		l = r.start(0)
		defer l.stop()
		time.Sleep(time.Minute)
		if _, waiting := l.oldestReport(); r.c.last().Deployment != "d" || r.c.count() != 2 || waiting {
			t.Errorf("last report %+v of %d, waiting: %v", r.c.last(), r.c.count(), waiting)
		}
	})
}
