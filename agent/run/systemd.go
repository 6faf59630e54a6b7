package run

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"time"

	"github.com/godbus/dbus/v5"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	redialTime = 200 * time.Millisecond
	awayTime   = time.Minute
)

// Systemd is the Host that this machine is. It speaks to systemd over a connection for each run, so that an idle agent
// has none.
type Systemd struct {
	Dir    string   // for what is private of runs: on a tmpfs, root's, nobody else's
	Hidden []string // files and folders that no sandbox shows
	Log    *slog.Logger
}

// Run implements Host.
func (h *Systemd) Run(ctx context.Context, s Spec, stdout, stderr *os.File) (protocol.Ending, error) {
	p, err := h.newPrivate(s)
	if err != nil {
		return protocol.Ending{}, err
	}
	defer p.remove()
	f, err := follow(unitName(s.ID))
	if err != nil {
		return protocol.Ending{}, err
	}
	defer f.close()
	if err := f.start(ctx, h.settings(s, p, stdout, stderr)); err != nil {
		return protocol.Ending{}, err
	}
	return f.await(ctx, s, p.started)
}

// Clear ends what an agent left behind that was killed, and returns when nothing of it is left.
func (h *Systemd) Clear(ctx context.Context) error {
	if entries, err := os.ReadDir(h.Dir); err == nil {
		for _, entry := range entries {
			_ = os.RemoveAll(filepath.Join(h.Dir, entry.Name())) // nobody but root can read what stays
		}
	}
	c, err := dial("")
	if err != nil {
		return err
	}
	defer c.Close()
	var units [][]any
	if err := c.manager(ctx, "ListUnitsByPatterns", &units, []string{}, []string{unitPattern}); err != nil {
		return err
	}
	clearing, ctx := errgroup.WithContext(ctx)
	for _, u := range units {
		name, _ := u[0].(string)
		h.Log.Warn("an agent that was killed left something running; it is ended", "unit", name)
		clearing.Go(func() error {
			f, err := follow(name)
			if err != nil {
				return err
			}
			defer f.close()
			return f.end(ctx)
		})
	}
	return clearing.Wait()
}

// follower follows one unit, over as many connections as it takes.
type follower struct {
	unit string
	conn *conn
	told bool // to stop
}

func follow(unit string) (*follower, error) {
	c, err := dial(unit)
	return &follower{unit: unit, conn: c}, err
}

func (f *follower) close() { f.conn.Close() }

func (f *follower) start(ctx context.Context, settings []setting) error {
	type aux struct {
		Name     string
		Settings []setting
	}
	var job dbus.ObjectPath
	// In mode "fail" a unit of that name is never replaced.
	if err := f.conn.manager(ctx, "StartTransientUnit", &job, f.unit, "fail", settings, []aux{}); err != nil {
		_ = f.end(context.WithoutCancel(ctx)) // it may run: what was lost may be the answer
		return fmt.Errorf("it can't be started: %w", err)
	}
	return nil
}

// await waits for the end, and until nothing is left. ctx brings the end about; what was begun is seen to its end all the
// same. started is called at least once after the program was executed.
func (f *follower) await(ctx context.Context, s Spec, started func()) (protocol.Ending, error) {
	ended := ctx.Done()
	ctx = context.WithoutCancel(ctx)
	for {
		u, err := f.look(ctx)
		if err != nil {
			return protocol.Ending{}, fmt.Errorf("systemd can't be asked how it ended: %w", err)
		}
		if !u.starting() {
			started()
		}
		switch {
		case u.exited() || u.failed() && !f.told:
			return f.result(ctx, s)
		case f.told && (u.failed() || u.gone()):
			return protocol.Ending{Exit: -1, Result: protocol.ResultEnded}, f.end(ctx)
		case u.gone():
			return protocol.Ending{Exit: -1, Result: protocol.ResultStopped, Reason: "somebody on the node stopped its unit"}, nil
		}
		if f.conn.changed(f.unit, ended) {
			ended = nil
			if err := f.stop(ctx); err != nil {
				return protocol.Ending{}, err
			}
		}
	}
}

// result tells how it ended, and ends what is left: processes that it began, and the unit.
func (f *follower) result(ctx context.Context, s Spec) (protocol.Ending, error) {
	var of service
	err := f.again(ctx, func() (err error) {
		of, err = f.conn.service(ctx, f.unit)
		return err
	})
	if err := errors.Join(err, f.end(ctx)); err != nil {
		return protocol.Ending{}, err
	}
	return of.ending(s)
}

// end stops the unit, waits for that and forgets its failure. One that does not exist is at its end.
func (f *follower) end(ctx context.Context) error {
	for {
		u, err := f.look(ctx)
		switch {
		case err != nil || u.gone():
			return err
		case u.failed():
			err = f.again(ctx, func() error { return f.conn.manager(ctx, "ResetFailedUnit", nil, f.unit) })
		case !f.told:
			err = f.stop(ctx)
		default:
			f.conn.changed(f.unit, ctx.Done())
		}
		if err := errors.Join(err, ctx.Err()); err != nil {
			return err
		}
	}
}

func (f *follower) stop(ctx context.Context) error {
	f.told = true
	var job dbus.ObjectPath
	return f.again(ctx, func() error { return f.conn.manager(ctx, "StopUnit", &job, f.unit, "replace") })
}

func (f *follower) look(ctx context.Context) (u unit, err error) {
	err = f.again(ctx, func() error {
		u, err = f.conn.look(ctx, f.unit)
		return err
	})
	return u, err
}

// again calls until systemd answers: it, or the bus, goes away for a moment where it is replaced, as by a deploy. That there
// is no such unit is an answer, and no error.
func (f *follower) again(ctx context.Context, call func() error) error {
	for deadline := time.Now().Add(awayTime); ; {
		err := call()
		var answer dbus.Error
		if errors.As(err, &answer) && answer.Name == noSuchUnit {
			return nil
		}
		if err == nil || errors.As(err, &answer) && !away(answer.Name) || time.Now().After(deadline) || ctx.Err() != nil {
			return err
		}
		time.Sleep(redialTime)
		if c, err := dial(f.unit); err == nil {
			f.conn.Close()
			f.conn = c
		}
	}
}
