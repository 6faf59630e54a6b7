// Package nix drives Nix on a machine: builds, the system profile, gc roots, and what can be read off
// a system's store path.
//
// Start here: store paths and how programs are run. run.go runs Nix's own. build.go builds, cache.go brings
// closures from binary caches and to them, closure.go tells what is in them, system.go reads and sets systems,
// generation.go is about the systems before, root.go keeps closures from the garbage collector.
//
// Nothing here goes through a shell, and nothing that Nix prints is believed to be a store path before
// it was checked to be one.
package nix

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// features are those of Nix that we use and that it still calls experimental.
const features = "nix-command flakes"

// StoreDir is where Nix keeps what it builds.
const StoreDir = "/nix/store"

// stopGrace is how long Nix has to end itself after SIGTERM, before SIGKILL: it kills its builders and
// lets go of its locks in that time.
const stopGrace = 5 * time.Second

// ErrNotStorePath marks a string that is not the path of one store object.
var ErrNotStorePath = errors.New("not a store path")

// CheckStorePath tells whether p is the path of one store object, such as
// /nix/store/<32 characters of Nix's base 32>-name: nothing below it, nothing relative.
func CheckStorePath(p string) error {
	name, ok := strings.CutPrefix(p, StoreDir+"/")
	if !ok || len(name) < 34 || len(name) > 32+1+211 || name[32] != '-' {
		return fmt.Errorf("%w: %q", ErrNotStorePath, p)
	}
	for _, c := range name[:32] {
		if !strings.ContainsRune("0123456789abcdfghijklmnpqrsvwxyz", c) {
			return fmt.Errorf("%w: %q", ErrNotStorePath, p)
		}
	}
	for _, c := range name[33:] {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && !strings.ContainsRune("+-._?=", c) {
			return fmt.Errorf("%w: %q", ErrNotStorePath, p)
		}
	}
	return nil
}

// SearchPath is the PATH under which Nix and a system's own programs run: NixOS's places first, then
// what this process inherited.
func SearchPath() string {
	parts := []string{"/run/current-system/sw/bin", "/run/wrappers/bin"}
	if inherited := os.Getenv("PATH"); inherited != "" {
		parts = append(parts, inherited)
	}
	return strings.Join(parts, ":")
}

// LookPath finds a program along SearchPath and follows symbolic links to the file itself, so that the
// answer stays good while systems are switched.
func LookPath(program string) (string, error) {
	for _, dir := range filepath.SplitList(SearchPath()) {
		if !path.IsAbs(dir) {
			continue
		}
		file, err := filepath.EvalSymlinks(path.Join(dir, program))
		if err != nil {
			continue
		}
		if info, err := os.Stat(file); err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0 {
			return file, nil
		}
	}
	return "", fmt.Errorf("%s is not installed: looked in %s", program, SearchPath())
}

// Run runs a command as one that the kernel may end where memory runs out. A service such as an agent is
// kept from that, and what it starts would be, too: what fills the memory could then be nothing but what
// matters.
func Run(c *exec.Cmd) error {
	if err := c.Start(); err != nil {
		return err
	}
	lift(c.Process.Pid)
	return c.Wait()
}

// lift takes the protection that a child inherited from it. Without one, or where the child is gone, there
// is nothing to do.
func lift(pid int) {
	const file = "oom_score_adj"
	own, err := os.ReadFile("/proc/self/" + file)
	if err == nil && strings.HasPrefix(string(own), "-") {
		_ = os.WriteFile(fmt.Sprintf("/proc/%d/%s", pid, file), []byte("0"), 0) // more is always allowed
	}
}

// command prepares a program for a run that ends with ctx: SIGTERM to its whole process group, and
// SIGKILL after stopGrace.
func command(ctx context.Context, program string, args ...string) (*exec.Cmd, error) {
	file, err := LookPath(program)
	if err != nil {
		return nil, err
	}
	c := exec.CommandContext(ctx, file, args...)
	// A multi-call binary such as nix's goes by the name under which it was called.
	c.Args[0] = program
	c.Env = append(os.Environ(), "PATH="+SearchPath())
	if os.Getenv("HOME") == "" { // a service of the system has none, and Nix wants one
		c.Env = append(c.Env, "HOME=/root")
	}
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error {
		group := -c.Process.Pid
		time.AfterFunc(stopGrace, func() { _ = syscall.Kill(group, syscall.SIGKILL) })
		return syscall.Kill(group, syscall.SIGTERM)
	}
	c.WaitDelay = 2 * stopGrace
	return c, nil
}
