//go:build !linux

package session

import (
	"os"
	"syscall"

	"golang.org/x/sys/unix"
)

// adoptOrphans does nothing: only Linux has it. A process that leaves the program's process group gets away here.
func adoptOrphans() error { return nil }

// withUs does nothing: only Linux can tie a process's life to ours.
func withUs(a *syscall.SysProcAttr) *syscall.SysProcAttr { return a }

// descendants is the program's process group, as kill takes it.
func descendants(program int) []int {
	if syscall.Kill(-program, 0) != nil {
		return nil
	}
	return []int{-program}
}

func letGoOfOutput() {
	null, err := os.OpenFile(os.DevNull, os.O_WRONLY, 0)
	if err != nil {
		return
	}
	defer null.Close()
	_ = unix.Dup2(int(null.Fd()), 1)
	_ = unix.Dup2(int(null.Fd()), 2)
}
