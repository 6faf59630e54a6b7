package reconcile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"

	"github.com/nix-infra/nix-infra/nix"
)

const (
	stopTimeout     = 5 * time.Second // of a hung activation, from SIGTERM to SIGKILL
	timerAccuracy   = 100 * time.Millisecond
	revertRestart   = 5 * time.Second // a revert that failed is tried again by systemd itself
	revertStarts    = 5
	revertStartsPer = time.Hour
	exitedNormally  = 1 // CLD_EXITED, of waitid(2)
)

func property(name string, value any) dbus.Property {
	return dbus.Property{Name: name, Value: godbus.MakeVariant(value)}
}

// micros is systemd's unit of time.
func micros(d time.Duration) uint64 { return uint64(d.Microseconds()) }

// timerProperties describe the timer that reverts unless it is stopped.
func timerProperties(r Revert) []dbus.Property {
	type monotonic struct {
		Base  string
		Value uint64
	}
	return []dbus.Property{
		dbus.PropDescription(fmt.Sprintf("nix-infra: go back unless attempt %d is confirmed", r.Number)),
		property("TimersMonotonic", []monotonic{{"OnActiveSec", micros(r.Timeout)}}),
		property("AccuracyUSec", micros(timerAccuracy)),
		property("RemainAfterElapse", true),
	}
}

// jobProperties describe the service that a job runs in. It stays after its end, until it is cleared
// away: the agent that reads the result may be another than the one that started it. A revert's service
// ends with the last steps.
func jobProperties(j Job, last steps) []dbus.Property {
	p := []dbus.Property{
		dbus.PropDescription(fmt.Sprintf("nix-infra: switch-to-configuration %s of %s", j.Action, filepath.Base(j.Closure))),
		dbus.PropType("oneshot"),
		dbus.PropRemainAfterExit(true),
		dbus.PropExecStart([]string{filepath.Join(j.Closure, switchProgram), j.Action}, false),
		property("Environment", environment(j.Closure)),
		property("TimeoutStartUSec", micros(j.Timeout)),
		property("TimeoutStopUSec", micros(stopTimeout)),
	}
	if j.Revert == nil {
		return p
	}
	type exitStatus struct{ Codes, Signals []int32 }
	p = append(p, last.properties()...)
	ended := conflicting(*j.Revert)
	if j.Revert.Secrets != "" {
		ended = append(ended, mountUnit(j.Revert.Secrets))
	}
	return append(p,
		// Starting the revert stops what may hold the lock or undo it, and takes the new secrets away, and waits for
		// that: systemd itself sees to it, no program is needed.
		property("Conflicts", ended),
		dbus.PropAfter(ended...),
		property("SuccessExitStatus", exitStatus{[]int32{exitUnitsFailed}, []int32{}}),
		property("Restart", "on-failure"),
		property("RestartUSec", micros(revertRestart)),
		property("StartLimitIntervalUSec", micros(revertStartsPer)),
		property("StartLimitBurst", uint32(revertStarts)),
	)
}

// conflicting are the units that must not run beside the revert.
func conflicting(r Revert) []string {
	return []string{unitName("activate", r.Number, "service"), unitName("boot", r.Number, "service")}
}

// environment is what nixos-rebuild gives switch-to-configuration. The closure's own programs come
// first: /run/current-system may be another's by the time of a revert.
func environment(closure string) []string {
	env := []string{"NIXOS_INSTALL_BOOTLOADER=0", "PATH=" + filepath.Join(closure, "sw/bin") + ":" + nix.SearchPath()}
	if locales, ok := os.LookupEnv("LOCALE_ARCHIVE"); ok {
		env = append(env, "LOCALE_ARCHIVE="+locales)
	}
	return env
}

// status is what systemd knows of a unit.
type status struct {
	load, active, sub, result string
	queued                    bool // a job of it waits or runs
	how, exit                 int  // waitid's si_code and si_status
}

func (s status) running() bool {
	return s.queued || s.active == "activating" || s.active == "deactivating" || s.active == "reloading"
}
func (s status) succeeded() bool { return !s.queued && s.active == "active" }
func (s status) failed() bool    { return !s.queued && s.active == "failed" }
func (s status) missing() bool   { return s.load == "not-found" || s.load == "" }

func (s status) outcome() Outcome {
	o := Outcome{Found: true, Exit: -1, Result: s.result}
	if s.how == exitedNormally && (s.result == "exit-code" || s.result == "success") {
		o.Exit = s.exit
	}
	return o
}

func statusOf(ctx context.Context, c *dbus.Conn, unit string) (status, error) {
	all, err := c.GetAllPropertiesContext(ctx, unit)
	if err != nil {
		return status{}, fmt.Errorf("systemd can't tell about %s: %w", unit, err)
	}
	var s status
	s.load, _ = all["LoadState"].(string)
	s.active, _ = all["ActiveState"].(string)
	s.sub, _ = all["SubState"].(string)
	s.result, _ = all["Result"].(string)
	if job, ok := all["Job"].([]any); ok && len(job) > 0 {
		id, _ := job[0].(uint32)
		s.queued = id != 0
	}
	how, _ := all["ExecMainCode"].(int32)
	exit, _ := all["ExecMainStatus"].(int32)
	s.how, s.exit = int(how), int(exit)
	return s, nil
}

// awaitJob returns when a job ended or, in case its signal was lost, after a while.
func awaitJob(ctx context.Context, done <-chan string) {
	t := time.NewTimer(pollUnit)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-done:
	case <-t.C:
	}
}

// clearUnit stops a unit, waits for that and forgets its failure. One that does not exist is clear.
func clearUnit(ctx context.Context, c *dbus.Conn, unit string) error {
	for {
		s, err := statusOf(ctx, c, unit)
		switch {
		case err != nil:
			return err
		case s.failed():
			_ = c.ResetFailedUnitContext(ctx, unit) // it may just have gone
			return nil
		case !s.running() && !s.succeeded():
			return nil
		}
		done := make(chan string, 1)
		if _, err := c.StopUnitContext(ctx, unit, "replace", done); err != nil && !s.missing() {
			return fmt.Errorf("systemd can't stop %s: %w", unit, err)
		}
		awaitJob(ctx, done)
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
}

// Run implements Host. The connection may break at any time, because an activation may restart what is
// at its other end.
func (h *SystemdHost) Run(ctx context.Context, j Job) (Outcome, error) {
	if err := h.Check(j.Closure); err != nil && !j.Attach {
		return Outcome{}, err
	}
	r := &runner{job: j}
	for {
		out, err := r.follow(ctx)
		if err == nil {
			if j.Forget {
				err = h.forget(ctx, j.Unit)
			}
			return out, err
		}
		var refused godbus.Error
		if ctx.Err() != nil {
			return Outcome{}, ctx.Err()
		}
		if errors.As(err, &refused) && refused.Name != godbus.ErrMsgNoObject.Name && !transient(refused.Name) {
			return Outcome{}, err
		}
		h.log.Warn("systemd went away; connecting again", "unit", j.Unit, "error", err)
		if !sleep(ctx, pollUnit) {
			return Outcome{}, ctx.Err()
		}
	}
}

// transient tells whether a D-Bus error is one of a bus or a systemd that is on its way back.
func transient(name string) bool {
	switch name {
	case "org.freedesktop.DBus.Error.NoReply", "org.freedesktop.DBus.Error.Disconnected",
		"org.freedesktop.DBus.Error.ServiceUnknown", "org.freedesktop.DBus.Error.NameHasNoOwner",
		"org.freedesktop.DBus.Error.Timeout", "org.freedesktop.DBus.Error.TimedOut":
		return true
	}
	return false
}

func (h *SystemdHost) forget(ctx context.Context, unit string) error {
	c, err := connect(ctx)
	if err != nil {
		return err
	}
	defer c.Close()
	return clearUnit(ctx, c, unit)
}

// runner follows one unit over as many connections as it takes.
type runner struct {
	job     Job
	started bool // by us, as far as we know
	stopped bool // the run before, for Job.Again
}

func (r *runner) follow(ctx context.Context) (Outcome, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	c, err := connect(ctx)
	if err != nil {
		return Outcome{}, err
	}
	defer c.Close()
	done := make(chan string, 1)
	for {
		s, err := statusOf(ctx, c, r.job.Unit)
		if err != nil {
			return Outcome{}, err
		}
		switch {
		case s.running():
			awaitJob(ctx, done)
		case s.succeeded() && r.job.Again && !r.started && !r.stopped:
			if err := clearUnit(ctx, c, r.job.Unit); err != nil {
				return Outcome{}, err
			}
			r.stopped = true
		case s.succeeded():
			return s.outcome(), nil
		case s.failed() && (r.started || r.job.Attach):
			return s.outcome(), nil
		case s.failed():
			if err := clearUnit(ctx, c, r.job.Unit); err != nil {
				return Outcome{}, err
			}
		case r.started:
			// It was stopped, and a transient unit that is stopped is gone: never start it a second time.
			return Outcome{Found: true, Exit: -1, Result: "stopped"}, nil
		case r.job.Attach:
			return Outcome{}, nil
		default:
			r.started = true // from here on it may be, whatever the answer
			if err := r.start(ctx, c, s, done); err != nil {
				return Outcome{}, err
			}
		}
		if ctx.Err() != nil {
			return Outcome{}, ctx.Err()
		}
	}
}

// start starts the unit; one that is loaded already (the timer's service) as it is.
func (r *runner) start(ctx context.Context, c *dbus.Conn, s status, done chan<- string) error {
	if !s.missing() {
		if _, err := c.StartUnitContext(ctx, r.job.Unit, "replace", done); err != nil {
			return fmt.Errorf("systemd can't start %s: %w", r.job.Unit, err)
		}
		return nil
	}
	var last steps
	if r.job.Revert != nil {
		last, _ = lastSteps(ctx, c, *r.job.Revert) // the timer's service has them; going back does not wait for them
	}
	if _, err := c.StartTransientUnitContext(ctx, r.job.Unit, "replace", jobProperties(r.job, last), done); err != nil {
		return fmt.Errorf("systemd can't start %s: %w", r.job.Unit, err)
	}
	return nil
}
