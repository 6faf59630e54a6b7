package nix

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

func TestCurrentGeneration(t *testing.T) {
	dir := t.TempDir()
	profile := filepath.Join(dir, "system")
	if n, err := currentGeneration(profile); n != 0 || err != nil {
		t.Errorf("none: %d, %v", n, err)
	}
	for link, want := range map[string]int{"system-42-link": 42, "/x/system-7-link": 7, "other-3-link": 0, "system-x-link": 0, "system-0-link": 0} {
		_ = os.Remove(profile)
		if err := os.Symlink(link, profile); err != nil {
			t.Fatal(err)
		}
		if n, err := currentGeneration(profile); n != want || (err == nil) != (want > 0) {
			t.Errorf("%s: %d, %v", link, n, err)
		}
	}
}

func TestGenerations(t *testing.T) {
	dir := t.TempDir()
	profile := filepath.Join(dir, "system")
	if all, err := generations(profile); len(all) != 0 || err != nil {
		t.Errorf("none: %v, %v", all, err)
	}
	for name, target := range map[string]string{"system-9-link": closure, "system-10-link": closure + "-b", "other-3-link": closure, "system-x-link": closure,
		"system-11-link": "/etc", "system": "system-9-link"} {
		if err := os.Symlink(target, filepath.Join(dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	before := time.Now()
	all, err := generations(profile)
	if err != nil || len(all) != 2 || all[0].Number != 10 || all[0].Closure != closure+"-b" || all[1].Number != 9 || all[1].Closure != closure {
		t.Fatalf("%+v, %v", all, err)
	}
	if age := before.Sub(all[0].Created); age < -time.Minute || age > time.Minute {
		t.Errorf("made at %v", all[0].Created)
	}
}

func TestDeleteGenerations(t *testing.T) {
	args := filepath.Join(t.TempDir(), "args")
	fake(t, "nix-env", `echo "$*" >`+args)
	if err := DeleteGenerations(t.Context(), []int{3, 12}); err != nil {
		t.Fatal(err)
	}
	if got, _ := os.ReadFile(args); string(got) != "-p /nix/var/nix/profiles/system --delete-generations 3 12\n" {
		t.Errorf("ran %q", got)
	}
	_ = os.Remove(args)
	for _, numbers := range [][]int{nil, {0}, {-1}, {3, -2}} {
		err := DeleteGenerations(t.Context(), numbers)
		if (err == nil) != (len(numbers) == 0) {
			t.Errorf("%v: %v", numbers, err)
		}
		if _, err := os.Stat(args); err == nil {
			t.Errorf("%v: Nix was run", numbers)
		}
	}
	fake(t, "nix-env", `echo "error: cannot delete current version of profile '/nix/var/nix/profiles/system'" >&2; exit 1`)
	if err := DeleteGenerations(t.Context(), []int{4}); err == nil || !strings.Contains(err.Error(), "deleting generations failed: cannot delete current version") {
		t.Errorf("got %v", err)
	}
}

func TestCollectGarbage(t *testing.T) {
	const stop = "error: interrupted"
	for script, want := range map[string]struct {
		paths int
		freed int64
		err   string
	}{
		`echo "deleting '/nix/store/x'" >&2; echo "12 store paths deleted, 3.50 MiB freed"`:  {12, 7 << 19, ""},
		`echo "0 store paths deleted, 0.00 MiB freed"`:                                       {0, 0, ""},
		`echo "1 store paths deleted, 0.5 KiB freed"`:                                        {1, 512, ""},
		`echo "4321 store paths deleted, 1.5 GiB freed"`:                                     {4321, 3 << 29, ""},
		`echo "note: currently hard linking saves 1.00 MiB" >&2; echo "nothing to see here"`: {0, 0, "did not say how much"},
		`echo "` + stop + `" >&2; exit 1`:                                                    {0, 0, "collecting garbage failed: interrupted"},
	} {
		fake(t, "nix-store", `[ "$*" = --gc ] || exit 9; `+script)
		paths, freed, err := CollectGarbage(t.Context())
		if paths != want.paths || freed != want.freed || (err == nil) != (want.err == "") || err != nil && !strings.Contains(err.Error(), want.err) {
			t.Errorf("%s: %d paths, %d bytes, %v", script, paths, freed, err)
		}
	}
}
