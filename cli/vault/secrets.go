package vault

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// Secrets is the folder of a project's secrets: NAME.age and, of the earlier tool, NAME. When each got its value is
// beside them in a file that is no secret, since a checkout forgets the times of files.
type Secrets struct {
	vault    *Vault
	pending  *Vault
	legacy   func() (string, error) // password of what the earlier tool encrypted
	warn     func(text string)
	ciphers  []string
	warnedOf map[string]bool
}

const (
	pendingDir = ".pending"      // values that are on their way to the nodes
	changes    = ".changed.json" // Changed, by name
)

// Secrets gives the secrets in dir. warn is told, in one line, of each that is not encrypted as it should be whenever it
// is read; legacy is the password of those that the earlier tool may have encrypted.
func (v *Vault) Secrets(dir string, legacy func() (string, error), warn func(text string)) *Secrets {
	return &Secrets{vault: v.Beside(dir), pending: v.Beside(filepath.Join(dir, pendingDir)), legacy: legacy, warn: warn, warnedOf: map[string]bool{}}
}

// Quiet has nobody told of secrets of the earlier tool any more, for who tells of them otherwise.
func (s *Secrets) Quiet() { s.warn = func(string) {} }

// Path is where a secret is, or would be.
func (s *Secrets) Path(name string) string { return s.vault.path(name) }

// Put stores a value of 1 to 65,536 bytes. One of the earlier tool in its place goes, and one that was on its way to the
// nodes is not wanted there any more.
func (s *Secrets) Put(name string, value []byte) error {
	if len(value) == 0 {
		return fmt.Errorf("secret %s: an empty one is none", name)
	}
	if len(value) > protocol.MaxSecretSize {
		return fmt.Errorf("secret %s has %d bytes, the limit is %d", name, len(value), protocol.MaxSecretSize)
	}
	if err := s.put(name, value, time.Now()); err != nil {
		return err
	}
	if s.isLegacy(name) {
		if err := s.removeLegacy(name); err != nil {
			return err
		}
	}
	return s.DropPending(name)
}

func (s *Secrets) put(name string, value []byte, changed time.Time) error {
	if err := s.vault.Put(name, value); err != nil {
		return err
	}
	return s.record(func(all map[string]time.Time) { all[name] = changed.UTC().Truncate(time.Second) })
}

// Get gives a value, of the earlier tool too: see Legacy. One that isn't there is fs.ErrNotExist.
func (s *Secrets) Get(name string) ([]byte, error) {
	if s.vault.Has(name) || !s.isLegacy(name) {
		return s.vault.Get(name)
	}
	value, format, err := s.readLegacy(name)
	if err != nil {
		return nil, err
	}
	if !s.warnedOf[name] {
		s.warnedOf[name] = true
		s.warn(fmt.Sprintf("secret %s is stored as %s, of the earlier tool: run nix-infra secrets migrate", name, format.words()))
	}
	return value, nil
}

// Has tells whether there is such a secret; it may still not open.
func (s *Secrets) Has(name string) bool { return s.vault.Has(name) || s.isLegacy(name) }

// Names lists all secrets, sorted.
func (s *Secrets) Names() ([]string, error) {
	names, err := s.vault.Names()
	if err != nil {
		return nil, err
	}
	entries, err := os.ReadDir(s.vault.Dir)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	for _, e := range entries {
		if s.isLegacy(e.Name()) {
			names = append(names, e.Name())
		}
	}
	slices.Sort(names)
	return slices.Compact(names), nil
}

// Remove takes a secret away, with a value of it that was on its way to the nodes; fs.ErrNotExist where there is none.
func (s *Secrets) Remove(name string) error {
	if !s.Has(name) {
		return fmt.Errorf("there is no secret %s: %w", name, fs.ErrNotExist)
	}
	if err := s.DropPending(name); err != nil {
		return err
	}
	if s.isLegacy(name) {
		if err := s.removeLegacy(name); err != nil {
			return err
		}
	}
	if s.vault.Has(name) {
		if err := s.vault.Remove(name); err != nil {
			return err
		}
	}
	return s.record(func(all map[string]time.Time) { delete(all, name) })
}

// Changed is when a secret got its value.
func (s *Secrets) Changed(name string) time.Time {
	if all, err := s.readChanges(); err == nil {
		if at, ok := all[name]; ok {
			return at
		}
	}
	info, err := os.Stat(s.path(name))
	if err != nil {
		return time.Time{}
	}
	return info.ModTime().UTC().Truncate(time.Second)
}

// Stored is the SHA-256, in hex, of a secret as it is stored, encrypted; "" where it isn't there. It is another one with each
// value, and can be told without the project's password.
func (s *Secrets) Stored(name string) string {
	data, err := os.ReadFile(s.path(name))
	if err != nil {
		return ""
	}
	return fmt.Sprintf("%x", sha256.Sum256(data))
}

// path is the file that has a secret's value.
func (s *Secrets) path(name string) string {
	if s.vault.Has(name) {
		return s.vault.path(name)
	}
	return s.legacyPath(name)
}

// PutPending keeps a value that is on its way to the nodes, beside the one that holds.
func (s *Secrets) PutPending(name string, value []byte) error { return s.pending.Put(name, value) }

// Pending is a value that is on its way to the nodes; fs.ErrNotExist where there is none.
func (s *Secrets) Pending(name string) ([]byte, error) { return s.pending.Get(name) }

// HasPending tells whether a rotation is under way, or was interrupted.
func (s *Secrets) HasPending(name string) bool { return s.pending.Has(name) }

// ConfirmPending makes the value that is pending the secret's. It is as old as that file.
func (s *Secrets) ConfirmPending(name string) error {
	value, err := s.pending.Get(name)
	if err != nil {
		return err
	}
	info, err := os.Stat(s.pending.path(name))
	if err != nil {
		return err
	}
	if err := s.put(name, value, info.ModTime()); err != nil {
		return err
	}
	if s.isLegacy(name) {
		if err := s.removeLegacy(name); err != nil {
			return err
		}
	}
	return s.DropPending(name)
}

// DropPending takes away a value that was on its way, if there is one.
func (s *Secrets) DropPending(name string) error {
	if err := s.pending.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (s *Secrets) changesPath() string { return filepath.Join(s.vault.Dir, changes) }

func (s *Secrets) readChanges() (map[string]time.Time, error) {
	all := map[string]time.Time{}
	data, err := os.ReadFile(s.changesPath())
	if errors.Is(err, fs.ErrNotExist) {
		return all, nil
	} else if err != nil {
		return nil, err
	}
	if err := json.Unmarshal(data, &all); err != nil {
		return nil, fmt.Errorf("%s is damaged (%v); restore it, or remove it: secrets then count as old as their files", s.changesPath(), err)
	}
	return all, nil
}

// record changes when secrets were changed.
func (s *Secrets) record(change func(all map[string]time.Time)) error {
	return s.vault.ring.locked(func() error {
		all, err := s.readChanges()
		if err != nil {
			return err
		}
		change(all)
		data, err := json.MarshalIndent(all, "", "  ")
		if err != nil {
			return err
		}
		return atomicfile.Write(s.changesPath(), append(data, '\n'), 0o600)
	})
}
