package heartbeat

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/godbus/dbus/v5"
)

const (
	// maxUnits bounds the failed units that a beat lists, maxFailed those that are followed.
	maxUnits  = 20
	maxFailed = 1000

	// relist is how often systemd is asked although it told nothing: a signal may have been lost.
	relist = 5 * time.Minute

	// gather is how long changes are gathered before systemd is asked once for all of them.
	// A unit that falls over all the time gets this at most once per spread.
	gather = 300 * time.Millisecond
	spread = 2 * time.Second

	busTimeout = 10 * time.Second
	busRetry   = 5 * time.Second
)

const (
	systemd        = "org.freedesktop.systemd1"
	systemdPath    = dbus.ObjectPath("/org/freedesktop/systemd1")
	systemdManager = systemd + ".Manager"
	systemdUnit    = systemd + ".Unit"
	properties     = "org.freedesktop.DBus.Properties"
)

// Units follows which units of the machine have failed, or fail and are restarted again and again. It
// listens to systemd's signals and asks only when one of them says that the answer may be another.
type Units struct {
	log     *slog.Logger
	changed func()

	mu     sync.Mutex
	failed []string
	paths  map[dbus.ObjectPath]bool // of the failed ones
}

// NewUnits makes a follower that calls changed, which must not block, when the list is another one.
func NewUnits(log *slog.Logger, changed func()) *Units {
	return &Units{log: log, changed: changed}
}

// Failed are the names of up to 1,000 units, sorted. They are not to be changed.
func (u *Units) Failed() []string {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.failed
}

// Run follows until ctx ends, through restarts of the bus.
func (u *Units) Run(ctx context.Context) error {
	for said := false; ; {
		err := u.follow(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if !said {
			u.log.Warn("can't follow units over D-Bus for now", "error", err)
			said = true
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(busRetry):
		}
	}
}

func (u *Units) follow(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return err
	}
	defer conn.Close()
	signals := make(chan *dbus.Signal, 64)
	conn.Signal(signals)
	if err := subscribe(ctx, conn); err != nil {
		return err
	}
	if err := u.list(ctx, conn); err != nil {
		return err
	}
	due := time.NewTimer(relist)
	defer due.Stop()
	waiting, listed := false, time.Now()
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-conn.Context().Done():
			return errors.New("the connection to the bus was lost")
		case s, ok := <-signals:
			if !ok {
				return errors.New("the connection to the bus was lost")
			}
			if !waiting && u.matters(s) {
				waiting = true
				due.Reset(max(gather, spread-time.Since(listed)))
			}
		case <-due.C:
			if err := u.list(ctx, conn); err != nil {
				return err
			}
			waiting, listed = false, time.Now()
			due.Reset(relist)
		}
	}
}

// subscribe asks for the signals that can mean another list; the bus filters the rest.
func subscribe(ctx context.Context, conn *dbus.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	matches := [][]dbus.MatchOption{
		{dbus.WithMatchSender(systemd), dbus.WithMatchInterface(properties), dbus.WithMatchMember("PropertiesChanged"), dbus.WithMatchArg(0, systemdUnit)},
		{dbus.WithMatchSender(systemd), dbus.WithMatchInterface(systemdManager), dbus.WithMatchMember("UnitRemoved")},
		{dbus.WithMatchSender(systemd), dbus.WithMatchInterface(systemdManager), dbus.WithMatchMember("Reloading")},
	}
	for _, m := range matches {
		if err := conn.AddMatchSignalContext(ctx, m...); err != nil {
			return fmt.Errorf("the bus does not take a match: %w", err)
		}
	}
	if err := conn.Object(systemd, systemdPath).CallWithContext(ctx, systemdManager+".Subscribe", 0).Err; err != nil {
		return fmt.Errorf("systemd does not take a subscriber: %w", err)
	}
	return nil
}

// matters tells whether a signal can change the list: a unit that fails, or a failed one that does
// anything. What is not understood counts.
func (u *Units) matters(s *dbus.Signal) bool {
	switch s.Name {
	case properties + ".PropertiesChanged":
		if u.listed(s.Path) || len(s.Body) < 2 {
			return true
		}
		changes, ok := s.Body[1].(map[string]dbus.Variant)
		if !ok {
			return true
		}
		active, _ := changes["ActiveState"].Value().(string)
		sub, _ := changes["SubState"].Value().(string)
		return active == "failed" || strings.HasPrefix(sub, "auto-restart")
	case systemdManager + ".UnitRemoved":
		if len(s.Body) < 2 {
			return true
		}
		path, ok := s.Body[1].(dbus.ObjectPath)
		return !ok || u.listed(path)
	}
	return s.Name == systemdManager+".Reloading"
}

func (u *Units) listed(path dbus.ObjectPath) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.paths[path]
}

// unit is one row of systemd's ListUnits, in its order.
type unit struct {
	Name, Description, Load, Active, Sub, Followed string
	Path                                           dbus.ObjectPath
	JobID                                          uint32
	JobType                                        string
	JobPath                                        dbus.ObjectPath
}

// list asks systemd for the failed units.
func (u *Units) list(ctx context.Context, conn *dbus.Conn) error {
	ctx, cancel := context.WithTimeout(ctx, busTimeout)
	defer cancel()
	var rows []unit
	states := []string{"failed", "auto-restart", "auto-restart-queued"}
	if err := conn.Object(systemd, systemdPath).CallWithContext(ctx, systemdManager+".ListUnitsFiltered", 0, states).Store(&rows); err != nil {
		return fmt.Errorf("systemd does not list its units: %w", err)
	}
	names, paths := make([]string, 0, len(rows)), make(map[dbus.ObjectPath]bool, len(rows))
	for _, r := range rows {
		names = append(names, r.Name)
		paths[r.Path] = true
	}
	slices.Sort(names)
	names = names[:min(len(names), maxFailed)]
	u.mu.Lock()
	other := !slices.Equal(names, u.failed)
	u.failed, u.paths = names, paths
	u.mu.Unlock()
	if other {
		u.changed()
	}
	return nil
}
