package reconcile

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

// A tree that brings the module is given the node's facts, and is built again when they change: that is how a node gets
// another agent. A tree without it never sees them.
func TestFacts(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		facts, failure := "one", error(nil)
		r.facts = func(context.Context) ([]byte, error) { return []byte(facts), failure }
		l := r.start(0)
		defer l.stop()
		serial := uint64(0)
		deploy := func(more ...string) (built bool) {
			t.Helper()
			serial++
			l.Look(r.publish(r.manifest(serial, protocol.Switch, good, more...)))
			if s := l.settle(serial); s.Phase != protocol.Confirmed || s.Reason != "" {
				t.Fatalf("state %+v", s)
			}
			return r.c.last().Built
		}
		deploy()
		if r.inEtc(protocol.FactsFile) != "" {
			t.Error("a tree without the module was given facts")
		}
		if deploy(protocol.ModuleFile); r.inEtc(protocol.FactsFile) != "one" {
			t.Errorf("facts %q", r.inEtc(protocol.FactsFile))
		}
		if deploy(protocol.ModuleFile) {
			t.Error("nothing changed, and it was built")
		}
		facts = "two"
		if !deploy(protocol.ModuleFile) || r.inEtc(protocol.FactsFile) != "two" {
			t.Errorf("other facts, and the tree shows %q", r.inEtc(protocol.FactsFile))
		}
		if deploy(); r.inEtc(protocol.FactsFile) != "" || r.inEtc(protocol.ModuleFile) != "" {
			t.Error("the module went, and its facts did not")
		}

		failure = errors.New("the store is full")
		l.Look(r.publish(r.manifest(serial+1, protocol.Switch, good, protocol.ModuleFile)))
		if s := l.settle(serial + 1); s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, "the facts for the configuration: the store is full") {
			t.Errorf("state %+v", s)
		}
	})
}
