package reconcile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/nix"
)

var errDead = errors.New("the agent is dead")

// machine is what survives the agent: systems, units, the timer, the boot default. Its units go on
// without the agent, as systemd's do. What must never happen is noted in wrong.
type machine struct {
	t *testing.T

	mu      sync.Mutex
	running string
	profile string
	boots   string // what the boot loader would boot
	boot    int
	start   time.Time
	failed  []string
	units   map[string]*unit
	timer   *time.Timer
	proven  map[string]bool // closures under which the controller was reached
	roots   string
	wrong   []string
	effects []string
	reboots int
	renews  bool // the agent's unit has another program

	profiling chan struct{}  // where there is one, SetProfile hangs until it is closed
	failures  map[string]int // acts that fail so many times

	generations []nix.Generation // of the profile, oldest first
	here        map[string]bool  // systems that can be switched to
	offline     bool             // no controller to be reached

	health   map[string]string         // what systems declare as health.json
	states   map[string]string         // of units that are not active
	said     string                    // by a dry run
	closures map[string][]nix.PathInfo // what is in them

	services map[string]*service // that load a secret, and run
	restarts []string
}

type unit struct {
	stop context.CancelFunc
	done chan struct{}
	exit int
	gone bool // was stopped
}

// The configuration's content decides how its system behaves.
const (
	good       = "good"
	badUnit    = "bad-unit"    // exit 4, a unit newly failed
	lateUnit   = "late-unit"   // exit 0, and a unit fails three seconds later
	badExit    = "bad-exit"    // exit 1
	hangs      = "hangs"       // never ends
	cutNetwork = "cut-network" // no controller to be reached
	badBoot    = "bad-boot"    // its boot default can't be written
	dies       = "dies"        // switches half: the units are stopped, the link is not set
)

func store(name string) string { return "/nix/store/" + strings.Repeat("a", 32) + "-" + name }

func newMachine(t *testing.T) *machine {
	old := store("old")
	return &machine{t: t, running: old, profile: old, boots: old, boot: 1, start: time.Now(), failed: []string{"ever.service"},
		units: map[string]*unit{}, services: map[string]*service{}, proven: map[string]bool{old: true}, roots: filepath.Join(t.TempDir(), "roots"), failures: map[string]int{},
		generations: []nix.Generation{{Number: 6, Closure: store("older")}, {Number: 7, Closure: old}}, here: map[string]bool{old: true, store("older"): true}}
}

// generation is the newest one's number; the lock is held.
func (m *machine) generation() int { return m.generations[len(m.generations)-1].Number }

func behaviour(closure string) string {
	_, name, _ := strings.Cut(closure, "-")
	return name
}

func (m *machine) effect(format string, args ...any) {
	m.effects = append(m.effects, fmt.Sprintf(format, args...))
}

func (m *machine) illegal(format string, args ...any) {
	m.wrong = append(m.wrong, fmt.Sprintf(format, args...))
}

// execute is a switch-to-configuration in its unit.
func (m *machine) execute(ctx context.Context, name string, j Job, u *unit) {
	defer close(u.done)
	kind := behaviour(j.Closure)
	if kind == hangs && j.Action == "test" {
		<-ctx.Done()
	}
	select {
	case <-ctx.Done():
		m.mu.Lock()
		u.gone, u.exit = true, -1
		m.mu.Unlock()
		return
	case <-time.After(time.Second):
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.effect("%s %s", j.Action, kind)
	switch j.Action {
	case "boot":
		if kind == badBoot {
			u.exit = 1
			return
		}
		if strings.Contains(name, "-boot-") && !m.proven[j.Closure] && !strings.Contains(name, "staged") {
			m.illegal("boot default set to %s, which was never proven", j.Closure)
		}
		if m.profile != j.Closure {
			m.illegal("boot default set to %s while the profile names %s", j.Closure, m.profile)
		}
		m.boots = j.Closure
	case "test":
		m.activated(kind, j.Closure, u)
		if j.Revert != nil {
			m.load(j.Revert.Loaders)
		}
	}
}

func (m *machine) activated(kind, closure string, u *unit) {
	m.failed = []string{"ever.service"}
	switch kind {
	case badExit:
		u.exit = 1
		m.running = closure
		return
	case dies:
		u.exit = 2
		m.failed = append(m.failed, "stopped.service")
		return
	case badUnit:
		u.exit = 4
		m.failed = append(m.failed, "app.service")
	case lateUnit:
		time.AfterFunc(3*time.Second, func() {
			m.mu.Lock()
			defer m.mu.Unlock()
			if m.running == closure {
				m.failed = append(m.failed, "late.service")
			}
		})
	}
	m.running = closure
}

// launch starts a unit; the lock is held.
func (m *machine) launch(j Job) *unit {
	if strings.Contains(j.Unit, "-activate-") && m.timer == nil {
		m.illegal("%s started without an armed revert", j.Unit)
	}
	if j.Revert != nil {
		unmount(j.Revert.Secrets)
		for _, other := range conflicting(*j.Revert) {
			if u := m.units[other]; u != nil {
				u.stop()
				delete(m.units, other)
				if !u.ended() {
					m.mu.Unlock()
					<-u.done
					m.mu.Lock()
				}
			}
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	u := &unit{stop: cancel, done: make(chan struct{})}
	m.units[j.Unit] = u
	go m.execute(ctx, j.Unit, j, u)
	return u
}

func (u *unit) ended() bool {
	select {
	case <-u.done:
		return true
	default:
		return false
	}
}

// powerCut stops everything and boots the boot default.
func (m *machine) powerCut() {
	m.mu.Lock()
	defer m.mu.Unlock()
	for name, u := range m.units {
		u.stop()
		delete(m.units, name)
	}
	if m.timer != nil {
		m.timer.Stop()
		m.timer = nil
	}
	m.running = m.boots
	m.failed = []string{"ever.service"}
	if behaviour(m.running) == badUnit {
		m.failed = append(m.failed, "app.service")
	}
	m.boot++
	m.start = time.Now()
	m.effect("booted %s", behaviour(m.boots))
	m.loadAtBoot()
}

// agent is one life of the agent on a machine: after its death nothing that it does has an effect.
type agent struct {
	*machine
	dead *bool // guarded by machine.mu
}

func (a agent) act(name string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if *a.dead {
		return errDead
	}
	if a.failures[name] > 0 {
		a.failures[name]--
		return fmt.Errorf("%s fails", name)
	}
	return nil
}

func (a agent) Observe(context.Context) (Observation, error) {
	if err := a.act("observe"); err != nil {
		return Observation{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return Observation{Running: a.running, Profile: a.profile, Generation: a.generation(), BootID: fmt.Sprint("boot-", a.boot),
		Uptime: time.Since(a.start), Failed: slices.Clone(a.failed)}, nil
}

func (a agent) Build(ctx context.Context, b Build) (string, error) {
	if err := a.act("build"); err != nil {
		return "", err
	}
	time.Sleep(time.Second) // in a bubble's time: who follows is there by then
	b.Log("building")
	a.mu.Lock()
	a.effect("build")
	if b.Netrc != "" {
		a.effect("build with %s", b.Netrc)
	}
	a.mu.Unlock()
	for _, file := range []string{"hardware-configuration.nix", "networking.nix"} {
		if _, err := os.Stat(filepath.Join(b.Dir, file)); err != nil {
			return "", err
		}
	}
	content, err := os.ReadFile(filepath.Join(b.Dir, "dir/configuration.nix"))
	if err != nil {
		return "", err
	}
	if string(content) == "slow" {
		<-ctx.Done()
		return "", ctx.Err()
	}
	a.mu.Lock()
	a.here[store(string(content))] = true
	a.mu.Unlock()
	return store(string(content)), a.act("build")
}

// Substitute knows of what a deployer signed and a cache has: all but what is called gone.
func (a agent) Substitute(ctx context.Context, s Substitution) error {
	if err := a.act("substitute"); err != nil {
		return err
	}
	s.Log("substituting")
	switch behaviour(s.Path) {
	case "slow":
		<-ctx.Done()
		return ctx.Err()
	case "unsigned":
		return errors.New("lacks a signature by a trusted key")
	}
	a.mu.Lock()
	a.effect("substitute %s", behaviour(s.Path))
	a.here[s.Path] = true
	a.mu.Unlock()
	return a.act("substitute")
}

func (a agent) Generations(context.Context) ([]nix.Generation, error) {
	if err := a.act("generations"); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	all := slices.Clone(a.generations)
	slices.Reverse(all)
	return all, nil
}

func (a agent) Check(closure string) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.here[closure] {
		return fmt.Errorf("%s is not here any more", closure)
	}
	return nil
}

func (a agent) SetProfile(_ context.Context, closure string) error {
	if err := a.act("profile"); err != nil {
		return err
	}
	if a.profiling != nil {
		<-a.profiling
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.effect("profile %s", behaviour(closure))
	a.profile = closure
	a.generations = append(a.generations, nix.Generation{Number: a.generation() + 1, Closure: closure})
	return nil
}

func (a agent) Arm(_ context.Context, r Revert) error {
	if err := a.act("arm"); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.timer != nil {
		return errors.New("the timer exists")
	}
	for _, name := range []string{"old", "new"} {
		if _, err := os.Readlink(filepath.Join(a.roots, name)); err != nil {
			a.illegal("armed without a gc root: %v", err)
		}
	}
	a.effect("arm")
	a.timer = time.AfterFunc(r.Timeout, func() {
		a.mu.Lock()
		defer a.mu.Unlock()
		if a.units[r.Job().Unit] == nil && a.timer != nil {
			a.effect("timer fires")
			a.launch(r.Job())
		}
	})
	return nil
}

func (a agent) Disarm(_ context.Context, r Revert) (bool, error) {
	if err := a.act("disarm"); err != nil {
		return false, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.timer != nil {
		a.timer.Stop()
		a.timer = nil
	}
	u := a.units[r.Job().Unit]
	if u != nil && !u.ended() {
		return true, nil
	}
	clear(a.units)
	return u != nil, nil
}

func (a agent) Run(ctx context.Context, j Job) (Outcome, error) {
	if err := a.act("run " + j.Action); err != nil {
		return Outcome{}, err
	}
	a.mu.Lock()
	u := a.units[j.Unit]
	if u == nil && j.Attach {
		a.mu.Unlock()
		return Outcome{}, nil
	}
	if u == nil || u.ended() && !j.Attach && (u.exit != 0 || j.Again) {
		u = a.launch(j)
	}
	a.mu.Unlock()
	select {
	case <-ctx.Done():
		return Outcome{}, ctx.Err()
	case <-u.done:
	}
	if err := a.act("await"); err != nil {
		return Outcome{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	return Outcome{Found: true, Exit: u.exit, Result: "result"}, nil
}

func (a agent) Journal(_ context.Context, unit string, _ int) (string, error) {
	return "log of " + unit + "\n" + a.said, a.act("journal")
}

func (a agent) Reboot(context.Context) error {
	if err := a.act("reboot"); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reboots++
	a.effect("reboot")
	return nil
}

// Renew tells of another agent once for each activation that brought one, and then kills this one.
func (a agent) Renew(context.Context) (bool, error) {
	if err := a.act("renew"); err != nil {
		return false, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.renews {
		return false, nil
	}
	a.renews = false
	a.effect("renewed")
	return true, nil
}

func (m *machine) rebooted() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.reboots
}
