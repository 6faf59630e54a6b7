package testos

import (
	"encoding/json"
	"fmt"
	"io/fs"
	"path/filepath"
	"strings"
	"testing/fstest"

	"github.com/nix-infra/nix-infra/e2e/nar"
)

// NixpkgsPath is where a node has the stand-in of nixpkgs.
const NixpkgsPath = "/usr/lib/testos/nixpkgs"

// nixpkgsFiles are the files of the stand-in: its own, and testos, which it renders a configuration to.
func nixpkgsFiles() (fstest.MapFS, error) {
	files := fstest.MapFS{}
	for from, to := range map[string]string{"nixpkgs": "", "project/modules/testos": "testos"} {
		err := fs.WalkDir(Files, from, func(name string, entry fs.DirEntry, err error) error {
			if err != nil || entry.IsDir() {
				return err
			}
			data, err := Files.ReadFile(name)
			if err != nil {
				return err
			}
			files[filepath.Join(to, strings.TrimPrefix(name, from+"/"))] = &fstest.MapFile{Data: data, Mode: 0o644}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("testos: nixpkgs: %w", err)
		}
	}
	return files, nil
}

// WriteNixpkgs writes the stand-in of nixpkgs, a flake, to dir.
func WriteNixpkgs(dir string) error {
	files, err := nixpkgsFiles()
	if err != nil {
		return err
	}
	for name, file := range files {
		if err := writeFile(filepath.Join(dir, name), file.Data, file.Mode); err != nil {
			return err
		}
	}
	return nil
}

// FlakeLock is the flake.lock of a project whose one input is github:NixOS/nixpkgs/nixos-VERSION, by which that is the
// stand-in that each node has. So flake.nix is what it is anywhere, and evaluating it needs no network.
func FlakeLock(version string) ([]byte, error) {
	files, err := nixpkgsFiles()
	if err != nil {
		return nil, err
	}
	hash, err := nar.Hash(files, ".")
	if err != nil {
		return nil, fmt.Errorf("testos: nixpkgs: %w", err)
	}
	type object = map[string]any
	return json.MarshalIndent(object{
		"version": 7,
		"root":    "root",
		"nodes": object{
			"root": object{"inputs": object{"nixpkgs": "nixpkgs"}},
			"nixpkgs": object{
				"locked":   object{"type": "path", "path": NixpkgsPath, "narHash": hash, "lastModified": 1},
				"original": object{"type": "github", "owner": "NixOS", "repo": "nixpkgs", "ref": "nixos-" + version},
			},
		},
	}, "", "  ")
}
