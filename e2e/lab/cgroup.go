package lab

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupRoot is the lab's subtree below the cgroup2 mount.
const cgroupRoot = "nix-infra-lab"

// cgroupMount is where cgroup2 is mounted: /sys/fs/cgroup, or beside the v1 controllers on a hybrid host.
var cgroupMount = sync.OnceValues(func() (string, error) {
	data, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return "", fmt.Errorf("lab: %w", err)
	}
	for line := range strings.Lines(string(data)) {
		mount, super, _ := strings.Cut(line, " - ")
		fields := strings.Fields(mount)
		if strings.HasPrefix(super, "cgroup2 ") && len(fields) > 4 {
			return fields[4], nil
		}
	}
	return "", errors.New("lab: cgroup2 is not mounted; `mount -t cgroup2 cgroup2 /sys/fs/cgroup` mounts it")
})

func (l *Lab) cgroup() string {
	mount, err := cgroupMount()
	if err != nil {
		mount = "/sys/fs/cgroup" // Open and Attach have said so already
	}
	return filepath.Join(mount, cgroupRoot, l.name)
}

// delegate gives the subtree the controllers that the kernel has on cgroup2, so that limits work in nodes. On a
// hybrid host that is few or none, and nodes do without.
func delegate(cgroup string) {
	mount, err := cgroupMount()
	if err != nil {
		return
	}
	var path []string
	for dir := cgroup; strings.HasPrefix(dir, mount); dir = filepath.Dir(dir) {
		path = append(path, dir)
	}
	slices.Reverse(path) // a group can pass on only what its parent has
	for _, dir := range path {
		controllers, _ := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
		for _, controller := range strings.Fields(string(controllers)) {
			_ = os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+controller), 0)
		}
	}
}

// killCgroup kills every process of the tree at once, and returns when they are gone.
func killCgroup(ctx context.Context, cgroup string) error {
	return awaitEmpty(ctx, cgroup, func() error {
		err := os.WriteFile(filepath.Join(cgroup, "cgroup.kill"), []byte("1"), 0)
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return err
	})
}

func populated(cgroup string) bool {
	data, err := os.ReadFile(filepath.Join(cgroup, "cgroup.events"))
	return err == nil && strings.Contains(string(data), "populated 1")
}

// awaitEmpty returns when the tree has no process any more. Until then it calls again, if there is one, every
// now and then: a process may join the tree just after the others were killed.
func awaitEmpty(ctx context.Context, cgroup string, again func() error) error {
	f, err := os.Open(filepath.Join(cgroup, "cgroup.events"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	for populated(cgroup) {
		if again != nil {
			if err := again(); err != nil {
				return err
			}
		}
		// The kernel signals a change of the file as an exceptional condition; the bound is for ctx and again.
		fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLPRI}}
		if _, err := unix.Poll(fds, 100); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("poll %s: %w", f.Name(), err)
		}
		// Reading rearms it.
		if _, err := f.Seek(0, 0); err == nil {
			_, _ = f.Read(make([]byte, 64))
		}
		if ctx.Err() != nil {
			return fmt.Errorf("waiting for the processes of %s to end: %w", cgroup, ctx.Err())
		}
	}
	return nil
}

// removeCgroup removes the empty tree, leaves first. A process that has just died may hold its group for a
// moment, hence the second tries.
func removeCgroup(cgroup string) {
	for range 50 {
		var dirs []string
		_ = filepath.WalkDir(cgroup, func(name string, e fs.DirEntry, err error) error {
			if err == nil && e.IsDir() {
				dirs = append(dirs, name)
			}
			return nil
		})
		slices.Reverse(dirs)
		for _, dir := range dirs {
			_ = os.Remove(dir)
		}
		if _, err := os.Stat(cgroup); err != nil {
			break
		}
		time.Sleep(10 * time.Millisecond)
	}
}
