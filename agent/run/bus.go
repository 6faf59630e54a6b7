package run

import (
	"context"
	"fmt"
	"os"
	"strconv"
	"time"

	systemd "github.com/coreos/go-systemd/v22/dbus"
	"github.com/godbus/dbus/v5"
)

const (
	callTimeout = 10 * time.Second
	lookAgain   = 5 * time.Second // changes are signalled; this is for signals that were lost

	socket      = "unix:path=/run/systemd/private"
	destination = "org.freedesktop.systemd1"
	object      = dbus.ObjectPath("/org/freedesktop/systemd1")
	noSuchUnit  = destination + ".NoSuchUnit"
	noReply     = "org.freedesktop.DBus.Error.NoReply"
)

// conn is a connection to systemd, without a bus between. It gets all of systemd's signals.
type conn struct {
	*dbus.Conn
	signals chan *dbus.Signal
}

func dial() (*conn, error) {
	ctx, cancel := context.WithCancel(context.Background())
	late := time.AfterFunc(callTimeout, cancel) // systemd may take the connection and say nothing
	defer late.Stop()
	c, err := dbus.Dial(socket, dbus.WithContext(ctx))
	if err != nil {
		cancel()
		return nil, fmt.Errorf("systemd can't be reached: %w", err)
	}
	if err := c.Auth([]dbus.Auth{dbus.AuthExternal(strconv.Itoa(os.Getuid()))}); err != nil {
		c.Close()
		cancel()
		return nil, fmt.Errorf("systemd can't be reached: %w", err)
	}
	signals := make(chan *dbus.Signal, 64)
	c.Signal(signals)
	made := &conn{c, signals}
	// systemd resets a connection on which file descriptors arrive together with the end of the handshake, so that must be
	// over before any is sent.
	if err := made.call(context.Background(), object, "org.freedesktop.DBus.Peer.Ping", nil); err != nil {
		c.Close()
		return nil, fmt.Errorf("systemd does not answer: %w", err)
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

func (c *conn) properties(ctx context.Context, unit, kind string) (all map[string]dbus.Variant, err error) {
	err = c.call(ctx, unitPath(unit), "org.freedesktop.DBus.Properties.GetAll", &all, destination+"."+kind)
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
	all, err := c.properties(ctx, name, "Unit")
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
	u, err := c.properties(ctx, name, "Unit")
	if err != nil {
		return service{}, err
	}
	s, err := c.properties(ctx, name, "Service")
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
