package provision

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// AnywhereProgram is the tool that installs NixOS over whatever a machine runs.
const AnywhereProgram = "nixos-anywhere"

// anywhere has that tool do it. What it converts it reboots, too.
func (a *Arrival) anywhere(ctx context.Context, m *Machine) error {
	m.Close()
	log, err := a.Conversion.Anywhere(ctx, a.Ways[0], a.Name)
	if err != nil {
		return a.Fail(ctx, err, log)
	}
	return nil
}

// Anywhere runs nixos-anywhere with the tree of a node, which lies in the folder etc/nixos below root: so the machine gets it
// as its /etc/nixos, with the hardware-configuration.nix that is made on the way. The output goes to the file logFile, which
// stays with an error, and whose last lines come with it. The tool itself does not check host keys; the machine keeps its own, which was
// checked before and is after.
func Anywhere(ctx context.Context, program, root, logFile string, t Target, node string) ([]string, error) {
	log, err := os.Create(logFile)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	cmd := exec.CommandContext(ctx, program, anywhereArgs(root, t, node)...)
	cmd.Stdout, cmd.Stderr = log, log
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 10 * time.Second
	if err := cmd.Run(); err != nil {
		text, readErr := os.ReadFile(logFile)
		return tail(string(text), logLines), errors.Join(fmt.Errorf("%s: %w; %s has its output", AnywhereProgram, err, logFile), readErr)
	}
	return nil, os.Remove(logFile)
}

func anywhereArgs(root string, t Target, node string) []string {
	tree := filepath.Join(root, "etc", "nixos")
	args := []string{
		"--flake", "path:" + tree + "#" + node, "--target-host", t.User + "@" + t.Host, "--ssh-port", fmt.Sprint(t.Port),
		"--copy-host-keys", "--extra-files", root,
		"--generate-hardware-config", "nixos-generate-config", filepath.Join(tree, "hardware-configuration.nix"),
	}
	for _, key := range t.KeyFiles {
		if _, err := os.Stat(key); err == nil {
			args = append(args, "-i", key)
			break
		}
	}
	if len(t.Jumps) > 0 {
		var hops []string
		for _, j := range t.Jumps {
			hops = append(hops, j.User+"@"+j.Address())
		}
		args = append(args, "--ssh-option", "ProxyJump="+strings.Join(hops, ","))
	}
	return args
}
