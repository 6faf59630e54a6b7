package credential

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nats-io/nkeys"
	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// machine stands in for systemd: a mount is a link in the folder's place, which is the same to all that look.
type machine struct {
	t         *testing.T
	encrypted []string
}

const below = ".below"

func (m *machine) Encrypt(_ context.Context, name string, value []byte) ([]byte, error) {
	m.encrypted = append(m.encrypted, name)
	if string(value) == "no" {
		return nil, errors.New("the TPM is gone")
	}
	return append([]byte(name+"="), value...), nil
}

func (m *machine) Mount(_ context.Context, what, where string) error {
	if err := os.Rename(where, where+below); err != nil {
		return err
	}
	return os.Symlink(what, where)
}

func (m *machine) Unmount(_ context.Context, where string) error {
	if err := os.Remove(where); err != nil {
		return err
	}
	return os.Rename(where+below, where)
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// rig is a store, and the key that secrets are sealed to.
type rig struct {
	*Store
	t *testing.T
	m *machine
}

func newRig(t *testing.T) *rig {
	t.Helper()
	keys, err := os.MkdirTemp("/dev/shm", "nix-infra-test-")
	must(t, err)
	t.Cleanup(func() { os.RemoveAll(keys) })
	key, err := nkeys.CreateCurveKeys()
	must(t, err)
	m := &machine{t: t}
	dir := t.TempDir()
	s, err := Open(Options{Dir: filepath.Join(dir, "sets"), Links: filepath.Join(dir, "secrets"), Keys: filepath.Join(keys, "keys"), Key: key, System: m, Log: slog.New(slog.DiscardHandler)})
	must(t, err)
	return &rig{s, t, m}
}

// asked is the set of a manifest with secrets as name, value, name, value….
func (r *rig) asked(pairs ...string) Set {
	r.t.Helper()
	public, err := r.o.Key.PublicKey()
	must(r.t, err)
	var sealed []protocol.SealedSecret
	for i := 0; i < len(pairs); i += 2 {
		box, err := protocol.Seal([]byte(pairs[i+1]), public)
		must(r.t, err)
		sealed = append(sealed, protocol.SealedSecret{Name: pairs[i], Sealed: box, PreBuild: strings.HasPrefix(pairs[i], "build")})
	}
	live, _ := r.Standing()
	set, err := r.Asked(sealed, live)
	must(r.t, err)
	return set
}

func (r *rig) stage(pairs ...string) int {
	r.t.Helper()
	live, _ := r.Standing()
	set, err := r.Stage(r.t.Context(), r.asked(pairs...), live)
	must(r.t, err)
	return set.Number
}

// sees checks what units see: name=value of each, in order of name.
func (r *rig) sees(want ...string) {
	r.t.Helper()
	var got []string
	entries, _ := os.ReadDir(r.o.Links)
	for _, entry := range entries {
		if data, err := os.ReadFile(r.File(entry.Name())); err == nil {
			got = append(got, string(data))
		}
	}
	if !slices.Equal(got, want) {
		r.t.Errorf("%q are seen, want %q", got, want)
	}
}

// boot takes all mounts away, as a boot does.
func (r *rig) boot() {
	covered, err := filepath.Glob(filepath.Join(r.o.Dir, "*"+below))
	must(r.t, err)
	for _, folder := range covered {
		must(r.t, r.m.Unmount(r.t.Context(), strings.TrimSuffix(folder, below)))
	}
}

// Between any two states, units see what is to be seen in this boot, and a boot finds what it is to find.
func TestShow(t *testing.T) {
	r := newRig(t)
	sets := map[int]string{1: ""}
	for _, value := range []string{"two", "three", "four"} {
		n := r.stage("a", value)
		sets[n] = "a=" + value
		must(t, r.Show(t.Context(), n, n)) // so that each is made from the one before
	}
	want := func(set int) []string {
		if sets[set] == "" {
			return nil
		}
		return []string{sets[set]}
	}
	type state struct{ live, boots int }
	var paths [][]state
	for _, first := range []state{{1, 1}, {2, 2}} {
		for _, second := range []state{{3, first.boots}, {first.live, 3}} { // on trial, or staged
			for _, third := range []state{{3, 3}, {first.live, first.boots}, {4, 4}, {first.live, 4}, {3, 2}} {
				paths = append(paths, []state{first, second, third, {2, 2}})
			}
		}
	}
	for _, path := range paths {
		for n := range path {
			must(t, r.Show(t.Context(), 1, 1))
			for _, s := range path[:n+1] {
				must(t, r.Show(t.Context(), s.live, s.boots))
				must(t, r.Show(t.Context(), s.live, s.boots))
				r.sees(want(s.live)...)
				if live, boots := r.Standing(); live.Number != s.live || boots != s.boots {
					t.Errorf("%v: %d and %d", path, live.Number, boots)
				}
				must(t, r.Prune([]int{1, 2, 3, 4}))
			}
			last := path[n]
			r.boot()
			r.sees(want(last.boots)...)
			if t.Failed() {
				t.Fatal(path[:n+1])
			}
		}
	}
	must(t, r.Show(t.Context(), 1, 1))
	must(t, r.Prune(nil))
	if got := r.numbers(); !slices.Equal(got, []int{1}) {
		t.Errorf("sets %v are left", got)
	}
	if left, _ := os.ReadDir(r.o.Links); len(left) != 0 {
		t.Errorf("%v are left", left)
	}
}

// A set that is mounted over another one is not removed in its place.
func TestPruneSparesWhatIsMounted(t *testing.T) {
	r := newRig(t)
	two, three := r.stage("a", "two"), r.stage("a", "three")
	if err := unix.Mount(r.dir(three), r.dir(two), "", unix.MS_BIND, ""); err != nil {
		t.Skipf("only root can mount: %v", err)
	}
	defer unix.Unmount(r.dir(two), unix.MNT_DETACH)
	must(t, r.Prune([]int{three}))
	if data, err := os.ReadFile(filepath.Join(r.dir(three), "a")); string(data) != "a=three" {
		t.Errorf("%q, %v", data, err)
	}
}

func TestChangedByValue(t *testing.T) {
	r := newRig(t)
	n := r.stage("a", "1", "b", "2", "build.c", "3")
	must(t, r.Show(t.Context(), n, n))
	live, _ := r.Standing()
	for _, c := range []struct {
		asked []string
		names []string
		same  bool
	}{
		{[]string{"a", "1", "b", "2", "build.c", "3"}, nil, true},
		{[]string{"a", "1", "b", "x", "build.c", "3"}, []string{"b"}, false},
		{[]string{"a", "1", "build.c", "3"}, []string{"b"}, false},
		{[]string{"a", "1", "b", "2", "build.c", "3", "d", ""}, []string{"d"}, false},
	} {
		names, same := r.Changed(live, r.asked(c.asked...))
		if !slices.Equal(names, c.names) || same != c.same {
			t.Errorf("%q: %q, %v", c.asked, names, same)
		}
	}
	// What builds get besides is no other value for units.
	other := r.asked("a", "1", "b", "2", "build.c", "3")
	other.Secrets[0].PreBuild = true
	if names, same := r.Changed(live, other); len(names) != 0 || same {
		t.Errorf("%q, %v", names, same)
	}
	// What stays the same is not encrypted again, and is as old as before.
	r.m.encrypted = nil
	before, _ := live.Get("a")
	before.Written = 7
	live.Secrets[0] = before
	must(t, r.save(live))
	n = r.stage("a", "1", "b", "x")
	set, err := r.Get(n)
	must(t, err)
	if a, _ := set.Get("a"); !slices.Equal(r.m.encrypted, []string{"b"}) || a.Written != 7 {
		t.Errorf("encrypted %q, %+v", r.m.encrypted, a)
	}
}

// A set that can't be made leaves nothing behind.
func TestStageFails(t *testing.T) {
	r := newRig(t)
	live, _ := r.Standing()
	if _, err := r.Stage(t.Context(), r.asked("a", "1", "b", "no"), live); err == nil || !strings.Contains(err.Error(), `secret "b"`) {
		t.Error(err)
	}
	must(t, os.MkdirAll(r.File("c"), 0o700))
	if _, err := r.Stage(t.Context(), r.asked("c", "1"), live); err == nil || !strings.Contains(err.Error(), "move it away") {
		t.Error(err)
	}
	if got := r.numbers(); !slices.Equal(got, []int{1}) {
		t.Errorf("sets %v are left", got)
	}
}

// A store that is damaged can be repaired by the next set.
func TestDamagedStore(t *testing.T) {
	for name, damage := range map[string]func(r *rig) error{
		"no link": func(r *rig) error { return os.Remove(filepath.Join(r.o.Dir, nowLink)) },
		"a file":  func(r *rig) error { return os.WriteFile(filepath.Join(r.dir(2), setFile), []byte("{"), 0o600) },
		"no set":  func(r *rig) error { return os.RemoveAll(r.dir(2)) },
		"no files": func(r *rig) error {
			return errors.Join(os.Remove(filepath.Join(r.dir(2), "a")), os.RemoveAll(r.o.Links))
		},
	} {
		t.Run(name, func(t *testing.T) {
			r := newRig(t)
			must(t, r.Show(t.Context(), r.stage("a", "1"), 2))
			must(t, damage(r))
			s, err := Open(r.o)
			must(t, err)
			r.Store = s
			n := r.stage("a", "1", "b", "2")
			must(t, r.Show(t.Context(), n, n))
			r.sees("a=1", "b=2")
		})
	}
}

func TestDeliver(t *testing.T) {
	r := newRig(t)
	must(t, r.Deliver(r.asked("a", "1")))
	if _, err := os.Stat(r.o.Keys); err == nil {
		t.Error("the folder was made for nothing")
	}
	must(t, r.Deliver(r.asked("build.a", "1", "b", "2"), r.asked("build.a", "3", "build.c", "4")))
	must(t, os.WriteFile(r.KeyFile("theirs"), nil, 0o600))
	if data, err := os.ReadFile(r.KeyFile("build.a")); err != nil || string(data) != "3" {
		t.Errorf("%q, %v", data, err)
	}
	must(t, r.Deliver(r.asked("build.c", "4")))
	var left []string
	entries, err := os.ReadDir(r.o.Keys)
	must(t, err)
	for _, entry := range entries {
		left = append(left, entry.Name())
	}
	if !slices.Equal(left, []string{"build.c", "theirs"}) {
		t.Errorf("%q", left)
	}
	must(t, os.Chmod(r.o.Keys, 0o755))
	if err := r.Deliver(r.asked("build.c", "5")); err == nil || !strings.Contains(err.Error(), "0700") {
		t.Error(err)
	}
	r.o.Keys = "/proc" // no tmpfs on any machine, which the folder for temporary files may well be
	if err := r.Deliver(r.asked("build.c", "5")); err == nil || !strings.Contains(err.Error(), "lies on a disk") {
		t.Error(err)
	}
}

func FuzzSet(f *testing.F) {
	for _, seed := range []string{`{"set":2,"secrets":[{"name":"a","sealed":"eA==","written":1}]}`, `{"set":0}`, `[]`, ``} {
		f.Add([]byte(seed), []byte(`["a","../b",".c"]`))
	}
	dir := f.TempDir()
	s, err := Open(Options{Dir: dir, Links: filepath.Join(dir, "links"), Keys: filepath.Join(dir, "keys"), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, set, keys []byte) {
		must(t, os.WriteFile(filepath.Join(dir, "1", setFile), set, 0o600))
		must(t, os.WriteFile(filepath.Join(dir, keysFile), keys, 0o600))
		live, boots := s.Standing()
		if live.Number < firstSet || boots != firstSet {
			t.Errorf("%+v, %d", live, boots)
		}
		s.Changed(live, Set{})
		for _, name := range s.brought() {
			if filepath.Dir(s.KeyFile(name)) != s.o.Keys {
				t.Errorf("%q would be removed", s.KeyFile(name))
			}
		}
	})
}
