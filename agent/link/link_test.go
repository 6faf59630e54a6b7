package link_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/agent/link"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

var quick = link.Backoff{Base: 20 * time.Millisecond, Jitter: 10 * time.Millisecond, Cap: 50 * time.Millisecond}

type node struct {
	*link.Link
	requests  chan *nats.Msg
	connected atomic.Int32
	mu        sync.Mutex
	looks     []protocol.Look
	accounts  []string
}

func start(t *testing.T, m *machine.Machine) *node {
	t.Helper()
	n := &node{requests: make(chan *nats.Msg, 16)}
	n.Link = link.New(link.Options{Machine: m, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Backoff: quick, Patience: time.Minute, Requests: n.requests,
		Connected: func() { n.connected.Add(1) },
		Look:      func(l protocol.Look) { n.mu.Lock(); n.looks = append(n.looks, l); n.mu.Unlock() },
		Account:   func(s string) { n.mu.Lock(); n.accounts = append(n.accounts, s); n.mu.Unlock() },
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- n.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		select {
		case err := <-done:
			if err != nil {
				t.Errorf("Run: %v", err)
			}
		case <-time.After(30 * time.Second):
			t.Error("the link does not end within 30 s")
		}
	})
	return n
}

func (n *node) waitConnected(t *testing.T, times int32) {
	t.Helper()
	testfleet.Eventually(t, "connected", func() bool { return n.connected.Load() >= times })
}

func (n *node) seen() ([]protocol.Look, []string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return append([]protocol.Look(nil), n.looks...), append([]string(nil), n.accounts...)
}

func TestReconnectRestoresSubscriptions(t *testing.T) {
	f := testfleet.New(t)
	n := start(t, f.Enrol("web-1"))
	n.waitConnected(t, 1)
	for round := int32(2); round < 4; round++ {
		f.Stop()
		testfleet.Eventually(t, "noticed", func() bool { url, _ := n.Status(); return url == "" })
		if err := n.Beat(protocol.Beat{}); !errors.Is(err, link.ErrDisconnected) {
			t.Fatalf("a beat without a connection: %v", err)
		}
		f.Start()
		n.waitConnected(t, round)
		who := f.Connect(f.User("ann", protocol.Viewer), "")
		for _, subject := range []string{protocol.RequestSubject("web-1", protocol.Ping), protocol.RequestSubject(protocol.Everyone, protocol.Ping)} {
			if err := who.Publish(subject, []byte("x")); err != nil {
				t.Fatal(err)
			}
			select {
			case m := <-n.requests:
				if m.Subject != subject {
					t.Fatalf("got %s", m.Subject)
				}
			case <-time.After(30 * time.Second):
				t.Fatalf("nothing arrived on %s after restart %d", subject, round)
			}
		}
		who.Close()
	}
}

func TestLooksAreReadStrictly(t *testing.T) {
	f := testfleet.New(t)
	n := start(t, f.Enrol("web-1"))
	n.waitConnected(t, 1)
	c := f.Controller()
	for _, bad := range []string{"", "{", `{"v":1,"serial":2,"more":1}`, `{"v":7,"serial":2,"digest":""}`, `{"v":1,"serial":-1}`} {
		if err := c.Publish(protocol.LookSubject("web-1"), []byte(bad)); err != nil {
			t.Fatal(err)
		}
	}
	good := protocol.Look{Version: 1, Serial: 9, Digest: strings.Repeat("a", 64), Account: "token"}
	if err := c.Publish(protocol.LookSubject("web-1"), protocol.Encode(good)); err != nil {
		t.Fatal(err)
	}
	testfleet.Eventually(t, "the look", func() bool { looks, _ := n.seen(); return len(looks) > 0 })
	looks, accounts := n.seen()
	if len(looks) != 1 || looks[0] != good || len(accounts) != 1 || accounts[0] != "token" {
		t.Fatalf("looks %v, accounts %v", looks, accounts)
	}
}

func TestWebSocketWhereTLSIsShut(t *testing.T) {
	f := testfleet.New(t)
	n := start(t, f.Enrol("web-1", fmt.Sprintf("tls://127.0.0.1:%d", testfleet.Port(t)), f.URLs()[1]))
	n.waitConnected(t, 1)
	if url, _ := n.Status(); !strings.HasPrefix(url, "wss://") {
		t.Fatalf("connected to %q", url)
	}
	f.Serve(f.Controller(), protocol.UpPing, func(string, []byte) (any, error) { return nil, nil })
	if err := n.Probe(t.Context()); err != nil {
		t.Fatalf("probe over wss: %v", err)
	}
	if ip := n.LocalIPv4(); ip != "127.0.0.1" {
		t.Fatalf("local address %q", ip)
	}
}

func TestAskControllers(t *testing.T) {
	f := testfleet.New(t)
	n := start(t, f.Enrol("web-1"))
	n.waitConnected(t, 1)
	if err := n.Probe(t.Context()); !errors.Is(err, nats.ErrNoResponders) {
		t.Fatalf("probe without a controller: %v", err)
	}
	c := f.Controller()
	f.Serve(c, protocol.UpPing, func(string, []byte) (any, error) { return nil, nil })
	f.Serve(c, protocol.UpReport, func(node string, data []byte) (any, error) {
		r, err := protocol.Decode[protocol.Report](data)
		if err != nil || node != "web-1" || r.Deployment != "d-1" {
			return nil, protocol.Refuse(protocol.Invalid, "%v %v", r, err)
		}
		return nil, nil
	})
	f.Serve(c, protocol.UpManifest, func(_ string, data []byte) (any, error) {
		q, err := protocol.Decode[protocol.ManifestQuery](data)
		if err != nil || q.Digest != "" {
			return nil, protocol.Refuse(protocol.Unknown, "there is no such manifest")
		}
		return protocol.ManifestReply{Digest: "d", Manifest: []byte("m"), Account: "newer"}, nil
	})
	if err := n.Probe(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := n.Report(t.Context(), protocol.Report{Version: 1, Deployment: "d-1", Phase: protocol.Confirmed}); err != nil {
		t.Fatal(err)
	}
	r, err := n.Manifest(t.Context(), "")
	if err != nil || string(r.Manifest) != "m" {
		t.Fatalf("%v, %v", r, err)
	}
	if _, accounts := n.seen(); len(accounts) != 1 || accounts[0] != "newer" {
		t.Fatalf("accounts %v", accounts)
	}
	if _, err := n.Manifest(t.Context(), "x"); !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
		t.Fatalf("a refusal came as %v", err)
	}
}

// TestHostileController: what answers a blob query may be anything.
func TestHostileController(t *testing.T) {
	f := testfleet.New(t)
	n := start(t, f.Enrol("web-1"))
	n.waitConnected(t, 1)
	content := bytes.Repeat([]byte("0123456789abcdef"), 3*protocol.ChunkSize/16+5)
	size := int64(len(content))
	honest := func(q protocol.BlobQuery) protocol.BlobReply {
		return protocol.BlobReply{Size: size, Data: content[q.Offset:min(q.Offset+protocol.ChunkSize, size)]}
	}
	var answer atomic.Value
	var asked atomic.Int64
	f.Serve(f.Controller(), protocol.UpBlob, func(_ string, data []byte) (any, error) {
		asked.Add(1)
		q, err := protocol.Decode[protocol.BlobQuery](data)
		if err != nil {
			return nil, err
		}
		return answer.Load().(func(protocol.BlobQuery) any)(q), nil
	})
	answer.Store(func(q protocol.BlobQuery) any { return honest(q) })
	if got, err := n.Blob(t.Context(), "m", "b"); err != nil || !bytes.Equal(got, content) {
		t.Fatalf("honest: %d bytes, %v", len(got), err)
	}
	piece := func(size int64, n int) any { return protocol.BlobReply{Size: size, Data: make([]byte, n)} }
	for name, hostile := range map[string]func(protocol.BlobQuery) any{
		"no size":          func(protocol.BlobQuery) any { return piece(0, 10) },
		"negative size":    func(protocol.BlobQuery) any { return piece(-1, 10) },
		"huge size":        func(protocol.BlobQuery) any { return piece(1<<40, 10) },
		"no data":          func(protocol.BlobQuery) any { return piece(1000, 0) },
		"too large piece":  func(protocol.BlobQuery) any { return piece(2<<20, protocol.ChunkSize+1) },
		"more than size":   func(protocol.BlobQuery) any { return piece(10, 11) },
		"size changes":     func(q protocol.BlobQuery) any { return piece(1<<20+q.Offset, protocol.ChunkSize) },
		"never ends":       func(q protocol.BlobQuery) any { return piece(q.Offset+protocol.ChunkSize+1, protocol.ChunkSize) },
		"crumbs":           func(protocol.BlobQuery) any { return piece(16<<20, 1) },
		"another document": func(protocol.BlobQuery) any { return map[string]any{"size": 1, "data": "AA==", "x": 1} },
		"not a document":   func(protocol.BlobQuery) any { return "x" },
	} {
		answer.Store(hostile)
		asked.Store(0)
		if got, err := n.Blob(t.Context(), "m", "b"); err == nil {
			t.Errorf("%s: %d bytes were taken", name, len(got))
		} else if strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: the error has more than one line: %v", name, err)
		}
		if asked.Load() > 200 {
			t.Errorf("%s: asked %d times", name, asked.Load())
		}
	}
}

func TestBrokerKeepsNodesApart(t *testing.T) {
	f := testfleet.New(t)
	m := f.Enrol("web-1")
	refused := make(chan string, 16)
	nc := f.Connect(m.Signer(), protocol.InboxPrefix("web-1"), nats.ErrorHandler(func(_ *nats.Conn, _ *nats.Subscription, err error) { refused <- err.Error() }))
	for _, try := range []struct {
		subscribe bool
		subject   string
	}{
		{true, protocol.NodeRequests("web-2")[0]},
		{true, protocol.LookSubject("web-2")},
		{true, protocol.InboxPrefix("web-2") + ".>"},
		{true, "ni.v1.reply.>"},
		{true, "_INBOX.>"},
		{true, ">"},
		{false, protocol.ReplySubject("ann", "id", "web-2")},
		{false, protocol.UpSubject("web-2", protocol.UpBeat)},
		{false, protocol.EventSubject("web-2", "d-1")},
		{false, protocol.LookSubject("web-2")},
		{false, protocol.RequestSubject("web-2", protocol.Ping)},
		{false, "$JS.API.INFO"},
	} {
		var err error
		if try.subscribe {
			_, err = nc.SubscribeSync(try.subject)
		} else {
			err = nc.Publish(try.subject, nil)
		}
		if err != nil {
			t.Fatal(err)
		}
		select {
		case text := <-refused:
			if !strings.Contains(text, "Permissions Violation") {
				t.Errorf("%s: %s", try.subject, text)
			}
		case <-time.After(30 * time.Second):
			t.Errorf("the broker let a node use %s (subscribe: %v)", try.subject, try.subscribe)
		}
	}
}

func TestRevokedNodeKeepsTryingSlowly(t *testing.T) {
	f := testfleet.New(t)
	m := f.Enrol("web-1")
	n := start(t, m)
	n.waitConnected(t, 1)
	key, err := m.Key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	f.Revoke(key)
	testfleet.Eventually(t, "thrown out", func() bool { url, _ := n.Status(); return url == "" })
	if err := n.Check(); err != nil {
		t.Fatalf("a revoked node is no reason to restart the agent: %v", err)
	}
	public, err := f.Keys.Publish(nil) // pardoned
	if err != nil {
		t.Fatal(err)
	}
	f.Stop()
	f.Public = public
	f.Start()
	n.waitConnected(t, 2)
}

func TestAuditIsOneMessageAndAcknowledgedByTheStream(t *testing.T) {
	f := testfleet.New(t)
	n := start(t, f.Enrol("web-1"))
	n.waitConnected(t, 1)
	records := [][]byte{[]byte("one"), []byte("two")}
	if err := n.Audit(t.Context(), records); err == nil {
		t.Fatal("acknowledged by nobody")
	}
	js, err := f.Controller().JetStream()
	if err != nil {
		t.Fatal(err)
	}
	if _, err := js.AddStream(&nats.StreamConfig{Name: "audit", Subjects: protocol.AuditSubjects}); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time they are known
		if err := n.Audit(t.Context(), records); err != nil {
			t.Fatal(err)
		}
	}
	info, err := js.StreamInfo("audit")
	if err != nil || info.State.Msgs != 1 {
		t.Fatalf("stream: %+v, %v", info, err)
	}
	m, err := js.GetMsg("audit", 1)
	if err != nil || !slices.EqualFunc(protocol.SplitRecords(m.Data), records, bytes.Equal) {
		t.Fatalf("the message is %q, %v", m.Data, err)
	}
}

func TestBackoffGrowsAndIsRandom(t *testing.T) {
	b := link.DefaultBackoff
	last := time.Duration(0)
	for attempt := range 40 {
		longest := time.Duration(0)
		different := map[time.Duration]bool{}
		for range 200 {
			d := b.Delay(attempt, false)
			longest, different[d] = max(longest, d), true
			if d < b.Base || d > b.Base+b.Cap {
				t.Fatalf("attempt %d waits %s", attempt, d)
			}
		}
		if len(different) < 100 {
			t.Fatalf("attempt %d: %d different waits of 200", attempt, len(different))
		}
		if attempt < 3 && longest <= last {
			t.Fatalf("attempt %d waits at most %s, the one before %s", attempt, longest, last)
		}
		last = longest
	}
	if d := b.Delay(0, true); d < b.Cap/2 {
		t.Fatalf("a refused login is tried again after %s", d)
	}
}

func TestStartsBeforeItsBroker(t *testing.T) {
	f := testfleet.New(t)
	m := f.Enrol("web-1")
	f.Stop()
	n := start(t, m)
	n.Event("d-1", protocol.Event{}) // dropped, does not block
	if _, err := n.Manifest(t.Context(), ""); !errors.Is(err, link.ErrDisconnected) {
		t.Fatal(err)
	}
	f.Start()
	n.waitConnected(t, 1)
	c := f.Controller()
	events := make(chan *nats.Msg, 1)
	if _, err := c.ChanSubscribe(fmt.Sprintf("ni.v1.node.%s.up.%s", "web-1", protocol.UpBeat), events); err != nil {
		t.Fatal(err)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	if err := n.Beat(protocol.Beat{Version: 1}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-events:
	case <-time.After(30 * time.Second):
		t.Fatal("no beat arrived")
	}
}
