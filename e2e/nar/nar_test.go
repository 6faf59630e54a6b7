package nar_test

import (
	"io/fs"
	"os"
	"testing"
	"testing/fstest"

	"github.com/nix-infra/nix-infra/e2e/nar"
)

// The hashes are those of `nix hash path` (2.26.3).
func TestHash(t *testing.T) {
	for name, c := range map[string]struct {
		files fstest.MapFS
		want  string
	}{
		"a tree": {fstest.MapFS{
			"b/program": {Data: []byte("#!/bin/sh\n"), Mode: 0o755},
			"b/empty":   {Mode: 0o644},
			"a.nix":     {Data: []byte("{ }\n"), Mode: 0o600},
			"link":      {Data: []byte("b/program"), Mode: fs.ModeSymlink | 0o777},
		}, "sha256-ngnMADLT+btgzoODr8UhlV7J/N7nAAZ4GZyYiHlG1/8="},
		"an empty folder": {fstest.MapFS{".": {Mode: fs.ModeDir | 0o755}}, "sha256-pQpattmS9VmO3ZIQUFn66az8GSmB4IvYhTTCFn6SUmo="},
	} {
		if got, err := nar.Hash(c.files, "."); err != nil || got != c.want {
			t.Errorf("%s: %s, %v; want %s", name, got, err, c.want)
		}
		// And the same from a disk.
		dir := t.TempDir()
		if err := os.CopyFS(dir, c.files); err != nil {
			t.Fatal(err)
		}
		if got, err := nar.Hash(os.DirFS(dir), "."); err != nil || got != c.want {
			t.Errorf("%s, on disk: %s, %v; want %s", name, got, err, c.want)
		}
	}
}

func TestHashRefuses(t *testing.T) {
	if got, err := nar.Hash(os.DirFS(t.TempDir()), "nothing"); err == nil {
		t.Errorf("of nothing: %s", got)
	}
	if got, err := nar.Hash(os.DirFS("/dev"), "null"); err == nil {
		t.Errorf("of a device: %s", got)
	}
	if got, err := nar.Hash(os.DirFS(t.TempDir()), "../x"); err == nil {
		t.Errorf("of what is outside: %s", got)
	}
}
