package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// startTime is for one order to systemd; the agent says by itself that it is up.
const startTime = time.Minute

// startService has systemd start the agent. Where the machine has no unit for it, it gets the one that enrolment over SSH
// installs, with this very program. Lasting tells whether the unit is still there after a boot.
func startService(ctx context.Context) (lasting bool, err error) {
	if _, err := os.Stat(machine.PassingUnits); err != nil {
		return false, errors.New("this machine does not run systemd")
	}
	state, err := systemctl(ctx, "show", "--property=LoadState,FragmentPath", "--value", machine.AgentService)
	if err != nil {
		return false, err
	}
	passing := strings.Contains(state, machine.PassingUnits+"/"+machine.AgentService)
	if strings.Contains(state, "not-found") {
		if lasting, err = installService(ctx); err != nil {
			return false, err
		}
		passing = !lasting
	}
	if _, err := systemctl(ctx, "start", machine.AgentService); err != nil {
		return false, fmt.Errorf("%w; see journalctl -u %s", err, machine.AgentService)
	}
	return !passing, nil
}

// installService puts the program and the unit where they are on every enrolled machine.
func installService(ctx context.Context) (lasting bool, err error) {
	if err := installProgram(machine.AgentBinary); err != nil {
		return false, err
	}
	dir := machine.PassingUnits
	if info, err := os.Lstat(machine.LastingUnits); err == nil && info.IsDir() && unix.Access(machine.LastingUnits, unix.W_OK) == nil {
		dir, lasting = machine.LastingUnits, true
	}
	if err := atomicfile.Write(filepath.Join(dir, machine.AgentService), []byte(machine.AgentUnit), 0o644); err != nil {
		return false, err
	}
	if _, err := systemctl(ctx, "daemon-reload"); err != nil {
		return false, err
	}
	if lasting {
		_, err = systemctl(ctx, "enable", machine.AgentService)
	}
	return lasting, err
}

// installProgram copies this program to path, unless it is what runs.
func installProgram(path string) error {
	self, err := os.Open("/proc/self/exe")
	if err != nil {
		return err
	}
	defer self.Close()
	running, err := self.Stat()
	if err != nil {
		return err
	}
	if there, err := os.Stat(path); err == nil && os.SameFile(running, there) {
		return nil
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	return atomicfile.Stream(path, 0o700, func(w io.Writer) error {
		_, err := io.Copy(w, self)
		return err
	})
}

func systemctl(ctx context.Context, args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	out, err := exec.CommandContext(ctx, "systemctl", args...).CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("systemctl %s: %w: %s", args[0], err, strings.Join(strings.Fields(string(out)), " "))
	}
	return string(out), nil
}
