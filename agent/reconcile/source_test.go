package reconcile

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const cacheKey = "cache.example-1:AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="

// closure is a manifest whose system was built elsewhere, out of a tree with the same content.
func (r *rig) closure(serial uint64, mode protocol.Mode, content string) *protocol.Manifest {
	m := r.manifest(serial, mode, content)
	m.Closure = &protocol.Closure{Path: store(content), Caches: []string{"https://cache.example"}, Keys: []string{cacheKey}}
	return m
}

// rollback is a manifest that goes back.
func (r *rig) rollback(serial uint64, to protocol.Rollback) *protocol.Manifest {
	m := r.manifest(serial, protocol.Switch, "back")
	m.Files, m.Rollback = nil, &to
	return m
}

// deploy takes a manifest to its end.
func (r *rig) deploy(l *life, m *protocol.Manifest) State {
	l.Look(r.publish(m))
	return l.settle(m.Serial)
}

// confirm deploys what has to be confirmed.
func (r *rig) confirm(l *life, m *protocol.Manifest) {
	r.t.Helper()
	if s := r.deploy(l, m); s.Phase != protocol.Confirmed || s.Deployment != m.Deployment {
		r.t.Fatalf("state %+v", s)
	}
}

func (r *rig) did(effect string) bool {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	return slices.Contains(r.m.effects, effect)
}

func TestClosure(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		r.confirm(l, r.closure(1, protocol.Switch, good))
		r.runs(good, good)
		if r.inEtc("dir/configuration.nix") != good {
			t.Error("the tree that it was built from is not in place")
		}
		if r.did("build") || r.c.last().Built || r.c.last().Closure != store(good) {
			t.Errorf("built: report %+v", r.c.last())
		}
		if !slices.ContainsFunc(r.c.lines, func(line string) bool { return strings.Contains(line, "nothing is built") }) {
			t.Errorf("lines %q", r.c.lines)
		}

		// One whose tree is not known says what the node's own one shows.
		m := r.closure(2, protocol.Switch, "better")
		m.Files = nil
		r.confirm(l, m)
		if s := l.State(); !strings.Contains(s.Reason, "shows deployment d-1-good") || r.inEtc("dir/configuration.nix") != good {
			t.Errorf("state %+v", s)
		}
		// Built from the tree that is shown, it is installed as if nothing had been there.
		r.confirm(l, r.closure(3, protocol.Switch, "better"))
		if s := l.State(); s.Reason != "" || r.inEtc("dir/configuration.nix") != "better" {
			t.Errorf("state %+v", s)
		}
	})
}

func TestClosureRefused(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		if s := r.deploy(l, r.closure(1, protocol.Switch, "unsigned")); s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, "signature") {
			t.Errorf("state %+v", s)
		}
		if s := r.deploy(l, r.closure(2, protocol.Switch, badUnit)); s.Phase != protocol.RolledBack {
			t.Errorf("state %+v", s)
		}
		r.m.mu.Lock()
		r.m.effects = nil
		r.m.mu.Unlock()
		if s := r.deploy(l, r.closure(3, protocol.Switch, badUnit)); s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, "in quarantine") {
			t.Errorf("state %+v", s)
		}
		if r.did("substitute " + badUnit) {
			t.Error("what is in quarantine was fetched")
		}
		r.runs("old", "old")
	})
}

func TestClosureModes(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.closure(0, protocol.DryActivate, good)))
		time.Sleep(10 * time.Second)
		if report := r.c.last(); report.Phase != protocol.Confirmed || report.Closure != store(good) || report.Built || r.did("build") {
			t.Errorf("report %+v", report)
		}
		r.confirm(l, r.closure(1, protocol.Test, good))
		r.runs(good, "old")
		r.m.proven[store("better")] = true
		if s := r.deploy(l, r.closure(2, protocol.Boot, "better")); s.Phase != protocol.Staged {
			t.Errorf("state %+v", s)
		}
		r.runs(good, "better")
	})
}

func TestSupersededWhileSubstituting(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.closure(1, protocol.Switch, "slow")))
		time.Sleep(5 * time.Second)
		if s := l.State(); s.Phase != protocol.Building {
			t.Fatalf("state %+v", s)
		}
		r.confirm(l, r.closure(2, protocol.Switch, good))
		if first := r.c.reports[0]; first.Reason != "superseded by deployment d-2-good" {
			t.Errorf("report %+v", first)
		}
	})
}

// Where rollbacks go to, after good, better and best were confirmed one after the other.
func TestRollback(t *testing.T) {
	for name, c := range map[string]struct {
		to      protocol.Rollback
		running string // after it
		phase   protocol.Phase
		reason  string
	}{
		"the one before":      {protocol.Rollback{}, "better", protocol.Confirmed, ""},
		"generation":          {protocol.Rollback{Generation: 8}, good, protocol.Confirmed, ""},
		"before nix-infra":    {protocol.Rollback{Generation: 6}, "older", protocol.Confirmed, "shows deployment d-3-best"},
		"path":                {protocol.Rollback{Path: store(good)}, good, protocol.Confirmed, ""},
		"path that runs":      {protocol.Rollback{Path: store("best")}, "best", protocol.Confirmed, ""},
		"before a deployment": {protocol.Rollback{Before: "d-2-better"}, good, protocol.Confirmed, ""},
		"before another one":  {protocol.Rollback{Before: "d-9-other"}, "best", protocol.Confirmed, "switched nothing here"},
		"no such generation":  {protocol.Rollback{Generation: 99}, "best", protocol.FailedPhase, "no generation 99"},
		"never was here":      {protocol.Rollback{Path: store("evil")}, "best", protocol.FailedPhase, "was never proven here"},
		"gone":                {protocol.Rollback{Generation: 7}, "best", protocol.FailedPhase, "not here any more"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				defer l.stop()
				for serial, content := range []string{good, "better", "best"} {
					r.confirm(l, r.manifest(uint64(serial)+1, protocol.Switch, content))
				}
				r.m.mu.Lock()
				delete(r.m.here, store("old"))
				r.m.here[store("evil")] = true
				r.m.effects = nil
				r.m.mu.Unlock()
				fetched := r.c.fetched
				s := r.deploy(l, r.rollback(4, c.to))
				if s.Phase != c.phase || !strings.Contains(s.Reason, c.reason) || c.reason == "" && s.Reason != "" {
					t.Errorf("state %+v", s)
				}
				r.runs(c.running, c.running)
				if r.did("build") || r.c.fetched != fetched || r.c.last().Built {
					t.Errorf("not only what was here: effects %q", r.m.effects)
				}
				etc := c.running
				if c.reason != "" {
					etc = "best"
				}
				if got := r.inEtc("dir/configuration.nix"); got != etc {
					t.Errorf("the source tree shows %s", got)
				}
				if c.phase == protocol.Confirmed && l.Confirmed() != store(c.running) {
					t.Errorf("confirmed: %s", l.Confirmed())
				}
			})
		})
	}
}

// A node to which nothing was deployed goes back by the generations of its profile.
func TestRollbackWithoutHistory(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		r.confirm(l, r.rollback(1, protocol.Rollback{}))
		r.runs("older", "older")
		// From there the one that was proven before is none, and older generations there are none.
		r.m.mu.Lock()
		r.m.generations = r.m.generations[2:]
		r.m.mu.Unlock()
		if s := r.deploy(l, r.rollback(2, protocol.Rollback{})); s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, "nothing to go back to") {
			t.Errorf("state %+v", s)
		}
	})
}

// The target is proven like any other system, and in quarantine if it fails. What was deployed before goes
// on being recognised.
func TestRollbackIsProven(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		r.confirm(l, r.manifest(2, protocol.Switch, "better"))
		r.m.mu.Lock()
		r.m.generations[0].Closure = store(badUnit)
		r.m.here[store(badUnit)] = true
		r.m.mu.Unlock()
		if s := r.deploy(l, r.rollback(3, protocol.Rollback{Generation: 6})); s.Phase != protocol.RolledBack {
			t.Errorf("state %+v", s)
		}
		r.runs("better", "better")
		if s := r.deploy(l, r.rollback(4, protocol.Rollback{Generation: 6})); s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, "node release n1") {
			t.Errorf("state %+v", s)
		}
		r.confirm(l, r.rollback(5, protocol.Rollback{}))
		r.runs(good, good)
		r.m.mu.Lock()
		r.m.effects = nil
		r.m.mu.Unlock()
		r.confirm(l, r.manifest(6, protocol.Switch, good))
		if r.did("build") {
			t.Error("what runs since the rollback was built again")
		}
	})
}

// A rollback whose files are gone says what the source tree shows, and the tree stays.
func TestRollbackWithoutFiles(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		r.confirm(l, r.manifest(2, protocol.Switch, "better"))
		l.cache.mu.Lock()
		l.cache.drop(protocol.Digest([]byte(good)))
		l.cache.mu.Unlock()
		r.confirm(l, r.rollback(3, protocol.Rollback{}))
		r.runs(good, good)
		if s := l.State(); !strings.Contains(s.Reason, "shows deployment d-2-better") || !strings.Contains(s.Reason, "d-1-good are not on this node any more") {
			t.Errorf("state %+v", s)
		}
		if r.inEtc("dir/configuration.nix") != "better" {
			t.Error("the source tree was changed")
		}
		// The next deploy of what runs brings it.
		r.confirm(l, r.manifest(4, protocol.Switch, good))
		if s := l.State(); s.Reason != "" || r.inEtc("dir/configuration.nix") != good {
			t.Errorf("state %+v", s)
		}
	})
}

// TestDeployed: what is given out of a file is what the confirmed deployment brought, or nothing.
func TestDeployed(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		const file = "dir/configuration.nix"
		l := r.start(0)
		defer l.stop()
		want := func(content string, code protocol.Code) {
			t.Helper()
			deployment, got, err := l.Deployed(file)
			if string(got) != content || (content != "") != (err == nil) || err != nil && !errors.Is(err, &protocol.Refusal{Code: code}) {
				t.Errorf("%q %q %v, want %q or %s", deployment, got, err, content, code)
			}
		}
		want("", protocol.Unknown)
		r.confirm(l, r.manifest(1, protocol.Switch, good))
		want(good, "")
		must(t, os.WriteFile(filepath.Join(r.etc, file), []byte("by hand"), 0o644))
		want(good, "")

		// One that is rolled back from never was shown.
		if s := r.deploy(l, r.manifest(2, protocol.Switch, badUnit)); s.Phase != protocol.RolledBack {
			t.Fatalf("state %+v", s)
		}
		want(good, "")

		// Without the cache it comes from the tree, as long as that has it.
		must(t, os.RemoveAll(filepath.Join(r.dir, blobsDir)))
		want("", protocol.Failed)
		must(t, os.WriteFile(filepath.Join(r.etc, file), []byte(good), 0o644))
		want(good, "")
		must(t, os.Remove(filepath.Join(r.etc, file)))
		must(t, os.Symlink("/etc/passwd", filepath.Join(r.etc, file)))
		want("", protocol.Failed)
		if _, _, err := l.Deployed("dir/other.nix"); !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
			t.Errorf("a file that it did not bring: %v", err)
		}
	})
}
