package projectfiles_test

import (
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
)

// TestRace: while something swaps files and folders for links to secrets as fast as it can, no secret is read and nothing
// is written outside.
func TestRace(t *testing.T) {
	dir, f := project(t)
	outside := filepath.Dir(dir)
	write(t, filepath.Join(outside, "victim/a.nix"), secret)
	write(t, filepath.Join(dir, "modules/good/a.nix"), "good\n")
	// Each is a name that is by turns the good thing and the link.
	swaps := []struct{ name, good, link string }{
		{"modules/file.nix", "good\n", "../secrets/a"},
		{"modules/outfile.nix", "good\n", filepath.Join(outside, "victim/a.nix")},
		{"modules/folder", "", "../../victim"},
		{"modules/inner", "", "../secrets"},
	}
	var stop atomic.Bool
	var swapper, users sync.WaitGroup
	var swapped atomic.Int64
	for _, s := range swaps {
		at := filepath.Join(dir, s.name)
		swapper.Go(func() {
			for !stop.Load() {
				_ = os.RemoveAll(at)
				if s.good != "" {
					_ = os.WriteFile(at, []byte(s.good), 0o644)
				} else {
					_ = os.MkdirAll(at, 0o755)
					_ = os.WriteFile(at+"/a.nix", []byte("good\n"), 0o644)
				}
				_ = os.RemoveAll(at)
				_ = os.Symlink(s.link, at)
				swapped.Add(1)
			}
		})
	}
	var read, refused atomic.Int64
	note := func(what, content string, err error) {
		if err != nil {
			refused.Add(1)
			return
		}
		read.Add(1)
		if strings.Contains(content, secret) {
			t.Errorf("%s gave a secret", what)
			stop.Store(true)
		}
	}
	for range 2 {
		users.Go(func() {
			for i := 0; (i < 100 || read.Load() == 0 || refused.Load() == 0 || swapped.Load() < 100) && !stop.Load() && t.Context().Err() == nil; i++ {
				for _, name := range []string{"modules/file.nix", "modules/outfile.nix", "modules/folder/a.nix", "modules/inner/a", "modules/inner/a.nix"} {
					text, err := f.Read(name)
					if err != nil {
						text = &projectfiles.Text{}
					}
					note("Read of "+name, text.Content, err)
				}
				found, _, err := f.Search(t.Context(), projectfiles.Search{Path: "modules", Pattern: "SECRET|good"})
				for _, m := range found {
					note("Search", m.Content, err)
				}
				for _, name := range []string{"modules/file.nix", "modules/outfile.nix", "modules/folder/a.nix", "modules/inner/a"} {
					before, _, err := f.Change(name, "", func(s string) (string, error) { return s + "changed\n", nil })
					if err == nil && strings.Contains(before.Content, secret) {
						t.Errorf("Change of %s had a secret before", name)
					}
				}
				_, _ = f.Create("modules/folder/new.nix", "new\n")
				_, _ = f.Create("modules/inner/new.nix", "new\n")
			}
		})
	}
	users.Wait()
	stop.Store(true)
	swapper.Wait()
	t.Logf("%d read, %d refused, %d swaps", read.Load(), refused.Load(), swapped.Load())
	for _, name := range []string{filepath.Join(outside, "victim/a.nix"), filepath.Join(dir, "secrets/a")} {
		if data, err := os.ReadFile(name); err != nil || string(data) != secret {
			t.Errorf("%s is %q now (%v)", name, data, err)
		}
	}
	for _, folder := range []string{filepath.Join(outside, "victim"), filepath.Join(dir, "secrets")} {
		if entries, err := os.ReadDir(folder); err != nil || len(entries) != 1 {
			t.Errorf("%s has %v now (%v)", folder, entries, err)
		}
	}
}

func FuzzName(f *testing.F) {
	for _, name := range escapes {
		f.Add(name)
	}
	dir := f.TempDir()
	outside := filepath.Join(dir, "secret")
	if err := os.MkdirAll(filepath.Join(dir, "project/nodes"), 0o755); err != nil {
		f.Fatal(err)
	}
	for _, name := range []string{outside, filepath.Join(dir, "project/.env"), filepath.Join(dir, "project/nodes/.x"), filepath.Join(dir, "project/nodes/a.creds")} {
		if err := os.WriteFile(name, []byte(secret), 0o644); err != nil {
			f.Fatal(err)
		}
	}
	folder := projectfiles.New(filepath.Join(dir, "project"))
	f.Fuzz(func(t *testing.T, name string) {
		if text, err := folder.Read(name); err == nil {
			t.Errorf("%q was read: %q", name, text.Content)
		}
	})
}
