package credential

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

const (
	setFile  = ".set.json" // no secret's name begins with a dot
	maxSet   = 8 << 20     // bytes, of a set's file
	maxFound = 1 << 20     // bytes, of a file of somebody else's: systemd takes no larger credential
)

// Set is the secrets of a system, by name.
type Set struct {
	Number  int      `json:"set"`
	Secrets []Secret `json:"secrets"`
}

// Secret is one of a set.
type Secret struct {
	Name     string `json:"name"`
	Sealed   []byte `json:"sealed,omitempty"` // the value, to the node; none where the file was found
	PreBuild bool   `json:"pre_build,omitempty"`
	Written  int64  `json:"written"`         // Unix seconds, when the node got this value
	Found    bool   `json:"found,omitempty"` // somebody else's file, which was there before ours of that name
}

// Get is a secret of the set by its name.
func (s Set) Get(name string) (Secret, bool) {
	i := slices.IndexFunc(s.Secrets, func(c Secret) bool { return c.Name == name })
	if i < 0 {
		return Secret{}, false
	}
	return s.Secrets[i], true
}

// Asked is the set that a manifest's secrets make, not kept yet: what is somebody else's stays beside them. What the
// node can't open is an error.
func (s *Store) Asked(secrets []protocol.SealedSecret, before Set) (Set, error) {
	var set Set
	for _, c := range secrets {
		secret := Secret{Name: c.Name, Sealed: c.Sealed, PreBuild: c.PreBuild}
		if _, err := s.Open(secret); err != nil {
			return Set{}, err
		}
		set.Secrets = append(set.Secrets, secret)
	}
	for _, c := range before.Secrets {
		if _, replaced := set.Get(c.Name); c.Found && !replaced {
			set.Secrets = append(set.Secrets, c)
		}
	}
	slices.SortFunc(set.Secrets, byName)
	return set, nil
}

func byName(a, b Secret) int { return strings.Compare(a.Name, b.Name) }

// Open gives a secret's value.
func (s *Store) Open(c Secret) ([]byte, error) {
	if s.o.Key == nil || c.Found {
		return nil, fmt.Errorf("secret %q: the node has no key that opens it", c.Name)
	}
	value, err := protocol.Unseal(c.Sealed, s.o.Key)
	if next := s.next.Load(); err != nil && next != nil {
		value, err = protocol.Unseal(c.Sealed, *next)
	}
	if err != nil {
		return nil, fmt.Errorf("secret %q can't be opened: %w; deploy again, and enroll the node again if that doesn't help", c.Name, err)
	}
	if len(value) > protocol.MaxSecretSize {
		return nil, fmt.Errorf("secret %q has %d bytes, the limit is %d", c.Name, len(value), protocol.MaxSecretSize)
	}
	return value, nil
}

// equal compares by value. What can't be opened any more, such as with the key of an earlier enrolment, is another one.
func (s *Store) equal(a, b Secret) bool {
	if a.Found && b.Found || !a.Found && !b.Found && bytes.Equal(a.Sealed, b.Sealed) {
		return true
	}
	one, err1 := s.Open(a)
	other, err2 := s.Open(b)
	return err1 == nil && err2 == nil && bytes.Equal(one, other)
}

// Changed names the secrets that are in one of two sets only, or with another value. Same is true where, besides, the
// builds get the same.
func (s *Store) Changed(a, b Set) (names []string, same bool) {
	same = true
	for _, c := range a.Secrets {
		d, ok := b.Get(c.Name)
		if !ok || !s.equal(c, d) {
			names = append(names, c.Name)
		}
		same = same && c.PreBuild == d.PreBuild
	}
	for _, d := range b.Secrets {
		if _, ok := a.Get(d.Name); !ok {
			names = append(names, d.Name)
		}
	}
	slices.Sort(names)
	return names, same && len(names) == 0
}

// Stage makes a set of what was asked for, beside those that are here: nothing sees it yet. What has the same value in
// before, which is here, is taken from there. A file of somebody else's under one of the names is taken into the sets
// that are here, so that each way back finds it again.
func (s *Store) Stage(ctx context.Context, asked, before Set) (set Set, err error) {
	set.Number = slices.Max(append(s.numbers(), firstSet)) + 1
	dir := s.dir(set.Number)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return Set{}, fmt.Errorf("can't make a set of secrets: %w", err)
	}
	defer func() {
		if err != nil {
			os.RemoveAll(dir)
		}
	}()
	for _, c := range asked.Secrets {
		data, written, err := s.make(ctx, c, before)
		if err != nil {
			return Set{}, err
		}
		if err := s.o.Write(filepath.Join(dir, c.Name), data, 0o400); err != nil {
			return Set{}, fmt.Errorf("secret %q can't be kept: %w", c.Name, err)
		}
		c.Written = written
		set.Secrets = append(set.Secrets, c)
	}
	if err := s.save(set); err != nil {
		return Set{}, err
	}
	if err := atomicfile.SyncDir(s.o.Dir); err != nil {
		return Set{}, err
	}
	for _, c := range set.Secrets {
		if err := s.takeOver(c.Name); err != nil {
			return Set{}, err
		}
	}
	return set, nil
}

// make gives what units load of a secret, and since when the node has that value.
func (s *Store) make(ctx context.Context, c Secret, before Set) (data []byte, written int64, err error) {
	if old, ok := before.Get(c.Name); ok && s.equal(c, old) {
		if data, err := atomicfile.Read(filepath.Join(s.dir(before.Number), c.Name), maxFound); err == nil {
			return data, old.Written, nil
		}
	}
	value, err := s.Open(c)
	if err != nil {
		return nil, 0, err
	}
	data, err = s.o.System.Encrypt(ctx, c.Name, value)
	if err != nil {
		return nil, 0, fmt.Errorf("secret %q can't be encrypted for this machine: %w", c.Name, err)
	}
	return data, time.Now().Unix(), nil
}

// takeOver makes a name ours: what somebody else has there becomes a part of all sets that lack the name, and our link
// takes its place.
func (s *Store) takeOver(name string) error {
	file := s.File(name)
	if s.ours(name) {
		return nil
	}
	info, err := os.Stat(file)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // Show makes the link
	case err != nil:
		return fmt.Errorf("what is there under a secret's name can't be read: %w", err)
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is no file, and a secret of that name is to come; move it away", file)
	}
	data, err := atomicfile.Read(file, maxFound)
	if err != nil {
		return fmt.Errorf("what is there under a secret's name can't be read: %w", err)
	}
	for _, n := range s.numbers() {
		set, err := s.read(fmt.Sprint(n))
		if _, has := set.Get(name); err != nil || set.Number != n || has { // another one may be mounted there
			continue
		}
		if err := s.o.Write(filepath.Join(s.dir(n), name), data, 0o400); err != nil {
			return fmt.Errorf("%s can't be kept: %w", file, err)
		}
		set.Secrets = append(set.Secrets, Secret{Name: name, Found: true, Written: info.ModTime().Unix()})
		slices.SortFunc(set.Secrets, byName)
		if err := s.save(set); err != nil {
			return err
		}
	}
	return s.link(name)
}

// save writes a set's file.
func (s *Store) save(set Set) error {
	data, err := json.Marshal(set)
	if err == nil {
		err = s.o.Write(filepath.Join(s.dir(set.Number), setFile), append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("a set of secrets can't be kept: %w", err)
	}
	return nil
}

// read reads the set that is to be seen in one of the store's folders.
func (s *Store) read(folder string) (Set, error) {
	file := filepath.Join(s.o.Dir, folder, setFile)
	data, err := atomicfile.Read(file, maxSet)
	if err != nil {
		return Set{}, err
	}
	set := Set{}
	if err := json.Unmarshal(data, &set); err != nil || set.Number < firstSet {
		return Set{}, fmt.Errorf("%s is damaged", file)
	}
	return set, nil
}
