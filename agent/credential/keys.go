package credential

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// keysFile lists the names that we wrote to the folder of keys.
const keysFile = "keys.json"

// Deliver brings the secrets that builds need, in clear, to a folder in memory, and takes away those that were brought
// before and are not among them. Of two sets the later one counts. A boot empties the folder, so it is to be done again
// after one.
func (s *Store) Deliver(sets ...Set) error {
	wanted := map[string][]byte{}
	for _, set := range sets {
		for _, c := range set.Secrets {
			if !c.PreBuild {
				continue
			}
			value, err := s.Open(c)
			if err != nil { // it is sealed to the key of an earlier enrolment
				s.o.Log.Error("a secret for builds can't be brought", "error", err)
				continue
			}
			wanted[c.Name] = value
		}
	}
	brought := s.brought()
	if len(wanted) == 0 && len(brought) == 0 {
		return nil
	}
	if err := s.inMemory(); err != nil {
		return err
	}
	// Known before it is there: what is on the list and is not there does no harm.
	all := slices.Clone(brought)
	for name := range wanted {
		all = append(all, name)
	}
	if err := s.list(all); err != nil {
		return err
	}
	for name, value := range wanted {
		if err := s.o.Write(s.KeyFile(name), value, 0o400); err != nil {
			return fmt.Errorf("secret %q can't be brought to the builds: %w", name, err)
		}
	}
	var left []string
	for _, name := range all {
		if _, ok := wanted[name]; ok {
			left = append(left, name)
		} else if err := os.Remove(s.KeyFile(name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return s.list(left)
}

// KeyFile is where builds find a secret.
func (s *Store) KeyFile(name string) string { return filepath.Join(s.o.Keys, name) }

// Netrc is the file by which Nix logs in to binary caches and sources, "" where there is none: a secret for builds with
// netrc in its name. Nix takes one file, so two of them are an error.
func (s *Store) Netrc(secrets []protocol.SealedSecret) (string, error) {
	var file, name string
	for _, c := range secrets {
		if !c.PreBuild || !strings.Contains(c.Name, "netrc") {
			continue
		}
		if file != "" {
			return "", fmt.Errorf("secrets %q and %q are both for Nix to log in with, which takes one netrc file; join them", name, c.Name)
		}
		file, name = s.KeyFile(c.Name), c.Name
	}
	return file, nil
}

// inMemory makes the folder of keys, and refuses one that lies on a disk.
func (s *Store) inMemory() error {
	if err := os.MkdirAll(s.o.Keys, 0o700); err != nil {
		return fmt.Errorf("can't make the folder of the builds' secrets: %w", err)
	}
	var f unix.Statfs_t
	if err := unix.Statfs(s.o.Keys, &f); err != nil {
		return fmt.Errorf("can't tell where %s lies: %w", s.o.Keys, err)
	}
	if f.Type != unix.TMPFS_MAGIC && f.Type != unix.RAMFS_MAGIC {
		return fmt.Errorf("%s lies on a disk, and secrets in clear are for tmpfs and ramfs only; mount one there", s.o.Keys)
	}
	info, err := os.Stat(s.o.Keys)
	if err == nil && info.Mode().Perm()&0o007 != 0 {
		err = fmt.Errorf("everybody may look into %s; it should have mode 0700", s.o.Keys)
	}
	return err
}

// brought are the names that may be in the folder of keys, by us.
func (s *Store) brought() []string {
	var names []string
	if data, err := atomicfile.Read(filepath.Join(s.o.Dir, keysFile), maxSet); err != nil || json.Unmarshal(data, &names) != nil {
		return nil
	}
	// It becomes paths that are removed.
	return slices.DeleteFunc(names, func(name string) bool { return name != filepath.Base(name) || strings.HasPrefix(name, ".") })
}

func (s *Store) list(names []string) error {
	data, err := json.Marshal(slices.Compact(slices.Sorted(slices.Values(names))))
	if err == nil {
		err = s.o.Write(filepath.Join(s.o.Dir, keysFile), append(data, '\n'), 0o600)
	}
	if err != nil {
		return fmt.Errorf("which secrets are brought to the builds can't be kept: %w", err)
	}
	return nil
}
