package agent_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// tunnelled is a node with an agent, and somebody who opens tunnels to it.
type tunnelled struct {
	t     *testing.T
	fleet *testfleet.Fleet
	side  *side
	agent *running
	xkey  string
}

func withTunnels(t *testing.T, change ...func(*agent.Options)) *tunnelled {
	t.Helper()
	f := testfleet.New(t)
	dir := enrolled(t, f)
	m, err := agent.Home(dir).Open()
	if err != nil {
		t.Fatal(err)
	}
	xkey, err := m.XKey.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	u := &tunnelled{t: t, fleet: f, side: control(t, f), agent: start(t, dir, change...), xkey: xkey}
	testfleet.Eventually(t, "beats", func() bool { _, n := u.side.lastBeat(); return n > 0 })
	return u
}

// open opens a tunnel as the user's end does; change makes the order another one.
func (u *tunnelled) open(who *protocol.Signer, name, to string, change ...func(*protocol.TunnelOrder)) (*tunnel.Conn, string, error) {
	u.t.Helper()
	nc := u.fleet.Connect(who, "")
	once, err := tunnel.NewKey()
	if err != nil {
		u.t.Fatal(err)
	}
	order := protocol.TunnelOrder{To: to, Public: once.PublicKey().Bytes()}
	for _, c := range change {
		c(&order)
	}
	signed, id, err := who.Request(protocol.OpenTunnel, node, order, time.Now())
	if err != nil {
		u.t.Fatal(err)
	}
	var conn atomic.Pointer[tunnel.Conn]
	answers := make(chan []byte, 1)
	if _, err = nc.Subscribe(protocol.ReplySubject(name, id, node), func(m *nats.Msg) {
		if c := conn.Load(); c != nil {
			c.Deliver(m.Data)
		} else if !tunnel.IsFrame(m.Data) {
			answers <- m.Data
		}
	}); err != nil {
		u.t.Fatal(err)
	}
	if err := nc.Publish(protocol.RequestSubject(node, protocol.OpenTunnel), protocol.Encode(signed)); err != nil {
		u.t.Fatal(err)
	}
	var answer protocol.Reply
	select {
	case data := <-answers:
		if answer, err = protocol.Decode[protocol.Reply](data); err != nil {
			u.t.Fatal(err)
		}
	case <-time.After(30 * time.Second):
		u.t.Fatal("no answer")
	}
	if answer.Refused != nil {
		return nil, id, answer.Refused
	}
	reply, err := protocol.Decode[protocol.TunnelReply](answer.Body)
	if err != nil {
		u.t.Fatal(err)
	}
	keys, err := tunnel.UserKeys(once, tunnel.Agreed{User: name, Node: node, ID: id, XKey: u.xkey, Order: order, Reply: reply})
	if err != nil {
		u.t.Fatal(err)
	}
	c := tunnel.New(tunnel.Options{Keys: keys, PeerWindow: reply.Window, Send: func(b []byte) error { return nc.Publish(protocol.TunnelSubject(node, name, id), b) }})
	conn.Store(c)
	u.t.Cleanup(func() { c.Reset("the test is over") })
	return c, id, nil
}

func (u *tunnelled) mustOpen(who *protocol.Signer, name, to string) (*tunnel.Conn, string) {
	u.t.Helper()
	c, id, err := u.open(who, name, to)
	if err != nil {
		u.t.Fatal(err)
	}
	return c, id
}

// service is a TCP service.
func service(t *testing.T, handle func(*net.TCPConn)) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go handle(c.(*net.TCPConn))
		}
	}()
	return l.Addr().String()
}

func echo(c *net.TCPConn) {
	defer c.Close()
	_, _ = io.Copy(c, c)
}

// broken is a service that tells how reading from each of its connections ended.
func broken(t *testing.T) (to string, ended chan error) {
	ended = make(chan error, 100)
	return service(t, func(c *net.TCPConn) {
		defer c.Close()
		_, _ = c.Write([]byte("hello"))
		_, err := io.Copy(io.Discard, c)
		ended <- err
	}), ended
}

func hello(t *testing.T, c *tunnel.Conn) {
	t.Helper()
	got := make([]byte, 5)
	if _, err := io.ReadFull(c, got); err != nil || string(got) != "hello" {
		t.Fatalf("read %q, %v", got, err)
	}
}

// brokenOff expects a tunnel to break soon with a reason, and its service to see a reset and no end.
func brokenOff(t *testing.T, c *tunnel.Conn, ended chan error, reason string) {
	t.Helper()
	if err := c.SetReadDeadline(time.Now().Add(30 * time.Second)); err != nil {
		t.Fatal(err)
	}
	_, err := c.Read(make([]byte, 1))
	var reset *tunnel.ResetError
	if !errors.As(err, &reset) || !strings.Contains(reset.Reason, reason) {
		t.Errorf("the user's end says %v, and not %q", err, reason)
	}
	select {
	case err := <-ended:
		if err == nil {
			t.Error("the service saw an end like any other")
		}
	case <-time.After(30 * time.Second):
		t.Error("the service's connection stays open")
	}
}

func TestTunnelOnRecord(t *testing.T) {
	u := withTunnels(t)
	to := service(t, echo)
	c, id := u.mustOpen(u.fleet.User("dora", protocol.Deployer), "dora", to)
	if _, err := c.Write([]byte("twelve bytes")); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if got, err := io.ReadAll(c); err != nil || string(got) != "twelve bytes" {
		t.Fatalf("read %q, %v", got, err)
	}
	_ = c.Close()
	var mine []protocol.AuditRecord
	testfleet.Eventually(t, "three records", func() bool {
		mine = nil
		for _, r := range u.side.audited(t) {
			if r.Request == id {
				mine = append(mine, r)
			}
		}
		return len(mine) == 3
	})
	for i, outcome := range []string{"", "ok", "ok"} {
		if r := mine[i]; r.Outcome != outcome || r.User != "dora" || r.Role != protocol.Deployer || r.Action != protocol.OpenTunnel || r.Detail != to || r.Payload != mine[0].Payload {
			t.Errorf("record %d: %+v", i, r)
		}
	}
	if r := mine[2].Reason; !strings.HasPrefix(r, "ended after ") || !strings.Contains(r, "12 bytes to it, 12 from it") {
		t.Errorf("the end is on record as %q", r)
	}
}

func TestTunnelPolicy(t *testing.T) {
	u := withTunnels(t)
	to := service(t, echo)
	nobody := service(t, echo)
	shut := fmt.Sprint("127.0.0.1:", testfleet.Port(t))
	other := func(o *protocol.TunnelOrder) { o.Window = 1000 }
	point := func(o *protocol.TunnelOrder) { o.Public = make([]byte, 32) }
	for name, c := range map[string]struct {
		role   protocol.Role
		to     string
		change []func(*protocol.TunnelOrder)
		code   protocol.Code // "": it opens
		says   string
	}{
		"a deployer, loopback":    {protocol.Deployer, to, nil, "", ""},
		"an admin, loopback":      {protocol.Admin, nobody, nil, "", ""},
		"an operator, loopback":   {protocol.Operator, to, nil, protocol.OverRole, "deployer"},
		"an admin, somewhere":     {protocol.Admin, "192.0.2.1:80", nil, protocol.Denied, "policy"},
		"a name":                  {protocol.Admin, "db.example.org:80", nil, protocol.Denied, "policy"},
		"nobody listens":          {protocol.Deployer, shut, nil, protocol.Failed, "refused"},
		"no port":                 {protocol.Deployer, "127.0.0.1", nil, protocol.Malformed, "host:port"},
		"a small window":          {protocol.Deployer, to, []func(*protocol.TunnelOrder){other}, protocol.Invalid, "window"},
		"a key that hides naught": {protocol.Deployer, to, []func(*protocol.TunnelOrder){point}, protocol.Invalid, "key"},
		"upload":                  {protocol.Operator, protocol.TunnelUpload, nil, "", ""},
		"overlay":                 {protocol.Deployer, "overlay:80", nil, protocol.Invalid, "overlay"},
	} {
		_, _, err := u.open(u.fleet.User("eve", c.role), "eve", c.to, c.change...)
		if c.code == "" && err != nil || c.code != "" && (!errors.Is(err, &protocol.Refusal{Code: c.code}) || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The broker goes away while bytes are under way, and comes back: none is missing.
func TestTunnelSurvivesTheBroker(t *testing.T) {
	u := withTunnels(t)
	c, _ := u.mustOpen(u.fleet.User("dora", protocol.Deployer), "dora", service(t, echo))
	const size = 32 << 20
	stopped := make(chan struct{})
	noise := func() io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{3}), size) }
	go func() {
		_, _ = io.Copy(c, noise())
		_ = c.CloseWrite()
	}()
	go func() {
		defer close(stopped)
		for range 2 {
			before, _, _ := c.Counts()
			testfleet.Eventually(t, "bytes go", func() bool { n, _, _ := c.Counts(); return n > before+2<<20 || n == size })
			u.fleet.Stop()
			u.fleet.Start()
		}
	}()
	h, expect := sha256.New(), sha256.New()
	_, _ = io.Copy(expect, noise())
	n, err := io.Copy(h, c)
	<-stopped
	if err != nil || n != size || !bytes.Equal(h.Sum(nil), expect.Sum(nil)) {
		t.Errorf("%d bytes of %d, equal %t, %v", n, size, bytes.Equal(h.Sum(nil), expect.Sum(nil)), err)
	}
}

func TestTunnelEndsWithItsUser(t *testing.T) {
	u := withTunnels(t)
	to, ended := broken(t)
	dora, eve := u.fleet.User("dora", protocol.Deployer), u.fleet.User("eve", protocol.Deployer)
	c, id := u.mustOpen(dora, "dora", to)
	hello(t, c)
	stays, _ := u.mustOpen(eve, "eve", service(t, echo))
	key, err := dora.Key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	account, err := u.fleet.Keys.Publish(map[string]time.Time{key: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	u.side.look(t, nil, 0, account.AccountJWT) // the node hears of it before the broker does
	brokenOff(t, c, ended, "revoked")
	testfleet.Eventually(t, "the end is on record", func() bool {
		for _, r := range u.side.audited(t) {
			if r.Request == id && strings.Contains(r.Reason, "ended after") {
				return r.Outcome == string(protocol.Failed) && strings.Contains(r.Reason, "revoked")
			}
		}
		return false
	})
	if _, err := stays.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	hello(t, stays)
}

// A system that came with a deployment may allow less than the one before.
func TestTunnelEndsWithItsPolicy(t *testing.T) {
	system := t.TempDir()
	policy := func(text string) {
		t.Helper()
		file := filepath.Join(system, "etc/nix-infra/policy.json")
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := atomicfile.Write(file, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	to, ended := broken(t)
	policy(fmt.Sprintf(`{"v": 1, "tunnels": [{"address": %q, "role": "operator"}]}`, to))
	u := withTunnels(t, func(o *agent.Options) { o.System = system })
	c, _ := u.mustOpen(u.fleet.User("olga", protocol.Operator), "olga", to)
	hello(t, c)
	dora := u.fleet.User("dora", protocol.Deployer)
	stays, _ := u.mustOpen(dora, "dora", service(t, echo))
	policy(`{"v": 1}`)
	u.side.look(t, manifest(t, u.side, dora, node, 5, nil), 5, "")
	brokenOff(t, c, ended, "needs the role deployer")
	if _, err := stays.Write([]byte("hello")); err != nil {
		t.Fatal(err)
	}
	hello(t, stays)
}

func TestTunnelEndsWithTheAgent(t *testing.T) {
	u := withTunnels(t)
	to, ended := broken(t)
	c, _ := u.mustOpen(u.fleet.User("dora", protocol.Deployer), "dora", to)
	hello(t, c)
	u.agent.stop()
	brokenOff(t, c, ended, "the agent of "+node+" ends")
}

func TestTunnelsAreBounded(t *testing.T) {
	u := withTunnels(t)
	to := service(t, echo)
	dora := u.fleet.User("dora", protocol.Deployer)
	var open []*tunnel.Conn
	var err error
	for range 100 {
		var c *tunnel.Conn
		if c, _, err = u.open(dora, "dora", to); err != nil {
			break
		}
		open = append(open, c)
	}
	if !errors.Is(err, &protocol.Refusal{Code: protocol.Failed}) || !strings.Contains(err.Error(), fmt.Sprintf("busy: dora has %d tunnels", len(open))) {
		t.Fatalf("after %d tunnels: %v", len(open), err)
	}
	other, _ := u.mustOpen(u.fleet.User("eve", protocol.Deployer), "eve", to)
	for _, c := range append(open[len(open)-1:], other) { // those with a narrow window, too
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		hello(t, c)
	}
	open[0].Reset("enough")
	testfleet.Eventually(t, "there is room again", func() bool {
		c, _, err := u.open(dora, "dora", to)
		if c != nil {
			c.Reset("enough")
		}
		return err == nil
	})
}
