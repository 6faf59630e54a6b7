package reconcile

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// recorded are the records in short: who, which deployment, the outcome.
func (r *rig) recorded() (all []string) {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	for _, a := range r.records {
		all = append(all, fmt.Sprintf("%s %s %s=%s", a.User, a.Role, a.Request, a.Outcome))
	}
	return all
}

func TestRecords(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		l.Look(r.publish(r.manifest(5, protocol.Switch, good)))
		l.settle(5)
		l.Look(r.publish(r.manifest(6, protocol.Switch, badUnit)))
		l.settle(6)
		l.Look(r.publish(r.manifest(0, protocol.DryActivate, good)))
		time.Sleep(10 * time.Second)
		// Looked at once more after a restart, the newest is neither tried nor refused.
		r.publish(r.manifest(6, protocol.Switch, badUnit))
		l.stop()
		l = r.start(0)
		defer l.stop()
		l.Look(protocol.Look{Version: protocol.Version})
		time.Sleep(10 * time.Second)
		older := r.announce(9, r.forge(r.signer, r.manifest(4, protocol.Switch, good+"er"), nodeName))
		l.Look(older)
		time.Sleep(10 * time.Second)
		l.Look(r.announce(9, []byte("{")))
		time.Sleep(10 * time.Second)
		want := []string{
			"deployer deployer d-5-good=", "deployer deployer d-5-good=ok",
			"deployer deployer d-6-bad-unit=", "deployer deployer d-6-bad-unit=failed",
			"deployer deployer d-0-good=", "deployer deployer d-0-good=ok",
			"deployer deployer d-4-gooder=outdated", "  =malformed",
		}
		if got := r.recorded(); !slices.Equal(got, want) {
			t.Errorf("records %q\nwant    %q", got, want)
		}
		if a := r.records[6]; a.Payload != older.Digest || a.Action != protocol.Deploy || a.Target != nodeName || a.Reason == "" {
			t.Errorf("%+v", a)
		}
	})
}

// Who gave an order is known after a restart, too.
func TestRecordAfterRestart(t *testing.T) {
	for _, step := range []string{"accepted", "armed", "checking"} {
		t.Run(step, func(t *testing.T) {
			steps := stepsOf(t, kind{source: built, mode: protocol.Switch}, good)
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(slices.Index(steps, step) + 1)
				l.Look(r.publish(r.manifest(1, protocol.Switch, good)))
				<-l.done
				l = r.start(0)
				defer l.stop()
				l.settle(1)
				if got := r.recorded(); !slices.Equal(got, []string{"deployer deployer d-1-good=", "deployer deployer d-1-good=ok"}) {
					t.Errorf("records %q", got)
				}
			})
		})
	}
}

// The agent of the old system goes on with what a newer one had begun.
func TestJournalOfNewerAgent(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		l.Look(r.publish(r.manifest(5, protocol.Switch, good)))
		l.settle(5)
		l.stop()
		file := filepath.Join(r.dir, journalFile)
		data, err := os.ReadFile(file)
		must(t, err)
		var j map[string]any
		must(t, json.Unmarshal(data, &j))
		j["later"] = "something"
		data, err = json.Marshal(j)
		must(t, err)
		must(t, os.WriteFile(file, data, 0o600))
		l = r.start(0)
		defer l.stop()
		if s := l.State(); s.Serial != 5 || s.Phase != protocol.Confirmed || s.Reason != "" {
			t.Errorf("state %+v", s)
		}
	})
}
