package reconcile

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestSwitch(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.manifest(1, protocol.Switch, good, "gone/with/folder.nix")))
		if s := l.settle(1); s.Phase != protocol.Confirmed || s.Reason != "" {
			t.Fatalf("state %+v", s)
		}
		r.runs(good, good)
		if r.inEtc("dir/configuration.nix") != good || r.inEtc("by-hand.nix") != "mine" || r.inEtc("hardware-configuration.nix") != "{ hardware }" || r.inEtc("networking.nix") != emptyNode {
			t.Error("the node's source tree is not as it should be")
		}
		if info, err := os.Stat(filepath.Join(r.etc, "run.sh")); err != nil || info.Mode().Perm() != 0o755 {
			t.Errorf("run.sh: %v, %v", info, err)
		}
		report := r.c.last()
		if report.Phase != protocol.Confirmed || !report.Built || report.Before != store("old") || report.Closure != store(good) || len(r.c.lines) == 0 {
			t.Errorf("report %+v", report)
		}

		// The same again builds nothing; another file goes, and its folder with it.
		fetched := r.c.fetched
		l.Look(r.publish(r.manifest(2, protocol.Switch, good, "gone/with/folder.nix")))
		l.settle(2)
		if report := r.c.last(); report.Phase != protocol.Confirmed || report.Built || report.Serial != 2 || r.c.fetched != fetched {
			t.Errorf("unchanged: report %+v, %d blobs fetched", report, r.c.fetched-fetched)
		}
		l.Look(r.publish(r.manifest(3, protocol.Switch, good)))
		if s := l.settle(3); s.Phase != protocol.Confirmed {
			t.Errorf("state %+v", s)
		}
		if _, err := os.Stat(filepath.Join(r.etc, "gone")); !os.IsNotExist(err) {
			t.Error("a file that went is still there")
		}
	})
}

func TestGoesBack(t *testing.T) {
	for content, want := range map[string]string{
		badUnit: "newly failed: app.service", lateUnit: "newly failed: late.service", badExit: "the activation failed (exit status 1)",
		hangs: "within the deadline", cutNetwork: "no route to host", badBoot: "boot default can't be set", dies: "the activation failed (exit status 2)",
	} {
		t.Run(content, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				defer l.stop()
				started := time.Now()
				l.Look(r.publish(r.manifest(1, protocol.Switch, content)))
				s := l.settle(1)
				if s.Phase != protocol.RolledBack || !strings.Contains(s.Reason, want) {
					t.Fatalf("state %+v, want %q", s, want)
				}
				if took := time.Since(started); took > 45*time.Second {
					t.Errorf("took %v", took)
				}
				r.runs("old", "old")
				if r.inEtc("flake.nix") != "" {
					t.Error("the source tree of a system that was rolled back is in place")
				}
				report := r.c.last()
				if report.Phase != protocol.RolledBack || !strings.Contains(report.Log, "nix-infra-activate-1.service") {
					t.Errorf("report %+v", report)
				}

				// The same closure is not tried again before it is released.
				l.Look(r.publish(r.manifest(2, protocol.Switch, content)))
				if s := l.settle(2); s.Phase != protocol.FailedPhase ||
					!strings.Contains(s.Reason, "in quarantine") || !strings.Contains(s.Reason, "d-1-"+content) || !strings.Contains(s.Reason, "node release n1") {
					t.Errorf("quarantine: state %+v", s)
				}
				must(t, l.Release(store(content)))
				l.Look(r.publish(r.manifest(3, protocol.Switch, content)))
				if s := l.settle(3); s.Phase != protocol.RolledBack {
					t.Errorf("released: state %+v", s)
				}
			})
		})
	}
}

func TestModeTest(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.manifest(1, protocol.Test, good)))
		if s := l.settle(1); s.Phase != protocol.Confirmed {
			t.Fatalf("state %+v", s)
		}
		r.runs(good, "old")
		if r.inEtc("flake.nix") != "" {
			t.Error("mode test changed the node's source tree")
		}
		// What runs already becomes the boot default without another activation.
		l.Look(r.publish(r.manifest(2, protocol.Switch, good)))
		if s := l.settle(2); s.Phase != protocol.Confirmed {
			t.Fatalf("state %+v", s)
		}
		r.runs(good, good)
		if r.inEtc("flake.nix") == "" {
			t.Error("mode switch left the node's source tree as it was")
		}
	})
}

func TestModeBoot(t *testing.T) {
	staged := func(r *rig, l *life, content string) {
		r.t.Helper()
		r.m.proven[store(content)] = true // mode boot writes what is unproven, by its nature
		l.Look(r.publish(r.manifest(1, protocol.Boot, content)))
		if s := l.settle(1); s.Phase != protocol.Staged {
			r.t.Fatalf("state %+v", s)
		}
		r.runs("old", content)
	}
	t.Run("proven", func(t *testing.T) {
		bubble(t, func(t *testing.T, r *rig) {
			l := r.start(0)
			staged(r, l, good)
			l.stop()
			l = r.start(0) // in the same boot: it goes on waiting
			time.Sleep(time.Minute)
			if s := l.State(); s.Phase != protocol.Staged {
				t.Errorf("state %+v", s)
			}
			l.stop()
			r.m.powerCut()
			l = r.start(0)
			defer l.stop()
			time.Sleep(20 * time.Second)
			if s := l.State(); s.Phase != protocol.Confirmed {
				t.Errorf("state %+v", s)
			}
			r.runs(good, good)
			if r.inEtc("flake.nix") == "" || r.c.last().Phase != protocol.Confirmed {
				t.Error("not kept or not reported")
			}
		})
	})
	t.Run("broken", func(t *testing.T) {
		bubble(t, func(t *testing.T, r *rig) {
			l := r.start(0)
			staged(r, l, badUnit)
			l.stop()
			r.m.powerCut()
			l = r.start(0)
			time.Sleep(20 * time.Second)
			if n := r.m.rebooted(); n != 1 {
				t.Fatalf("%d reboots, state %+v", n, l.State())
			}
			l.stop()
			r.m.powerCut()
			l = r.start(0)
			defer l.stop()
			if s := l.settle(1); s.Phase != protocol.RolledBack || !strings.Contains(s.Reason, "app.service") {
				t.Errorf("state %+v", s)
			}
			r.runs("old", "old")
			if n := r.m.rebooted(); n != 1 || len(l.Quarantined()) != 1 {
				t.Errorf("%d reboots, quarantine %v", n, l.Quarantined())
			}
		})
	})
	t.Run("superseded", func(t *testing.T) {
		bubble(t, func(t *testing.T, r *rig) {
			l := r.start(0)
			defer l.stop()
			staged(r, l, badUnit)
			l.Look(r.publish(r.manifest(2, protocol.Switch, good)))
			if s := l.settle(2); s.Phase != protocol.Confirmed {
				t.Errorf("state %+v", s)
			}
			r.runs(good, good)
			if r.c.reports[1].Phase != protocol.RolledBack || len(l.Quarantined()) != 0 {
				t.Errorf("reports %+v", r.c.reports)
			}
		})
	})
}

func TestDryActivate(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		look := r.publish(r.manifest(0, protocol.DryActivate, good))
		l.Look(look)
		time.Sleep(10 * time.Second)
		l.Look(look)
		time.Sleep(10 * time.Second)
		if s := l.State(); s != (State{}) {
			t.Errorf("state %+v", s)
		}
		if len(r.c.reports) != 1 || r.c.last().Phase != protocol.Confirmed || !strings.Contains(r.c.last().Log, "nix-infra-dry-") {
			t.Errorf("reports %+v", r.c.reports)
		}
		r.runs("old", "old")
		if _, err := os.Stat(l.stagedTree("d-0-good")); !os.IsNotExist(err) {
			t.Error("the dry run's tree is still there")
		}
	})
}

func TestSuperseded(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.manifest(1, protocol.Switch, "slow")))
		time.Sleep(5 * time.Second)
		if s := l.State(); s.Phase != protocol.Building {
			t.Fatalf("state %+v", s)
		}
		// Nobody but a deployer can make it stop.
		l.Look(protocol.Look{Version: protocol.Version, Serial: 99, Digest: protocol.Digest([]byte("nothing"))})
		time.Sleep(5 * time.Second)
		if s := l.State(); s.Phase != protocol.Building {
			t.Fatalf("state %+v", s)
		}
		l.Look(r.publish(r.manifest(100, protocol.Switch, good)))
		if s := l.settle(100); s.Phase != protocol.Confirmed {
			t.Fatalf("state %+v", s)
		}
		if first := r.c.reports[0]; first.Phase != protocol.FailedPhase || first.Reason != "superseded by deployment d-100-good" {
			t.Errorf("report %+v", first)
		}
	})
}

func TestRevertIsTriedUntilItWorks(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.manifest(1, protocol.Switch, badUnit)))
		time.Sleep(500 * time.Millisecond)
		r.m.mu.Lock()
		r.m.failures["run test"] = 4
		r.m.mu.Unlock()
		if s := l.settle(1); s.Phase != protocol.RolledBack {
			t.Errorf("state %+v", s)
		}
		r.runs("old", "old")
	})
}

func TestPhases(t *testing.T) {
	all := []protocol.Phase{"", protocol.Accepted, protocol.Fetching, protocol.Building, protocol.Activating, protocol.Checking, protocol.Confirming,
		protocol.Staged, protocol.Rebooting, protocol.Confirmed, protocol.RollingBack, protocol.RolledBack, protocol.FailedPhase}
	var ends func(p protocol.Phase, seen map[protocol.Phase]bool) bool
	ends = func(p protocol.Phase, seen map[protocol.Phase]bool) bool {
		if p.Ended() {
			return true
		}
		if seen[p] {
			return false
		}
		seen[p] = true
		for _, next := range legal[p] {
			if ends(next, seen) {
				return true
			}
		}
		return false
	}
	for _, from := range all {
		if !ends(from, map[protocol.Phase]bool{}) {
			t.Errorf("%q never ends", from)
		}
		if from.Ended() && from != protocol.Staged && len(legal[from]) != 0 {
			t.Errorf("%q is an end and goes on", from)
		}
		// Once something was switched, "nothing was switched" is no end. Checking may end so after a reboot that
		// switched nothing.
		before := []protocol.Phase{protocol.Accepted, protocol.Fetching, protocol.Building, protocol.Activating, protocol.Rebooting, protocol.Checking}
		if mayMove(from, protocol.FailedPhase) != slices.Contains(before, from) {
			t.Errorf("%q may end failed: %v", from, mayMove(from, protocol.FailedPhase))
		}
	}
}
