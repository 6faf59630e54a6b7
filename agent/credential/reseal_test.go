package credential

import (
	"errors"
	"os"
	"testing"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// TestReseal breaks sealing to another key off before each write: with both keys everything can be opened all the same, and
// done again it is sealed to the new one alone.
func TestReseal(t *testing.T) {
	next, err := nkeys.CreateCurveKeys()
	must(t, err)
	for ends := 0; ; ends++ {
		r := newRig(t)
		must(t, os.MkdirAll(r.o.Links, 0o700))
		must(t, os.WriteFile(r.File("theirs"), []byte("theirs=found"), 0o400))
		var sets []int
		for _, value := range []string{"one", "two"} {
			n := r.stage("a", value, "build-b", "same", "theirs", "ours")
			must(t, r.Show(t.Context(), n, n))
			sets = append(sets, n)
		}
		values := func(what string, o Options) {
			t.Helper()
			s, err := Open(o)
			must(t, err)
			for i, n := range sets {
				set, err := s.Get(n)
				must(t, err)
				for name, want := range map[string]string{"a": []string{"one", "two"}[i], "build-b": "same", "theirs": "ours"} {
					c, _ := set.Get(name)
					if got, err := s.Open(c); err != nil || string(got) != want {
						t.Errorf("broken off after %d, %s: set %d has %s = %q, %v", ends, what, n, name, got, err)
					}
				}
			}
			first, err := s.Get(firstSet)
			must(t, err)
			if c, _ := first.Get("theirs"); !c.Found || c.Sealed != nil {
				t.Errorf("%s: what was found is %+v", what, c)
			}
		}
		old := r.o
		writes := 0
		r.o.Write = func(path string, data []byte, mode os.FileMode) error {
			if writes++; writes > ends {
				return errors.New("killed")
			}
			return atomicfile.Write(path, data, mode)
		}
		err := r.Reseal(next)
		if done := writes <= ends; (err == nil) != done {
			t.Fatalf("broken off after %d: %v", ends, err)
		}
		both := old
		both.Next = next
		values("with both keys", both)
		s, err := Open(both)
		must(t, err)
		must(t, s.Reseal(next))
		alone := old
		alone.Key, alone.Next = next, nil
		values("with the new key", alone)
		s, err = Open(old)
		must(t, err)
		for _, n := range sets {
			set, err := s.Get(n)
			must(t, err)
			for _, c := range set.Secrets {
				if _, err := s.Open(c); err == nil {
					t.Errorf("the old key opens %s of set %d still", c.Name, n)
				}
			}
		}
		r.sees("a=two", "build-b=same", "theirs=ours")
		if writes <= ends {
			return
		}
	}
}
