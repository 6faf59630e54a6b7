package vault

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"slices"

	"filippo.io/age"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// Rekey makes a new key, encrypts it to the team's recipients or, without a team, with a new password, and every file of
// this vault and those beside it to that key. What somebody kept of the old key opens nothing that is written from then on.
//
// The password changes in one step, with the keyring's file: it holds the new key and the old one until no file is left
// that needs the old one. A rekey that was interrupted goes on where it stopped, with the password or recipients that it
// had been given; finished tells that this is what happened.
func (v *Vault) Rekey(password func() (string, error)) (finished bool, err error) {
	k := v.ring
	err = k.locked(func() error {
		if err := k.load(); errors.Is(err, ErrWrongPassword) {
			// The one that was interrupted may have had this password already.
			old := k.password
			if k.password = password; k.load() != nil || len(k.held) < 2 {
				k.password = old
				return err
			}
		} else if err != nil && err != errNoKeyYet {
			return err
		}
		if finished = len(k.held) > 1; finished {
			return k.finish()
		}
		return k.rekey(password)
	})
	return finished, err
}

func (k *keyring) rekey(password func() (string, error)) error {
	recipients, err := k.team.recipients()
	if err != nil {
		return err
	}
	old, err := k.newest()
	if err != nil {
		return err
	}
	// All must open, and what was encrypted with the password itself goes to the old key first: from the next step on
	// nobody needs the old password.
	if err := k.each(func(path string, sealed []byte) error {
		plaintext, err := k.unwrap(path, sealed, passwordIdentity{k.password}, ringIdentity{k})
		if err != nil || !isOfPassword(sealed) {
			return err
		}
		return rewrite(path, plaintext, old)
	}); err != nil {
		return err
	}
	if err := k.did("opened"); err != nil {
		return err
	}
	key, err := age.GenerateX25519Identity()
	if err != nil {
		return err
	}
	if err := k.save([]*age.X25519Identity{key, old}, recipients, password); err != nil {
		return err
	}
	k.password = password
	if err := k.did("changed"); err != nil {
		return err
	}
	return k.finish()
}

// finish encrypts what is left to the newest key, and drops the others.
func (k *keyring) finish() error {
	newest := k.held[0]
	if err := k.each(func(path string, sealed []byte) error {
		if _, err := decrypt(sealed, newest); err == nil {
			return nil
		}
		plaintext, err := k.unwrap(path, sealed, passwordIdentity{k.password}, ringIdentity{k})
		if err != nil {
			return err
		}
		if err := rewrite(path, plaintext, newest); err != nil {
			return err
		}
		return k.did(path)
	}); err != nil {
		return err
	}
	return k.save(slices.Clone(k.held[:1]), k.to, k.password)
}

// each does something for all files of all vaults.
func (k *keyring) each(do func(path string, sealed []byte) error) error {
	files, err := k.files()
	if err != nil {
		return err
	}
	for _, path := range files {
		sealed, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		if err := do(path, sealed); err != nil {
			return err
		}
	}
	return nil
}

// rewrite encrypts a file to a key, once it is sure that the key opens it.
func rewrite(path string, plaintext []byte, to *age.X25519Identity) error {
	sealed, err := encrypt(plaintext, to.Recipient())
	if err != nil {
		return fmt.Errorf("can't encrypt %s: %w", path, err)
	}
	if back, err := decrypt(sealed, to); err != nil || !bytes.Equal(back, plaintext) {
		return fmt.Errorf("%s would not read back as it was written: %v", path, err)
	}
	return atomicfile.Write(path, sealed, 0o600)
}

func (k *keyring) did(step string) error {
	if k.step == nil {
		return nil
	}
	return k.step(step)
}

// Readers are the public keys of those that open the vault, as the recipients' file listed them when it was last
// rekeyed; none: whoever has the password. unfinished tells of a rekey that was interrupted.
func (v *Vault) Readers() (recipients []string, unfinished bool, err error) {
	v.ring.mu.Lock()
	defer v.ring.mu.Unlock()
	if err := v.ring.load(); err == errNoKeyYet {
		return nil, false, nil
	} else if err != nil {
		return nil, false, err
	}
	return v.ring.to, len(v.ring.held) > 1, nil
}

// Recipients are the lines of the recipients' file, without comments; none where there is no such file.
func (v *Vault) Recipients() ([]string, error) { return v.ring.team.recipients() }
