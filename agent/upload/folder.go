package upload

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/transfer"
)

// A folder is reached name by name from one that is open, and a link is never followed: whoever may write into one of
// them can't lead the agent elsewhere.

// openRoot opens the folder of a root, and makes it where it is not there. Nobody but its owner, who is the agent's user,
// may write into it: else what is in it could change between two looks at it.
func openRoot(path string) (*os.File, error) {
	top, err := os.Open("/")
	if err != nil {
		return nil, err
	}
	defer top.Close()
	root, err := walk(top, strings.TrimPrefix(path, "/"), 0, true)
	if err != nil {
		return nil, err
	}
	if err := ownFolder(root); err != nil {
		root.Close()
		return nil, err
	}
	return root, nil
}

func ownFolder(f *os.File) error {
	var s unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &s); err != nil {
		return err
	}
	if int(s.Uid) != os.Geteuid() || s.Mode&0o022 != 0 {
		return protocol.Refuse(protocol.Failed, "%s takes no uploads while others than root own it, or may write into it (chown root, chmod go-w)", f.Name())
	}
	return nil
}

// walk opens a folder below another one, "" for that one itself. Folders that are missing are made, where that is wanted.
func walk(from *os.File, path string, resolve uint64, create bool) (*os.File, error) {
	fd, err := unix.Openat(int(from.Fd()), ".", unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	at := strings.TrimSuffix(from.Name(), "/")
	for name := range strings.SplitSeq(path, "/") {
		if name == "" {
			continue
		}
		at += "/" + name
		next, err := enter(fd, name, resolve, create)
		unix.Close(fd)
		if err != nil {
			return nil, explain(at, err)
		}
		fd = next
	}
	return os.NewFile(uintptr(fd), at), nil
}

func enter(fd int, name string, resolve uint64, create bool) (int, error) {
	how := &unix.OpenHow{Flags: unix.O_RDONLY | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: resolve | unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS}
	next, err := unix.Openat2(fd, name, how)
	if !create || !errors.Is(err, unix.ENOENT) {
		return next, err
	}
	if err := unix.Mkdirat(fd, name, 0o755); err != nil && !errors.Is(err, unix.EEXIST) {
		return -1, err
	}
	if err := unix.Fsync(fd); err != nil {
		return -1, err
	}
	return unix.Openat2(fd, name, how)
}

// explain says what is in the way.
func explain(path string, err error) error {
	switch {
	case errors.Is(err, unix.ELOOP):
		return protocol.Refuse(protocol.Invalid, "%s is a link, and uploads follow none", path)
	case errors.Is(err, unix.ENOTDIR):
		return protocol.Refuse(protocol.Invalid, "%s is no folder", path)
	case errors.Is(err, unix.EXDEV):
		return protocol.Refuse(protocol.Invalid, "%s is on another file system than the folder that takes uploads", path)
	case errors.Is(err, unix.ENOSPC), errors.Is(err, unix.EDQUOT):
		return protocol.Refuse(protocol.Failed, "there is no room left for %s", path)
	}
	return fmt.Errorf("%s: %w", path, err)
}

// What the staging folder keeps of uploads that broke off.
const (
	keptFor  = 24 * time.Hour
	keptMost = 256
)

// openStaging opens the root's staging folder and removes from it what nobody came back for.
func (u *session) openStaging() (*os.File, error) {
	if err := unix.Mkdirat(int(u.root.Fd()), transfer.Staging, 0o700); err != nil && !errors.Is(err, unix.EEXIST) {
		return nil, explain(u.root.Name()+"/"+transfer.Staging, err)
	}
	staging, err := walk(u.root, transfer.Staging, unix.RESOLVE_NO_XDEV, false)
	if err != nil {
		return nil, err
	}
	if err = ownFolder(staging); err == nil {
		err = u.clean(staging)
	}
	if err != nil {
		staging.Close()
		return nil, err
	}
	return staging, nil
}

func (u *session) clean(staging *os.File) error {
	names, err := staging.Readdirnames(-1)
	if err != nil {
		return err
	}
	type rest struct {
		name string
		at   int64 // of the last write, Unix seconds
	}
	var kept []rest
	for _, name := range names {
		var s unix.Stat_t
		if unix.Fstatat(int(staging.Fd()), name, &s, unix.AT_SYMLINK_NOFOLLOW) == nil && !u.s.held(u.root.Name(), name) {
			kept = append(kept, rest{name, s.Mtim.Sec})
		}
	}
	slices.SortFunc(kept, func(a, b rest) int { return int(b.at - a.at) })
	for i, r := range kept {
		if i >= keptMost || time.Since(time.Unix(r.at, 0)) > keptFor {
			if err := unix.Unlinkat(int(staging.Fd()), r.name, 0); err != nil {
				return fmt.Errorf("%s/%s: %w", staging.Name(), r.name, err)
			}
		}
	}
	return nil
}

// reserve is how much room a file system keeps, whatever is uploaded: a twentieth, and no more than this many bytes.
const reserve = 1 << 30

// room tells how many bytes uploads may take still.
func (u *session) room() (int64, error) {
	var s unix.Statfs_t
	if err := unix.Fstatfs(int(u.root.Fd()), &s); err != nil {
		return 0, err
	}
	block := uint64(s.Bsize)
	kept := min(s.Blocks*block/20, reserve)
	return int64(s.Bavail*block) - int64(kept), nil
}
