// Package project reads the project folder: what the operator keeps in version control, and what each
// node's source tree is composed from.
//
// Start here: Open gives a Project. settings.go is nix-infra.yaml, env.go is .env, servers.go is
// servers.yaml; tree.go composes what goes to a node, placeholder.go fills it in; selector.go says which
// nodes are meant.
package project

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/nix-infra/nix-infra/protocol"
)

// ErrNotInitialised marks a folder without nix-infra.yaml.
var ErrNotInitialised = errors.New("not a project yet")

// Project is a folder as it was when it was first read: Open it again to see changes.
type Project struct {
	Dir      string // absolute
	Settings Settings
	Env      Env

	servers func() ([]Server, error)
	shared  func() ([]File, error) // the files that every node gets as they are
}

// Open reads the settings and the environment file of the folder dir. envFile "" means dir's .env, if
// there is one; a named one is looked for below dir and then below the current folder, and must exist.
//
// A folder without nix-infra.yaml gives ErrNotInitialised together with a Project of default settings,
// with which init can go on.
func Open(dir, envFile string) (*Project, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	info, err := os.Stat(dir)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("the project folder %s does not exist: give an existing one with --working-dir", dir)
	case err != nil:
		return nil, fmt.Errorf("the project folder: %w", err)
	case !info.IsDir():
		return nil, fmt.Errorf("the project folder %s is not a folder", dir)
	}
	p := &Project{Dir: dir}
	p.servers = sync.OnceValues(p.readServers)
	p.shared = sync.OnceValues(p.readShared)
	if p.Env, err = readEnv(dir, envFile); err != nil {
		return nil, err
	}
	p.Settings, err = readSettings(dir)
	if err != nil && !errors.Is(err, ErrNotInitialised) {
		return nil, err
	}
	return p, err
}

// SSHKeyName is the name of the key pair below ssh/: $SSH_KEY, as the projects of the original have it,
// or the settings'.
func (p *Project) SSHKeyName() string { return firstOf(p.Env.Get("SSH_KEY"), p.Settings.SSHKey) }

// reserved names would take the place of other files of the tree: a node's own file is <name>.nix.
var reserved = []string{"configuration", "flake", "hardware-configuration", "networking"}

// ValidNodeName tells whether a node may be called so: it is a host name, a NATS token, a flake attribute
// and a file name at once. See protocol.CheckName.
func ValidNodeName(name string) error {
	if err := protocol.CheckName(name); err != nil {
		return err
	}
	if slices.Contains(reserved, name) {
		return fmt.Errorf("%q can't be a node's name: its file %s.nix would stand in the way of another", name, name)
	}
	return nil
}

// ValidKeyName tells whether a key pair below ssh/ may be called so.
func ValidKeyName(name string) error {
	if name == "" {
		return errors.New("a key needs a name")
	}
	return validKeyName(name)
}

// locate finds a path that a user gave: as it is when absolute, else below the project, else below the
// current folder. What exists nowhere is given back below the project.
func locate(dir, name string) string {
	if filepath.IsAbs(name) {
		return filepath.Clean(name)
	}
	below := filepath.Join(dir, name)
	if _, err := os.Stat(below); err == nil {
		return below
	}
	if here, err := filepath.Abs(name); err == nil {
		if _, err := os.Stat(here); err == nil {
			return here
		}
	}
	return below
}

func firstOf(values ...string) string {
	for _, v := range values {
		if v != "" {
			return v
		}
	}
	return ""
}
