package units

import (
	"context"
	"fmt"

	"github.com/godbus/dbus/v5"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	systemd = "org.freedesktop.systemd1"
	manager = systemd + ".Manager"
)

// bus is the Systemd of this machine.
type bus struct{ conn *dbus.Conn }

// Dial connects to the system's bus for one question; it is good until ctx ends.
func Dial(ctx context.Context) (Systemd, error) {
	conn, err := dbus.ConnectSystemBus(dbus.WithContext(ctx))
	if err != nil {
		return nil, fmt.Errorf("systemd can't be asked over D-Bus: %w", err)
	}
	return bus{conn}, nil
}

func (b bus) Close() error { return b.conn.Close() }

func (b bus) call(ctx context.Context, path dbus.ObjectPath, method string, into any, args ...any) error {
	if err := b.conn.Object(systemd, path).CallWithContext(ctx, method, 0, args...).Store(into); err != nil {
		return fmt.Errorf("systemd: %w", err)
	}
	return nil
}

const managerPath = dbus.ObjectPath("/org/freedesktop/systemd1")

func (b bus) List(ctx context.Context, states, patterns []string) ([]protocol.Unit, error) {
	// In systemd's order.
	var rows []struct {
		Name, Description, Load, Active, Sub, Followed string
		Path                                           dbus.ObjectPath
		JobID                                          uint32
		JobType                                        string
		JobPath                                        dbus.ObjectPath
	}
	if states == nil {
		states = []string{}
	}
	if patterns == nil {
		patterns = []string{}
	}
	if err := b.call(ctx, managerPath, manager+".ListUnitsByPatterns", &rows, states, patterns); err != nil {
		return nil, err
	}
	units := make([]protocol.Unit, len(rows))
	for i, r := range rows {
		units[i] = protocol.Unit{Name: r.Name, Description: r.Description, Load: r.Load, Active: r.Active, Sub: r.Sub}
	}
	return units, nil
}

func (b bus) Properties(ctx context.Context, unit, kind string) (Properties, error) {
	var path dbus.ObjectPath
	if err := b.call(ctx, managerPath, manager+".LoadUnit", &path, unit); err != nil {
		return nil, err
	}
	var all map[string]dbus.Variant
	if err := b.call(ctx, path, "org.freedesktop.DBus.Properties.GetAll", &all, systemd+"."+kind); err != nil {
		return nil, err
	}
	p := make(Properties, len(all))
	for name, v := range all {
		p[name] = v.Value()
	}
	return p, nil
}
