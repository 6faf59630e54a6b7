package reconcile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"

	"github.com/nix-infra/nix-infra/nix"
)

// ownUnit is the service whose main process this is; "" where there is none, such as in a shell.
func ownUnit(ctx context.Context, c *dbus.Conn) (string, error) {
	var refused godbus.Error
	unit, err := c.GetUnitNameByPID(ctx, uint32(os.Getpid()))
	if errors.As(err, &refused) && !transient(refused.Name) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("systemd can't tell which unit the agent is: %w", err)
	}
	if !strings.HasSuffix(unit, ".service") {
		return "", nil
	}
	main, err := c.GetServicePropertyContext(ctx, unit, "MainPID")
	if err != nil {
		return "", fmt.Errorf("systemd can't tell about %s: %w", unit, err)
	}
	if pid, _ := main.Value.Value().(uint32); pid != uint32(os.Getpid()) {
		return "", nil
	}
	return unit, nil
}

// steps are the commands that a revert ends with.
type steps struct {
	restart []string // the units that the old system has as the new one had them, and that load other secrets
	start   []string // the agent's own unit; none where it has none
}

// lastSteps are the last steps of a revert. One starts the agent: the old system's switch-to-configuration stops a
// unit that only the new system had, and starts none of those that belong to no system, as the one that a machine
// became a node with does.
func lastSteps(ctx context.Context, c *dbus.Conn, r Revert) (s steps, err error) {
	unit, err := ownUnit(ctx, c)
	if unit == "" && len(r.Loaders) == 0 || err != nil {
		return s, err
	}
	program, err := nix.LookPath("systemctl")
	if err != nil {
		return s, err
	}
	if len(r.Loaders) > 0 {
		s.restart = append([]string{program, "--no-block", "restart"}, r.Loaders...)
	}
	if unit != "" {
		s.start = []string{program, "--no-block", "start", unit}
	}
	return s, nil
}

// properties run the steps after the job. The agent is started whether that succeeded or not, and what becomes of
// the steps is not what became of the job.
func (s steps) properties() []dbus.Property {
	type command struct {
		Path          string
		Args          []string
		IgnoreFailure bool
	}
	var after, always []command
	if len(s.restart) > 0 {
		after = append(after, command{s.restart[0], s.restart, true})
	}
	if len(s.start) > 0 {
		after, always = append(after, command{s.start[0], s.start, true}), []command{{s.start[0], s.start, true}}
	}
	var p []dbus.Property
	if len(after) > 0 {
		p = append(p, property("ExecStartPost", after))
	}
	if len(always) > 0 {
		p = append(p, property("ExecStopPost", always))
	}
	return p
}

// Renew implements Host.
func (h *SystemdHost) Renew(ctx context.Context) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	c, err := connect(ctx)
	if err != nil {
		return false, err
	}
	defer c.Close()
	unit, err := ownUnit(ctx, c)
	if unit == "" || err != nil {
		return false, err
	}
	all, err := c.GetAllPropertiesContext(ctx, unit)
	if err != nil {
		return false, fmt.Errorf("systemd can't tell about %s: %w", unit, err)
	}
	switch load, _ := all["LoadState"].(string); load {
	case "masked", "bad-setting", "error":
		return false, fmt.Errorf("the new system's %s can't be started: systemd calls it %s", unit, load)
	}
	argv := firstCommand(all["ExecStart"])
	if len(argv) == 0 || isThis(argv) {
		return false, nil
	}
	h.log.Info("the unit has another agent now, which has to prove the system; it takes over", "unit", unit, "program", argv[0])
	if _, err := c.RestartUnitContext(ctx, unit, "replace", nil); err != nil {
		return false, fmt.Errorf("systemd can't restart %s: %w", unit, err)
	}
	return true, nil
}

// firstCommand is the path and the arguments of the first command of systemd's ExecStart, a(sasbttttuii).
func firstCommand(value any) []string {
	commands, _ := value.([][]any)
	if len(commands) == 0 || len(commands[0]) < 2 {
		return nil
	}
	file, _ := commands[0][0].(string)
	args, _ := commands[0][1].([]string)
	if file == "" || len(args) == 0 {
		return nil
	}
	return append([]string{file}, args[1:]...)
}

// isThis tells whether a command of a unit would run what this process runs. A program that was replaced
// in its place is another one, and one that can't be found is certainly another one.
func isThis(argv []string) bool {
	self, err := os.Stat("/proc/self/exe")
	if err != nil {
		return true // nothing can be told by it
	}
	file, err := os.Stat(argv[0])
	if err != nil || !os.SameFile(self, file) {
		return false
	}
	// One file may have several names that mean several programs.
	link, err1 := os.Readlink("/proc/self/exe")
	name, err2 := filepath.EvalSymlinks(argv[0])
	if err1 == nil && err2 == nil && link != name {
		return false
	}
	// systemd shows arguments before it puts in the environment's values.
	expands := func(arg string) bool { return strings.Contains(arg, "$") }
	return slices.ContainsFunc(argv[1:], expands) || slices.Equal(argv[1:], os.Args[1:])
}
