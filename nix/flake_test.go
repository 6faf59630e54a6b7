package nix

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestInputURIs: an evaluation may reach what the flake's lock names, written as Nix 2.26 writes it, and nothing beside it.
func TestInputURIs(t *testing.T) {
	dir := t.TempDir()
	if all, err := inputURIs(dir); err != nil || all != nil {
		t.Errorf("without a lock: %q %v", all, err)
	}
	const lock = `{"version": 7, "root": "root", "nodes": {
		"root": {"inputs": {"dep": "dep", "nixpkgs": "nixpkgs"}},
		"dep": {"locked": {"lastModified": 1795749864, "narHash": "sha256-fWN2HGkHkWo0Kv/hZSa7pjniwhLI7uzcSixMuP3KFZ8=", "path": "/tmp/t/dep", "type": "path"}},
		"nixpkgs": {"locked": {"lastModified": 1, "narHash": "sha256-x", "owner": "NixOS", "repo": "nixpkgs", "rev": "0123", "type": "github"}, "original": {"type": "github", "owner": "evil", "repo": "x"}},
		"tar": {"locked": {"type": "tarball", "url": "https://example.org/a/b.tar.gz?rev=1", "narHash": "sha256-x"}},
		"git": {"locked": {"type": "git", "url": "file:///srv/x", "ref": "refs/heads/main", "rev": "0123", "revCount": 7, "submodules": true, "shallow": false, "lastModified": 1}},
		"old": {"locked": {"type": "git", "url": "git://example.org/x", "rev": "0123"}},
		"inside": {"locked": {"type": "path", "path": "./sub"}},
		"local": {"locked": {"type": "tarball", "url": "file:///home/u/x.tar.gz"}},
		"host": {"locked": {"type": "file", "url": "https://example.org"}},
		"words": {"locked": {"type": "tarball", "url": "https://example.org/ http://127.0.0.1/ /x"}},
		"wrong": {"locked": {"type": 7, "url": [], "path": {}}}}}`
	if err := os.WriteFile(filepath.Join(dir, "flake.lock"), []byte(lock), 0o644); err != nil {
		t.Fatal(err)
	}
	all, err := inputURIs(dir)
	want := []string{
		"git+file:///srv/x?ref=refs/heads/main&rev=0123&submodules=1",
		"git://example.org/x?rev=0123",
		"github:NixOS/nixpkgs",
		"https://example.org/a/",
		"path:/tmp/t/dep?lastModified=1795749864&narHash=sha256-fWN2HGkHkWo0Kv/hZSa7pjniwhLI7uzcSixMuP3KFZ8%3D",
	}
	if err != nil || !slices.Equal(all, want) {
		t.Errorf("%q %v, want %q", all, err, want)
	}
	if err := os.WriteFile(filepath.Join(dir, "flake.lock"), []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := inputURIs(dir); err == nil || !strings.Contains(err.Error(), "flake.lock") {
		t.Errorf("of a damaged lock: %v", err)
	}
}
