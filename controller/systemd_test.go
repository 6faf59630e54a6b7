package controller

import (
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// systemd is told when the controller serves, that it is alive, and when it stops.
func TestTellsSystemd(t *testing.T) {
	r := enrolled(t)
	path := filepath.Join(r.cfg.Dir, "notify")
	socket := value[*net.UnixConn](t)(net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"}))
	defer socket.Close()
	t.Setenv("NOTIFY_SOCKET", path)
	t.Setenv("WATCHDOG_USEC", "200000")
	process, _ := r.spawn()
	next := func() string {
		buf := make([]byte, 256)
		must(t, socket.SetReadDeadline(time.Now().Add(patience)))
		return string(buf[:value[int](t)(socket.Read(buf))])
	}
	if m := next(); m != "READY=1" {
		t.Errorf("first %q", m)
	}
	for range 3 {
		if m := next(); m != "WATCHDOG=1" {
			t.Errorf("then %q", m)
		}
	}
	must(t, process.Process.Signal(syscall.SIGTERM))
	for m := next(); m != "STOPPING=1"; m = next() {
		if m != "WATCHDOG=1" {
			t.Fatalf("then %q", m)
		}
	}
	must(t, process.Wait())
}

func TestWebsocket(t *testing.T) {
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	n1 := r.node(admin, "n1")
	if !strings.HasPrefix(r.c.WebsocketURL(), "wss://127.0.0.1:") {
		t.Fatal(r.c.WebsocketURL())
	}
	r.url = r.c.WebsocketURL()
	n1.nc = r.dial(n1.signer, protocol.InboxPrefix("n1"))
	if _, err := n1.ask(protocol.UpPing, struct{}{}); err != nil {
		t.Fatal(err)
	}
}
