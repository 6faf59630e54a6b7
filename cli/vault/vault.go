// Package vault keeps what must stay private, the project's keys and its secrets, in files that only the project's
// password opens, or the keys of a team: age's format, so that the age tool reads them too.
//
// Start here: a Vault is a folder of <name>.age files. All of a project's are encrypted to one key, which keyring.go
// keeps and rekey.go replaces; password.go and team.go are how people open that one. secrets.go is the folder of the
// project's secrets, legacy.go what the earlier tool left there. folder.go locks other files of the project.
package vault

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"

	"filippo.io/age"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// What is wrong with a file, for errors.Is. A file that isn't there is fs.ErrNotExist.
var (
	ErrWrongPassword = errors.New("wrong password")
	ErrNoKey         = errors.New("none of your keys opens it")
	ErrDamaged       = errors.New("damaged")
)

const suffix = ".age"

// Vault is a folder of encrypted files. Its methods may be called concurrently, by several processes too.
type Vault struct {
	Dir string

	ring *keyring
}

// New gives the vault in dir, which need not exist yet, with the key that all vaults beside it have in common. The
// password is asked for when it is first needed.
func New(dir string, password func() (string, error), options ...Option) *Vault {
	ring := &keyring{dir: dir, password: password, workFactor: defaultWorkFactor}
	for _, o := range options {
		o(ring)
	}
	return (&Vault{dir, ring}).Beside(dir)
}

// Beside gives the vault in another folder that the same key opens.
func (v *Vault) Beside(dir string) *Vault {
	beside := &Vault{dir, v.ring}
	v.ring.mu.Lock()
	defer v.ring.mu.Unlock()
	if !slices.Contains(v.ring.folders, dir) {
		v.ring.folders = append(v.ring.folders, dir)
	}
	return beside
}

// Put encrypts plaintext into <dir>/<name>.age, for its owner only, and replaces what was there in one
// step. Nothing else is ever written. A password that does not open the files that are there already is
// ErrWrongPassword: a vault with two passwords would open with neither.
func (v *Vault) Put(name string, plaintext []byte) error {
	if err := v.check(name); err != nil {
		return err
	}
	return v.ring.locked(func() error {
		key, err := v.ring.newest()
		if err != nil {
			return err
		}
		return v.write(name, plaintext, key.Recipient())
	})
}

func (v *Vault) write(name string, plaintext []byte, to ...age.Recipient) error {
	sealed, err := encrypt(plaintext, to...)
	if err != nil {
		return fmt.Errorf("can't encrypt %s: %w", v.path(name), err)
	}
	if err := makePrivate(v.Dir); err != nil {
		return err
	}
	return atomicfile.Write(v.path(name), sealed, 0o600)
}

// Get decrypts <dir>/<name>.age. Errors are ErrWrongPassword, ErrNoKey, ErrDamaged (cut short, changed, or not of this
// project) or fs.ErrNotExist; nothing is returned unless all of it is authentic.
func (v *Vault) Get(name string) ([]byte, error) {
	if err := v.check(name); err != nil {
		return nil, err
	}
	sealed, err := os.ReadFile(v.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: restore it from a backup, or make it anew: %w", v.path(name), fs.ErrNotExist)
	} else if err != nil {
		return nil, err
	}
	return v.ring.open(v.path(name), sealed)
}

// Remove takes the file away; fs.ErrNotExist where there is none.
func (v *Vault) Remove(name string) error {
	if err := v.check(name); err != nil {
		return err
	}
	if err := os.Remove(v.path(name)); err != nil {
		return err
	}
	return atomicfile.SyncDir(v.Dir)
}

// Has tells whether there is such a file; it may still not open.
func (v *Vault) Has(name string) bool {
	if v.check(name) != nil {
		return false
	}
	info, err := os.Stat(v.path(name))
	return err == nil && info.Mode().IsRegular()
}

// Names lists the vault, sorted. A folder that isn't there is an empty vault.
func (v *Vault) Names() ([]string, error) {
	entries, err := os.ReadDir(v.Dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var names []string
	for _, e := range entries {
		name, ok := strings.CutSuffix(e.Name(), suffix)
		if ok && v.Has(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func (v *Vault) path(name string) string { return filepath.Join(v.Dir, name+suffix) }

// check tells whether an entry can be called that. The keyring's own file is none.
func (v *Vault) check(name string) error {
	if v.Dir == v.ring.dir && name == keyEntry {
		return fmt.Errorf("%q is the key of all other entries, and none itself", name)
	}
	return checkName(name)
}

// makePrivate makes a folder, and closes one that a checkout left open to others.
func makePrivate(dir string) error {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	info, err := os.Stat(dir)
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = os.Chmod(dir, 0o700)
	}
	return err
}

func encrypt(plaintext []byte, to ...age.Recipient) ([]byte, error) {
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, to...)
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(plaintext); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return sealed.Bytes(), nil
}

func decrypt(sealed []byte, with ...age.Identity) ([]byte, error) {
	r, err := age.Decrypt(bytes.NewReader(sealed), with...)
	if err != nil {
		return nil, err
	}
	return io.ReadAll(r)
}

// validName is what can be a file everywhere and is never hidden, an option or a way out of the folder.
var validName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._@+-]{0,127}$`)

func checkName(s string) error {
	if !validName.MatchString(s) {
		return fmt.Errorf("%q can't be the name of a secret: use letters, digits and . _ @ + -, at most 128 characters, the first a letter, digit or _", s)
	}
	return nil
}
