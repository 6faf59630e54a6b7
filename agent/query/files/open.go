package files

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// open opens a path that lies in a root and hands the file or folder to use.
func (r Reader) open(path string, use func(*os.File) error) error {
	root, whole, ok := r.root(path)
	if !ok || r.hidden(path) {
		return protocol.Refuse(protocol.Invalid, "%s is not among the files that this node lets be read, which are below %s", path, r.roots())
	}
	if whole {
		return r.beneath(root, path, use)
	}
	return asNobody(func() error { return r.beneath(root, path, use) })
}

func (r Reader) hidden(path string) bool {
	return slices.ContainsFunc(r.Hidden, func(h string) bool { return within(path, h) })
}

// beneath opens the path beneath its root or, where a link leads into the Nix store, beneath that.
func (r Reader) beneath(root, path string, use func(*os.File) error) error {
	f, err := r.resolve(root, path)
	if errors.Is(err, unix.EXDEV) {
		// Where the path leads is only asked to say which of the two it is: the kernel decides again.
		target, failed := filepath.EvalSymlinks(path)
		if failed != nil || !within(target, r.Store) || target == r.Store {
			return protocol.Refuse(protocol.Invalid, "%s leads out of %s", path, root)
		}
		f, err = r.resolve(r.Store, target)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	return use(f)
}

// resolve opens a regular file or folder. Nothing else is opened for reading, so that no pipe is waited for and no
// device woken.
func (r Reader) resolve(root, path string) (*os.File, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	relative := strings.TrimPrefix(strings.TrimPrefix(path, root), "/")
	if relative == "" {
		relative = "."
	}
	found, err := unix.Openat2(dir, relative, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_MAGICLINKS})
	if err != nil {
		return nil, err
	}
	defer unix.Close(found)
	var s unix.Stat_t
	if err := unix.Fstat(found, &s); err != nil {
		return nil, err
	}
	self := fmt.Sprintf("/proc/self/fd/%d", found)
	if where, err := os.Readlink(self); err != nil || r.hidden(where) {
		return nil, protocol.Refuse(protocol.Invalid, "%s is not for reading", path)
	}
	if kind := s.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFDIR {
		return nil, protocol.Refuse(protocol.Invalid, "%s is neither a file nor a folder", path)
	}
	fd, err := unix.Open(self, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), path), nil
}

// nobody is the user and group that have no file.
const nobody = 65534

// asNobody does something on a thread that has no more rights to files than anybody on the machine, and that ends
// afterwards. An agent that is not root has no more to begin with.
func asNobody(do func() error) error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // for good: the thread ends with this goroutine
		done <- func() error {
			if os.Geteuid() == 0 {
				if err := drop(); err != nil {
					return err
				}
			}
			return do()
		}()
	}()
	return <-done
}

// drop takes this thread's rights, and finds out that they are gone.
func drop() error {
	if _, _, e := unix.RawSyscall(unix.SYS_SETGROUPS, 0, 0, 0); e != 0 {
		return fmt.Errorf("the agent can't give up its groups: %w", e)
	}
	for _, call := range []uintptr{unix.SYS_SETFSGID, unix.SYS_SETFSUID} { // in this order: the second takes the right to do the first
		unix.RawSyscall(call, nobody, 0, 0)
		if id, _, _ := unix.RawSyscall(call, ^uintptr(0), 0, 0); id != nobody {
			return errors.New("the agent can't give up its rights to files")
		}
	}
	return nil
}
