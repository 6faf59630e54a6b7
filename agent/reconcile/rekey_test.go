package reconcile

import (
	"errors"
	"testing"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
)

func curveKey(t *testing.T) nkeys.KeyPair {
	t.Helper()
	key, err := nkeys.CreateCurveKeys()
	must(t, err)
	return key
}

// TestRekey: a node with other keys has the secrets that it had, and those of the systems that it goes back to.
func TestRekey(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer func() { l.stop() }()
		r.serve("a.service", "a")
		r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one"))
		r.confirm(l, r.with(r.manifest(2, protocol.Switch, "better"), "a", "two"))
		r.restarted("a.service", "a.service")

		// What can't be taken leaves the old key in its place, for this agent and the next one.
		r.nextKey = curveKey(t)
		if err := l.Rekey(r.nextKey, func() error { return errors.New("the disk is full") }); code(err) != protocol.Failed {
			t.Errorf("%v", err)
		}
		if got, err := l.Rotate(t.Context(), r.rotate("a", "two")); err != nil || !got.Same {
			t.Errorf("%+v, %v", got, err)
		}
		l.stop()
		l = r.start(0)
		r.confirm(l, r.with(r.manifest(3, protocol.Switch, "better"), "a", "two"))
		r.restarted()

		taken := false
		must(t, l.Rekey(r.nextKey, func() error { taken = true; return nil }))
		if !taken {
			t.Error("the key was not taken")
		}
		// Nothing may be sealed to the old key any more.
		if _, err := l.Rotate(t.Context(), r.rotate("a", "three")); code(err) != protocol.Conflict {
			t.Errorf("a rotation after it: %v", err)
		}
		look := r.publish(r.with(r.manifest(4, protocol.Switch, "best"), "a", "four"))
		l.Look(look)
		time.Sleep(time.Minute)
		if s := l.State(); s.Serial != 3 {
			t.Errorf("it went on with %+v", s)
		}
		l.stop()

		r.key, r.nextKey = r.nextKey, nil
		l = r.start(0)
		r.has("a.service", "two")
		r.confirm(l, r.with(r.manifest(5, protocol.Switch, "better"), "a", "two"))
		r.restarted() // it is the same value, whatever it was sealed to
		if _, err := l.Rotate(t.Context(), r.rotate("a", "three")); err != nil {
			t.Error(err)
		}
		r.has("a.service", "three")
		m := r.manifest(6, protocol.Switch, "back")
		m.Files, m.Rollback = nil, &protocol.Rollback{Path: store(good)}
		r.confirm(l, m)
		r.has("a.service", "one")
	})
}

func TestRekeyIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		time.Sleep(time.Second) // it resumes first
		refused := func(what string) {
			t.Helper()
			err := l.Rekey(curveKey(t), func() error { t.Errorf("%s: the key was taken", what); return nil })
			if code(err) != protocol.Conflict {
				t.Errorf("%s: %v", what, err)
			}
		}
		r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one"))
		l.Look(r.publish(r.with(r.manifest(2, protocol.Switch, "better"), "a", "two")))
		time.Sleep(3 * time.Second)
		refused("a deployment is under way")
		l.settle(2)
		r.confirm(l, r.with(r.manifest(3, protocol.Test, good), "a", "three"))
		refused("what runs was only tested")
		r.confirm(l, r.with(r.manifest(4, protocol.Switch, good), "a", "one"))
		r.stage(l, 5, "staged")
		refused("something is staged")
	})
}
