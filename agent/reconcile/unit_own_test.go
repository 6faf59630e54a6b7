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

// The activation brought another agent and did not start it: the system is proven by that one.
func TestAnotherAgentTakesOver(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.m.renews = true
		l := r.start(0)
		l.Look(r.publish(r.manifest(1, protocol.Switch, good)))
		time.Sleep(8 * time.Second) // the checks would be over by now
		if s := l.State(); s.Phase != protocol.Checking {
			t.Errorf("the old agent goes on: %+v", s)
		}
		l.stop()
		r.m.renews = true // asked again, it would begin again
		l = r.start(0)
		defer l.stop()
		if s := l.settle(1); s.Phase != protocol.Confirmed {
			t.Errorf("state %+v", s)
		}
		r.runs(good, good)
		if !r.m.renews || !slices.Contains(r.m.effects, "renewed") {
			t.Errorf("effects %q", r.m.effects)
		}
	})
}

func TestAnotherAgentThatCannotStart(t *testing.T) {
	for name, prepare := range map[string]func(m *machine){
		"refused":   func(m *machine) { m.failures["renew"] = renewTries },
		"not ended": func(m *machine) { m.renews = true },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				prepare(r.m)
				l := r.start(0)
				defer l.stop()
				m := r.manifest(1, protocol.Switch, good)
				m.Timeout = 90
				l.Look(r.publish(m))
				if s := l.settle(1); s.Phase != protocol.RolledBack || !strings.Contains(s.Reason, "the new system's agent can't be started") {
					t.Errorf("state %+v", s)
				}
				r.runs("old", "old")
			})
		})
	}
}

func TestIsThis(t *testing.T) {
	self, err := os.Executable()
	must(t, err)
	args := os.Args[1:]
	link := filepath.Join(t.TempDir(), "link")
	must(t, os.Symlink(self, link))
	for _, c := range []struct {
		what string
		argv []string
		want bool
	}{
		{"itself", append([]string{self}, args...), true},
		{"itself by a link", append([]string{link}, args...), true},
		{"with other arguments", append([]string{self, "other"}, args...), false},
		{"with arguments that are known later", []string{self, "--dir", "$STATE"}, true},
		{"another program", append([]string{"/bin/sh"}, args...), false},
		{"nothing", []string{"/nowhere"}, false},
	} {
		if got := isThis(c.argv); got != c.want {
			t.Errorf("%s: %v", c.what, got)
		}
	}
	systemds := [][]any{{"/bin/agent", []string{"agent", "run"}, false, uint64(1)}, {"/bin/second", []string{"second"}, false}}
	if got := firstCommand(systemds); !slices.Equal(got, []string{"/bin/agent", "run"}) {
		t.Errorf("first command %q", got)
	}
	for _, odd := range []any{nil, "", [][]any{}, [][]any{{"/bin/agent"}}, [][]any{{1, 2}}} {
		if got := firstCommand(odd); got != nil {
			t.Errorf("%v: %q", odd, got)
		}
	}
}
