package tunnel

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// end is what a tunnel leads to.
type end interface {
	// carry has bytes go both ways until there are no more, and returns why that was too early.
	carry(ctx context.Context, t *open) error
	// give gives up what was opened and is not needed.
	give()
}

// serve is a tunnel's life.
func (s *Server) serve(t *open, e end) {
	defer s.running.Done()
	who := t.order.Sender
	if at := who.Ends(); !at.IsZero() {
		// A second later than that, since it is valid up to the end of that second.
		expiry := time.AfterFunc(time.Until(at)+time.Second, func() { s.Recheck(time.Now()) })
		defer expiry.Stop()
	}
	if err := s.still(t); err != nil {
		t.Reset(err.Error()) // it came between the order and here
	}
	err := s.heard(t)
	if err == nil {
		err = e.carry(s.ctx, t)
	} else {
		e.give()
	}
	if err != nil {
		t.Reset(err.Error())
	}
	_ = t.Close()
	<-t.Done()
	if broke := t.Err(); broke != nil && (err == nil || errors.Is(err, context.Canceled)) {
		err = broke // which is why it was cancelled
	}
	s.record(t, err)
	s.mu.Lock()
	t.late = true
	left, _ := s.count("")
	s.mu.Unlock()
	if left == 0 && s.o.Idle != nil {
		s.o.Idle()
	}
	time.AfterFunc(lateTime, func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		delete(s.tunnels, key(who.Name, t.order.ID))
	})
}

// still tells whether a tunnel's user may still be here.
func (s *Server) still(t *open) error { return s.o.Verifier.Still(t.order.Sender, time.Now()) }

// heard waits for the user's end: nothing is said to what is reached before somebody has shown to have the keys.
func (s *Server) heard(t *open) error {
	limit := time.NewTimer(heardTime)
	defer limit.Stop()
	select {
	case <-t.Heard():
		return nil
	case <-t.Done():
		return t.Err()
	case <-limit.C:
		return errors.New("nobody used it")
	}
}

// record keeps how a tunnel ended, beside how it began, under the same request.
func (s *Server) record(t *open, err error) {
	sent, received, _ := t.Counts()
	who := t.order.Sender
	r := protocol.AuditRecord{User: who.Name, Role: who.Role, Request: t.order.ID, Action: protocol.OpenTunnel, Target: t.order.Target,
		Payload: t.order.Header.Payload, Detail: t.to, Outcome: "ok",
		Reason: fmt.Sprintf("ended after %s: %d bytes to it, %d from it", time.Since(t.began).Round(time.Millisecond), received, sent)}
	var user *tunnel.ResetError
	if err != nil {
		r.Reason += ": " + err.Error()
	}
	if err != nil && !errors.As(err, &user) { // what the user breaks off has not failed
		r.Outcome = string(protocol.Failed)
	}
	if err := s.o.Audit(r); err != nil {
		s.o.Log.Warn("the end of a tunnel is not on record", "request", t.order.ID, "error", err)
	}
}

// dialled is a TCP connection of the node's.
type dialled struct {
	*net.TCPConn
	to string
}

func (d *dialled) give() { d.Close() }

func (d *dialled) carry(_ context.Context, t *open) error {
	return tunnel.Join(t.Conn, d.TCPConn, d.to)
}

// uploading is the agent itself, which takes files in.
type uploading struct {
	s   *Server
	who protocol.Identity
}

func (*uploading) give() {}

func (u *uploading) carry(ctx context.Context, t *open) error {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case <-t.Done():
			cancel(t.Err())
		case <-ctx.Done():
		}
	}()
	if err := u.s.o.Upload(ctx, t.Conn, u.who); err != nil {
		return err
	}
	return t.CloseWrite()
}
