// Package vault keeps what must stay private (the project's keys) in files that only a password opens:
// age's format, so that the age tool reads them too.
//
// Start here: a Vault is a folder of <name>.age files. password.go is where its password comes from.
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
	"sync"

	"filippo.io/age"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// What is wrong with a file, for errors.Is. A file that isn't there is fs.ErrNotExist.
var (
	ErrWrongPassword = errors.New("wrong password")
	ErrDamaged       = errors.New("damaged")
)

const (
	suffix = ".age"

	defaultWorkFactor = 17 // 128 MiB and a third of a second for each guess
	maxWorkFactor     = 20 // a file from elsewhere can't make us use more than 1 GiB
)

// Vault is a folder of encrypted files, all of one password. Its methods may be called concurrently.
type Vault struct {
	Dir string

	password   func() (string, error)
	workFactor int

	mu     sync.Mutex
	proven bool // the password opened a file of this vault, or there was none to try
}

// Option changes how a vault encrypts.
type Option func(*Vault)

// WorkFactor sets the cost of a guess: scrypt's N is two to this power, 1 to 20. Tests take a low one.
func WorkFactor(log2 int) Option { return func(v *Vault) { v.workFactor = log2 } }

// New gives the vault in dir, which need not exist yet. The password is asked for when it is first needed.
func New(dir string, password func() (string, error), options ...Option) *Vault {
	v := &Vault{Dir: dir, password: password, workFactor: defaultWorkFactor}
	for _, o := range options {
		o(v)
	}
	return v
}

// Put encrypts plaintext into <dir>/<name>.age, for its owner only, and replaces what was there in one
// step. Nothing else is ever written. A password that does not open the files that are there already is
// ErrWrongPassword: a vault with two passwords would open with neither.
func (v *Vault) Put(name string, plaintext []byte) error {
	if err := checkName(name); err != nil {
		return err
	}
	if err := v.prove(); err != nil {
		return err
	}
	sealed, err := v.seal(plaintext)
	if err != nil {
		return fmt.Errorf("can't encrypt %s: %w", v.path(name), err)
	}
	if err := v.makeDir(); err != nil {
		return err
	}
	return atomicfile.Write(v.path(name), sealed, 0o600)
}

// Get decrypts <dir>/<name>.age. Errors are ErrWrongPassword, ErrDamaged (cut short, changed, or not an
// age file with a password) or fs.ErrNotExist; nothing is returned unless all of it is authentic.
func (v *Vault) Get(name string) ([]byte, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	sealed, err := os.ReadFile(v.path(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%s is missing: restore it from a backup, or make it anew: %w", v.path(name), fs.ErrNotExist)
	} else if err != nil {
		return nil, err
	}
	plaintext, err := v.open(v.path(name), sealed)
	if err == nil {
		v.mu.Lock()
		v.proven = true
		v.mu.Unlock()
	}
	return plaintext, err
}

// Has tells whether there is such a file; it may still not open.
func (v *Vault) Has(name string) bool {
	if checkName(name) != nil {
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
		if ok && checkName(name) == nil && v.Has(name) {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names, nil
}

func (v *Vault) path(name string) string { return filepath.Join(v.Dir, name+suffix) }

// makeDir makes the folder, and closes one that a checkout left open to others.
func (v *Vault) makeDir() error {
	if err := os.MkdirAll(v.Dir, 0o700); err != nil {
		return err
	}
	info, err := os.Stat(v.Dir)
	if err == nil && info.Mode().Perm()&0o077 != 0 {
		err = os.Chmod(v.Dir, 0o700)
	}
	return err
}

// prove opens some file of the vault once, before the first Put. Damaged ones prove nothing and must not
// keep the vault from being repaired.
func (v *Vault) prove() error {
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.proven {
		return nil
	}
	names, err := v.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		sealed, err := os.ReadFile(v.path(name))
		if err != nil {
			continue
		}
		_, err = v.open(v.path(name), sealed)
		if err == nil {
			break
		}
		if !errors.Is(err, ErrDamaged) {
			return err
		}
	}
	v.proven = true
	return nil
}

func (v *Vault) seal(plaintext []byte) ([]byte, error) {
	if v.workFactor < 1 || v.workFactor > maxWorkFactor {
		return nil, fmt.Errorf("work factor %d: 1 to %d are possible", v.workFactor, maxWorkFactor)
	}
	password, err := v.password()
	if err != nil {
		return nil, err
	}
	recipient, err := age.NewScryptRecipient(password)
	if err != nil {
		return nil, err
	}
	recipient.SetWorkFactor(v.workFactor)
	var sealed bytes.Buffer
	w, err := age.Encrypt(&sealed, recipient)
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

func (v *Vault) open(path string, sealed []byte) ([]byte, error) {
	if len(sealed) == 0 {
		return nil, fmt.Errorf("%s is empty (%w): restore it from a backup", path, ErrDamaged)
	}
	password, err := v.password()
	if err != nil {
		return nil, fmt.Errorf("can't decrypt %s: %w", path, err)
	}
	identity, err := age.NewScryptIdentity(password)
	if err != nil {
		return nil, fmt.Errorf("can't decrypt %s: %w", path, err)
	}
	identity.SetMaxWorkFactor(maxWorkFactor)
	r, err := age.Decrypt(bytes.NewReader(sealed), identity)
	var plaintext []byte
	if err == nil {
		plaintext, err = io.ReadAll(r)
	}
	if other := new(age.NoIdentityMatchError); errors.As(err, &other) {
		if !slices.Contains(other.StanzaTypes, "scrypt") {
			return nil, fmt.Errorf("%s is %w: it is not encrypted with a password", path, ErrDamaged)
		}
		return nil, fmt.Errorf("%s: %w: check %s, and that .env does not override it", path, ErrWrongPassword, Variable)
	} else if err != nil {
		return nil, fmt.Errorf("%s is %w (%v): restore it from a backup", path, ErrDamaged, err)
	}
	return plaintext, nil
}

// validName is what can be a file everywhere and is never hidden, an option or a way out of the folder.
var validName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._@+-]{0,127}$`)

func checkName(s string) error {
	if !validName.MatchString(s) {
		return fmt.Errorf("%q can't be the name of a secret: use letters, digits and . _ @ + -, at most 128 characters, the first a letter, digit or _", s)
	}
	return nil
}
