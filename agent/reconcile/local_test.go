package reconcile

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/bundle"
)

// bundle is a manifest as a file, with what the controller has of it.
func (r *rig) bundle(m *protocol.Manifest) []byte {
	r.t.Helper()
	doc, err := r.signer.Manifest(m)
	must(r.t, err)
	file := filepath.Join(r.t.TempDir(), "bundle")
	must(r.t, bundle.Write(file, doc, func(digest string) ([]byte, error) { return r.c.blobs[digest], nil }))
	data, err := os.ReadFile(file)
	must(r.t, err)
	return data
}

func (r *rig) setOffline(offline bool) {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	r.m.offline = offline
}

// follow follows a deployment to its end and gives the phases that were told.
func follow(t *testing.T, l *life, deployment string) (phases []protocol.Phase, lines int) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
	defer cancel()
	err := l.Follow(ctx, deployment, func(ev protocol.Event) error {
		if lines += len(ev.Lines); len(ev.Lines) == 0 {
			phases = append(phases, ev.Phase)
		}
		return nil
	})
	if err != nil {
		t.Fatalf("%v, after %q", err, phases)
	}
	time.Sleep(time.Second)
	return phases, lines
}

// With the controller down, a bundle is built, switched to and proven without it.
func TestApply(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		data := r.bundle(r.manifest(1, protocol.Switch, good))
		r.m.proven[store(good)] = true // without the controller
		r.setOffline(true)
		deployment, err := l.Apply(bytes.NewReader(data))
		if err != nil || deployment != "d-1-good" {
			t.Fatal(deployment, err)
		}
		phases, lines := follow(t, l, deployment)
		want := []protocol.Phase{protocol.Accepted, protocol.Fetching, protocol.Building, protocol.Activating, protocol.Checking, protocol.Confirming, protocol.Confirmed}
		// Who follows comes while it is built at the latest, and is told of the one that it finds twice then.
		phases = slices.Compact(slices.DeleteFunc(phases, func(p protocol.Phase) bool { return p == "" }))
		if n := len(want) - len(phases); n < 0 || n > 2 || !slices.Equal(phases, want[n:]) || lines == 0 {
			t.Errorf("phases %q, %d lines", phases, lines)
		}
		r.runs(good, good)
		if r.inEtc("dir/configuration.nix") != good || r.c.fetched != 0 {
			t.Errorf("%d blobs were fetched", r.c.fetched)
		}
		// It may be asked again how it ended, also by an agent that was started since.
		if phases, _ := follow(t, l, deployment); !slices.Equal(phases, []protocol.Phase{protocol.Confirmed}) {
			t.Errorf("phases %q", phases)
		}
		if got := r.recorded(); !slices.Equal(got, []string{"deployer deployer d-1-good=", "deployer deployer d-1-good=ok"}) {
			t.Errorf("records %q", got)
		}
		if !strings.Contains(r.records[0].Reason, "by root on the node itself") {
			t.Errorf("record %+v", r.records[0])
		}
		// The controller hears of it when it is back, and sees nothing new in what it wanted.
		r.setOffline(false)
		l.Connected()
		time.Sleep(2 * time.Minute)
		if report := r.c.last(); report.Deployment != "d-1-good" || report.Phase != protocol.Confirmed {
			t.Errorf("report %+v", report)
		}
	})
}

// Where the controller could be reached to begin with, a system that cuts it off is not proven.
func TestApplyThatCutsTheNetwork(t *testing.T) {
	for offline, want := range map[bool]protocol.Phase{false: protocol.RolledBack, true: protocol.Confirmed} {
		bubble(t, func(t *testing.T, r *rig) {
			l := r.start(0)
			defer l.stop()
			data := r.bundle(r.manifest(1, protocol.Switch, cutNetwork))
			r.m.proven[store(cutNetwork)] = offline
			r.setOffline(offline)
			deployment, err := l.Apply(bytes.NewReader(data))
			must(t, err)
			if phases, _ := follow(t, l, deployment); phases[len(phases)-1] != want {
				t.Errorf("offline %v: phases %q", offline, phases)
			}
		})
	}
}

func TestApplyRefused(t *testing.T) {
	for name, c := range map[string]struct {
		data func(r *rig) []byte
		want string
	}{
		"serial":  {func(r *rig) []byte { return r.bundle(r.manifest(5, protocol.Switch, badUnit)) }, "not above 5"},
		"dry run": {func(r *rig) []byte { return r.bundle(r.manifest(0, protocol.DryActivate, good)) }, "dry run"},
		"signer": {func(r *rig) []byte {
			r.signer = r.user("eve", protocol.Operator)
			return r.bundle(r.manifest(9, protocol.Switch, badUnit))
		}, "needs deployer"},
		"other node": {func(r *rig) []byte {
			m := r.manifest(9, protocol.Switch, badUnit)
			m.Node, m.Attr = "n2", protocol.SystemAttr("n2")
			return r.bundle(m)
		}, "n2"},
		"name": {func(r *rig) []byte {
			m := r.manifest(9, protocol.Switch, badUnit)
			m.Deployment = "local-1"
			return r.bundle(m)
		}, "the node's own orders"},
		"blob": {func(r *rig) []byte {
			m := r.manifest(9, protocol.Switch, badUnit)
			r.c.blobs[protocol.Digest([]byte(badUnit))] = r.c.blobs[protocol.Digest([]byte("{ }"))]
			return r.bundle(m)
		}, "other content"},
		"cut":     {func(r *rig) []byte { return r.bundle(r.manifest(9, protocol.Switch, badUnit))[:3000] }, "bundle"},
		"garbage": {func(*rig) []byte { return []byte("garbage") }, "bundle"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				defer l.stop()
				r.confirm(l, r.manifest(5, protocol.Switch, good))
				if _, err := l.Apply(bytes.NewReader(c.data(r))); err == nil || !strings.Contains(err.Error(), c.want) {
					t.Errorf("%v, want %q", err, c.want)
				}
				time.Sleep(time.Minute)
				r.runs(good, good)
				if s := l.State(); s.Deployment != "d-5-good" || s.Serial != 5 {
					t.Errorf("state %+v", s)
				}
			})
		})
	}
}

func TestLocalRollback(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		r.confirm(l, r.manifest(2, protocol.Switch, "better"))
		r.setOffline(true)
		r.m.mu.Lock()
		r.records = nil
		r.m.mu.Unlock()
		deployment, err := l.RollBack(t.Context(), protocol.Rollback{})
		must(t, err)
		phases, _ := follow(t, l, deployment)
		if phases[len(phases)-1] != protocol.Confirmed || slices.Contains(phases, protocol.Building) {
			t.Errorf("phases %q", phases)
		}
		r.runs(good, good)
		s := l.State()
		if s.Deployment != deployment || !strings.HasPrefix(deployment, "local-") || s.Serial != 2 || s.Phase != protocol.Confirmed {
			t.Errorf("state %+v", s)
		}
		if r.inEtc("dir/configuration.nix") != good {
			t.Error("the source tree is not that of what runs")
		}
		if got := r.recorded(); !slices.Equal(got, []string{"root  " + deployment + "=", "root  " + deployment + "=ok"}) || !strings.Contains(r.records[0].Reason, "by root on the node itself") {
			t.Errorf("records %q", got)
		}
		l.stop()

		// What is desired by the controller was seen, so it is left alone, and the next deploy goes on.
		r.setOffline(false)
		l = r.start(0)
		defer l.stop()
		l.Look(protocol.Look{Version: protocol.Version})
		time.Sleep(time.Minute)
		if s := l.State(); s.Deployment != deployment || s.Reason != "" {
			t.Errorf("state %+v", s)
		}
		r.runs(good, good)
		if report := r.c.last(); report.Deployment != deployment || report.Serial != 2 {
			t.Errorf("report %+v", report)
		}
		r.confirm(l, r.manifest(3, protocol.Switch, "best"))
		r.runs("best", "best")
	})
}

func TestLocalRollbackRefused(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		time.Sleep(time.Second)
		for want, to := range map[string]protocol.Rollback{"no generation 99": {Generation: 99}, "never proven": {Path: store("evil")}, "more than one": {Generation: 6, Path: store("old")}} {
			if _, err := l.RollBack(t.Context(), to); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("%+v: %v", to, err)
			}
		}
		r.m.mu.Lock()
		r.m.generations[0].Closure = store(badUnit)
		r.m.here[store(badUnit)] = true
		r.m.mu.Unlock()
		deployment, err := l.RollBack(t.Context(), protocol.Rollback{})
		must(t, err)
		if phases, _ := follow(t, l, deployment); phases[len(phases)-1] != protocol.RolledBack {
			t.Errorf("phases %q", phases)
		}
		r.runs("old", "old")
		if _, err := l.RollBack(t.Context(), protocol.Rollback{}); err == nil || !strings.Contains(err.Error(), "in quarantine") {
			t.Error(err)
		}
		err = l.Follow(t.Context(), "local-1", func(protocol.Event) error { return nil })
		if !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
			t.Error(err)
		}
	})
}

// What root orders is on record before anything comes of it, however long the record takes.
func TestLocalOrdersAreRecordedFirst(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		time.Sleep(time.Second) // it resumes first
		r.recording = time.Minute
		deployment, err := l.RollBack(t.Context(), protocol.Rollback{Before: "d-9-other"})
		must(t, err)
		follow(t, l, deployment)
		if got := r.recorded(); !slices.Equal(got, []string{"root  " + deployment + "=", "root  " + deployment + "=ok"}) {
			t.Errorf("records %q", got)
		}
		deployment, err = l.Apply(bytes.NewReader(r.bundle(r.manifest(1, protocol.Switch, good))))
		must(t, err)
		follow(t, l, deployment)
		if got := r.recorded(); !slices.Equal(got[2:], []string{"deployer deployer d-1-good=", "deployer deployer d-1-good=ok"}) {
			t.Errorf("records %q", got)
		}
	})
}

// Root doesn't wait for a build that is under way.
func TestLocalRollbackStopsABuild(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		l.Look(r.publish(r.manifest(2, protocol.Switch, "slow")))
		time.Sleep(5 * time.Second)
		deployment, err := l.RollBack(t.Context(), protocol.Rollback{})
		must(t, err)
		if phases, _ := follow(t, l, deployment); phases[len(phases)-1] != protocol.Confirmed {
			t.Errorf("phases %q", phases)
		}
		r.runs("old", "old")
		if stopped := r.c.reports[1]; stopped.Deployment != "d-2-slow" || stopped.Reason != "superseded by deployment "+deployment {
			t.Errorf("report %+v", stopped)
		}
		if s := l.State(); s.Serial != 2 {
			t.Errorf("state %+v", s)
		}
	})
}

// An agent that is killed meanwhile goes on with it, without the one who gave it, and without a controller.
func TestLocalKilledAtEveryStep(t *testing.T) {
	for name, give := range map[string]func(r *rig, l *life) (string, error){
		"bundle": func(r *rig, l *life) (string, error) {
			return l.Apply(bytes.NewReader(r.bundle(r.manifest(3, protocol.Switch, "best"))))
		},
		"rollback": func(r *rig, l *life) (string, error) { return l.RollBack(context.Background(), protocol.Rollback{}) },
	} {
		begin := func(r *rig, killAt int) (*life, string) {
			l := r.start(0)
			r.confirm(l, r.manifest(1, protocol.Switch, good))
			r.confirm(l, r.manifest(2, protocol.Switch, "better"))
			l.stop()
			r.setOffline(true)
			r.m.proven[store("best")] = true // without the controller
			l = r.start(killAt)
			synctest.Wait()
			deployment, err := give(r, l)
			must(r.t, err)
			return l, deployment
		}
		var steps []string
		t.Run(name+"/undisturbed", func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l, deployment := begin(r, 0)
				follow(t, l, deployment)
				l.stop()
				last := len(r.steps)
				for i := last - 1; i >= 0 && r.steps[i] != "accepted"; i-- {
					last = i
				}
				steps = slices.Clone(r.steps[last-1:])
			})
		})
		if len(steps) < 6 {
			t.Fatalf("only %q", steps)
		}
		for n := range steps {
			t.Run(name+"/"+steps[n], func(t *testing.T) {
				t.Parallel()
				bubble(t, func(t *testing.T, r *rig) {
					l, deployment := begin(r, n+1)
					<-l.done
					l = r.start(0)
					defer l.stop()
					synctest.Wait()
					if phases, _ := follow(t, l, deployment); phases[len(phases)-1] != protocol.Confirmed {
						t.Errorf("phases %q, state %+v", phases, l.State())
					}
					if name == "bundle" {
						r.runs("best", "best")
					} else {
						r.runs(good, good)
					}
				})
			})
		}
	}
}

// Who doesn't take the events is cut off, and may ask again.
func TestSlowFollower(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		l.Look(r.publish(r.manifest(2, protocol.Switch, "slow")))
		time.Sleep(5 * time.Second)
		slow := make(chan struct{})
		var err error
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			err = l.Follow(t.Context(), "d-2-slow", func(protocol.Event) error { <-slow; return nil })
		}()
		synctest.Wait()
		for range eventsAhead + 1 {
			l.event("d-2-slow", protocol.Event{Phase: protocol.Building, Lines: []string{"line"}})
		}
		close(slow)
		<-ended
		if !errors.Is(err, ErrSlow) {
			t.Error(err)
		}
	})
}
