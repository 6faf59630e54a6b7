package reconcile

import (
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// An engine at work, or one that goes on trying, is never found to hang.
func TestCheckOfAnEngineAtWork(t *testing.T) {
	for _, content := range []string{good, badUnit, hangs, cutNetwork, "slow"} {
		t.Run(content, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				defer l.stop()
				l.Look(r.publish(r.manifest(1, protocol.Switch, content)))
				for range 24 * 60 {
					time.Sleep(time.Minute)
					if err := l.Check(); err != nil {
						t.Fatal(err)
					}
				}
			})
		})
	}
	t.Run("going back for a day", func(t *testing.T) {
		bubble(t, func(t *testing.T, r *rig) {
			l := r.start(0)
			defer l.stop()
			l.Look(r.publish(r.manifest(1, protocol.Switch, badUnit)))
			time.Sleep(500 * time.Millisecond) // the activation runs
			r.m.mu.Lock()
			r.m.failures["run test"] = 1 << 30
			r.m.mu.Unlock()
			for range 24 * 60 {
				time.Sleep(time.Minute)
				if err := l.Check(); err != nil {
					t.Fatal(err)
				}
			}
			if s := l.State(); s.Phase != protocol.RollingBack {
				t.Errorf("state %+v", s)
			}
			r.m.mu.Lock()
			r.m.failures["run test"] = 0
			r.m.mu.Unlock()
			l.settle(1)
		})
	})
}

func TestCheckOfAnEngineThatHangs(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		r.m.profiling = make(chan struct{})
		l.Look(r.publish(r.manifest(1, protocol.Switch, good)))
		time.Sleep(time.Minute)
		if err := l.Check(); err != nil {
			t.Errorf("too early: %v", err)
		}
		time.Sleep(confirmTime)
		if err := l.Check(); err == nil || !strings.Contains(err.Error(), "confirming") {
			t.Errorf("Check: %v", err)
		}
		close(r.m.profiling)
		synctest.Wait()
	})
}
