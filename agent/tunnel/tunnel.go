// Package tunnel is the node's end of tunnels: what a user may reach, for how long, and what is kept of it.
//
// Start with Open, which an order to open a tunnel comes to, then serve, which is a tunnel's life. Frames come by
// Route; how they make a stream is protocol/tunnel's.
package tunnel

import (
	"context"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// How many tunnels a node has at a time, and how much memory they may take: twice a window each. The first few get
// wide ones, for bulk; the others get what a shell or a page needs.
const (
	atOnce       = 64
	ofOneUser    = 48
	wide         = 8
	narrowWindow = 256 << 10
)

const (
	dialTime  = 10 * time.Second // for the connection to what is reached
	heardTime = 15 * time.Second // for the user's first frame, which shows that the user has the keys
	lateTime  = 5 * time.Second  // for which a tunnel that ended answers who missed the end
	endTime   = time.Second      // for telling the other ends when the agent ends
)

// Options are a server's surroundings.
type Options struct {
	Node     string
	Log      *slog.Logger
	XKey     nkeys.KeyPair // the node's curve key
	Verifier *protocol.Verifier
	Audit    func(protocol.AuditRecord) error
	Publish  func(subject string, data []byte) error // it may block for as long as the connection takes

	// Allow tells which address to dial for somebody of a role who asks for to, and the name of the rule that allows it.
	Allow func(to string, role protocol.Role) (dial, rule string, err error)
	// Upload takes files in from the other end of conn, until ctx ends; nil: this node takes none. It closes conn's writing side
	// itself when it has said all.
	Upload func(ctx context.Context, conn net.Conn, who protocol.Identity) error

	Idle func() // called when the last open tunnel ended; may be nil
}

// Server has the tunnels of a node. It is safe for concurrent use.
type Server struct {
	o       Options
	ctx     context.Context
	end     context.CancelFunc
	running sync.WaitGroup

	mu      sync.Mutex
	tunnels map[string]*open // by user and id
	ended   bool
}

// open is a tunnel that there is, or was a moment ago.
type open struct {
	*tunnel.Conn
	order *protocol.Verified
	to    string
	began time.Time
	late  bool // it ended, and only answers
}

// New makes a server; Run is its life.
func New(o Options) *Server {
	ctx, end := context.WithCancel(context.Background())
	return &Server{o: o, ctx: ctx, end: end, tunnels: map[string]*open{}}
}

// Run breaks off what is open when ctx ends, and returns when that is told.
func (s *Server) Run(ctx context.Context) error {
	<-ctx.Done()
	s.mu.Lock()
	s.ended = true
	for _, t := range s.tunnels {
		t.Reset("the agent of " + s.o.Node + " ends")
	}
	s.mu.Unlock()
	s.end()
	done := make(chan struct{})
	go func() {
		s.running.Wait()
		close(done)
	}()
	select {
	case <-done:
	case <-time.After(endTime):
	}
	return nil
}

// Route takes a message that came on protocol.NodeTunnels. What is of no tunnel is dropped.
func (s *Server) Route(m *nats.Msg) {
	user, id, ok := protocol.TunnelSender(m.Subject)
	if !ok {
		return
	}
	s.mu.Lock()
	t := s.tunnels[key(user, id)]
	s.mu.Unlock()
	if t != nil {
		t.Deliver(m.Data)
	}
}

func key(user, id string) string { return user + "." + id }

// Recheck breaks off the tunnels of who may not be here any more. It is called when an account JWT came, and when another
// system, with another policy, may run.
func (s *Server) Recheck(now time.Time) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, t := range s.tunnels {
		if t.late {
			continue
		}
		err := s.o.Verifier.Still(t.order.Sender, now)
		if err == nil && t.to != protocol.TunnelUpload { // which asks for itself, for each folder
			_, _, err = s.o.Allow(t.to, t.order.Sender.Role)
		}
		if err != nil {
			t.Reset(err.Error())
		}
	}
}

// Open carries out an OpenTunnel order: what is to be reached is reached, or the order refused.
func (s *Server) Open(ctx context.Context, r *protocol.Verified) (any, error) {
	order, err := protocol.Decode[protocol.TunnelOrder](r.Payload)
	if err != nil {
		return nil, protocol.Refuse(protocol.Malformed, "%v", err)
	}
	if order.Window != 0 && order.Window < tunnel.MinWindow {
		return nil, protocol.Refuse(protocol.Invalid, "a window of %d bytes; %d are the least", order.Window, tunnel.MinWindow)
	}
	if err := s.room(r.Sender.Name); err != nil { // again below, when it counts
		return nil, err
	}
	end, rule, err := s.reach(ctx, order.To, r.Sender)
	if err != nil {
		return nil, err
	}
	t, reply, err := s.begin(r, order, rule)
	if err != nil {
		end.give()
		return nil, err
	}
	go s.serve(t, end)
	return reply, nil
}

// reach opens what a tunnel leads to.
func (s *Server) reach(ctx context.Context, to string, who protocol.Identity) (end, string, error) {
	if to == protocol.TunnelUpload {
		if s.o.Upload == nil {
			return nil, "", protocol.Refuse(protocol.Unknown, "%s takes no files in; its agent is %s", s.o.Node, protocol.Build())
		}
		return &uploading{s, who}, "", nil
	}
	address, rule, err := s.o.Allow(to, who.Role)
	if err != nil {
		return nil, "", err
	}
	conn, err := (&net.Dialer{Timeout: dialTime}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, "", protocol.Refuse(protocol.Failed, "%s can't reach %s: %s", s.o.Node, to, strings.TrimPrefix(err.Error(), "dial tcp "))
	}
	return &dialled{conn.(*net.TCPConn), to}, rule, nil
}

// room tells whether another tunnel of a user fits in.
func (s *Server) room(user string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.roomLocked(user)
}

func (s *Server) roomLocked(user string) error {
	all, mine := s.count(user)
	switch {
	case s.ended:
		return protocol.Refuse(protocol.Failed, "the agent of %s ends", s.o.Node)
	case all >= atOnce:
		return protocol.Refuse(protocol.Failed, "busy: %s has %d tunnels; close some, or try again later", s.o.Node, all)
	case mine >= ofOneUser:
		return protocol.Refuse(protocol.Failed, "busy: %s has %d tunnels to %s; close some", user, mine, s.o.Node)
	}
	return nil
}

func (s *Server) count(user string) (all, mine int) {
	for _, t := range s.tunnels {
		if t.late {
			continue
		}
		all++
		if t.order.Sender.Name == user {
			mine++
		}
	}
	return all, mine
}

// begin agrees on keys and makes the node's end.
func (s *Server) begin(r *protocol.Verified, order protocol.TunnelOrder, rule string) (*open, *protocol.TunnelReply, error) {
	once, err := tunnel.NewKey()
	if err != nil {
		return nil, nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.roomLocked(r.Sender.Name); err != nil {
		return nil, nil, err
	}
	reply := &protocol.TunnelReply{Public: once.PublicKey().Bytes(), Window: tunnel.DefaultWindow, Rule: rule}
	if all, _ := s.count(""); all >= wide {
		reply.Window = narrowWindow
	}
	keys, err := tunnel.NodeKeys(once, s.o.XKey, tunnel.Agreed{User: r.Sender.Name, Node: s.o.Node, ID: r.ID, Order: order, Reply: *reply})
	if err != nil {
		return nil, nil, protocol.Refuse(protocol.Invalid, "%v", err)
	}
	subject := protocol.ReplySubject(r.Sender.Name, r.ID, s.o.Node)
	t := &open{order: r, to: order.To, began: time.Now(), Conn: tunnel.New(tunnel.Options{
		Keys: keys, Window: reply.Window, PeerWindow: order.Window, Local: s.o.Node, Remote: r.Sender.Name,
		Send: func(frame []byte) error { return s.o.Publish(subject, frame) }})}
	s.tunnels[key(r.Sender.Name, r.ID)] = t
	s.running.Add(1)
	return t, reply, nil
}
