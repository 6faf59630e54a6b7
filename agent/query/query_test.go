package query

import (
	"context"
	"encoding/json"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

const node = "web-1"

// served is a server at a real broker, with all that it did.
type served struct {
	t     *testing.T
	fleet *testfleet.Fleet
	nc    *nats.Conn
	path  string // of the ids

	mu      sync.Mutex
	ran     []string
	records []protocol.AuditRecord
	block   chan struct{} // while not nil, handlers wait for it
	streams *streamer
	runs    chan func(ctx context.Context, send func(any) error) error // each run does what comes first
	life    time.Duration                                              // of a stream; 0: as ever
	full    error                                                      // why nothing can be recorded

	seen *Seen
	stop func()
}

func serve(t *testing.T) *served {
	t.Helper()
	s := &served{t: t, fleet: testfleet.New(t), path: filepath.Join(t.TempDir(), "seen.log"), streams: newStreamer(), runs: make(chan func(context.Context, func(any) error) error, 8)}
	s.nc = s.fleet.Connect(s.fleet.Enrol(node).Signer(), protocol.InboxPrefix(node))
	s.start()
	t.Cleanup(func() { s.stop() })
	return s
}

func (s *served) server(seen *Seen) *Server {
	v, err := protocol.NewVerifier(s.fleet.Public.Operator, s.fleet.Public.AccountJWT)
	if err != nil {
		s.t.Fatal(err)
	}
	handler := func(_ context.Context, r *protocol.Verified) (any, error) {
		s.mu.Lock()
		s.ran = append(s.ran, r.ID)
		block := s.block
		s.mu.Unlock()
		if block != nil {
			<-block
		}
		return map[string]string{"hello": r.Sender.Name}, nil
	}
	left := func(ctx context.Context, _ *protocol.Verified) (any, error) {
		until, _ := ctx.Deadline()
		return time.Until(until), nil
	}
	runs := func(ctx context.Context, r *protocol.Verified, send func(any) error) error {
		s.mu.Lock()
		s.ran = append(s.ran, r.ID)
		s.mu.Unlock()
		return (<-s.runs)(ctx, send)
	}
	return New(Options{Node: node, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Verifier: v, Seen: seen,
		Audit: func(r protocol.AuditRecord) error {
			s.mu.Lock()
			defer s.mu.Unlock()
			s.records = append(s.records, r)
			return s.full
		},
		Publish: s.nc.Publish,
		Running: 2,
		Limits:  map[protocol.Action]time.Duration{protocol.CollectGarbage: time.Hour},
		Handlers: map[protocol.Action]Handler{protocol.Ping: handler, protocol.Release: handler, protocol.CollectGarbage: left, protocol.OwnFiles: left,
			protocol.Facts:       func(context.Context, *protocol.Verified) (any, error) { panic("a fault") },
			protocol.ReadStats:   func(context.Context, *protocol.Verified) (any, error) { return time.Unix(1<<40, 0), nil },
			protocol.ReadJournal: func(ctx context.Context, _ *protocol.Verified) (any, error) { <-ctx.Done(); return nil, ctx.Err() }},
		Streams: map[protocol.Action]Streamer{protocol.FollowJournal: s.streams.run}, Streaming: 2, StreamLife: s.life,
		Runs: map[protocol.Action]Streamer{protocol.RunCommand: runs, protocol.RunScript: runs}, RunsAtOnce: 2,
	})
}

// start starts the server as an agent's start does, with the ids of the file.
func (s *served) start() {
	seen, err := OpenSeen(s.path, 0, time.Now)
	if err != nil {
		s.t.Fatal(err)
	}
	requests := make(chan *nats.Msg, 64)
	var subs []*nats.Subscription
	for _, subject := range protocol.NodeRequests(node) {
		sub, err := s.nc.ChanSubscribe(subject, requests)
		if err != nil {
			s.t.Fatal(err)
		}
		subs = append(subs, sub)
	}
	if err := s.nc.Flush(); err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = s.server(seen).Serve(ctx, requests) }()
	s.seen = seen
	s.stop = sync.OnceFunc(func() {
		cancel()
		<-done
		for _, sub := range subs {
			_ = sub.Unsubscribe() // the connection may be gone
		}
		seen.Close()
	})
}

func (s *served) effects() (ran []string, records []protocol.AuditRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	ran, records = s.ran, s.records
	s.ran, s.records = nil, nil
	return ran, records
}

// running are the requests that handlers have begun with.
func (s *served) running() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.ran)
}

// asker is a user with a raw connection.
type asker struct {
	t       *testing.T
	signer  *protocol.Signer
	nc      *nats.Conn
	replies chan *nats.Msg
	name    string
	kept    map[string][]protocol.Reply // by subject: what came while something else was waited for
}

func (s *served) asker(name string, role protocol.Role) *asker {
	a := &asker{t: s.t, signer: s.fleet.User(name, role), replies: make(chan *nats.Msg, 64), name: name, kept: map[string][]protocol.Reply{}}
	a.nc = s.fleet.Connect(a.signer, "")
	if _, err := a.nc.ChanSubscribe("ni.*.reply."+name+".>", a.replies); err != nil {
		s.t.Fatal(err)
	}
	return a
}

// send publishes with the reply subject that an honest client names, and gives the answer.
func (a *asker) send(subject string, data []byte, id string) (string, protocol.Reply) {
	a.t.Helper()
	reply := strings.Replace(protocol.ReplySubject(a.name, id, node), "ni.v1", "ni."+protocol.SubjectVersion(subject), 1)
	if err := a.nc.PublishRequest(subject, reply, data); err != nil {
		a.t.Fatal(err)
	}
	select {
	case m := <-a.replies:
		r, err := protocol.Decode[protocol.Reply](m.Data)
		if err != nil || r.From != node {
			a.t.Fatalf("reply %s: %v", m.Data, err)
		}
		return m.Subject, r
	case <-time.After(30 * time.Second):
		a.t.Fatalf("no answer to a request on %s", subject)
	}
	return "", protocol.Reply{}
}

func (a *asker) sign(h protocol.Header, payload []byte) *protocol.Signed {
	a.t.Helper()
	signed, err := a.signer.Sign(h, payload)
	if err != nil {
		a.t.Fatal(err)
	}
	return signed
}

func header(action protocol.Action, target string) protocol.Header {
	now := time.Now()
	return protocol.Header{Version: 1, Kind: protocol.KindRequest, ID: protocol.NewID(), Action: action, Target: target,
		NotBefore: now.Unix(), Expires: now.Add(protocol.RequestLifetime).Unix()}
}

func TestAnswers(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Viewer)
	for _, target := range []string{node, protocol.Everyone} {
		h := header(protocol.Ping, target)
		subject, r := ann.send(protocol.RequestSubject(target, protocol.Ping), protocol.Encode(ann.sign(h, nil)), h.ID)
		if r.Refused != nil || string(r.Body) != `{"hello":"ann"}` || subject != protocol.ReplySubject("ann", h.ID, node) {
			t.Fatalf("to %s: %+v on %s", target, r, subject)
		}
		ran, records := s.effects()
		if len(ran) != 1 || len(records) != 2 || records[0].Outcome != "" || records[1].Outcome != "ok" {
			t.Fatalf("ran %v, records %+v", ran, records)
		}
		for _, r := range records {
			if r.User != "ann" || r.Role != protocol.Viewer || r.Request != h.ID || r.Action != protocol.Ping || r.Target != target {
				t.Fatalf("record %+v", r)
			}
		}
	}
}

func TestHostileRequests(t *testing.T) {
	s := serve(t)
	ann, eve := s.asker("ann", protocol.Deployer), s.asker("eve", protocol.Viewer)
	subject := protocol.RequestSubject(node, protocol.Ping)
	good := func() (protocol.Header, *protocol.Signed) {
		h := header(protocol.Ping, node)
		return h, ann.sign(h, []byte(`{"name":"x"}`))
	}
	other, err := protocol.NewFleet("other")
	if err != nil {
		t.Fatal(err)
	}
	stranger := (&testfleet.Fleet{TB: t, Keys: other}).User("ann", protocol.Admin)
	type attempt struct {
		code    protocol.Code
		subject string
		make    func() (protocol.Header, *protocol.Signed)
		raw     []byte
		as      *asker
	}
	edited := func(change func(*protocol.Header)) func() (protocol.Header, *protocol.Signed) {
		return func() (protocol.Header, *protocol.Signed) {
			h := header(protocol.Ping, node)
			change(&h)
			return h, ann.sign(h, nil)
		}
	}
	broken := func(change func(*protocol.Signed)) func() (protocol.Header, *protocol.Signed) {
		return func() (protocol.Header, *protocol.Signed) {
			h, signed := good()
			change(signed)
			return h, signed
		}
	}
	for name, a := range map[string]attempt{
		"not JSON":         {code: protocol.Malformed, raw: []byte("hello")},
		"empty":            {code: protocol.Malformed, raw: []byte("")},
		"more fields":      {code: protocol.Malformed, raw: []byte(`{"header":"","user":"","sig":"","more":1}`)},
		"two documents":    {code: protocol.Malformed, raw: []byte(`{"header":"","user":"","sig":""}{}`)},
		"unsigned":         {code: protocol.Unsigned, make: broken(func(s *protocol.Signed) { s.Signature = nil })},
		"no user":          {code: protocol.Unsigned, make: broken(func(s *protocol.Signed) { s.User = "" })},
		"wrong signature":  {code: protocol.Forged, make: broken(func(s *protocol.Signed) { s.Signature[0] ^= 1 })},
		"changed header":   {code: protocol.Forged, make: broken(func(s *protocol.Signed) { s.Header = []byte(strings.Replace(string(s.Header), "ping", "fact", 1)) })},
		"another's JWT":    {code: protocol.Forged, make: broken(func(s *protocol.Signed) { s.User = eve.signer.User })},
		"changed payload":  {code: protocol.Tampered, make: broken(func(s *protocol.Signed) { s.Payload = []byte(`{"name":"y"}`) })},
		"another fleet":    {code: protocol.Untrusted, make: broken(func(s *protocol.Signed) { s.User = stranger.User })},
		"JWT that is none": {code: protocol.Untrusted, make: broken(func(s *protocol.Signed) { s.User = "a.b.c" })},
		"a node orders": {code: protocol.OverRole, make: func() (protocol.Header, *protocol.Signed) {
			h := header(protocol.Ping, node)
			sg, _ := s.fleet.User("web-2", protocol.Node).Sign(h, nil)
			return h, sg
		}},
		"over role": {code: protocol.OverRole, as: eve, make: func() (protocol.Header, *protocol.Signed) {
			h := header(protocol.Release, node)
			return h, eve.sign(h, []byte(`{"name":""}`))
		}},
		"no row needs admin": {code: protocol.OverRole, make: edited(func(h *protocol.Header) { h.Action = "format-disk" })},
		"expired":            {code: protocol.Expired, make: edited(func(h *protocol.Header) { h.NotBefore -= 600; h.Expires -= 600 })},
		"not yet":            {code: protocol.NotYet, make: edited(func(h *protocol.Header) { h.NotBefore += 600; h.Expires += 600 })},
		"lives too long":     {code: protocol.Invalid, make: edited(func(h *protocol.Header) { h.Expires += 3600 })},
		"never expires":      {code: protocol.Expired, make: edited(func(h *protocol.Header) { h.Expires = 0 })},
		"for another node":   {code: protocol.Misaddressed, make: edited(func(h *protocol.Header) { h.Target = "web-2" })},
		"for a controller":   {code: protocol.Misaddressed, make: edited(func(h *protocol.Header) { h.Target = protocol.ControllerName })},
		"all for another":    {code: protocol.Misaddressed, subject: protocol.RequestSubject(protocol.Everyone, protocol.Ping), make: edited(func(h *protocol.Header) { h.Target = "web-2" })},
		"a manifest":         {code: protocol.Malformed, make: edited(func(h *protocol.Header) { h.Kind = protocol.KindManifest })},
		"version in header":  {code: protocol.OtherVersion, make: edited(func(h *protocol.Header) { h.Version = 2 })},
		"version in subject": {code: protocol.OtherVersion, subject: "ni.v2.node." + node + ".req.viewer", make: good},
		"id with a dot":      {code: protocol.Malformed, make: edited(func(h *protocol.Header) { h.ID = "a.b" })},
		"id with a newline":  {code: protocol.Malformed, make: edited(func(h *protocol.Header) { h.ID = "a\r\nPUB x 0\r\n" })},
		"id with a wildcard": {code: protocol.Malformed, make: edited(func(h *protocol.Header) { h.ID = ">" })},
	} {
		t.Run(name, func(t *testing.T) {
			if a.subject == "" {
				a.subject = subject
			}
			if a.as == nil {
				a.as = ann
			}
			data, id := a.raw, "some-id"
			if a.make != nil {
				h, signed := a.make()
				data = protocol.Encode(signed)
				if isID(h.ID) {
					id = h.ID
				}
			}
			// The node's own order that its operator signed goes to the node that answers; the broker
			// does not let a sender take another's reply subject.
			if name == "a node orders" {
				if err := a.as.nc.Publish(a.subject, data); err != nil {
					t.Fatal(err)
				}
				testfleet.Eventually(t, "a record", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.records) > 0 })
			} else if _, r := a.as.send(a.subject, data, id); r.Refused == nil || r.Refused.Code != a.code || r.Body != nil || strings.Contains(r.Refused.Reason, "\n") {
				t.Errorf("answered %+v", r.Refused)
			}
			ran, records := s.effects()
			if len(ran) > 0 || len(records) != 1 || records[0].Outcome != string(a.code) || records[0].Reason == "" {
				t.Errorf("ran %v, records %+v", ran, records)
			}
		})
	}
}

func TestReplayed(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Deployer)
	for _, action := range []protocol.Action{protocol.Ping, protocol.Release} {
		h := header(action, node)
		data := protocol.Encode(ann.sign(h, nil))
		if _, r := ann.send(protocol.RequestSubject(node, action), data, h.ID); r.Refused != nil {
			t.Fatal(r.Refused)
		}
		s.effects()
		for _, restart := range []bool{false, true} {
			if restart {
				s.stop()
				s.start()
			}
			_, r := ann.send(protocol.RequestSubject(node, action), data, h.ID)
			if r.Refused == nil || r.Refused.Code != protocol.Replayed {
				t.Fatalf("%s again (restart %v): %+v", action, restart, r)
			}
			if ran, records := s.effects(); len(ran) > 0 || len(records) != 1 || records[0].Outcome != string(protocol.Replayed) || records[0].User != "ann" {
				t.Fatalf("ran %v, records %+v", ran, records)
			}
		}
	}
}

// TestAnswersOnlyWhereItMay: a sender that is not proven can't have the node speak anywhere else.
func TestAnswersOnlyWhereItMay(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Viewer)
	for _, reply := range []string{"", protocol.ReplySubject("ann", "id", "web-2"), protocol.UpSubject(node, protocol.UpReport), protocol.EventSubject(node, "d"), "ni.v1.reply.*.id." + node} {
		m := &nats.Msg{Subject: protocol.RequestSubject(node, protocol.Ping), Reply: reply, Data: []byte("hello")}
		var said []string
		server := s.server(s.seen)
		server.o.Publish = func(subject string, _ []byte) error { said = append(said, subject); return nil }
		server.receive(t.Context(), m, &sync.WaitGroup{})
		if len(said) > 0 {
			t.Errorf("asked for an answer on %q, it spoke on %v", reply, said)
		}
	}
	s.effects()
	// A proven sender is answered on its own subject, whatever it names.
	h := header(protocol.Ping, node)
	if err := ann.nc.PublishRequest(protocol.RequestSubject(node, protocol.Ping), protocol.ReplySubject("bob", h.ID, node), protocol.Encode(ann.sign(h, nil))); err != nil {
		t.Fatal(err)
	}
	select {
	case m := <-ann.replies:
		if m.Subject != protocol.ReplySubject("ann", h.ID, node) {
			t.Fatal(m.Subject)
		}
	case <-time.After(30 * time.Second):
		t.Fatal("no answer")
	}
}

func TestBusy(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Viewer)
	block := make(chan struct{})
	s.mu.Lock()
	s.block = block
	s.mu.Unlock()
	publish := func() {
		h := header(protocol.Ping, node)
		if err := ann.nc.Publish(protocol.RequestSubject(node, protocol.Ping), protocol.Encode(ann.sign(h, nil))); err != nil {
			t.Fatal(err)
		}
	}
	publish()
	publish()
	testfleet.Eventually(t, "two handlers run", func() bool { s.mu.Lock(); defer s.mu.Unlock(); return len(s.ran) == 2 })
	h := header(protocol.Ping, node)
	if _, r := ann.send(protocol.RequestSubject(node, protocol.Ping), protocol.Encode(ann.sign(h, nil)), h.ID); r.Refused == nil || r.Refused.Code != protocol.Failed || !strings.Contains(r.Refused.Reason, "busy") {
		t.Fatalf("a third: %+v", r)
	}
	// Questions are not in the way of what changes something.
	dora := s.asker("dora", protocol.Deployer)
	h = header(protocol.OwnFiles, node)
	if _, r := dora.send(protocol.RequestSubject(node, protocol.OwnFiles), protocol.Encode(dora.sign(h, nil)), h.ID); r.Refused != nil {
		t.Errorf("a deployer's order beside them: %+v", r)
	}
	close(block)
	for range 2 {
		select {
		case m := <-ann.replies:
			if r, err := protocol.Decode[protocol.Reply](m.Data); err != nil || r.Refused != nil {
				t.Fatalf("%+v, %v", r, err)
			}
		case <-time.After(30 * time.Second):
			t.Fatal("what ran was not answered")
		}
	}
}

func TestLimits(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Deployer)
	for action, most := range map[protocol.Action]time.Duration{protocol.CollectGarbage: time.Hour, protocol.OwnFiles: 30 * time.Second} {
		h := header(action, node)
		_, r := ann.send(protocol.RequestSubject(node, action), protocol.Encode(ann.sign(h, nil)), h.ID)
		var left time.Duration
		if err := json.Unmarshal(r.Body, &left); err != nil || left > most || left < most*9/10 {
			t.Errorf("%s has %v: %+v, %v", action, left, r, err)
		}
	}
}

func TestUnknownAndPanic(t *testing.T) {
	s := serve(t)
	root := s.asker("root", protocol.Admin)
	for action, code := range map[protocol.Action]protocol.Code{"format-disk": protocol.Unknown, protocol.Facts: protocol.Failed} {
		h := header(action, node)
		if _, r := root.send(protocol.RequestSubject(node, action), protocol.Encode(root.sign(h, nil)), h.ID); r.Refused == nil || r.Refused.Code != code {
			t.Errorf("%s: %+v", action, r)
		}
	}
}

// TestJunkIsBounded: a flood that nobody is proven to have sent costs neither disk nor answers.
func TestJunkIsBounded(t *testing.T) {
	s := serve(t)
	now := time.Unix(1_800_000_000, 0)
	server := s.server(s.seen)
	server.o.Now = func() time.Time { return now }
	said := 0
	server.o.Publish = func(string, []byte) error { said++; return nil }
	junk := &nats.Msg{Subject: protocol.RequestSubject(node, protocol.Ping), Reply: protocol.ReplySubject("eve", "id", node), Data: []byte("x")}
	for range 1000 {
		server.receive(t.Context(), junk, &sync.WaitGroup{})
	}
	if _, records := s.effects(); len(records) != unprovenPerSecond || said != unprovenPerSecond {
		t.Fatalf("%d records, %d answers", len(records), said)
	}
	now = now.Add(time.Second)
	server.receive(t.Context(), junk, &sync.WaitGroup{})
	if _, records := s.effects(); len(records) != 1 || !strings.Contains(records[0].Reason, "980 more") {
		t.Fatalf("%+v", records)
	}
}

func FuzzRequest(f *testing.F) {
	fleet, err := protocol.NewFleet("test")
	if err != nil {
		f.Fatal(err)
	}
	public, err := fleet.Publish(nil)
	if err != nil {
		f.Fatal(err)
	}
	signer := (&testfleet.Fleet{TB: f, Keys: fleet}).User("ann", protocol.Viewer)
	signed, _, err := signer.Request(protocol.Ping, node, nil, time.Now())
	if err != nil {
		f.Fatal(err)
	}
	f.Add("ni.v1.node.web-1.req.viewer", "ni.v1.reply.ann.id.web-1", protocol.Encode(signed))
	f.Add("ni.v2.all.req.viewer", "x", []byte("{}"))
	f.Add("", "", []byte(`{"header":"e30=","user":"u","sig":"AA=="}`))
	v, err := protocol.NewVerifier(public.Operator, public.AccountJWT)
	if err != nil {
		f.Fatal(err)
	}
	seen, err := OpenSeen(filepath.Join(f.TempDir(), "seen.log"), 0, time.Now)
	if err != nil {
		f.Fatal(err)
	}
	good := map[string]bool{string(protocol.Encode(signed)): true}
	f.Fuzz(func(t *testing.T, subject, reply string, data []byte) {
		if strings.ContainsAny(reply, " \t\r\n") {
			t.Skip("a broker delivers no such subject")
		}
		ran := false
		s := New(Options{Node: node, Log: slog.New(slog.NewTextHandler(io.Discard, nil)), Verifier: v, Seen: seen,
			Audit: func(protocol.AuditRecord) error { return nil },
			Publish: func(subject string, data []byte) error {
				if sender, ok := protocol.ReplySender(subject); !ok || sender != node || strings.ContainsAny(subject, " \r\n*>") {
					t.Errorf("spoke on %q", subject)
				}
				if !json.Valid(data) {
					t.Errorf("said %q", data)
				}
				return nil
			},
			Handlers: map[protocol.Action]Handler{protocol.Ping: func(context.Context, *protocol.Verified) (any, error) { ran = true; return nil, nil }}})
		var running sync.WaitGroup
		s.receive(t.Context(), &nats.Msg{Subject: subject, Reply: reply, Data: data}, &running)
		running.Wait()
		if ran {
			var back protocol.Signed
			if json.Unmarshal(data, &back) != nil || !good[string(protocol.Encode(back))] {
				t.Errorf("ran %q", data)
			}
		}
	})
}
