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

	"github.com/nix-infra/nix-infra/nix"
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
	for _, k := range []kind{
		{built, protocol.Switch, []string{good, badUnit, lateUnit, hangs, cutNetwork, badBoot, dies}},
		{built, protocol.Test, []string{good, badUnit}},
		{substituted, protocol.Switch, []string{good, badUnit}},
		{goneBackTo, protocol.Switch, []string{good, badUnit}},
		{goneBackTo, protocol.Test, []string{good}},
	} {
		for _, content := range k.contents {
			steps := stepsOf(t, k, content)
			for n := range steps {
				for name, then := range after {
					t.Run(fmt.Sprintf("%s/%s/%s/%d-%s/%s", k.source, k.mode, content, n+1, steps[n], name), func(t *testing.T) {
						t.Parallel()
						bubble(t, func(t *testing.T, r *rig) { killed(t, r, k, content, n+1, then) })
					})
				}
			}
		}
	}
}

// kind is what is deployed, in which mode, and how its systems behave.
type kind struct {
	source   string
	mode     protocol.Mode
	contents []string
}

const (
	built       = "built"
	substituted = "substituted"
	goneBackTo  = "gone back to"
)

// manifest brings a system that behaves like content.
func (k kind) manifest(r *rig, content string) *protocol.Manifest {
	m := r.manifest(1, k.mode, content)
	switch k.source {
	case substituted:
		m.Closure = &protocol.Closure{Path: store(content), Caches: []string{"https://cache.example"}, Keys: []string{cacheKey}}
	case goneBackTo:
		m.Files = nil
		m.Rollback = &protocol.Rollback{Generation: 3}
		r.m.mu.Lock()
		r.m.generations = append([]nix.Generation{{Number: 3, Closure: store(content)}}, r.m.generations...)
		r.m.here[store(content)] = true
		r.m.mu.Unlock()
	}
	return m
}

// stepsOf are the journal writes of an undisturbed deploy.
func stepsOf(t *testing.T, k kind, content string) (steps []string) {
	t.Run(fmt.Sprintf("%s/%s/%s/undisturbed", k.source, k.mode, content), func(t *testing.T) {
		bubble(t, func(t *testing.T, r *rig) {
			l := r.start(0)
			l.Look(r.publish(k.manifest(r, content)))
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

func killed(t *testing.T, r *rig, k kind, content string, n int, then func(*rig)) {
	mode := k.mode
	l := r.start(n)
	look := r.publish(k.manifest(r, content))
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
		if k.source == goneBackTo {
			if !strings.Contains(s.Reason, "shows no deployment") {
				t.Errorf("confirmed, and nothing is said about the source tree: %+v", s)
			}
		} else if r.inEtc("dir/configuration.nix") != good {
			t.Error("confirmed, and the source tree is not in place")
		}
		if k.source != built && slices.Contains(r.m.effects, "build") {
			t.Error("something was built")
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
			steps := stepsOf(t, kind{source: built, mode: protocol.Switch}, content)
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
