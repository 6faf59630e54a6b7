package reconcile

import (
	"context"
	"errors"
	"fmt"
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/agent/health"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

func (a agent) Declared(closure string) ([]health.Declaration, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	document := a.health[closure]
	if document == "" {
		return nil, nil
	}
	return health.Parse([]byte(document))
}

func (a agent) UnitState(_ context.Context, unit string) (string, error) {
	if err := a.act("unit state"); err != nil {
		return "", err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if state, ok := a.states[unit]; ok {
		return state, nil
	}
	return "active", nil
}

func (a agent) ClosureInfo(_ context.Context, closure string) ([]nix.PathInfo, error) {
	if err := a.act("closure"); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if info, ok := a.closures[closure]; ok {
		return info, nil
	}
	return nil, fmt.Errorf("path '%s' is not valid", closure)
}

func (a agent) DeleteGenerations(context.Context, []int) error {
	return errors.New("the engine deletes no generations")
}

func (a agent) CollectGarbage(context.Context) (int, int64, error) {
	return 0, 0, errors.New("the engine collects no garbage")
}

// declares has a system declare one check of a unit, with a grace of 10 s.
func (m *machine) declares(content, unit string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.health = map[string]string{store(content): fmt.Sprintf(`{"v":1,"checks":[{"name":"app","kind":"unit","unit":%q,"grace":10}]}`, unit)}
}

func (m *machine) set(unit, state string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.states = map[string]string{unit: state}
}

func TestDeclaredChecksProve(t *testing.T) {
	for _, mode := range []protocol.Mode{protocol.Switch, protocol.Test} {
		bubble(t, func(t *testing.T, r *rig) {
			r.m.declares(good, "app.service")
			r.m.set("app.service", "activating")
			l := r.start(0)
			defer l.stop()
			l.Look(r.publish(r.manifest(1, mode, good)))
			time.Sleep(10 * time.Second)
			if s := l.State(); s.Phase != protocol.Checking {
				t.Fatalf("while the check does not pass: %+v", s)
			}
			r.m.set("app.service", "active")
			if s := l.settle(1); s.Phase != protocol.Confirmed {
				t.Fatalf("state %+v", s)
			}
			checks := r.c.last().Checks
			if len(checks) != 1 || !checks[0].Passed || checks[0].Name != "app" || checks[0].Kind != "unit" || checks[0].Tries < 5 ||
				checks[0].Reason != "app.service is activating" || checks[0].Millis < 8000 {
				t.Errorf("%s: checks %+v", mode, checks)
			}
		})
	}
}

func TestDeclaredCheckRollsBack(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.m.declares(good, "app.service")
		r.m.set("app.service", "inactive")
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.manifest(1, protocol.Switch, good)))
		s := l.settle(1)
		if want := `health check "app" (unit) did not pass within its grace of 10s: app.service is inactive`; s.Phase != protocol.RolledBack || s.Reason != want {
			t.Errorf("state %+v", s)
		}
		r.runs("old", "old")
		if checks := r.c.last().Checks; len(checks) != 1 || checks[0].Passed || checks[0].Reason != "app.service is inactive" {
			t.Errorf("checks %+v", checks)
		}
		if l.Quarantined()[store(good)].Reason != s.Reason {
			t.Errorf("quarantine %+v", l.Quarantined())
		}
	})
}

// An agent that dies while it checks begins to check anew.
func TestDeclaredChecksSurviveTheAgent(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.m.declares(good, "app.service")
		r.m.set("app.service", "activating")
		l := r.start(0)
		l.Look(r.publish(r.manifest(1, protocol.Switch, good)))
		time.Sleep(8 * time.Second)
		if s := l.State(); s.Phase != protocol.Checking {
			t.Fatalf("state %+v", s)
		}
		l.stop()
		r.m.set("app.service", "active")
		l = r.start(0)
		defer l.stop()
		if s := l.settle(1); s.Phase != protocol.Confirmed {
			t.Fatalf("state %+v", s)
		}
		if checks := r.c.last().Checks; len(checks) != 1 || !checks[0].Passed || checks[0].Reason != "" {
			t.Errorf("checks %+v", checks)
		}
	})
}

func TestDeclaredChecksAfterABoot(t *testing.T) {
	for state, want := range map[string]protocol.Phase{"active": protocol.Confirmed, "failed": protocol.RolledBack} {
		bubble(t, func(t *testing.T, r *rig) {
			r.m.declares(good, "app.service")
			r.m.set("app.service", state)
			r.m.proven[store(good)] = true // mode boot writes what is unproven, by its nature
			l := r.start(0)
			l.Look(r.publish(r.manifest(1, protocol.Boot, good)))
			if s := l.settle(1); s.Phase != protocol.Staged || len(r.c.last().Checks) != 0 {
				t.Fatalf("state %+v, checks %+v", s, r.c.last().Checks)
			}
			for boots := 0; boots < 2 && l.State().Phase != want; boots++ {
				l.stop()
				r.m.powerCut()
				l = r.start(0)
				time.Sleep(30 * time.Second)
			}
			defer l.stop()
			if s := l.State(); s.Phase != want {
				t.Errorf("state %+v", s)
			}
			if checks := r.c.last().Checks; len(checks) != 1 || checks[0].Passed != (state == "active") {
				t.Errorf("checks %+v", checks)
			}
		})
	}
}

// What can't be understood fails before anything is switched.
func TestDamagedChecksSwitchNothing(t *testing.T) {
	for _, mode := range protocol.Modes {
		bubble(t, func(t *testing.T, r *rig) {
			r.m.health = map[string]string{store(good): `{"v":1,"checks":[{"name":"app","kind":"unit","unitt":"app.service"}]}`}
			l := r.start(0)
			defer l.stop()
			l.Look(r.publish(r.manifest(1, mode, good)))
			if mode == protocol.DryActivate {
				time.Sleep(10 * time.Second)
			} else if s := l.settle(1); s.Phase != protocol.FailedPhase {
				t.Errorf("%s: state %+v", mode, s)
			}
			if report := r.c.last(); report.Phase != protocol.FailedPhase || !strings.Contains(report.Reason, `check "app": field "unitt" is unknown`) {
				t.Errorf("%s: report %+v", mode, report)
			}
			r.runs("old", "old")
			for _, effect := range r.m.effects {
				if effect != "build" {
					t.Errorf("%s: %s", mode, effect)
				}
			}
		})
	}
}

const dryOutput = `would stop the following units: gone.service, web.service
would NOT stop the following changed units: user@1000.service
would activate the configuration...
would create /etc/x, would restart the following units:
would restart systemd
would reload the following units: dbus.service, firewall.service
would restart the following units: nix-daemon.service
would start the following units: new.socket, new.service, web.service
would NOT restart the following changed units: getty@tty1.service`

func TestPlanUnits(t *testing.T) {
	want := &protocol.UnitPlan{Stop: []string{"gone.service"}, Restart: []string{"nix-daemon.service", "web.service"},
		Reload: []string{"dbus.service", "firewall.service"}, Start: []string{"new.service", "new.socket"}}
	if got := planUnits(dryOutput); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
	if got := planUnits("would activate the configuration...\n"); !reflect.DeepEqual(got, &protocol.UnitPlan{}) {
		t.Errorf("nothing changes: %+v", got)
	}
}

func TestDryRunPlans(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.m.said = dryOutput
		many := []nix.PathInfo{{Path: store("hello-1.1"), Size: 300}}
		for i := range protocol.MaxPackages + 7 {
			many = append(many, nix.PathInfo{Path: store(fmt.Sprintf("new%d-1", i)), Size: 1})
		}
		r.m.closures = map[string][]nix.PathInfo{store("old"): {{Path: store("hello-1.0"), Size: 1000}}, store(good): many}
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.manifest(0, protocol.DryActivate, good)))
		time.Sleep(10 * time.Second)
		p := r.c.last().Plan
		if p == nil || len(p.Restart) != 2 || p.Size != 807 || p.Growth != -193 || len(p.Packages) != protocol.MaxPackages || p.More != 8 {
			t.Fatalf("plan %+v", p)
		}
		if hello := p.Packages[0]; hello.Name != "hello" || hello.Growth != -700 || hello.Before[0] != "1.0" || hello.After[0] != "1.1" {
			t.Errorf("%+v", hello)
		}
		if report := r.c.last(); report.Validate() != nil {
			t.Error(report.Validate())
		}
	})
	// Packages that can't be told are no failure.
	bubble(t, func(t *testing.T, r *rig) {
		r.m.said = dryOutput
		l := r.start(0)
		defer l.stop()
		l.Look(r.publish(r.manifest(0, protocol.DryActivate, good)))
		time.Sleep(10 * time.Second)
		if report := r.c.last(); report.Phase != protocol.Confirmed || report.Plan == nil || len(report.Plan.Restart) != 2 || !strings.Contains(report.Log, "warning: what changes in packages can't be told") {
			t.Errorf("report %+v", report)
		}
	})
}
