// Package upload takes files in: into folders that the node's policy names, each file whole or not at all.
//
// Start with Server.Serve, which is one upload; package transfer has what is said there. receive.go takes one file in,
// folder.go opens folders in a way that nothing outside of a root is ever touched.
//
// A file is put together in the root's staging folder, under the name of its content and of who sends it, found to have
// the announced SHA-256, and only then moved to its place, in place of what was there. What an upload that broke off has
// left in the staging folder is where the next one goes on; it counts for nothing before the whole content is proven.
package upload

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/transfer"
)

// silence is for how long an upload may say nothing where a message is due.
const silence = 10 * time.Minute

// errOvertaken ends an upload whose file another one of the same user writes.
var errOvertaken = errors.New("another upload of the same file has begun, and goes on with it")

// Options are a server's surroundings.
type Options struct {
	Log   *slog.Logger
	Audit func(protocol.AuditRecord) error
	Node  string
	// Root tells which folder that takes uploads a path is in, for somebody of a role. Its errors are *protocol.Refusal.
	Root func(to string, role protocol.Role) (string, error)
}

// Server takes uploads, several at a time. It is safe for concurrent use.
type Server struct {
	o Options

	mu      sync.Mutex
	writing map[string]*session // by root and name in its staging folder
}

// New makes a server.
func New(o Options) *Server { return &Server{o: o, writing: map[string]*session{}} }

// session is one upload.
type session struct {
	s    *Server
	conn net.Conn
	who  protocol.Identity
	end  context.CancelCauseFunc
	done chan struct{}

	to      string
	root    *os.File
	staging *os.File
	below   string // the folder, from the root on: "" is the root itself

	written, same int // files
	bytes         int64
	names         []string // of what was written, the first ones
}

// Serve takes files in from the other end of conn until that has no more, or ctx ends. The connection stays open.
func (s *Server) Serve(ctx context.Context, conn net.Conn, who protocol.Identity) error {
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	u := &session{s: s, conn: conn, who: who, end: end, done: make(chan struct{})}
	defer close(u.done)
	defer s.release(u)
	err := u.serve(ctx)
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	u.record(err)
	var refusal *protocol.Refusal
	if errors.As(err, &refusal) {
		return nil // the user was told
	}
	return err
}

func (u *session) serve(ctx context.Context) error {
	if err := u.begin(); err != nil {
		refusal := asRefusal(err)
		if err := transfer.Write(u.conn, transfer.Welcome{Refused: refusal}); err != nil {
			return err
		}
		return refusal
	}
	defer u.root.Close()
	defer u.staging.Close()
	if err := transfer.Write(u.conn, transfer.Welcome{}); err != nil {
		return err
	}
	for {
		_ = u.conn.SetReadDeadline(time.Now().Add(silence)) // where it fails, reading does
		if ctx.Err() != nil {
			return ctx.Err() // its end has set a deadline of its own
		}
		offer, err := transfer.Read[transfer.Offer](u.conn)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := u.take(ctx, offer.Files); err != nil {
			return err
		}
	}
}

// begin opens the root.
func (u *session) begin() error {
	hello, err := transfer.Read[transfer.Hello](u.conn)
	if errors.Is(err, transfer.ErrMalformed) {
		return protocol.Refuse(protocol.Malformed, "%v", err)
	} else if err != nil {
		return err
	}
	u.to = hello.To
	root, err := u.s.o.Root(hello.To, u.who.Role)
	if err != nil {
		return err
	}
	u.below = strings.TrimPrefix(strings.TrimPrefix(hello.To, root), "/")
	if u.root, err = openRoot(root); err != nil {
		return err
	}
	if u.staging, err = u.openStaging(); err != nil {
		u.root.Close()
		return err
	}
	return nil
}

// take takes some files in.
func (u *session) take(ctx context.Context, files []transfer.File) error {
	defer u.s.release(u)
	plan, wanted, err := u.plan(ctx, files)
	if err != nil {
		return err
	}
	if err := transfer.Write(u.conn, plan); err != nil {
		return err
	}
	for _, w := range wanted {
		r, err := u.receive(ctx, w)
		var refusal *protocol.Refusal
		switch {
		case errors.As(err, &refusal):
			r.Refused = refusal
		case err != nil:
			return err
		}
		if err := transfer.Write(u.conn, r); err != nil {
			return err
		}
		if refusal != nil {
			return refusal
		}
	}
	return nil
}

// hold has the session be the one that writes a file in the staging folder. Another one of the same user, which may be
// one whose end has not been noticed yet, gives way.
func (u *session) hold(ctx context.Context, name string) error {
	key := u.root.Name() + "/" + name
	for {
		u.s.mu.Lock()
		other := u.s.writing[key]
		if other == nil || other == u {
			u.s.writing[key] = u
			u.s.mu.Unlock()
			return nil
		}
		u.s.mu.Unlock()
		other.end(errOvertaken)
		select {
		case <-other.done:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// held tells whether a file in the staging folder of a root is being written.
func (s *Server) held(root, name string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.writing[root+"/"+name] != nil
}

func (s *Server) release(u *session) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for key, holder := range s.writing {
		if holder == u {
			delete(s.writing, key)
		}
	}
}

// maxNames is how many of the files that were written are named on the record.
const maxNames = 16

// record keeps what came of it, beside the record of the tunnel.
func (u *session) record(err error) {
	r := protocol.AuditRecord{User: u.who.Name, Role: u.who.Role, Action: protocol.OpenTunnel, Target: u.s.o.Node, Detail: "upload to " + u.to, Outcome: "ok",
		Reason: fmt.Sprintf("%d files of %d bytes were written, %d were unchanged: %s", u.written, u.bytes, u.same, strings.Join(u.names, ", "))}
	if u.written > len(u.names) {
		r.Reason += ", …"
	}
	if err != nil {
		r.Outcome = string(asRefusal(err).Code)
		r.Reason = err.Error() + "; " + r.Reason
	}
	if err := u.s.o.Audit(r); err != nil {
		u.s.o.Log.Warn("an upload is not on record", "user", u.who.Name, "to", u.to, "error", err)
	}
}

func asRefusal(err error) *protocol.Refusal {
	var r *protocol.Refusal
	if errors.As(err, &r) {
		return r
	}
	return protocol.Refuse(protocol.Failed, "%v", err)
}
