// Package query answers signed requests: it proves who asks, records it, runs the action's handler and
// says what came of it, or why nothing did.
//
// Start with Server.Serve, which is the way of a request. seen.go is the memory against replays, stream.go has the
// answers that come in parts. What a node can be asked is a table of handlers that the agent hands in (those of
// a viewer's questions are in the folders below this one); who may ask is protocol's table of roles.
package query

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// Handler does what a proven request asks for. Its result becomes the answer's body. An error that is
// a *protocol.Refusal is answered as it is, any other as Failed.
type Handler func(ctx context.Context, r *protocol.Verified) (any, error)

// Options are a server's surroundings.
type Options struct {
	Node     string
	Log      *slog.Logger
	Verifier *protocol.Verifier
	Seen     *Seen
	Audit    func(protocol.AuditRecord) error
	Publish  func(subject string, data []byte) error
	Handlers map[protocol.Action]Handler
	Streams  map[protocol.Action]Streamer
	Runs     map[protocol.Action]Streamer // what is run for somebody; see stream.go
	Now      func() time.Time             // nil: time.Now

	Running    int           // handlers of questions at the same time, and as many of what changes something; 0: 8
	Streaming  int           // streams at the same time; 0: 4
	RunsAtOnce int           // of each action of Runs; 0: 8
	StreamLife time.Duration // of a stream or a run that is not renewed; 0: protocol.StreamLifetime

	Timeout time.Duration                     // of one handler; 0: 30 s
	Limits  map[protocol.Action]time.Duration // in place of Timeout, of handlers that work for longer
}

var ownVersion = fmt.Sprintf("v%d", protocol.Version) // in subjects

// unprovenPerSecond bounds what senders without a good signature can make the node write and say.
const unprovenPerSecond = 20

// Server answers one node's requests.
type Server struct {
	o        Options
	slots    chan struct{} // of handlers that run for a question
	orders   chan struct{} // of the others
	lines    chan struct{} // of streams
	runs     map[protocol.Action]chan struct{}
	underWay underWay
	received atomic.Uint64

	second  int64 // of the last request that nobody could be proven to have sent
	junk    int   // how many of those there were in it
	ignored int   // how many were neither recorded nor answered since the last record
}

// New makes a server; Serve runs it.
func New(o Options) *Server {
	if o.Now == nil {
		o.Now = time.Now
	}
	if o.Running == 0 {
		o.Running = 8
	}
	if o.Timeout == 0 {
		o.Timeout = 30 * time.Second
	}
	if o.Streaming == 0 {
		o.Streaming = 4
	}
	if o.StreamLife == 0 {
		o.StreamLife = protocol.StreamLifetime
	}
	if o.RunsAtOnce == 0 {
		o.RunsAtOnce = 8
	}
	s := &Server{o: o, slots: make(chan struct{}, o.Running), orders: make(chan struct{}, o.Running), lines: make(chan struct{}, o.Streaming), runs: map[protocol.Action]chan struct{}{},
		underWay: underWay{all: map[string]*answering{}}}
	for action := range o.Runs {
		// Each has its own: a viewer's commands must not be in the way of an operator's actions.
		s.runs[action] = make(chan struct{}, o.RunsAtOnce)
	}
	return s
}

// Serve answers what comes until ctx ends and the handlers that run have ended.
func (s *Server) Serve(ctx context.Context, requests <-chan *nats.Msg) error {
	var running sync.WaitGroup
	defer running.Wait()
	for {
		select {
		case <-ctx.Done():
			return nil
		case m := <-requests:
			s.receive(ctx, m, &running)
		}
	}
}

// Received grows with each request that comes, good or bad, and with each part of a stream: while it stays, nobody
// asks anything.
func (s *Server) Received() uint64 { return s.received.Load() }

// receive proves one request, one after the other, and starts its handler.
func (s *Server) receive(ctx context.Context, m *nats.Msg, running *sync.WaitGroup) {
	s.received.Add(1)
	r, refusal := s.prove(m)
	if refusal != nil {
		s.refuse(m, r, refusal)
		return
	}
	if r.Action == protocol.Stream {
		s.steer(r)
		return
	}
	slots, run, what := s.slots, s.run, "requests"
	switch {
	case r.runs:
		slots, run, what = s.runs[r.Action], s.stream, "requests of "+string(r.Action)
	case r.streamer != nil:
		slots, run, what = s.lines, s.stream, "streams"
	case !r.question():
		slots, what = s.orders, "orders" // which a viewer's questions, as many as they may be, are not in the way of
	}
	select {
	case slots <- struct{}{}:
	default:
		s.refuse(m, r, protocol.Refuse(protocol.Failed, "busy: %d %s are running on %s; ask again later", cap(slots), what, s.o.Node))
		return
	}
	r.over = func() {}
	if r.question() || r.streamer != nil {
		ctx, r.over = s.underWay.begin(ctx, r, s.o.StreamLife) // here, so that an order to end it that comes next finds it
	}
	running.Go(func() {
		defer func() { <-slots }()
		defer r.over()
		run(ctx, r)
	})
}

// request is what is known of a request: of an unproven one only what it claims.
type request struct {
	protocol.Header
	sender   protocol.Identity // empty while unproven
	payload  []byte
	handler  Handler
	streamer Streamer // in place of handler
	runs     bool     // the streamer runs something
	ending   *protocol.Ending
	over     func() // it can't be ended or renewed any more; to be called before its sender has the whole answer
}

func (r *request) verified() *protocol.Verified {
	return &protocol.Verified{Header: r.Header, Sender: r.sender, Payload: r.payload}
}

// prove finds out whether a message is an order to this node that it may carry out.
func (s *Server) prove(m *nats.Msg) (*request, error) {
	r := &request{}
	if v := protocol.SubjectVersion(m.Subject); v != ownVersion {
		return r, protocol.Refuse(protocol.OtherVersion, "the request is of version %.16q of the protocol, %s speaks version %d; upgrade the older one", v, s.o.Node, protocol.Version)
	}
	signed, err := protocol.Decode[protocol.Signed](m.Data)
	if err != nil {
		return r, protocol.Refuse(protocol.Malformed, "the request: %v", err)
	}
	order, sender, err := s.o.Verifier.Verify(&signed, protocol.Expect{
		Kind: protocol.KindRequest, Targets: []string{s.o.Node, protocol.Everyone}, Now: s.o.Now()}, s.o.Seen)
	r.sender = sender
	if sender.Name != "" && !errors.Is(err, &protocol.Refusal{Code: protocol.Tampered}) {
		r.payload = signed.Payload // its sender signed it, whatever else is wrong
	}
	if err != nil {
		r.claim(signed.Header)
		return r, err
	}
	r.Header = order.Header
	r.handler, r.streamer = s.o.Handlers[r.Action], s.o.Streams[r.Action]
	if run := s.o.Runs[r.Action]; run != nil {
		r.streamer, r.runs = run, true
	}
	if r.handler == nil && r.streamer == nil && r.Action != protocol.Stream {
		return r, protocol.Refuse(protocol.Unknown, "%s can't be asked for %q; its agent is %s", s.o.Node, r.Action, protocol.Build())
	}
	if !r.question() {
		if err := s.o.Seen.Sync(); err != nil {
			return r, protocol.Refuse(protocol.Failed, "can't remember the request's id for good, so it is not run: %v", err)
		}
	}
	return r, nil
}

// claim takes over what an unproven header says of itself, as far as it can be read.
func (r *request) claim(header []byte) {
	if json.Unmarshal(header, &r.Header) != nil || !isID(r.ID) { // it becomes part of a subject and of lines in files
		r.Header = protocol.Header{}
	}
}

// question tells whether it only asks: such a request changes nothing.
func (r *request) question() bool { return protocol.OnlyAsks(r.Action) }

func isID(s string) bool {
	return len(s) <= 64 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyz0123456789-") == ""
}

// run carries out a proven request, on record before and after.
func (s *Server) run(ctx context.Context, r *request) {
	if err := s.record(r, nil, false); err != nil && !r.question() {
		s.answer(r, nil, protocol.Refuse(protocol.Failed, "can't record the request, so it is not run: %v", err))
		return
	}
	limit, ok := s.o.Limits[r.Action]
	if !ok {
		limit = s.o.Timeout
	}
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	result, err := s.handle(ctx, r)
	s.record(r, err, true) // a failure is logged there, and what was done is done
	r.over()
	s.answer(r, result, err)
}

// handle keeps a handler's panic from ending the agent.
func (s *Server) handle(ctx context.Context, r *request) (result any, err error) {
	defer func() {
		if p := recover(); p != nil {
			s.o.Log.Error("a handler panicked", "action", r.Action, "panic", p, "stack", string(debug.Stack()))
			err = protocol.Refuse(protocol.Failed, "the agent has a fault in %s: %v", r.Action, p)
		}
	}()
	result, err = r.handler(ctx, r.verified())
	if err == nil && result != nil {
		result = json.RawMessage(protocol.Encode(result)) // here, where what can't be encoded does no harm
	}
	return result, err
}

// refuse records and answers a request that is not run. Those that nobody is proven to have sent are
// few per second: more are counted only.
func (s *Server) refuse(m *nats.Msg, r *request, err error) {
	if r.sender.Name == "" {
		if now := s.o.Now().Unix(); now != s.second {
			s.second, s.junk = now, 0
		}
		if s.junk++; s.junk > unprovenPerSecond {
			s.ignored++
			return
		}
	}
	s.record(r, err, true) // a failure is logged there; nothing is run
	if r.Target == protocol.Everyone && errors.Is(err, &protocol.Refusal{Code: protocol.OffTarget}) {
		return // it was not meant for this node, and thousands may be in the same place
	}
	if r.sender.Name != "" && r.ID != "" {
		s.answer(r, nil, err)
	} else if protocol.OwnReply(s.o.Node, m.Reply) {
		s.publish(m.Reply, nil, err)
	}
}

func (s *Server) record(r *request, err error, ended bool) error {
	a := protocol.AuditRecord{User: r.sender.Name, Role: r.sender.Role, Request: r.ID, Action: r.Action, Target: r.Target, Payload: r.Header.Payload,
		Detail: protocol.Detail(r.Action, r.payload)}
	if r.sender.Name == "" && s.ignored > 0 {
		a.Reason = fmt.Sprintf("(%d more that nobody is proven to have sent were ignored) ", s.ignored)
		s.ignored = 0
	}
	if ended {
		a.Outcome = "ok"
	}
	if e := r.ending; e != nil && err == nil {
		a.Reason = e.Reason
		if !e.Over() {
			a.Outcome = string(protocol.Failed)
		}
	}
	if err != nil {
		a.Outcome = string(asRefusal(err).Code)
		a.Reason += err.Error()
	}
	return s.o.Audit(a)
}

func (s *Server) answer(r *request, result any, err error) {
	s.publish(protocol.ReplySubject(r.sender.Name, r.ID, s.o.Node), result, err)
}

func (s *Server) publish(subject string, result any, err error) {
	if err != nil {
		err = asRefusal(err)
	}
	data := protocol.Encode(protocol.Answer(s.o.Node, result, err))
	if len(data) > protocol.MaxMessage {
		data = protocol.Encode(protocol.Answer(s.o.Node, nil, protocol.Refuse(protocol.Failed, "the answer has %d bytes, more than a message can carry", len(data))))
	}
	if err := s.o.Publish(subject, data); err != nil {
		s.o.Log.Warn("an answer could not be sent", "subject", subject, "error", err)
	}
}

func asRefusal(err error) *protocol.Refusal {
	var r *protocol.Refusal
	if errors.As(err, &r) {
		return r
	}
	return protocol.Refuse(protocol.Failed, "%v", err)
}
