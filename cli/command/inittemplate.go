package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/examples"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// lockTime is how long Nix may look up the sources that a flake locks.
const lockTime = 2 * time.Minute

// check refuses what can't be, and takes --name for what it means.
func (o *initOptions) check() error {
	switch {
	case o.name != "" && o.fleet != "" && o.name != o.fleet:
		return fmt.Errorf("--name %s and --fleet %s mean the same; leave one out", o.name, o.fleet)
	case o.template != "" && !slices.Contains(examples.Names, o.template):
		return fmt.Errorf("--template %q: use %s", o.template, strings.Join(examples.Names, " or "))
	case o.template == "" && o.force:
		return errors.New("--force goes with --template: it replaces files of the project by those of the template")
	}
	o.fleet = first(o.fleet, o.name)
	return nil
}

// initTemplate writes the files of a template. What is there already is left as it is, unless it is to be replaced.
func (a *app) initTemplate(template string, force bool) error {
	files, err := examples.Files(template)
	if err != nil {
		return err
	}
	var others []string // that are there, and not the template's
	for _, f := range files {
		path := filepath.Join(a.dir, filepath.FromSlash(f.Path))
		old, err := os.ReadFile(path)
		existed := err == nil
		switch {
		case existed && bytes.Equal(old, f.Data):
			a.told("file", path, true)
			continue
		case existed && !force:
			others = append(others, f.Path)
			a.told("file", path, true)
			continue
		case !existed && !errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("a file of the template can't be written: %w", err)
		}
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := atomicfile.Write(path, f.Data, f.Mode); err != nil {
			return err
		}
		a.told("file", path, false)
	}
	if len(others) > 0 {
		a.note("%s were there already, and differ from the template's: they were left as they are; --force replaces them", some(others))
	}
	return nil
}

// initLock makes the flake.lock that all nodes build by, where Nix is at hand. It is no error where it can't be made: each node
// makes its own then.
func (a *app) initLock(ctx context.Context, template string) error {
	path := filepath.Join(a.dir, lockFile)
	if _, err := os.Stat(path); err == nil {
		a.told("lock of the flake", path, true)
		return nil
	}
	again := fmt.Sprintf("until there is a %s, each node locks its sources by itself; run `nix-infra init --template %s` again where there are Nix and a network, or copy /etc/nixos/%s of a node here", lockFile, template, lockFile)
	if _, err := nix.LookPath("nix"); err != nil {
		a.note("Nix is not installed here: %s", again)
		return nil
	}
	p, err := a.openProject()
	if err != nil {
		return err
	}
	lock, err := lockOf(ctx, p)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if err != nil {
		a.note("%v: %s", err, again)
		return nil
	}
	if err := atomicfile.Write(path, lock, 0o644); err != nil {
		return err
	}
	a.told("lock of the flake", path, false)
	return nil
}

// lockOf has Nix lock the flake as nodes get it: with its placeholders it is none.
func lockOf(ctx context.Context, p *project.Project) ([]byte, error) {
	flake, err := p.Flake("node001")
	if err != nil {
		return nil, err
	}
	dir, err := os.MkdirTemp("", "nix-infra-lock-")
	if err == nil {
		defer os.RemoveAll(dir)
		dir, err = filepath.EvalSymlinks(dir) // Nix takes no link on the way to a flake
	}
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join(dir, "flake.nix"), flake, 0o600); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeoutCause(ctx, lockTime, fmt.Errorf("it took longer than %s", lockTime))
	defer cancel()
	if err := nix.Lock(ctx, dir, nil); err != nil {
		return nil, err
	}
	return os.ReadFile(filepath.Join(dir, lockFile))
}
