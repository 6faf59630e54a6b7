package run

import (
	"context"
	"fmt"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

const (
	callTimeout = 10 * time.Second
	lookAgain   = 5 * time.Second // changes are signalled; this is for signals that were lost

	destination = "org.freedesktop.systemd1"
	object      = dbus.ObjectPath("/org/freedesktop/systemd1")
	properties  = "org.freedesktop.DBus.Properties"
	noSuchUnit  = destination + ".NoSuchUnit"
)

// away tells whether a D-Bus error is one of a bus or a systemd that is on its way back.
func away(name string) bool {
	switch name {
	case "org.freedesktop.DBus.Error.NoReply", "org.freedesktop.DBus.Error.Disconnected", "org.freedesktop.DBus.Error.ServiceUnknown",
		"org.freedesktop.DBus.Error.NameHasNoOwner", "org.freedesktop.DBus.Error.Timeout", "org.freedesktop.DBus.Error.TimedOut":
		return true
	}
	return false
}

// conn is a connection to systemd over the bus, for one unit, whose changes it hears of. (On systemd's own socket nothing
// may follow the handshake at once, and file descriptors least of all: what arrives together with its end is never read.)
type conn struct {
	*dbus.Conn
	signals chan *dbus.Signal
}

// dial connects; with a unit, it is told of its changes.
func dial(unit string) (_ *conn, err error) {
	ctx, cancel := context.WithCancel(context.Background())
	late := time.AfterFunc(callTimeout, cancel) // whoever takes the connection may say nothing
	defer late.Stop()
	c, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, fmt.Errorf("systemd can't be reached over D-Bus: %w", err)
	}
	made := &conn{c, make(chan *dbus.Signal, 64)}
	if unit == "" {
		return made, nil
	}
	c.Signal(made.signals)
	err = c.AddMatchSignalContext(ctx, dbus.WithMatchObjectPath(unitPath(unit)), dbus.WithMatchInterface(properties), dbus.WithMatchMember("PropertiesChanged"))
	if err == nil {
		err = made.manager(ctx, "Subscribe", nil)
	}
	if err != nil {
		c.Close()
		return nil, fmt.Errorf("systemd's signals can't be had: %w", err)
	}
	return made, nil
}

// manager calls a method of systemd itself. into may be nil.
func (c *conn) manager(ctx context.Context, method string, into any, args ...any) error {
	return c.call(ctx, object, destination+".Manager."+method, into, args...)
}

func (c *conn) call(ctx context.Context, path dbus.ObjectPath, method string, into any, args ...any) error {
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	answer := c.Object(destination, path).CallWithContext(ctx, method, 0, args...)
	if into == nil {
		return answer.Err
	}
	return answer.Store(into)
}

func (c *conn) all(ctx context.Context, unit, kind string) (all map[string]dbus.Variant, err error) {
	err = c.call(ctx, unitPath(unit), properties+".GetAll", &all, destination+"."+kind)
	return all, err
}

func unitPath(unit string) dbus.ObjectPath {
	return object + "/unit/" + dbus.ObjectPath(systemd.PathBusEscape(unit))
}

// unit is where a unit stands.
type unit struct {
	load, active, sub string
	queued            bool // a job of it waits or runs
}

func (u unit) starting() bool { return u.active == "activating" || u.active == "inactive" && u.queued }
func (u unit) exited() bool   { return !u.queued && u.active == "active" && u.sub == "exited" }
func (u unit) failed() bool   { return !u.queued && u.active == "failed" }
func (u unit) gone() bool     { return !u.queued && (u.active == "inactive" || u.load == "not-found") }

func (c *conn) look(ctx context.Context, name string) (u unit, err error) {
	all, err := c.all(ctx, name, "Unit")
	if err != nil {
		return u, err
	}
	u.load, _ = all["LoadState"].Value().(string)
	u.active, _ = all["ActiveState"].Value().(string)
	u.sub, _ = all["SubState"].Value().(string)
	if job, ok := all["Job"].Value().([]any); ok && len(job) > 0 {
		id, _ := job[0].(uint32)
		u.queued = id != 0
	}
	return u, nil
}

func (c *conn) service(ctx context.Context, name string) (service, error) {
	u, err := c.all(ctx, name, "Unit")
	if err != nil {
		return service{}, err
	}
	s, err := c.all(ctx, name, "Service")
	return serviceOf(u, s), err
}

// changed waits until the unit may have changed, and tells whether ended was first.
func (c *conn) changed(unit string, ended <-chan struct{}) bool {
	path := unitPath(unit)
	again := time.NewTimer(lookAgain)
	defer again.Stop()
	for {
		select {
		case <-ended:
			return true
		case <-again.C:
			return false
		case s, open := <-c.signals:
			if !open {
				return false
			}
			if s.Path == path {
				return false
			}
		}
	}
}
