package reconcile

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

func (r *rig) rotate(name, value string) protocol.RotateOrder {
	return protocol.RotateOrder{Secret: r.sealed(name, value), Timeout: 30, Settle: 5}
}

func TestRotate(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer func() { l.stop() }()
		r.serve("a.service", "a")
		r.serve("b.service", "b")
		r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one", "b", "same"))
		r.confirm(l, r.with(r.manifest(2, protocol.Switch, "better"), "a", "one", "b", "same"))
		r.restarted("a.service", "b.service")

		got, err := l.Rotate(t.Context(), r.rotate("a", "two"))
		if err != nil || got.Same || !slices.Equal(got.Units, []string{"a.service"}) {
			t.Errorf("%+v, %v", got, err)
		}
		r.has("a.service", "two")
		r.restarted("a.service")
		if got, err := l.Rotate(t.Context(), r.rotate("a", "two")); err != nil || !got.Same {
			t.Errorf("%+v, %v", got, err)
		}
		// It is the generation's now: deploying the same changes nothing, a boot keeps it.
		r.confirm(l, r.with(r.manifest(3, protocol.Switch, "better"), "a", "two", "b", "same"))
		r.restarted()
		r.m.powerCut()
		r.has("a.service", "two")
		l.stop()
		l = r.start(0)
		// And what was proven before has what it was proven with.
		r.confirm(l, r.back(4))
		r.runs(good, good)
		r.has("a.service", "one")
		m := r.manifest(5, protocol.Switch, "to")
		m.Files, m.Rollback = nil, &protocol.Rollback{Path: store("better")}
		r.confirm(l, m)
		r.has("a.service", "two")
	})
}

func TestRotationIsRefused(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer l.stop()
		time.Sleep(time.Second) // it resumes first
		if _, err := l.Rotate(t.Context(), r.rotate("a", "x")); code(err) != protocol.Unknown {
			t.Errorf("%v", err)
		}
		r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one"))
		if _, err := l.Rotate(t.Context(), newRig(t).rotate("a", "x")); code(err) != protocol.Invalid {
			t.Errorf("%v", err)
		}
		l.Look(r.publish(r.with(r.manifest(2, protocol.Switch, "better"), "a", "one")))
		time.Sleep(3 * time.Second)
		if _, err := l.Rotate(t.Context(), r.rotate("a", "x")); code(err) != protocol.Conflict {
			t.Errorf("%v", err)
		}
		l.settle(2)
	})
}

func TestRotationIsTakenBack(t *testing.T) {
	for name, c := range map[string]struct {
		value string
		after func(r *rig)
		says  string
	}{
		"does not start": {badSecret, nil, "does not start with it: a.service"},
		"another fails": {"two", func(r *rig) {
			r.m.mu.Lock()
			r.m.failed = append(r.m.failed, "needs-a.service")
			r.m.mu.Unlock()
		}, "newly failed: needs-a.service"},
		"ends": {"two", func(r *rig) {
			time.Sleep(time.Second)
			r.m.mu.Lock()
			r.m.services["a.service"].ended = true
			r.m.mu.Unlock()
		}, "a.service did not stay up with it"},
		"cut off": {"two", func(r *rig) { r.setOffline(true) }, "the controller could not be reached"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				l := r.start(0)
				defer l.stop()
				r.serve("a.service", "a")
				r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one"))
				done := make(chan error)
				go func() {
					_, err := l.Rotate(t.Context(), r.rotate("a", c.value))
					done <- err
				}()
				time.Sleep(500 * time.Millisecond) // it is being restarted
				if c.after != nil {
					c.after(r)
				}
				err := <-done
				if err == nil {
					t.Fatal("it was taken")
				}
				if code(err) != protocol.Failed || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "the old value is back") {
					t.Errorf("%v", err)
				}
				r.has("a.service", "one")
				r.m.powerCut()
				r.has("a.service", "one")
				if l.j.Rotation != nil || len(l.secretSets()) != 2 {
					t.Errorf("left: %+v, sets %v", l.j.Rotation, l.secretSets())
				}
			})
		})
	}
}

// secretSets are the sets that are kept.
func (l *life) secretSets() (all []string) {
	for _, name := range names(l.o.Dir + "/" + secretsDir) {
		if strings.Trim(name, "0123456789") == "" {
			all = append(all, name)
		}
	}
	return all
}

func TestRotationKilledAtEveryStep(t *testing.T) {
	for n := range 4 {
		for _, then := range []string{"restarted", "power cut"} {
			t.Run(fmt.Sprintf("%d/%s", n+1, then), func(t *testing.T) {
				bubble(t, func(t *testing.T, r *rig) {
					l := r.start(0)
					r.serve("a.service", "a")
					r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one"))
					l.stop()
					r.steps = nil
					l = r.start(n + 1)
					time.Sleep(time.Second)
					ended := make(chan struct{})
					go func() {
						defer close(ended)
						_, _ = l.Rotate(t.Context(), r.rotate("a", "two"))
					}()
					<-ended
					time.Sleep(20 * time.Second)
					if then == "power cut" {
						r.m.powerCut()
					}
					value := "one"
					if slices.Contains(r.steps, "rotated") {
						value = "two"
					} else if then == "power cut" {
						r.has("a.service", "one") // before there is an agent
					}
					l.stop()
					l = r.start(0)
					defer l.stop()
					time.Sleep(5 * time.Second)
					r.has("a.service", value)
					r.m.powerCut()
					r.has("a.service", value)
					if l.j.Rotation != nil {
						t.Errorf("left: %+v", l.j.Rotation)
					}
				})
			})
		}
	}
}
