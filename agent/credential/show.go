package credential

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// Show lets units see one set from now on, and another one, or the same, from the next boot on. Both change at one
// moment, by a mount or by a rename.
func (s *Store) Show(ctx context.Context, live, boots int) error {
	now, err := s.boots()
	if err != nil {
		now = firstSet // it is written anew below
	}
	for _, n := range []int{live, boots} {
		set, err := s.read(strconv.Itoa(n))
		if err != nil {
			return fmt.Errorf("a set of secrets is not here any more: %w", err)
		}
		for _, c := range set.Secrets {
			if err := s.link(c.Name); err != nil {
				return err
			}
		}
	}
	if seen, _ := s.Standing(); seen.Number == live && now == boots && err == nil {
		return s.tidy(live, boots)
	}
	// What is mounted over the set that is to be seen hides it.
	if err := s.cover(ctx, live, live); err != nil {
		return err
	}
	// Where a boot is to find another set, nobody looks yet at what is mounted over it here.
	if err := s.cover(ctx, boots, live); err != nil {
		return err
	}
	if now != boots || err != nil {
		if err := s.turn(boots); err != nil {
			return err
		}
		if err := s.cover(ctx, now, now); err != nil {
			return err
		}
	}
	if seen, _ := s.Standing(); seen.Number != live {
		return fmt.Errorf("the secrets can't be put in place: set %d is to be seen in place of %d", seen.Number, live)
	}
	return s.tidy(live, boots)
}

// cover lets a set be seen in a set's folder, itself or another one.
func (s *Store) cover(ctx context.Context, folder, with int) error {
	seen := folder
	if set, err := s.read(strconv.Itoa(folder)); err == nil {
		seen = set.Number
	}
	if seen == with {
		return nil
	}
	if seen != folder {
		if err := s.o.System.Unmount(ctx, s.dir(folder)); err != nil {
			return fmt.Errorf("the secrets that were in place can't be taken away: %w", err)
		}
	}
	if with == folder {
		return nil
	}
	if err := s.o.System.Mount(ctx, s.dir(with), s.dir(folder)); err != nil {
		return fmt.Errorf("the secrets can't be put in place: %w", err)
	}
	return nil
}

// target is where our link of a name leads to.
func (s *Store) target(name string) string { return filepath.Join(s.o.Dir, nowLink, name) }

// ours tells whether a name is a link of ours.
func (s *Store) ours(name string) bool {
	target, err := os.Readlink(s.File(name))
	return err == nil && target == s.target(name)
}

// link makes the link of a name, in place of whatever file is there.
func (s *Store) link(name string) error {
	if s.ours(name) {
		return nil
	}
	err := os.MkdirAll(s.o.Links, 0o700)
	if err == nil {
		err = os.Chmod(s.o.Links, 0o700) // who made it before us may have left it open
	}
	temp := filepath.Join(s.o.Links, ".nix-infra-new")
	_ = os.Remove(temp)
	if err == nil {
		err = os.Symlink(s.target(name), temp)
	}
	if err == nil {
		err = os.Rename(temp, s.File(name))
	}
	if err == nil {
		err = atomicfile.SyncDir(s.o.Links)
	}
	if err != nil {
		return fmt.Errorf("secret %q can't be put in place: %w", name, err)
	}
	return nil
}

// tidy removes our links of names that are in no set in place.
func (s *Store) tidy(live, boots int) error {
	if live != boots { // one of them lies below the other, and can't be read
		return nil
	}
	wanted, err := s.read(nowLink)
	if err != nil {
		return nil // damaged: what is there stays
	}
	entries, err := os.ReadDir(s.o.Links)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, entry := range entries {
		if _, ok := wanted.Get(entry.Name()); !ok && s.ours(entry.Name()) {
			if err := os.Remove(s.File(entry.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Prune removes the sets that nobody has a use for any more; those in place stay.
func (s *Store) Prune(keep []int) error {
	live, boots := s.Standing()
	keep = append(slices.Clone(keep), live.Number, boots)
	var failed []error
	for _, n := range s.numbers() {
		if slices.Contains(keep, n) || s.covered(n) {
			continue
		}
		failed = append(failed, os.RemoveAll(s.dir(n)))
	}
	return errors.Join(failed...)
}

// covered tells whether another set is mounted over a set's folder: what would be removed there is that one.
func (s *Store) covered(set int) bool {
	info, err := os.Stat(s.dir(set))
	return err != nil || slices.ContainsFunc(s.numbers(), func(n int) bool {
		other, err := os.Stat(s.dir(n))
		return n != set && err == nil && os.SameFile(info, other)
	})
}
