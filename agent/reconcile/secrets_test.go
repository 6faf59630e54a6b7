package reconcile

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// service is a unit that loads a secret as it starts, and that no activation has a reason to restart.
type service struct {
	file   string // where it loads the secret from
	loaded string // what it found there, "" for nothing
	failed bool   // with that
	ended  bool   // by itself, and well
	since  time.Duration
}

// badSecret is a value with which no service starts.
const badSecret = "bad secret"

// inMemory is a folder on a tmpfs.
func inMemory(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "nix-infra-test-")
	must(t, err)
	must(t, os.Chmod(dir, 0o700))
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// begin starts a service, again or for the first time; the lock is held.
func (m *machine) begin(name string) {
	s := m.services[name]
	data, err := os.ReadFile(s.file)
	if err != nil {
		data = nil
	}
	s.loaded, s.since = strings.TrimPrefix(string(data), "encrypted "), time.Since(m.start)
	s.failed, s.ended = s.loaded == badSecret, false
	m.restarts = append(m.restarts, name)
}

func (m *machine) load(units []string) {
	for _, u := range units {
		m.begin(u)
	}
}

// loadAtBoot is what a boot does before there is an agent: no mount is left, and every service starts.
func (m *machine) loadAtBoot() {
	for name, s := range m.services {
		now, err := os.Readlink(s.file)
		if err == nil {
			folder := filepath.Dir(filepath.Dir(now))
			for _, entry := range names(folder) {
				unmount(filepath.Join(folder, entry))
			}
		}
		m.begin(name)
	}
}

func (a agent) Encrypt(_ context.Context, name string, value []byte) ([]byte, error) {
	return append([]byte("encrypted "), value...), a.act("encrypt")
}

const below = ".below"

// Mount puts a link in the folder's place, as a mount does to all that look.
func (a agent) Mount(_ context.Context, what, where string) error {
	if err := a.act("mount"); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if _, err := os.Lstat(where + below); err == nil {
		a.illegal("mounted twice over %s", where)
	}
	if err := os.Rename(where, where+below); err != nil {
		return err
	}
	return os.Symlink(what, where)
}

func (a agent) Unmount(_ context.Context, where string) error {
	if err := a.act("unmount"); err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	unmount(where)
	return nil
}

func unmount(where string) {
	if _, err := os.Lstat(where + below); err == nil {
		_ = os.Remove(where)
		_ = os.Rename(where+below, where)
	}
}

func (a agent) Loaders(_ context.Context, files []string) (all []Loader, err error) {
	if err := a.act("loaders"); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for name, s := range a.services {
		if slices.Contains(files, s.file) && !s.ended {
			all = append(all, Loader{Unit: name, Since: s.since})
		}
	}
	return all, nil
}

func (a agent) Restart(_ context.Context, units []string) (failed []string, err error) {
	if err := a.act("restart"); err != nil {
		return nil, err
	}
	time.Sleep(time.Second)
	if err := a.act("restarted"); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.load(units)
	for _, u := range units {
		if a.services[u].failed {
			failed = append(failed, u)
		}
	}
	return failed, nil
}

// sealed is a secret for the node.
func (r *rig) sealed(name, value string) protocol.SealedSecret {
	r.t.Helper()
	public, err := r.key.PublicKey()
	must(r.t, err)
	box, err := protocol.Seal([]byte(value), public)
	must(r.t, err)
	return protocol.SealedSecret{Name: name, Sealed: box, PreBuild: strings.HasPrefix(name, "build")}
}

// with gives a manifest secrets, as name, value, name, value….
func (r *rig) with(m *protocol.Manifest, pairs ...string) *protocol.Manifest {
	for i := 0; i < len(pairs); i += 2 {
		m.Secrets = append(m.Secrets, r.sealed(pairs[i], pairs[i+1]))
	}
	return m
}

// serve has a service run that loads a secret.
func (r *rig) serve(unit, secret string) {
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	r.m.services[unit] = &service{file: filepath.Join(r.loadsFrom, secret)}
	r.m.begin(unit)
	r.m.restarts = nil
}

// has checks what a service has loaded.
func (r *rig) has(unit, value string) {
	r.t.Helper()
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	if got := r.m.services[unit].loaded; got != value {
		r.t.Errorf("%s has loaded %q, want %q (effects %q, restarts %q)", unit, got, value, r.m.effects, r.m.restarts)
	}
	if s := r.m.services[unit]; s.failed || s.ended {
		r.t.Errorf("%s does not run", unit)
	}
}

// restarted checks which services were restarted since it was asked last.
func (r *rig) restarted(want ...string) {
	r.t.Helper()
	r.m.mu.Lock()
	defer r.m.mu.Unlock()
	slices.Sort(r.m.restarts)
	if !slices.Equal(r.m.restarts, want) {
		r.t.Errorf("restarted %q, want %q", r.m.restarts, want)
	}
	r.m.restarts = nil
}

func TestSecretsAreDeployed(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer func() { l.stop() }()
		r.serve("a.service", "a")
		r.serve("b.service", "b")
		r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one", "b", "same"))
		r.has("a.service", "one")
		r.has("b.service", "same")
		r.restarted("a.service", "b.service")
		builds := slices.Index(r.m.effects, "build")

		// The same values are no change, though they are sealed anew.
		r.confirm(l, r.with(r.manifest(2, protocol.Switch, good), "a", "one", "b", "same"))
		r.restarted()
		if c := l.History()[0]; c.Secrets != l.History()[1].Secrets || !c.idle() {
			t.Errorf("%+v", l.History())
		}
		// One that changes alone is proven and put in place; only what loads it is restarted, and nothing is built.
		r.confirm(l, r.with(r.manifest(3, protocol.Switch, good), "a", "two", "b", "same"))
		r.has("a.service", "two")
		r.restarted("a.service")
		if n := slices.Index(r.m.effects[builds+1:], "build"); n >= 0 {
			t.Errorf("something was built: %q", r.m.effects)
		}
		r.m.powerCut()
		r.has("a.service", "two")
		r.restarted("a.service", "b.service")
		l.stop()
		l = r.start(0)

		// The plain rollback goes back to the secret, too: that was a generation.
		r.confirm(l, r.back(4))
		r.has("a.service", "one")
		r.restarted("a.service")
		// What is listed no more is gone; what somebody else has there stays.
		must(t, os.WriteFile(filepath.Join(r.loadsFrom, "foreign"), []byte("theirs"), 0o600))
		r.confirm(l, r.with(r.manifest(5, protocol.Switch, "better"), "b", "same"))
		if got := names(r.loadsFrom); !slices.Equal(got, []string{"b", "foreign"}) {
			t.Errorf("%q are there", got)
		}
		if held := l.Secrets(); len(held) != 1 || held[0].Name != "b" || held[0].Written == 0 || held[0].PreBuild {
			t.Errorf("held: %+v", held)
		}
		// Each deployed system has the secrets that it was proven with.
		r.confirm(l, r.back(6))
		r.runs(good, good)
		r.has("a.service", "one")
	})
}

// A dry run says which secrets would change and what would be restarted for that, and changes none.
func TestDryRunTellsOfSecrets(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		r.m.said = "would restart the following units: web.service"
		l := r.start(0)
		defer l.stop()
		r.serve("a.service", "a")
		r.serve("b.service", "b")
		r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one", "b", "same", "gone", "x"))
		r.restarted("a.service", "b.service")
		sets := l.secretSets()
		for _, content := range []string{good, "better"} {
			l.Look(r.publish(r.with(r.manifest(0, protocol.DryActivate, content), "a", "two", "b", "same", "build.new", "y")))
			time.Sleep(20 * time.Second)
			p := r.c.last().Plan
			if p == nil || !slices.Equal(p.Secrets, []string{"a", "build.new", "gone"}) || !slices.Equal(p.Restart, []string{"a.service", "web.service"}) {
				t.Errorf("%s: plan %+v", content, p)
			}
		}
		r.has("a.service", "one")
		r.restarted()
		if got := l.secretSets(); !slices.Equal(got, sets) || len(names(r.builds)) != 0 {
			t.Errorf("sets %v, were %v; for builds %v", got, sets, names(r.builds))
		}
	})
}

// back is a rollback that names nothing.
func (r *rig) back(serial uint64) *protocol.Manifest {
	m := r.manifest(serial, protocol.Switch, "back")
	m.Files, m.Rollback = nil, &protocol.Rollback{}
	return m
}

// A file that was there under a secret's name is taken over, and comes back with each way back.
func TestForeignFileIsTakenOver(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		must(t, os.MkdirAll(r.loadsFrom, 0o755))
		must(t, os.WriteFile(filepath.Join(r.loadsFrom, "a"), []byte("theirs"), 0o644))
		r.serve("a.service", "a")
		l := r.start(0)
		defer func() { l.stop() }()
		r.deploy(l, r.with(r.manifest(1, protocol.Switch, badUnit), "a", "one"))
		r.has("a.service", "theirs")
		r.confirm(l, r.manifest(2, protocol.Switch, good)) // which brings none: theirs is theirs
		r.m.powerCut()
		r.has("a.service", "theirs")
		l.stop()
		l = r.start(0)
		r.confirm(l, r.with(r.manifest(3, protocol.Switch, "better"), "a", "one"))
		r.has("a.service", "one")
		r.confirm(l, r.back(4))
		r.has("a.service", "theirs")
		if info, err := os.Stat(r.loadsFrom); err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("%v, %v", info.Mode(), err)
		}
	})
}

func TestSecretsThatCannotBe(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		must(t, os.MkdirAll(filepath.Join(r.loadsFrom, "folder"), 0o700))
		l := r.start(0)
		defer l.stop()
		other := newRig(t)
		for _, c := range []struct {
			m    *protocol.Manifest
			says string
		}{
			{other.with(r.manifest(1, protocol.Switch, good), "a", "one"), "sealed to another key"},
			{r.with(r.manifest(2, protocol.Switch, good), "folder", "one"), "move it away"},
			{r.with(r.manifest(3, protocol.Switch, good), "build.netrc", "x", "build.netrc2", "y"), "join them"},
		} {
			if s := r.deploy(l, c.m); s.Phase != protocol.FailedPhase || !strings.Contains(s.Reason, c.says) {
				t.Errorf("%s: %+v", c.says, s)
			}
		}
		r.runs("old", "old")
		if left := names(r.builds); len(left) != 0 {
			t.Errorf("%q are left for builds", left)
		}
	})
}

// Builds find theirs in clear before they begin, again after a boot, and not after they are needed no more.
func TestSecretsForBuilds(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer func() { l.stop() }()
		r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "build.netrc", "machine"))
		for range 2 {
			file := filepath.Join(r.builds, "build.netrc")
			data, err := os.ReadFile(file)
			info, err2 := os.Stat(file)
			if err != nil || err2 != nil || string(data) != "machine" || info.Mode().Perm() != 0o400 {
				t.Errorf("%q, %v, %v", data, err, err2)
			}
			if !slices.Contains(r.m.effects, "build with "+file) {
				t.Errorf("effects %q", r.m.effects)
			}
			l.stop()
			must(t, os.Remove(file)) // as a boot does
			l = r.start(0)
			time.Sleep(time.Second)
		}
		// One that fails leaves none behind.
		r.deploy(l, r.with(r.manifest(2, protocol.Switch, badUnit), "build.other", "x"))
		if got := names(r.builds); !slices.Equal(got, []string{"build.netrc"}) {
			t.Errorf("%q", got)
		}
		r.confirm(l, r.manifest(3, protocol.Switch, "better"))
		if got := names(r.builds); len(got) != 0 {
			t.Errorf("%q", got)
		}
	})
}

// What was only tested is gone with the next boot, its secrets too; and a way back from there leads to them.
func TestSecretsThatAreTested(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		defer func() { l.stop() }()
		r.serve("a.service", "a")
		r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one"))
		r.confirm(l, r.with(r.manifest(2, protocol.Test, "better"), "a", "two"))
		r.has("a.service", "two")
		r.deploy(l, r.with(r.manifest(3, protocol.Switch, badUnit), "a", "three"))
		r.has("a.service", "two")
		if _, err := l.Rotate(t.Context(), r.rotate("a", "four")); code(err) != protocol.Conflict {
			t.Errorf("%v", err)
		}
		r.m.powerCut()
		r.has("a.service", "one")
		l.stop()
		l = r.start(0)
		time.Sleep(time.Second)
		r.confirm(l, r.with(r.manifest(4, protocol.Test, "better"), "a", "two"))
		r.confirm(l, r.with(r.manifest(5, protocol.Switch, "better"), "a", "two"))
		r.m.powerCut()
		r.has("a.service", "two")
	})
}

// What is staged finds its secrets at the boot that it waits for, and what runs until then keeps its own.
func TestSecretsThatAreStaged(t *testing.T) {
	for _, c := range []struct {
		content, value string
		phase          protocol.Phase
	}{{"better", "two", protocol.Confirmed}, {good, "two", protocol.Confirmed}, {badUnit, "one", protocol.RolledBack}} {
		t.Run(c.content, func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				for _, content := range []string{"never", "better", badUnit} { // whatever becomes of it
					r.m.proven[store(content)] = true
				}
				l := r.start(0)
				defer func() { l.stop() }()
				r.serve("a.service", "a")
				r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one"))
				r.restarted("a.service")
				// One that is superseded leaves no trace.
				r.deploy(l, r.with(r.manifest(2, protocol.Boot, "never"), "a", "never"))
				r.deploy(l, r.with(r.manifest(3, protocol.Boot, c.content), "a", "two"))
				if s := l.State(); s.Phase != protocol.Staged {
					t.Fatalf("%+v", s)
				}
				r.has("a.service", "one")
				r.restarted()
				r.m.mu.Lock()
				r.m.begin("a.service") // by itself, meanwhile
				r.m.mu.Unlock()
				r.has("a.service", "one")
				if _, err := l.Rotate(t.Context(), r.rotate("a", "four")); code(err) != protocol.Conflict {
					t.Errorf("%v", err)
				}
				r.m.powerCut()
				r.has("a.service", "two")
				l.stop()
				l = r.start(0)
				for range 60 {
					time.Sleep(time.Second)
					if r.m.rebooted() == 1 {
						r.m.powerCut()
						l.stop()
						l = r.start(0)
						break
					}
				}
				if s := l.settle(3); s.Phase != c.phase {
					t.Errorf("%+v", s)
				}
				r.has("a.service", c.value)
				r.m.powerCut()
				r.has("a.service", c.value)
			})
		})
	}
}

// Killed at every step, or without power, a node has the secrets that belong to the system that runs: at once, and
// after the next boot.
func TestSecretsKilledAtEveryStep(t *testing.T) {
	for _, c := range []struct {
		mode    protocol.Mode
		content string
		value   string
	}{
		{protocol.Switch, "better", "two"}, {protocol.Switch, good, "two"}, {protocol.Switch, badUnit, "two"}, {protocol.Switch, good, badSecret},
		{protocol.Switch, hangs, "two"}, {protocol.Test, "better", "two"},
	} {
		second := func(r *rig) (*life, protocol.Look) {
			l := r.start(0)
			r.serve("a.service", "a")
			r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one"))
			l.stop()
			r.steps = nil
			return l, r.publish(r.with(r.manifest(2, c.mode, c.content), "a", c.value))
		}
		var steps []string
		name := fmt.Sprintf("%s/%s/%s", c.mode, c.content, c.value)
		t.Run(name+"/undisturbed", func(t *testing.T) {
			bubble(t, func(t *testing.T, r *rig) {
				_, look := second(r)
				l := r.start(0)
				l.Look(look)
				l.settle(2)
				l.stop()
				steps = slices.Clone(r.steps)
			})
		})
		for n, step := range steps {
			for _, then := range []string{"restarted", "late", "power cut"} {
				t.Run(fmt.Sprintf("%s/%d-%s/%s", name, n+1, step, then), func(t *testing.T) {
					t.Parallel()
					bubble(t, func(t *testing.T, r *rig) {
						_, look := second(r)
						l := r.start(n + 1)
						l.Look(look)
						<-l.done
						switch then {
						case "late":
							time.Sleep(time.Minute)
						case "power cut":
							r.m.powerCut()
							// The boot default and what a boot finds can't change at one moment.
							if step != "boot-default" && (behaviour(r.m.running) != c.content || r.m.running == store(good)) {
								r.belongs(c.content, c.value)
							}
						}
						l = r.start(0)
						time.Sleep(time.Second)
						l.Look(look)
						s := l.settle(2)
						switch {
						case s.Phase == protocol.Confirmed && (c.content == badUnit || c.content == hangs || c.value == badSecret):
							t.Errorf("confirmed: %+v", s)
						case s.Phase == protocol.Confirmed && c.mode == protocol.Test && r.m.running == store(good):
							r.has("a.service", "one") // the power was cut after the end
						case s.Phase == protocol.Confirmed:
							r.has("a.service", c.value)
						case s.Phase == protocol.RolledBack:
							r.has("a.service", "one")
						default:
							t.Errorf("%+v", s)
						}
						l.stop()
						r.m.powerCut()
						value := "one"
						if s.Phase == protocol.Confirmed && c.mode != protocol.Test {
							value = c.value
						}
						r.has("a.service", value)
					})
				})
			}
		}
	}
}

// belongs checks that what a boot loaded is the running system's, where that can be told by the system.
func (r *rig) belongs(content, value string) {
	r.t.Helper()
	r.m.mu.Lock()
	running, loaded := behaviour(r.m.running), r.m.services["a.service"].loaded
	r.m.mu.Unlock()
	switch {
	case running == good && content != good && loaded != "one", running == content && content != good && loaded != value:
		r.t.Errorf("%s booted with the secret %q (effects %q)", running, loaded, r.m.effects)
	}
}

// Without any agent the timer takes the new secrets away, and restarts what had loaded them.
func TestTimerTakesSecretsBack(t *testing.T) {
	bubble(t, func(t *testing.T, r *rig) {
		l := r.start(0)
		r.serve("a.service", "a")
		r.confirm(l, r.with(r.manifest(1, protocol.Switch, good), "a", "one"))
		m := r.with(r.manifest(2, protocol.Switch, "better"), "a", "two")
		m.Settle = 20
		l.Look(r.publish(m))
		time.Sleep(10 * time.Second)
		r.has("a.service", "two")
		if s := l.State(); s.Phase != protocol.Checking {
			t.Fatalf("%+v", s)
		}
		l.stop()
		time.Sleep(time.Minute)
		r.has("a.service", "one")
		l = r.start(0)
		defer l.stop()
		if s := l.settle(2); s.Phase != protocol.RolledBack {
			t.Errorf("%+v", s)
		}
		r.runs(good, good)
		r.has("a.service", "one")
	})
}
