package heartbeat

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/godbus/dbus/v5"
)

// manager stands in for systemd on a real bus of the test's own.
type manager struct {
	t     *testing.T
	conn  *dbus.Conn
	mu    sync.Mutex
	units []unit
	asked atomic.Int32
}

func (m *manager) Subscribe() *dbus.Error { return nil }

func (m *manager) ListUnitsFiltered(states []string) ([]unit, *dbus.Error) {
	m.asked.Add(1)
	m.mu.Lock()
	defer m.mu.Unlock()
	var found []unit
	for _, u := range m.units {
		if slices.Contains(states, u.Active) || slices.Contains(states, u.Sub) {
			found = append(found, u)
		}
	}
	return found, nil
}

func pathOf(name string) dbus.ObjectPath {
	return systemdPath + "/unit/" + dbus.ObjectPath(strings.NewReplacer(".", "_2e", "-", "_2d").Replace(name))
}

// set changes a unit and tells as systemd does.
func (m *manager) set(name, active, sub string) {
	m.t.Helper()
	m.mu.Lock()
	m.units = slices.DeleteFunc(m.units, func(u unit) bool { return u.Name == name })
	m.units = append(m.units, unit{Name: name, Load: "loaded", Active: active, Sub: sub, Path: pathOf(name), JobPath: "/"})
	m.mu.Unlock()
	changes := map[string]dbus.Variant{"ActiveState": dbus.MakeVariant(active), "SubState": dbus.MakeVariant(sub)}
	if err := m.conn.Emit(pathOf(name), properties+".PropertiesChanged", systemdUnit, changes, []string{}); err != nil {
		m.t.Fatal(err)
	}
}

func systemdOnABus(t *testing.T) (m *manager, stopBus func()) {
	t.Helper()
	if _, err := exec.LookPath("dbus-daemon"); err != nil {
		t.Skip("no dbus-daemon here")
	}
	dir := t.TempDir()
	config := filepath.Join(dir, "bus.conf")
	if err := os.WriteFile(config, fmt.Appendf(nil, `<busconfig><type>custom</type><listen>unix:path=%s/bus</listen><auth>EXTERNAL</auth>
<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>`, dir), 0o600); err != nil {
		t.Fatal(err)
	}
	bus := exec.CommandContext(t.Context(), "dbus-daemon", "--config-file="+config, "--nofork", "--print-address")
	out, err := bus.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := bus.Start(); err != nil {
		t.Fatal(err)
	}
	stopBus = sync.OnceFunc(func() { _ = bus.Process.Kill(); _ = bus.Wait() })
	t.Cleanup(stopBus)
	address, err := bufio.NewReader(out).ReadString('\n')
	if err != nil {
		t.Fatal(err)
	}
	t.Setenv("DBUS_SYSTEM_BUS_ADDRESS", strings.TrimSpace(address))
	m = &manager{t: t}
	if m.conn, err = dbus.ConnectSystemBus(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.conn.Close() })
	if err := m.conn.Export(m, systemdPath, systemdManager); err != nil {
		t.Fatal(err)
	}
	if _, err := m.conn.RequestName(systemd, dbus.NameFlagDoNotQueue); err != nil {
		t.Fatal(err)
	}
	return m, stopBus
}

func TestUnitsFollowSystemd(t *testing.T) {
	m, stopBus := systemdOnABus(t)
	m.set("old.service", "failed", "failed")
	changed := make(chan struct{}, 16)
	u := NewUnits(quiet(), func() { changed <- struct{}{} })
	done := make(chan struct{})
	go func() { defer close(done); _ = u.Run(t.Context()) }()
	expect := func(names ...string) {
		t.Helper()
		for deadline := time.After(time.Minute); !slices.Equal(u.Failed(), names); {
			select {
			case <-changed:
			case <-deadline:
				t.Fatalf("failed units %v, expected %v", u.Failed(), names)
			}
		}
	}
	expect("old.service")
	m.set("web.service", "failed", "failed")
	m.set("loop.service", "activating", "auto-restart")
	expect("loop.service", "old.service", "web.service")

	asked := m.asked.Load()
	for i := range 200 { // a busy machine: none of this can change the list
		m.set(fmt.Sprintf("job-%d.service", i), "active", "running")
		m.set(fmt.Sprintf("job-%d.service", i), "inactive", "dead")
	}
	m.set("web.service", "active", "running") // and this does
	expect("loop.service", "old.service")
	if again := m.asked.Load() - asked; again > 2 {
		t.Errorf("systemd was asked %d times for one change of 401", again)
	}

	m.mu.Lock()
	m.units = slices.DeleteFunc(m.units, func(u unit) bool { return u.Name == "old.service" })
	m.mu.Unlock()
	if err := m.conn.Emit(systemdPath, systemdManager+".UnitRemoved", "old.service", pathOf("old.service")); err != nil {
		t.Fatal(err)
	}
	expect("loop.service")

	for i := range 2 * maxUnits {
		m.set(fmt.Sprintf("bad-%02d.service", i), "failed", "failed")
	}
	for deadline := time.Now().Add(time.Minute); len(u.Failed()) != 2*maxUnits+1; time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d failed units are known", len(u.Failed()))
		}
	}
	// A beat names a part of them. What is new is looked for among all, and bounded, too.
	h := &Host{Units: u, Degraded: func(failed []string) []string { return failed[5:] }}
	if b := h.Facts(t.Context()); len(b.FailedUnits) != maxUnits || b.FailedUnits[0] != "bad-00.service" || len(b.Degraded) != maxUnits || b.Degraded[0] != "bad-05.service" {
		t.Errorf("%d failed units are told, and %d degraded", len(b.FailedUnits), len(b.Degraded))
	}
	if b := (&Host{Units: u}).Facts(t.Context()); b.Degraded != nil {
		t.Errorf("degraded %v", b.Degraded)
	}
	stopBus() // the list stays, the follower waits for another bus
	if len(u.Failed()) != 2*maxUnits+1 {
		t.Fatal("forgotten with the bus")
	}
	select {
	case <-done:
		t.Fatal("the follower gave up")
	case <-time.After(50 * time.Millisecond):
	}
}
