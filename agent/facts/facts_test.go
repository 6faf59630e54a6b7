package facts

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// shelf is a store: what is put into it has a path by its content.
type shelf struct {
	t     *testing.T
	added []string // the contents, in order
}

func (s *shelf) add(_ context.Context, dir string) (nix.Fixed, error) {
	name := filepath.Base(dir)
	program := filepath.Join(dir, "bin", name)
	data, err := os.ReadFile(program)
	if err != nil {
		return nix.Fixed{}, err
	}
	if info, err := os.Stat(program); err != nil || info.Mode()&0o100 == 0 {
		s.t.Errorf("%s can't be run: %v", program, err)
	}
	s.added = append(s.added, name+"="+string(data))
	digest := strings.NewReplacer("e", "a", "o", "a", "t", "a", "u", "a").Replace(protocol.Digest(data))
	return nix.Fixed{Path: nix.StoreDir + "/" + digest[:32] + "-" + name, Hash: "sha256:" + digest[:52]}, nil
}

func put(t *testing.T, file, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	fresh := file + ".new"
	if err := os.WriteFile(fresh, []byte(content), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(fresh, file); err != nil { // as enrolment does
		t.Fatal(err)
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	store := &shelf{t: t}
	s := &Source{Node: "web1", Dir: filepath.Join(dir, "agent"), Controller: filepath.Join(dir, "controller"), Roots: filepath.Join(dir, "roots"), Add: store.add}
	read := func() (doc protocol.NodeFacts) {
		t.Helper()
		data, err := s.File(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if err := json.Unmarshal(data, &doc); err != nil {
			t.Fatal(err)
		}
		return doc
	}
	added := func(want ...string) {
		t.Helper()
		if strings.Join(store.added, " ") != strings.Join(want, " ") {
			t.Fatalf("added %q, not %q", store.added, want)
		}
		store.added = nil
	}
	root := func(name string) string { to, _ := os.Readlink(filepath.Join(s.Roots, name)); return to }

	put(t, filepath.Join(s.Dir, "bin", agentName), "one")
	put(t, filepath.Join(s.Dir, "store", agentName, "bin", agentName), "of an agent that was killed")
	first := read()
	if first.Version != protocol.Version || first.Node != "web1" || !strings.HasSuffix(first.System, "-linux") || first.Agent == nil || first.Agent.Name != agentName || first.Controller != nil {
		t.Errorf("%+v", first)
	}
	added(agentName + "=one")
	if !strings.HasSuffix(root(agentName), "-"+agentName) {
		t.Errorf("the gc root is %q", root(agentName))
	}

	// Enrolled again: another file, and another program. The one before is let go of.
	before := root(agentName)
	put(t, filepath.Join(s.Dir, "bin", agentName), "two")
	put(t, filepath.Join(s.Controller, "bin", controllerName), "three")
	put(t, filepath.Join(s.Controller, "controller.yaml"), "")
	second := read()
	if second.Agent.Hash == first.Agent.Hash || second.Controller == nil || second.Controller.Name != controllerName || !second.Controller.Settings || root(agentName) == before {
		t.Errorf("%+v", second)
	}
	added(agentName+"=two", controllerName+"=three")

	if left, err := os.ReadDir(s.Dir); err != nil || len(left) != 1 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// Nothing is copied or hashed for each deployment, but what the garbage collector took is there again.
func TestUnchanged(t *testing.T) {
	dir := t.TempDir()
	there := filepath.Join(dir, "object")
	adds := 0
	s := &Source{Node: "web1", Dir: dir, Roots: filepath.Join(dir, "roots"), Add: func(context.Context, string) (nix.Fixed, error) {
		adds++
		put(t, there, "x")
		return nix.Fixed{Path: nix.StoreDir + "/" + strings.Repeat("a", 32) + "-x", Hash: "sha256:x"}, nil
	}}
	put(t, filepath.Join(dir, "bin", agentName), "one")
	first, err := s.File(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	known := s.known[agentName]
	known.Path = there // a path that is there, as one in the store would be
	s.known[agentName] = known
	if again, err := s.File(t.Context()); err != nil || string(again) != string(first) || adds != 1 {
		t.Errorf("%s, %v; added %d times", again, err, adds)
	}
	if err := os.Remove(there); err != nil {
		t.Fatal(err)
	}
	if _, err := s.File(t.Context()); err != nil || adds != 2 {
		t.Errorf("%v; added %d times", err, adds)
	}
}

// An agent that was started from elsewhere is in the facts all the same: a system without one would be lost.
func TestStartedFromElsewhere(t *testing.T) {
	store := &shelf{t: t}
	s := &Source{Node: "web1", Dir: t.TempDir(), Roots: t.TempDir(), Add: store.add}
	data, err := s.File(t.Context())
	if err != nil || !strings.Contains(string(data), `"agent":{"name":"nix-infra-agent"`) || len(store.added) != 1 {
		t.Errorf("%s, %v", data, err)
	}
	s.Add = func(context.Context, string) (nix.Fixed, error) { return nix.Fixed{}, errors.New("the disk is full") }
	s.known = nil
	if _, err := s.File(t.Context()); err == nil || !strings.Contains(err.Error(), "the disk is full") {
		t.Errorf("%v", err)
	}
}
