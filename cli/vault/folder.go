package vault

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// Folder is a project's folder, of which private files can be locked: FILE becomes FILE.age. Which ones are is in a
// record that is written before the first file goes, and goes after the last one is back, so that what was interrupted
// is gone on with.
type Folder struct {
	Root   string
	Record string // path of the record

	vault *Vault
}

// lockedFile is a file in the record.
type lockedFile struct {
	Path string      `json:"path"` // slash-separated, below Root
	Mode fs.FileMode `json:"mode"`
}

const maxLocked = 16 << 20 // bytes, of a file that is locked

// Folder gives a folder whose files are locked with the key of this vault.
func (v *Vault) Folder(root, record string) *Folder { return &Folder{root, record, v} }

// Locked are the files that are locked, or on their way.
func (f *Folder) Locked() ([]string, error) {
	files, err := f.read()
	var paths []string
	for _, l := range files {
		paths = append(paths, l.Path)
	}
	return paths, err
}

func (f *Folder) read() ([]lockedFile, error) {
	data, err := os.ReadFile(f.Record)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var files []lockedFile
	if err := json.Unmarshal(data, &files); err != nil {
		return nil, fmt.Errorf("%s is %w (%v): restore it, or open FILE.age yourself: age -d -i %s FILE.age", f.Record, ErrDamaged, err, f.vault.ring.path())
	}
	for _, l := range files {
		if !filepath.IsLocal(filepath.FromSlash(l.Path)) {
			return nil, fmt.Errorf("%s is %w: %q is no file of the project", f.Record, ErrDamaged, l.Path)
		}
	}
	return files, nil
}

func (f *Folder) write(files []lockedFile) error {
	data, err := json.MarshalIndent(files, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(f.Record, append(data, '\n'), 0o644)
}

func (f *Folder) path(l lockedFile) string { return filepath.Join(f.Root, filepath.FromSlash(l.Path)) }

// Lock locks files, slash-separated paths below the root, and those that an interrupted Lock left. Each is told when it
// is done. A file is removed only once its encrypted form was read back.
func (f *Folder) Lock(paths []string, done func(path string)) error {
	files, err := f.read()
	if err != nil {
		return err
	}
	for _, path := range paths {
		if slices.ContainsFunc(files, func(l lockedFile) bool { return l.Path == path }) {
			continue
		}
		l := lockedFile{Path: path}
		info, err := os.Lstat(f.path(l))
		if err != nil {
			return err
		}
		l.Mode = info.Mode().Perm()
		if f.vault.ring.team.uses(info) {
			return fmt.Errorf("%s is the key that opens the project, and would be locked with it: move it out of the project, such as to ~/.ssh", f.path(l))
		}
		if _, err := os.Lstat(f.path(l) + suffix); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("%s is in the way: move it, so that %s can be locked", f.path(l)+suffix, path)
		}
		if info.Size() > maxLocked {
			return fmt.Errorf("%s has more than %d MiB, too much for a key or password: move it out of the project", f.path(l), maxLocked>>20)
		}
		files = append(files, l)
	}
	slices.SortFunc(files, func(x, y lockedFile) int { return strings.Compare(x.Path, y.Path) })
	// The key first: without one that opens, nothing may go.
	if err := f.vault.ring.locked(func() error { _, err := f.vault.ring.newest(); return err }); err != nil {
		return err
	}
	if err := f.write(files); err != nil {
		return err
	}
	for _, l := range files {
		if err := f.lock(l); err != nil {
			return err
		}
		done(l.Path)
	}
	return nil
}

func (f *Folder) lock(l lockedFile) error {
	plaintext, err := os.ReadFile(f.path(l))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(f.path(l) + suffix); err != nil {
			return fmt.Errorf("%s is gone, and so is its encrypted form: restore one of them from a backup", f.path(l))
		}
		return nil // was locked before
	} else if err != nil {
		return err
	}
	same, err := f.compare(l, plaintext)
	if err != nil {
		return err
	}
	if !same {
		err := f.vault.ring.locked(func() error {
			key, err := f.vault.ring.newest()
			if err != nil {
				return err
			}
			sealed, err := encrypt(plaintext, key.Recipient())
			if err != nil {
				return err
			}
			return atomicfile.Write(f.path(l)+suffix, sealed, 0o600)
		})
		if err != nil {
			return err
		}
		if same, err = f.compare(l, plaintext); err != nil || !same {
			return fmt.Errorf("%s does not read back as it was written (%v); %s is kept", f.path(l)+suffix, err, l.Path)
		}
	}
	return remove(f.path(l))
}

// compare tells whether the encrypted form of a file is there and has this content. One of another content is an error:
// nobody knows which of them is wanted.
func (f *Folder) compare(l lockedFile, plaintext []byte) (same bool, err error) {
	sealed, err := os.ReadFile(f.path(l) + suffix)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	} else if err != nil {
		return false, err
	}
	other, err := f.vault.ring.open(f.path(l)+suffix, sealed)
	if err != nil {
		return false, err
	}
	if !bytes.Equal(other, plaintext) {
		return false, fmt.Errorf("%s and %s are both there and differ: remove the one that is not wanted, and run this again", f.path(l), f.path(l)+suffix)
	}
	return true, nil
}

// Unlock opens all files that are locked. Those that can't be opened stay so, and the others are open.
func (f *Folder) Unlock(done func(path string)) error {
	files, err := f.read()
	if err != nil {
		return err
	}
	var left []lockedFile
	var errs []error
	for _, l := range files {
		err := f.unlock(l)
		if errors.Is(err, ErrWrongPassword) || errors.Is(err, ErrNoPassword) || errors.Is(err, ErrNoKey) {
			return err
		}
		if err != nil {
			left = append(left, l)
			errs = append(errs, err)
			continue
		}
		done(l.Path)
	}
	if len(left) > 0 {
		return errors.Join(append(errs, f.write(left))...)
	}
	if err := remove(f.Record); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

func (f *Folder) unlock(l lockedFile) error {
	plaintext, err := os.ReadFile(f.path(l))
	if err == nil {
		same, err := f.compare(l, plaintext)
		if err != nil || !same {
			return err // not same: it was never locked, or is open already
		}
		return remove(f.path(l) + suffix)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	sealed, err := os.ReadFile(f.path(l) + suffix)
	if errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s is gone: restore it from a backup", f.path(l)+suffix)
	} else if err != nil {
		return err
	}
	if plaintext, err = f.vault.ring.open(f.path(l)+suffix, sealed); err != nil {
		return err
	}
	if err := atomicfile.Write(f.path(l), plaintext, l.Mode.Perm()); err != nil {
		return err
	}
	return remove(f.path(l) + suffix)
}

func remove(path string) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return atomicfile.SyncDir(filepath.Dir(path))
}
