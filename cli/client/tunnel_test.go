package client_test

import (
	"bytes"
	"crypto/sha256"
	"errors"
	"io"
	"math/rand/v2"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// service is a TCP service that handles each connection.
func service(t testing.TB, handle func(*net.TCPConn)) string {
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

func verifier(t testing.TB, f *fleettest.Fleet) *protocol.Verifier {
	t.Helper()
	v, err := protocol.NewVerifier(f.Authority.Public.Operator, f.Authority.Public.AccountJWT)
	if err != nil {
		t.Fatal(err)
	}
	return v
}

// noise is so many random bytes, the same ones each time.
func noise(size int64) io.Reader { return io.LimitReader(rand.NewChaCha8([32]byte{7}), size) }

func digest(t testing.TB, r io.Reader) string {
	t.Helper()
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		t.Fatal(err)
	}
	return string(h.Sum(nil))
}

func TestTunnel(t *testing.T) {
	f := fleettest.New(t)
	f.Add("web1").Script(fleettest.Script{Tunnels: fleettest.Dial})
	c := connect(t, f, "ann", protocol.Operator)
	to := service(t, echo)
	conn, reply, err := c.Tunnel(t.Context(), &f.Record("web1").NodeRecord, verifier(t, f), to)
	if err != nil {
		t.Fatal(err)
	}
	if reply.Rule != "test" || conn.RemoteAddr().String() != "web1/"+to {
		t.Errorf("rule %q, remote address %s", reply.Rule, conn.RemoteAddr())
	}
	const size = 20 << 20
	go func() {
		_, _ = io.Copy(conn, noise(size))
		_ = conn.CloseWrite()
	}()
	if digest(t, conn) != digest(t, noise(size)) {
		t.Error("other bytes came back")
	}
	if err := conn.Close(); err != nil {
		t.Error(err)
	}
	select {
	case <-conn.Done():
		if conn.Err() != nil {
			t.Errorf("ended with %v", conn.Err())
		}
	case <-time.After(awhile):
		t.Error("it does not end")
	}
}

func TestTunnelRefused(t *testing.T) {
	f := fleettest.New(t)
	n := f.Add("web1")
	n.Script(fleettest.Script{Tunnels: func(to string) (func(*tunnel.Conn), error) {
		return nil, protocol.Refuse(protocol.Denied, "no tunnel to %s", to)
	}})
	f.Add("web2")
	f.Register("web3")
	c := connect(t, f, "ann", protocol.Operator)
	v := verifier(t, f)
	record := func(name string) *protocol.NodeRecord { return &f.Record(name).NodeRecord }
	open := func(c *client.Client, r *protocol.NodeRecord, to string) error {
		t.Helper()
		conn, _, err := c.Tunnel(t.Context(), r, v, to)
		if err == nil {
			conn.Reset("it was opened")
			t.Fatal("it was opened")
		}
		return err
	}
	if err := open(c, record("web1"), "127.0.0.1:22"); !errors.Is(err, &protocol.Refusal{Code: protocol.Denied}) {
		t.Errorf("by the node: %v", err)
	}
	if err := open(c, record("web3"), "127.0.0.1:22"); !errors.Is(err, client.ErrNoAnswer) {
		t.Errorf("nobody is there: %v", err)
	}
	if err := open(connect(t, f, "bob", protocol.Viewer), record("web1"), "127.0.0.1:22"); !errors.Is(err, &protocol.Refusal{Code: protocol.OverRole}) {
		t.Errorf("a viewer: %v", err)
	}
	if err := open(c, record("web1"), "127.0.0.1"); err == nil || !strings.Contains(err.Error(), "host:port") {
		t.Errorf("no port: %v", err)
	}
	other := *record("web1")
	other.JWT = record("web2").JWT
	if err := open(c, &other, "127.0.0.1:22"); !errors.Is(err, &protocol.Refusal{Code: protocol.Untrusted}) {
		t.Errorf("a record with another node's keys: %v", err)
	}
	if n := len(n.TunnelOrders()); n != 1 {
		t.Errorf("%d orders came to the node", n)
	}
}

// A node whose key is not the proven one, as a broker would play it, is not heard.
func TestTunnelToAnImpostor(t *testing.T) {
	t.Parallel()
	f := fleettest.New(t)
	f.Add("web1").Script(fleettest.Script{Tunnels: fleettest.Dial})
	real := f.Record("web1").NodeRecord
	f.Register("web1") // it has other keys now, and what connected as web1 uses those
	c := connect(t, f, "ann", protocol.Operator)
	_, _, err := c.Tunnel(within(t, 5*time.Second), &real, verifier(t, f), service(t, echo))
	if !errors.Is(err, client.ErrNoAnswer) || !strings.Contains(err.Error(), "key") {
		t.Errorf("%v", err)
	}
}

// What breaks on the node's side is an error here, and no end.
func TestTunnelBreaks(t *testing.T) {
	f := fleettest.New(t)
	f.Add("web1").Script(fleettest.Script{Tunnels: fleettest.Dial})
	c := connect(t, f, "ann", protocol.Operator)
	to := service(t, func(c *net.TCPConn) {
		_, _ = io.Copy(c, bytes.NewReader(make([]byte, 1000)))
		_, _ = io.ReadFull(c, make([]byte, 1))
		_ = c.SetLinger(0)
		c.Close()
	})
	conn, _, err := c.Tunnel(t.Context(), &f.Record("web1").NodeRecord, verifier(t, f), to)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := io.ReadFull(conn, make([]byte, 1000)); err != nil {
		t.Fatal(err)
	}
	if _, err := conn.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
	_, err = conn.Read(make([]byte, 1))
	var reset *tunnel.ResetError
	if !errors.As(err, &reset) || !strings.Contains(reset.Reason, to) || !strings.Contains(reset.Reason, "reset by peer") {
		t.Errorf("%v", err)
	}
}

func BenchmarkTunnel(b *testing.B) {
	f := fleettest.New(b)
	f.Add("web1").Script(fleettest.Script{Tunnels: fleettest.Dial})
	c := connect(b, f, "ann", protocol.Operator)
	piece := make([]byte, 1<<20)
	for name, up := range map[string]bool{"up": true, "down": false} {
		b.Run(name, func(b *testing.B) {
			done := make(chan struct{})
			to := service(b, func(c *net.TCPConn) {
				defer c.Close()
				if !up {
					for range b.N {
						_, _ = c.Write(piece)
					}
					return
				}
				_, _ = io.Copy(io.Discard, c)
				close(done)
			})
			conn, _, err := c.Tunnel(b.Context(), &f.Record("web1").NodeRecord, verifier(b, f), to)
			if err != nil {
				b.Fatal(err)
			}
			b.SetBytes(int64(len(piece)))
			b.ResetTimer()
			if !up {
				_, _ = io.Copy(io.Discard, conn)
				return
			}
			for range b.N {
				_, _ = conn.Write(piece)
			}
			_ = conn.CloseWrite()
			<-done
			b.StopTimer()
			_ = conn.Close()
		})
	}
}
