package lab

import (
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"golang.org/x/sys/unix"
)

// overlaid says whether that folder, or the nearest one above that exists, lies on overlayfs.
func overlaid(dir string) bool {
	for ; ; dir = filepath.Dir(dir) {
		var fs unix.Statfs_t
		if err := unix.Statfs(dir, &fs); err == nil {
			return fs.Type == unix.OVERLAYFS_SUPER_MAGIC
		}
		if dir == filepath.Dir(dir) {
			return false
		}
	}
}

// inNetwork runs do on a thread that is in that network namespace: sockets that it opens are there.
func inNetwork(namespace string, do func() error) error {
	result := make(chan error, 1)
	go func() {
		// Never unlocked: the thread ends with the goroutine, so nothing else ever runs in there by mistake.
		runtime.LockOSThread()
		result <- func() error {
			f, err := os.Open(namespace)
			if err != nil {
				return err
			}
			defer f.Close()
			if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
				return fmt.Errorf("enter %s: %w", namespace, err)
			}
			return do()
		}()
	}()
	return <-result
}

// openInRoot opens a file as that process sees it: its mounts, and absolute links relative to its root.
func openInRoot(pid int, name string) (*os.File, error) {
	root, err := os.Open(fmt.Sprintf("/proc/%d/root", pid))
	if err != nil {
		return nil, err
	}
	defer root.Close()
	how := unix.OpenHow{Flags: unix.O_RDONLY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT}
	fd, err := unix.Openat2(int(root.Fd()), name, &how)
	if err != nil {
		return nil, &os.PathError{Op: "open", Path: name, Err: err}
	}
	return os.NewFile(uintptr(fd), name), nil
}
