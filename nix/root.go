package nix

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
)

// RootsDir is where our gc roots are: symbolic links to what the garbage collector has to keep.
const RootsDir = "/nix/var/nix/gcroots/nix-infra"

// SetRoot keeps a closure from the garbage collector under a name, in place of what the name kept
// before; storePath "" lets go of it. dir is RootsDir, but for tests.
func SetRoot(dir, name, storePath string) error {
	if name == "" || name != path.Base(name) || strings.HasPrefix(name, ".") {
		return fmt.Errorf("gc root %q is not a plain name", name)
	}
	link := path.Join(dir, name)
	if storePath == "" {
		if err := os.Remove(link); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("can't remove the gc root: %w", err)
		}
		return nil
	}
	if err := CheckStorePath(storePath); err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("can't make the folder of gc roots: %w", err)
	}
	fresh := path.Join(dir, "."+name+".new")
	if err := os.Remove(fresh); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("can't make the gc root: %w", err)
	}
	if err := os.Symlink(storePath, fresh); err != nil {
		return fmt.Errorf("can't make the gc root: %w", err)
	}
	if err := os.Rename(fresh, link); err != nil {
		return fmt.Errorf("can't make the gc root: %w", err)
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
