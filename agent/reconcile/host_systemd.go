package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/nix"
)

const (
	pollUnit      = 500 * time.Millisecond // the end of a job is signalled; this is for signals that were lost
	busTimeout    = 10 * time.Second
	observeTime   = 20 * time.Second
	disarmTime    = time.Minute
	journalTime   = 5 * time.Second
	journalMax    = 64 << 10 // bytes
	bootIDFile    = "/proc/sys/kernel/random/boot_id"
	switchProgram = "bin/switch-to-configuration"
)

// SystemdHost is a machine with Nix and systemd. It speaks to systemd over a connection of its own for
// each act: an activation restarts the bus and re-executes systemd, and an open connection would cost
// an idle agent a wake-up for each signal.
type SystemdHost struct {
	log *slog.Logger
}

// NewHost checks that this is a machine that can be switched: systemd answers.
func NewHost(log *slog.Logger) (*SystemdHost, error) {
	ctx, cancel := context.WithTimeout(context.Background(), busTimeout)
	defer cancel()
	c, err := connect(ctx)
	if err != nil {
		return nil, err
	}
	c.Close()
	return &SystemdHost{log: log}, nil
}

// connect prefers systemd's own socket, which needs no bus daemon.
func connect(ctx context.Context) (*dbus.Conn, error) {
	c, err := dbus.NewSystemdConnectionContext(ctx)
	if err == nil {
		return c, nil
	}
	c, err2 := dbus.NewSystemConnectionContext(ctx)
	if err2 != nil {
		return nil, fmt.Errorf("systemd can't be reached: %w", errors.Join(err, err2))
	}
	_ = c.Subscribe() // without it ends are polled for
	return c, nil
}

// Observe implements Host.
func (h *SystemdHost) Observe(ctx context.Context) (Observation, error) {
	var o Observation
	var err error
	if o.Running, err = nix.RunningSystem(); err != nil {
		return o, err
	}
	if o.Booted, err = nix.BootedSystem(); err != nil {
		o.Booted = "" // a container has not booted one
	}
	if o.Profile, err = nix.ProfileTarget(); err != nil {
		// A profile that leads nowhere boots nothing; the next one that is set repairs it.
		h.log.Warn("the system profile can't be read", "error", err)
		o.Profile = ""
	}
	if o.Generation, err = nix.CurrentGeneration(); err != nil {
		h.log.Warn("the generation can't be read", "error", err)
	}
	id, err := os.ReadFile(bootIDFile)
	if err != nil {
		return o, err
	}
	o.BootID = strings.TrimSpace(string(id))
	var now unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_MONOTONIC, &now); err != nil {
		return o, err
	}
	o.Uptime = time.Duration(now.Nano())
	o.Failed, err = failedUnits(ctx)
	return o, err
}

func failedUnits(ctx context.Context) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, observeTime)
	defer cancel()
	c, err := connect(ctx)
	if err != nil {
		return nil, err
	}
	defer c.Close()
	units, err := c.ListUnitsFilteredContext(ctx, []string{"failed", "auto-restart", "auto-restart-queued"})
	if err != nil {
		return nil, fmt.Errorf("systemd can't list its units: %w", err)
	}
	var failed []string
	for _, u := range units {
		if !OwnUnit(u.Name) {
			failed = append(failed, u.Name)
		}
	}
	return failed, nil
}

// Build implements Host.
func (h *SystemdHost) Build(ctx context.Context, b Build) (string, error) {
	closure, err := nix.Build(ctx, nix.BuildRequest{Dir: b.Dir, Attr: b.Attr, OutLink: b.OutLink, Impure: b.Impure, Netrc: b.Netrc, Log: b.Log})
	if err != nil {
		return "", err
	}
	if err := h.Check(closure); err != nil {
		return "", fmt.Errorf("built, but %w", err)
	}
	return closure, nil
}

// Substitute implements Host.
func (h *SystemdHost) Substitute(ctx context.Context, s Substitution) error {
	err := nix.Substitute(ctx, nix.SubstituteRequest{Path: s.Path, Caches: s.Caches, Keys: s.Keys, OutLink: s.OutLink, Netrc: s.Netrc, Log: s.Log})
	if err != nil {
		return err
	}
	return h.Check(s.Path)
}

// Generations implements Host.
func (h *SystemdHost) Generations(context.Context) ([]nix.Generation, error) {
	return nix.Generations()
}

// Check implements Host.
func (h *SystemdHost) Check(closure string) error {
	if err := nix.CheckStorePath(closure); err != nil {
		return err
	}
	info, err := os.Stat(filepath.Join(closure, switchProgram))
	switch {
	case err == nil && info.Mode()&0o111 != 0:
		return nil
	case err == nil || errors.Is(err, fs.ErrNotExist) && exists(closure):
		return fmt.Errorf("%s is no system that can be switched to: it has no program %s", closure, switchProgram)
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is not here any more", closure)
	}
	return fmt.Errorf("%s can't be looked at: %w", closure, err)
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// SetProfile implements Host.
func (h *SystemdHost) SetProfile(ctx context.Context, closure string) error {
	return nix.SetProfile(ctx, closure)
}

// Arm implements Host.
func (h *SystemdHost) Arm(ctx context.Context, r Revert) error {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	if err := h.Check(r.Old); err != nil {
		return err
	}
	c, err := connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	last, err := lastSteps(ctx, c, r)
	if err != nil {
		return err
	}
	service := dbus.PropertyCollection{Name: r.Job().Unit, Properties: jobProperties(r.Job(), last)}
	done := make(chan string, 1)
	if _, err := c.StartTransientUnitAux(ctx, r.Timer(), "fail", timerProperties(r), []dbus.PropertyCollection{service}, done); err != nil {
		return fmt.Errorf("systemd refused the timer %s: %w", r.Timer(), err)
	}
	for {
		s, err := statusOf(ctx, c, r.Timer())
		switch {
		case err != nil:
			return err
		case s.active == "active":
			return nil
		case s.active == "failed":
			return fmt.Errorf("the timer %s can't be started: %s", r.Timer(), s.result)
		}
		awaitJob(ctx, done)
	}
}

// Disarm implements Host.
func (h *SystemdHost) Disarm(ctx context.Context, r Revert) (started bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, disarmTime)
	defer cancel()
	c, err := connect(ctx)
	if err != nil {
		return false, err
	}
	defer c.Close()
	if err := clearUnit(ctx, c, r.Timer()); err != nil {
		return false, err
	}
	// The timer can start nothing any more: what the service is now, it stays.
	s, err := statusOf(ctx, c, r.Job().Unit)
	if err != nil {
		return false, err
	}
	if s.running() {
		return true, nil
	}
	for _, u := range append(conflicting(r), unitName("restore", r.Number, "service"), r.Job().Unit) {
		if err := clearUnit(ctx, c, u); err != nil {
			h.log.Warn("a unit that ended can't be cleared away", "unit", u, "error", err)
		}
	}
	return s.succeeded() || s.failed(), nil
}

// Journal implements Host.
func (h *SystemdHost) Journal(ctx context.Context, unit string, lines int) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, journalTime)
	defer cancel()
	program, err := nix.LookPath("journalctl")
	if err != nil {
		return "", err
	}
	// What a unit wrote last may still be on its way to the journal.
	_ = exec.CommandContext(ctx, program, "--sync").Run()
	c := exec.CommandContext(ctx, program, "-o", "cat", "--no-pager", "-n", strconv.Itoa(lines), "-u", unit)
	c.WaitDelay = time.Second
	var out tail
	c.Stdout = &out
	if err := c.Run(); err != nil {
		return "", fmt.Errorf("journalctl -u %s: %w", unit, err)
	}
	return clipTail(string(out.data), journalMax), nil
}

// tail keeps the end of what is written to it.
type tail struct{ data []byte }

func (t *tail) Write(p []byte) (int, error) {
	t.data = append(t.data, p...)
	if n := len(t.data) - 2*journalMax; n > 0 {
		t.data = append(t.data[:0], t.data[n:]...)
	}
	return len(p), nil
}

// Reboot implements Host.
func (h *SystemdHost) Reboot(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	c, err := connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	_, err = c.StartUnitContext(ctx, "reboot.target", "replace-irreversibly", nil)
	return err
}
