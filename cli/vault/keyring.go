package vault

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"filippo.io/age"
	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// keyEntry is the file, in the folder of the keys, that opens all others: an age identity, encrypted with the project's
// password or to the team. So a password costs its third of a second once, however many files are opened, and giving the
// project another one replaces one file. Files of before there was such a key were encrypted with the password itself,
// and open as ever.
//
//	age -d nix-infra/keys/identity.age | age -d -i - secrets/NAME.age
const keyEntry = "identity"

const (
	defaultWorkFactor = 17 // 128 MiB and a third of a second for each guess
	maxWorkFactor     = 20 // a file from elsewhere can't make us use more than 1 GiB
)

// keyring is the project's key. While a rekey is under way, it is two: the new one, and the one that not all files are
// rid of yet.
type keyring struct {
	dir        string
	password   func() (string, error)
	team       team
	workFactor int

	mu      sync.Mutex
	folders []string // of all vaults
	held    []*age.X25519Identity
	to      []string // the recipients that it is encrypted to; none: the password
	from    [sha256.Size]byte

	step func(name string) error // told what was done, for tests; nil: nobody is
}

// Option changes how a vault is opened and encrypts.
type Option func(*keyring)

// WorkFactor sets the cost of a guess: scrypt's N is two to this power, 1 to 20. Tests take a low one.
func WorkFactor(log2 int) Option { return func(k *keyring) { k.workFactor = log2 } }

func (k *keyring) path() string { return filepath.Join(k.dir, keyEntry+suffix) }

// locked keeps other processes from changing the vaults meanwhile: what one encrypts to the old key while another drops
// it could not be opened any more.
func (k *keyring) locked(do func() error) (err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if _, missing := os.Lstat(k.dir); errors.Is(missing, fs.ErrNotExist) {
		defer func() {
			if err != nil {
				os.Remove(k.dir) // stays if anything is in it
			}
		}()
	}
	if err := makePrivate(k.dir); err != nil {
		return err
	}
	dir, err := os.Open(k.dir)
	if err != nil {
		return err
	}
	defer dir.Close() // and the lock with it
	for {
		if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); !errors.Is(err, unix.EINTR) {
			if err != nil {
				return fmt.Errorf("can't lock %s: %w", k.dir, err)
			}
			break
		}
	}
	return do()
}

// errNoKeyYet is a keyring that was not made yet, and nothing else: on it, one is made.
var errNoKeyYet = errors.New("there is no key yet")

// load reads the keys, unless they are known already; errNoKeyYet where there are none.
func (k *keyring) load() error {
	sealed, err := os.ReadFile(k.path())
	if errors.Is(err, fs.ErrNotExist) {
		return errNoKeyYet
	} else if err != nil {
		return err
	}
	from := sha256.Sum256(sealed)
	if k.held != nil && from == k.from {
		return nil
	}
	plaintext, err := k.unwrap(k.path(), sealed, passwordIdentity{k.password}, &k.team)
	if err != nil {
		return err
	}
	held, recipients, err := parseKeys(plaintext)
	if err != nil {
		return fmt.Errorf("%s is %w (%v): restore it from a backup", k.path(), ErrDamaged, err)
	}
	k.held, k.to, k.from = held, recipients, from
	return nil
}

// newest is the key that is encrypted to. It is made where there is none, but never in the place of one that can't be
// opened.
func (k *keyring) newest() (*age.X25519Identity, error) {
	err := k.load()
	if err == errNoKeyYet {
		err = k.make()
	}
	if err != nil {
		return nil, err
	}
	return k.held[0], nil
}

func (k *keyring) make() error {
	recipients, err := k.team.recipients()
	if err != nil {
		return err
	}
	if len(recipients) == 0 {
		if err := k.prove(); err != nil {
			return err
		}
	}
	key, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	return k.save([]*age.X25519Identity{key}, recipients, k.password)
}

// prove opens some file that was encrypted with the password itself, if there is one. Damaged ones prove nothing and
// must not keep the vault from being repaired.
func (k *keyring) prove() error {
	files, err := k.files()
	if err != nil {
		return err
	}
	for _, path := range files {
		sealed, err := os.ReadFile(path)
		if err != nil || !isOfPassword(sealed) {
			continue
		}
		if _, err = k.unwrap(path, sealed, passwordIdentity{k.password}); err == nil || !errors.Is(err, ErrDamaged) {
			return err
		}
	}
	return nil
}

// save replaces the keyring's file in one step: keys, the newest first, encrypted to recipients or, without any, with a
// password.
func (k *keyring) save(keys []*age.X25519Identity, recipients []string, password func() (string, error)) error {
	to, err := parseRecipients(recipients)
	if err != nil {
		return err
	}
	if len(to) == 0 {
		if k.workFactor < 1 || k.workFactor > maxWorkFactor {
			return fmt.Errorf("work factor %d: 1 to %d are possible", k.workFactor, maxWorkFactor)
		}
		text, err := password()
		if err != nil {
			return err
		}
		r, err := age.NewScryptRecipient(text)
		if err != nil {
			return err
		}
		r.SetWorkFactor(k.workFactor)
		to = []age.Recipient{r}
	}
	sealed, err := encrypt(formatKeys(keys, recipients), to...)
	if err != nil {
		return fmt.Errorf("can't encrypt %s: %w", k.path(), err)
	}
	if err := atomicfile.Write(k.path(), sealed, 0o600); err != nil {
		return err
	}
	k.held, k.to, k.from = keys, recipients, sha256.Sum256(sealed)
	return nil
}

const recipientLine = "# for: "

// formatKeys is an identity file of age's. Its comments tell whom it was encrypted to, which age's format does not.
func formatKeys(keys []*age.X25519Identity, recipients []string) []byte {
	var b bytes.Buffer
	b.WriteString("# The key of this project's private files. The first one is encrypted to.\n")
	for _, r := range recipients {
		b.WriteString(recipientLine + r + "\n")
	}
	for _, key := range keys {
		b.WriteString(key.String() + "\n")
	}
	return b.Bytes()
}

func parseKeys(text []byte) (keys []*age.X25519Identity, recipients []string, err error) {
	for line := range strings.Lines(string(text)) {
		line = strings.TrimSpace(line)
		if r, ok := strings.CutPrefix(line, recipientLine); ok {
			recipients = append(recipients, r)
		} else if line != "" && line[0] != '#' {
			key, err := age.ParseX25519Identity(line)
			if err != nil {
				return nil, nil, errors.New("it holds something else than keys") // age's error might show it
			}
			keys = append(keys, key)
		}
	}
	if len(keys) == 0 {
		return nil, nil, errors.New("it holds no key")
	}
	return keys, recipients, nil
}

// open decrypts a file of a vault.
func (k *keyring) open(path string, sealed []byte) ([]byte, error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	return k.unwrap(path, sealed, passwordIdentity{k.password}, ringIdentity{k})
}

// unwrap decrypts with the first of some identities that can, and says what is wrong otherwise.
func (k *keyring) unwrap(path string, sealed []byte, with ...age.Identity) ([]byte, error) {
	if len(sealed) == 0 {
		return nil, fmt.Errorf("%s is empty (%w): restore it from a backup", path, ErrDamaged)
	}
	plaintext, err := decrypt(sealed, with...)
	var none *age.NoIdentityMatchError
	var asked *askError
	switch {
	case err == nil:
		return plaintext, nil
	case errors.As(err, &asked):
		return nil, fmt.Errorf("can't decrypt %s: %w", path, asked.err)
	case errors.As(err, &none) && slices.Contains(none.StanzaTypes, "scrypt"):
		return nil, fmt.Errorf("%s: %w: check %s, and that .env does not override it", path, ErrWrongPassword, Variable)
	case errors.As(err, &none) && path == k.path():
		return nil, fmt.Errorf("%s: %w; it is encrypted to those that %s named: set %s, or have one of them run nix-infra secrets rekey", path, ErrNoKey, k.team.name(), IdentityVariable)
	case errors.As(err, &none):
		return nil, fmt.Errorf("%s is %w: it is not encrypted to the key of this project", path, ErrDamaged)
	}
	return nil, fmt.Errorf("%s is %w (%v): restore it from a backup", path, ErrDamaged, err)
}

// askError is what went wrong before anything was decrypted: a password that nobody can be asked for, a keyring that
// does not open.
type askError struct{ err error }

func (e *askError) Error() string { return e.err.Error() }

// passwordIdentity asks for the password only for what was encrypted with one.
type passwordIdentity struct{ password func() (string, error) }

func (p passwordIdentity) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	if !slices.ContainsFunc(stanzas, func(s *age.Stanza) bool { return s.Type == "scrypt" }) {
		return nil, age.ErrIncorrectIdentity
	}
	password, err := p.password()
	if err != nil {
		return nil, &askError{err}
	}
	identity, err := age.NewScryptIdentity(password)
	if err != nil {
		return nil, &askError{err}
	}
	identity.SetMaxWorkFactor(maxWorkFactor)
	return identity.Unwrap(stanzas)
}

// ringIdentity opens the keyring only for what was encrypted to a key.
type ringIdentity struct{ *keyring }

func (r ringIdentity) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	if !slices.ContainsFunc(stanzas, func(s *age.Stanza) bool { return s.Type == "X25519" }) {
		return nil, age.ErrIncorrectIdentity
	}
	if err := r.load(); err == errNoKeyYet {
		return nil, &askError{fmt.Errorf("%s is missing, which opens it: restore it from a backup: %w", r.path(), ErrDamaged)}
	} else if err != nil {
		return nil, &askError{err}
	}
	for _, key := range r.held {
		if fileKey, err := key.Unwrap(stanzas); !errors.Is(err, age.ErrIncorrectIdentity) {
			return fileKey, err
		}
	}
	return nil, age.ErrIncorrectIdentity
}

// isOfPassword tells whether a file is encrypted with a password itself.
func isOfPassword(sealed []byte) bool {
	header, err := age.ExtractHeader(bytes.NewReader(sealed))
	return err == nil && bytes.Contains(header, []byte("\n-> scrypt "))
}

// files are those of all vaults, but for the keyring's own.
func (k *keyring) files() ([]string, error) {
	var files []string
	for _, dir := range k.folders {
		v := &Vault{dir, k}
		names, err := v.Names()
		if err != nil {
			return nil, err
		}
		for _, name := range names {
			files = append(files, v.path(name))
		}
	}
	return files, nil
}

// Empty tells whether nothing was ever put into this vault.
func (v *Vault) Empty() bool {
	names, err := v.Names()
	_, missing := os.Lstat(v.ring.path())
	return err == nil && len(names) == 0 && errors.Is(missing, fs.ErrNotExist)
}
