// Package credential keeps a node's secrets: sealed to the node as they came, and as systemd-creds made of them for the
// units that load them. Nothing is in clear on a disk; what builds need in clear is on a file system in memory.
//
// Start with Store. set.go is what a set is and how one is made, show.go puts one in place, keys.go brings what builds
// need, encrypt.go runs systemd-creds, reseal.go is for another key of the node's.
//
// # Sets
//
// A system is proven with all of its secrets, so they change together. Each set of them is a folder, whose name is its
// number:
//
//	/root/secrets/NAME → DIR/now/NAME   one link for each name: what units load by LoadCredentialEncrypted=
//	DIR/now → 7                         what a boot finds; replaced by one rename
//	DIR/7/NAME                          encrypted by systemd-creds, for this machine alone
//	DIR/7/.set.json                     what is in the set, sealed to the node's key: to compare, and for builds
//
// What is to be seen until the next boot only is mounted over the set that a boot finds: the secrets of a system that is
// not proven yet, or, where the next boot is to bring another system, those of the one that runs. So nothing has to be
// put back after a loss of power, before the first unit loads what is there; and without a boot it is systemd that takes
// the mount away, by a conflict of the service that reverts: no agent is needed for either.
package credential

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync/atomic"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

const (
	DefaultLinks = "/root/secrets" // where units load secrets from
	DefaultKeys  = "/run/keys"     // where builds find theirs
)

const (
	nowLink  = "now"
	firstSet = 1 // it has none of our secrets: what was there before we brought any
)

// System is what a store asks of the machine.
type System interface {
	// Encrypt makes of a value what LoadCredentialEncrypted= takes under the name, on this machine alone.
	Encrypt(ctx context.Context, name string, value []byte) ([]byte, error)
	// Mount lets a folder be seen in another one's place until the next boot, by every process of the machine. It is
	// done already where it is so.
	Mount(ctx context.Context, what, where string) error
	// Unmount ends that. It is done already where nothing is mounted.
	Unmount(ctx context.Context, where string) error
}

// Options are what a Store works with.
type Options struct {
	Dir    string        // of the sets, the store's own
	Links  string        // "": DefaultLinks
	Keys   string        // "": DefaultKeys
	Key    nkeys.KeyPair // the node's curve key, to which secrets are sealed; nil: none can be opened
	Next   nkeys.KeyPair // the one that is to replace it, to which some may be sealed already; nil: none
	System System
	Log    *slog.Logger
	Write  func(path string, data []byte, mode os.FileMode) error // nil: atomicfile.Write
}

// Store has the sets of a node. Reading is safe for concurrent use, all else is one caller's at a time. Each change may
// be broken off anywhere, and repeated.
type Store struct {
	o    Options
	next atomic.Pointer[nkeys.KeyPair] // opens what Key doesn't; nil: nothing does
}

// Open opens the store, making what is missing of it.
func Open(o Options) (*Store, error) {
	if o.Links == "" {
		o.Links = DefaultLinks
	}
	if o.Keys == "" {
		o.Keys = DefaultKeys
	}
	if o.Write == nil {
		o.Write = atomicfile.Write
	}
	s := &Store{o: o}
	if o.Next != nil {
		s.next.Store(&o.Next)
	}
	if err := os.MkdirAll(o.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("can't make the folder of the secrets: %w", err)
	}
	var err error
	if s.o.Dir, err = filepath.EvalSymlinks(o.Dir); err != nil { // nothing can be mounted below a link
		return nil, fmt.Errorf("can't open the folder of the secrets: %w", err)
	}
	if _, err := s.boots(); !errors.Is(err, fs.ErrNotExist) {
		return s, nil // or it is damaged: then the next set that is put in place repairs it
	}
	if err := os.MkdirAll(s.dir(firstSet), 0o700); err != nil {
		return nil, fmt.Errorf("can't make the first set of secrets: %w", err)
	}
	if err := s.save(Set{Number: firstSet}); err != nil {
		return nil, err
	}
	return s, s.turn(firstSet)
}

// dir is a set's folder.
func (s *Store) dir(set int) string { return filepath.Join(s.o.Dir, strconv.Itoa(set)) }

// Place is the folder over which a set is mounted that is to be seen until the next boot, in place of the given one.
func (s *Store) Place(set int) string { return s.dir(set) }

// File is where units load a secret from.
func (s *Store) File(name string) string { return filepath.Join(s.o.Links, name) }

// boots is the set that a boot finds.
func (s *Store) boots() (int, error) {
	target, err := os.Readlink(filepath.Join(s.o.Dir, nowLink))
	if err != nil {
		return 0, err
	}
	set, err := strconv.Atoi(target)
	if err != nil || set < firstSet {
		return 0, fmt.Errorf("%s leads to %q, which is no set of secrets", nowLink, target)
	}
	return set, nil
}

// turn makes a set what a boot finds.
func (s *Store) turn(set int) error {
	link := filepath.Join(s.o.Dir, nowLink)
	temp := filepath.Join(s.o.Dir, "."+nowLink)
	_ = os.Remove(temp)
	err := os.Symlink(strconv.Itoa(set), temp)
	if err == nil {
		err = os.Rename(temp, link)
	}
	if err == nil {
		err = atomicfile.SyncDir(s.o.Dir)
	}
	if err != nil {
		return fmt.Errorf("can't put the secrets in place: %w", err)
	}
	return nil
}

// Standing is the set that is to be seen now, and the number of the one that a boot finds. One that is damaged is
// taken for one without secrets: the next deployment brings them anew.
func (s *Store) Standing() (live Set, boots int) {
	boots, err := s.boots()
	if err != nil {
		s.o.Log.Error("which secrets are in place can't be told; deploy again", "error", err)
		boots = firstSet
	}
	if live, err = s.read(nowLink); err != nil {
		s.o.Log.Error("the secrets that are in place can't be told; deploy again", "error", err)
		live = Set{Number: boots}
	}
	return live, boots
}

// numbers are those of all sets that are here.
func (s *Store) numbers() []int {
	entries, err := os.ReadDir(s.o.Dir)
	if err != nil {
		return nil
	}
	var all []int
	for _, entry := range entries {
		if n, err := strconv.Atoi(entry.Name()); err == nil && n >= firstSet && entry.IsDir() {
			all = append(all, n)
		}
	}
	return all
}

// Get is what can be seen of a set: where another one is mounted over it, that one.
func (s *Store) Get(set int) (Set, error) { return s.read(strconv.Itoa(set)) }
