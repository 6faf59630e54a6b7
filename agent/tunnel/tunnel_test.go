package tunnel_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	node "github.com/nix-infra/nix-infra/agent/tunnel"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// world is a node's server and a user, with nothing between them. What goes over a real broker is tested with the agent.
type world struct {
	t        *testing.T
	keys     *protocol.FleetKeys
	verifier *protocol.Verifier
	who      protocol.Identity
	xkey     nkeys.KeyPair
	server   *node.Server

	mu      sync.Mutex
	records []protocol.AuditRecord
	users   map[string]*tunnel.Conn // by reply subject
	idle    int
	deaf    bool // what the node says gets lost
}

func newWorld(t *testing.T, upload func(context.Context, net.Conn, protocol.Identity) error) *world {
	t.Helper()
	w := &world{t: t, users: map[string]*tunnel.Conn{}}
	var err error
	w.keys, err = protocol.NewFleet("test")
	must(t, err)
	public, err := w.keys.Publish(nil)
	must(t, err)
	w.verifier, err = protocol.NewVerifier(public.Operator, public.AccountJWT)
	must(t, err)
	creds, err := w.keys.Credentials("ann", protocol.Operator, time.Now().Add(time.Hour))
	must(t, err)
	signer, _, err := protocol.ParseCredentials(creds)
	must(t, err)
	w.who, err = w.verifier.Identify(signer.User, time.Now())
	must(t, err)
	w.xkey, err = nkeys.CreateCurveKeys()
	must(t, err)
	w.server = node.New(node.Options{Node: "web1", Log: slog.New(slog.DiscardHandler), XKey: w.xkey, Verifier: w.verifier, Upload: upload,
		Audit: func(r protocol.AuditRecord) error {
			w.mu.Lock()
			defer w.mu.Unlock()
			w.records = append(w.records, r)
			return nil
		},
		Publish: func(subject string, data []byte) error {
			w.mu.Lock()
			user := w.users[subject]
			deaf := w.deaf
			w.mu.Unlock()
			if user != nil && !deaf {
				go user.Deliver(bytes.Clone(data))
			}
			return nil
		},
		Allow: func(string, protocol.Role) (string, string, error) { return "", "", errors.New("not asked here") },
		Idle:  func() { w.mu.Lock(); w.idle++; w.mu.Unlock() },
	})
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- w.server.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Run: %v", err)
		}
		time.Sleep(10 * time.Second) // until nothing of a tunnel is left
	})
	return w
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// open opens a tunnel for uploads, whose user's end has nothing to say if it is silent.
func (w *world) open(id string, silent bool) *tunnel.Conn {
	w.t.Helper()
	once, err := tunnel.NewKey()
	must(w.t, err)
	order := protocol.TunnelOrder{To: protocol.TunnelUpload, Public: once.PublicKey().Bytes()}
	answer, err := w.server.Open(w.t.Context(), &protocol.Verified{Header: protocol.Header{ID: id, Action: protocol.OpenTunnel, Target: "web1", Payload: "digest"}, Sender: w.who, Payload: protocol.Encode(order)})
	must(w.t, err)
	xkey, err := w.xkey.PublicKey()
	must(w.t, err)
	reply := *answer.(*protocol.TunnelReply)
	keys, err := tunnel.UserKeys(once, tunnel.Agreed{User: "ann", Node: "web1", ID: id, XKey: xkey, Order: order, Reply: reply})
	must(w.t, err)
	c := tunnel.New(tunnel.Options{Keys: keys, PeerWindow: reply.Window, Send: func(b []byte) error {
		if !silent {
			m := &nats.Msg{Subject: protocol.TunnelSubject("web1", "ann", id), Data: bytes.Clone(b)}
			go w.server.Route(m)
		}
		return nil
	}})
	w.mu.Lock()
	w.users[protocol.ReplySubject("ann", id, "web1")] = c
	w.mu.Unlock()
	w.t.Cleanup(func() { c.Reset("the test is over"); <-c.Done() })
	return c
}

func (w *world) ended(id string) *protocol.AuditRecord {
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range w.records {
		if w.records[i].Request == id {
			return &w.records[i]
		}
	}
	return nil
}

func TestUpload(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(_ context.Context, c net.Conn, who protocol.Identity) error {
			got, err := io.ReadAll(c)
			if err != nil || string(got) != "a file" || who.Name != "ann" || who.Role != protocol.Operator {
				t.Errorf("%q of %s (%s), %v", got, who.Name, who.Role, err)
			}
			_, err = c.Write([]byte("thanks"))
			return err
		})
		c := w.open("one", false)
		_, err := c.Write([]byte("a file"))
		must(t, err)
		must(t, c.CloseWrite())
		if got, err := io.ReadAll(c); err != nil || string(got) != "thanks" {
			t.Errorf("%q, %v", got, err)
		}
		must(t, c.Close())
		<-c.Done()
		time.Sleep(time.Second)
		r := w.ended("one")
		if r == nil || r.Outcome != "ok" || r.Detail != protocol.TunnelUpload || r.Payload != "digest" || !strings.Contains(r.Reason, "6 bytes to it, 6 from it") {
			t.Errorf("on record is %+v", r)
		}
		if w.idle != 1 {
			t.Errorf("idle was told %d times", w.idle)
		}
	})
}

// What goes wrong in the handler is told to the user's end.
func TestUploadFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(context.Context, net.Conn, protocol.Identity) error { return errors.New("the disk is full") })
		c := w.open("one", false)
		_, err := io.ReadAll(c)
		var reset *tunnel.ResetError
		if !errors.As(err, &reset) || reset.Reason != "the disk is full" {
			t.Errorf("%v", err)
		}
		time.Sleep(time.Second)
		if r := w.ended("one"); r == nil || r.Outcome != "failed" || !strings.HasSuffix(r.Reason, "the disk is full") {
			t.Errorf("on record is %+v", r)
		}
	})
}

// The handler's context ends with the tunnel: it may be at something else than reading.
func TestUploadIsInterrupted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(ctx context.Context, _ net.Conn, _ protocol.Identity) error {
			<-ctx.Done()
			return context.Cause(ctx)
		})
		c := w.open("one", false)
		time.Sleep(time.Minute)
		if r := w.ended("one"); r != nil {
			t.Fatalf("it ended: %+v", r)
		}
		c.Reset("enough")
		time.Sleep(time.Second)
		if r := w.ended("one"); r == nil || r.Outcome != "ok" || !strings.HasSuffix(r.Reason, "enough") {
			t.Errorf("on record is %+v", r)
		}
	})
}

// What its user breaks off has not failed.
func TestUserEndsIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(_ context.Context, c net.Conn, _ protocol.Identity) error {
			_, err := io.ReadAll(c)
			return err
		})
		w.open("one", false).Reset("enough")
		time.Sleep(time.Second)
		if r := w.ended("one"); r == nil || r.Outcome != "ok" || !strings.HasSuffix(r.Reason, "enough") {
			t.Errorf("on record is %+v", r)
		}
	})
}

// A tunnel ends with its user's credentials, which are good for an hour.
func TestEndsWithItsCredentials(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(ctx context.Context, _ net.Conn, _ protocol.Identity) error {
			<-ctx.Done()
			return context.Cause(ctx)
		})
		c := w.open("one", false)
		time.Sleep(time.Hour - time.Second)
		if r := w.ended("one"); r != nil {
			t.Fatalf("it ended: %+v", r)
		}
		began := time.Now()
		<-c.Done()
		var reset *tunnel.ResetError
		if took := time.Since(began); took > 3*time.Second || !errors.As(c.Err(), &reset) || !strings.Contains(reset.Reason, "expired") {
			t.Errorf("after %v: %v", took, c.Err())
		}
		time.Sleep(time.Second)
		if r := w.ended("one"); r == nil || r.Outcome != "failed" || !strings.Contains(r.Reason, "expired") {
			t.Errorf("on record is %+v", r)
		}
	})
}

// Nobody gets as far as what is reached without a frame that opens.
func TestNobodyUsesIt(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(context.Context, net.Conn, protocol.Identity) error {
			t.Error("the handler was called")
			return nil
		})
		w.open("one", true)
		for range 10 {
			for _, data := range [][]byte{nil, []byte("{}"), {1}, make([]byte, 100), make([]byte, 1<<20)} {
				w.server.Route(&nats.Msg{Subject: protocol.TunnelSubject("web1", "ann", "one"), Data: data})
				w.server.Route(&nats.Msg{Subject: protocol.TunnelSubject("web1", "eve", "one"), Data: data})
				w.server.Route(&nats.Msg{Subject: "ni.v1.node.web1.tunnel", Data: data})
			}
			time.Sleep(time.Second)
		}
		if r := w.ended("one"); r != nil {
			t.Fatalf("it ended already: %+v", r)
		}
		time.Sleep(10 * time.Second)
		if r := w.ended("one"); r == nil || r.Outcome != "failed" || !strings.Contains(r.Reason, "nobody used it") {
			t.Errorf("on record is %+v", r)
		}
	})
}

// A user's end that missed the end of a tunnel hears of it when it asks, some seconds later, too.
func TestLateAnswer(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := newWorld(t, func(context.Context, net.Conn, protocol.Identity) error { return errors.New("the disk is full") })
		w.mu.Lock()
		w.deaf = true
		w.mu.Unlock()
		c := w.open("one", false)
		time.Sleep(3 * time.Second)
		w.mu.Lock()
		w.deaf = false
		w.mu.Unlock()
		began := time.Now()
		<-c.Done()
		var reset *tunnel.ResetError
		if took := time.Since(began); took > 3*time.Second || !errors.As(c.Err(), &reset) {
			t.Errorf("%v after %v", c.Err(), took)
		}
	})
}
