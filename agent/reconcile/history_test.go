package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestHistory(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		if l.Confirmed() != "" || len(l.History()) != 0 {
			t.Errorf("%+v", l.History())
		}
		if _, known := l.Baseline(); known {
			t.Error("nothing was confirmed, and there is a baseline")
		}
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		r.deploy(l, r.manifest(2, protocol.Switch, badUnit))
		r.confirm(l, r.manifest(3, protocol.Test, "better"))
		l.stop()
		l = r.start(0)
		defer l.stop()
		h := l.History()
		if len(h) != 2 || l.Confirmed() != store("better") || h[0].Closure != store("better") || h[0].Before != store(good) || h[0].Deployment != "d-3-better" ||
			h[0].Mode != protocol.Test || h[0].Serial != 3 || h[0].Time.IsZero() || h[1].Closure != store(good) || h[1].Before != store("old") {
			t.Errorf("history %+v", h)
		}
		record, err := ReadRecord(r.dir)
		if err != nil || !slices.Equal(record.History, h) || record.State != l.State() || len(record.Quarantine) != 1 {
			t.Errorf("record %+v, %v", record, err)
		}
		if units, known := l.Baseline(); !known || !slices.Equal(units, []string{"ever.service"}) {
			t.Errorf("baseline %q", units)
		}
		// The manifests of what can be gone back to stay, those of others go.
		kept := names(filepath.Join(r.dir, manifestsDir))
		for _, c := range h {
			if !slices.Contains(kept, c.Digest) {
				t.Errorf("the manifest of %s is gone", c.Deployment)
			}
		}
		if len(kept) != 2 {
			t.Errorf("%d manifests are kept", len(kept))
		}
	})
}

func TestHistoryIsBounded(t *testing.T) {
	var j journal
	for n := range 30 {
		c := Confirmation{Deployment: fmt.Sprint(n), Closure: fmt.Sprint("c", n), Before: fmt.Sprint("c", n-1)}
		if n >= 25 { // the last ones change nothing
			c.Closure, c.Before = "c24", "c24"
		}
		j.remember(c)
	}
	if len(j.History) != maxHistory {
		t.Fatalf("%d entries", len(j.History))
	}
	// One of those that changed nothing is the newest and stays, so that 19 are left that did.
	if j.History[0].Deployment != "6" || j.previous(system{closure: "c24"}).closure != "c23" || j.History[maxHistory-1].Deployment != "29" || j.History[maxHistory-2].Deployment != "24" {
		t.Errorf("%+v", j.History)
	}
}

// A plain rollback goes back one step further each time, and never forth to what was left.
func TestPreviousIsFurtherBack(t *testing.T) {
	deploy := func(closure, before string) Confirmation { return Confirmation{Closure: closure, Before: before} }
	back := func(closure, before string) Confirmation {
		return Confirmation{Closure: closure, Before: before, Back: true}
	}
	for _, c := range []struct {
		name    string
		history []Confirmation
		running string
		want    string
	}{
		{"nothing", nil, "a", ""},
		{"the first deploy", []Confirmation{deploy("a", "first")}, "a", "first"},
		{"two deploys", []Confirmation{deploy("a", "first"), deploy("b", "a")}, "b", "a"},
		{"after a rollback", []Confirmation{deploy("a", "first"), deploy("b", "a"), back("a", "b")}, "a", "first"},
		{"a deploy after a rollback", []Confirmation{deploy("a", "first"), deploy("b", "a"), back("a", "b"), deploy("c", "a")}, "c", "a"},
		{"and back from it", []Confirmation{deploy("a", "first"), deploy("b", "a"), back("a", "b"), deploy("c", "a"), back("a", "c")}, "a", "first"},
		{"deployed again on purpose", []Confirmation{deploy("a", "first"), deploy("b", "a"), deploy("a", "b")}, "a", "b"},
		{"a deploy that changed nothing", []Confirmation{deploy("a", "first"), deploy("b", "a"), deploy("b", "b")}, "b", "a"},
		{"the same after a rollback", []Confirmation{deploy("a", "first"), deploy("b", "a"), back("a", "b"), deploy("a", "a")}, "a", "first"},
		{"switched by hand", []Confirmation{deploy("a", "first"), deploy("b", "a")}, "hand", "b"},
		{"only what ran already", []Confirmation{deploy("a", "a")}, "a", ""},
	} {
		j := journal{History: c.history}
		if got := j.previous(system{closure: c.running}).closure; got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
}

// links are the gc roots by name.
func (r *rig) links() map[string]string {
	all := map[string]string{}
	for _, name := range names(r.m.roots) {
		target, err := os.Readlink(filepath.Join(r.m.roots, name))
		must(r.t, err)
		all[name] = behaviour(target)
	}
	return all
}

// What the next rollback goes to and what is in quarantine is kept from the garbage collector.
func TestKeeps(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		r.confirm(l, r.manifest(2, protocol.Switch, "better"))
		r.deploy(l, r.manifest(3, protocol.Switch, badUnit))
		quarantine := rootQuarantine + strings.Repeat("a", 32)
		want := map[string]string{rootCurrent: "better", rootPrevious: good, quarantine: badUnit}
		if got := r.links(); !maps.Equal(got, want) {
			t.Errorf("roots %v", got)
		}
		keep, err := l.Keep(t.Context())
		must(t, err)
		if got := slices.Sorted(maps.Keys(keep)); !slices.Equal(got, []string{store(badUnit), store("better"), store(good)}) {
			t.Errorf("kept: %v", keep)
		}
		// They come back, should somebody have removed them.
		l.stop()
		must(t, os.RemoveAll(r.m.roots))
		l = r.start(0)
		defer l.stop()
		time.Sleep(time.Second)
		if got := r.links(); !maps.Equal(got, want) {
			t.Errorf("after a restart: roots %v", got)
		}
		must(t, l.Release(""))
		delete(want, quarantine)
		if got := r.links(); !maps.Equal(got, want) {
			t.Errorf("released: roots %v", got)
		}
		// What is staged is kept, and so is what would be gone back to by the profile alone.
		r.stage(l, 4, "best")
		keep, err = l.Keep(t.Context())
		must(t, err)
		if keep[store("best")] == "" || r.links()[rootNew] != "best" {
			t.Errorf("kept: %v, roots %v", keep, r.links())
		}
	})
}

func TestKeepsWithoutHistory(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		keep, err := l.Keep(t.Context())
		must(t, err)
		if got := slices.Sorted(maps.Keys(keep)); !slices.Equal(got, []string{store("old"), store("older")}) {
			t.Errorf("kept: %v", keep)
		}
	})
}

func TestQuarantineIsNamedNewestFirst(t *testing.T) {
	j := journal{Quarantine: map[string]Quarantine{}}
	for n := range protocol.MaxQuarantine + 3 {
		j.Quarantine[fmt.Sprintf("c%02d", n)] = Quarantine{Time: time.Unix(int64(n), 0)}
	}
	got := j.inQuarantine()
	if len(got) != protocol.MaxQuarantine || got[0] != "c10" || got[protocol.MaxQuarantine-1] != "c03" {
		t.Errorf("%q", got)
	}
}

// A unit that a deployment broke is not among those that had failed before it; one that somebody broke in
// between is.
func TestBaseline(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		baseline := func(want ...string) {
			t.Helper()
			if units, known := l.Baseline(); !known || !slices.Equal(units, want) {
				t.Errorf("baseline %q, want %q", units, want)
			}
		}
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		baseline("ever.service")
		r.m.mu.Lock()
		r.m.failed = []string{"by-hand.service"}
		r.m.mu.Unlock()
		r.confirm(l, r.manifest(2, protocol.Switch, good)) // it changes nothing
		baseline("ever.service")
		r.m.mu.Lock()
		r.m.failed = nil
		r.m.mu.Unlock()
		r.confirm(l, r.manifest(3, protocol.Switch, good, "another.nix")) // built, and the same
		baseline()
	})
}

// Nothing that must not meet an attempt meets one.
func TestIdle(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		time.Sleep(time.Second)
		ended := errors.New("ended")
		err := l.Idle(t.Context(), func(context.Context) error {
			l.Look(r.publish(r.manifest(1, protocol.Switch, good)))
			time.Sleep(time.Hour)
			if s := l.State(); s.Phase != "" {
				t.Errorf("an attempt began: %+v", s)
			}
			if err := l.Check(); err != nil {
				t.Errorf("it is taken for hanging: %v", err)
			}
			return ended
		})
		if !errors.Is(err, ended) {
			t.Error(err)
		}
		if s := l.settle(1); s.Phase != protocol.Confirmed {
			t.Errorf("state %+v", s)
		}
		l.Look(r.publish(r.manifest(2, protocol.Switch, "slow")))
		time.Sleep(5 * time.Second)
		err = l.Idle(t.Context(), func(context.Context) error {
			t.Error("run during an attempt")
			return nil
		})
		if !errors.Is(err, &protocol.Refusal{Code: protocol.Conflict}) || !strings.Contains(err.Error(), "d-2-slow") {
			t.Error(err)
		}
	})
}

// An attempt that is to be resumed is one that is under way.
func TestNotIdleBeforeResumed(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		e, err := New(Options{Dir: r.dir, Node: nodeName, Verifier: r.verifier, Upstream: r.c, Host: agent{r.m, new(bool)}, Log: slog.New(slog.DiscardHandler), Etc: r.etc, Roots: r.m.roots})
		must(t, err)
		if err := e.Idle(t.Context(), func(context.Context) error { return nil }); !errors.Is(err, &protocol.Refusal{Code: protocol.Conflict}) {
			t.Error(err)
		}
	})
}
