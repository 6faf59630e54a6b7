package nix

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"time"
)

// SystemProfile is the profile whose generations the boot loader offers.
const SystemProfile = "/nix/var/nix/profiles/system"

const (
	runningLink    = "/run/current-system"
	bootedLink     = "/run/booted-system"
	profileTimeout = 2 * time.Minute
)

// RunningSystem is the store path of the system that runs now. It is an error where this is not NixOS.
func RunningSystem() (string, error) { return resolve(runningLink) }

// BootedSystem is the store path of the system that was booted: its kernel is the one that runs.
func BootedSystem() (string, error) { return resolve(bootedLink) }

// ProfileTarget is the store path of the system profile's current generation; "" where the profile
// was never set.
func ProfileTarget() (string, error) {
	p, err := resolve(SystemProfile)
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	return p, err
}

func resolve(link string) (string, error) {
	p, err := filepath.EvalSymlinks(link)
	if err != nil {
		return "", fmt.Errorf("%s leads nowhere: %w", link, err)
	}
	if err := CheckStorePath(p); err != nil {
		return "", fmt.Errorf("%s: %w", link, err)
	}
	return p, nil
}

// SetProfile makes a store path the system profile's newest generation. It does not touch the boot
// loader: that is the work of the path's own switch-to-configuration boot, which reads the profile.
func SetProfile(ctx context.Context, storePath string) error {
	if err := CheckStorePath(storePath); err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, profileTimeout)
	defer cancel()
	return job{what: fmt.Sprintf("setting %s to %s", SystemProfile, storePath), program: "nix-env",
		args: []string{"-p", SystemProfile, "--set", storePath}}.run(ctx)
}

// RebootNeeded tells whether the current system brings another kernel, initrd or kernel modules than
// the booted one: what no switch can change.
func RebootNeeded(booted, current string) bool {
	for _, part := range []string{"kernel", "initrd", "kernel-modules"} {
		before, err1 := filepath.EvalSymlinks(path.Join(booted, part))
		after, err2 := filepath.EvalSymlinks(path.Join(current, part))
		if before != after || (err1 == nil) != (err2 == nil) {
			return true
		}
	}
	return false
}

// NixOSVersion is what a system says of its own version; "" where it does not say.
func NixOSVersion(system string) string {
	f, err := os.Open(path.Join(system, "nixos-version"))
	if err != nil {
		return ""
	}
	defer f.Close()
	var b [256]byte
	n, _ := f.Read(b[:])
	return oneLine(string(b[:n]))
}
