package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// A node's keys are replaced at one moment, in which the answer's file is: the answer says by its JWT which key counts.
// The new keys are there before, beside the old ones, and take their files' names afterwards.

// Replacement is keys that are to replace a node's.
type Replacement struct {
	Request *protocol.EnrolRequest // their public halves, proven
	Key     nkeys.KeyPair
	XKey    nkeys.KeyPair
}

// Replacement makes the keys that are to replace the node's, where they weren't made before.
func (h Home) Replacement() (*Replacement, error) {
	a, err := h.answer()
	if err != nil {
		return nil, err
	}
	var r Replacement
	r.Request, r.Key, r.XKey, err = h.request(a.Name, nextSuffix)
	return &r, err
}

// Replace makes the keys of Replacement the node's, by the user JWT for them, which the caller has proven. Who opened the
// identity before has the old ones still.
func (h Home) Replace(user string) error {
	a, err := h.answer()
	if err != nil {
		return err
	}
	key, err := readSeed(filepath.Join(h.Dir, keyFile+nextSuffix))
	if err != nil {
		return err
	}
	a.User = user
	if err := a.For(key); err != nil {
		return err
	}
	return atomicfile.Write(filepath.Join(h.Dir, answerFile), protocol.Encode(a), 0o600)
}

// Resume is Open by the one who has the folder: where keys were replaced, nothing is left of the old ones afterwards.
func (h Home) Resume() (*Machine, error) {
	if err := h.settle(); err != nil {
		return nil, err
	}
	return h.Open()
}

// settle gives keys that became the machine's the names of those that they replaced.
func (h Home) settle() error {
	a, err := h.answer()
	if errors.Is(err, ErrNotEnrolled) {
		return nil
	} else if err != nil {
		return err
	}
	// Where there is no key for the answer, whoever looks for it says so.
	if _, replaced, err := h.key(a); err != nil || !replaced {
		return nil
	}
	for _, file := range []string{xkeyFile, keyFile} { // the last one tells that there is something to do
		path := filepath.Join(h.Dir, file)
		if err := os.Rename(path+nextSuffix, path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("the new keys can't be put in place: %w", err)
		}
	}
	return atomicfile.SyncDir(h.Dir)
}

// key is the one that the answer is for. Replaced is true where it has not got its file's name yet.
func (h Home) key(a *protocol.EnrolAnswer) (key nkeys.KeyPair, replaced bool, err error) {
	if key, err = readSeed(filepath.Join(h.Dir, keyFile)); err != nil {
		return nil, false, err
	}
	if err = a.For(key); err == nil {
		return key, false, nil
	}
	if next, nextErr := readSeed(filepath.Join(h.Dir, keyFile+nextSuffix)); nextErr == nil && a.For(next) == nil {
		return next, true, nil
	}
	return nil, false, fmt.Errorf("%s: %w", filepath.Join(h.Dir, answerFile), err)
}

// xkeys reads the curve keys that belong to the machine's key.
func (h Home) xkeys(m *Machine, replaced bool) error {
	next, err := readSeed(filepath.Join(h.Dir, xkeyFile+nextSuffix))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if replaced && err == nil {
		m.XKey = next
		return nil
	}
	if err == nil {
		m.NextXKey = next
	}
	m.XKey, err = readSeed(filepath.Join(h.Dir, xkeyFile))
	return err
}
