package query

import (
	"context"
	"errors"
	"fmt"
	"runtime/debug"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// Streamer answers a proven request in parts, until ctx ends; send gives the answer's next part. It says nothing of a
// ctx that ended: whoever asked for the stream has ended it, or is gone.
//
// One of Options.Runs runs something for its sender, and is no mere question whatever role it needs: its id is remembered
// for good and its record written before it begins, or it does not. Its parts are protocol.Output. It may go on sending after
// ctx ended, because how what ran came to its end is what its sender waits for; that is on record, too.
type Streamer func(ctx context.Context, r *protocol.Verified, send func(part any) error) error

// errEnded is why a request that is still worked on ends when its sender wants that.
var errEnded = errors.New("its sender ended it")

// errLapsed is why a stream ends that nobody renewed.
var errLapsed = errors.New("nobody renewed it in time")

// underWay are the questions and runs that are being answered, by id: what can be ended and, if they stream, renewed.
type underWay struct {
	mu  sync.Mutex
	all map[string]*answering
}

type answering struct {
	sender string // public key
	end    context.CancelCauseFunc
	lapse  *time.Timer // nil: it does not stream
	life   time.Duration
}

// begin keeps a question for as long as it is answered.
func (u *underWay) begin(ctx context.Context, r *request, life time.Duration) (context.Context, func()) {
	ctx, end := context.WithCancelCause(ctx)
	a := &answering{sender: r.sender.Key, end: end, life: life}
	if r.streamer != nil {
		a.lapse = time.AfterFunc(life, func() { end(errLapsed) })
	}
	u.mu.Lock()
	defer u.mu.Unlock()
	u.all[r.ID] = a
	return ctx, func() {
		u.mu.Lock()
		defer u.mu.Unlock()
		delete(u.all, r.ID)
		if a.lapse != nil {
			a.lapse.Stop()
		}
		end(nil)
	}
}

// order carries out a StreamOrder. A request of somebody else is as unknown as one that there is not.
func (u *underWay) order(o protocol.StreamOrder, key string) error {
	u.mu.Lock()
	defer u.mu.Unlock()
	a := u.all[o.Request]
	switch {
	case a == nil || a.sender != key:
		return protocol.Refuse(protocol.Unknown, "nothing of yours is being answered as request %s", o.Request)
	case o.End:
		a.end(errEnded)
	case a.lapse == nil:
		return protocol.Refuse(protocol.Invalid, "request %s does not stream, so it can't be renewed", o.Request)
	case a.lapse.Stop():
		a.lapse.Reset(a.life)
	default:
		return protocol.Refuse(protocol.Unknown, "request %s ended, because %v", o.Request, errLapsed)
	}
	return nil
}

// steer answers a StreamOrder, at once. A stream is on record with its begin and its end; renewals, which say nothing
// new, are not.
func (s *Server) steer(r *request) {
	o, err := protocol.Decode[protocol.StreamOrder](r.payload)
	if err != nil {
		err = protocol.Refuse(protocol.Malformed, "%v", err)
	} else {
		err = s.underWay.order(o, r.sender.Key)
	}
	if err != nil || o.End {
		_ = s.record(r, err, true) // a failure is logged there, and what was done is done
	}
	s.answer(r, nil, err)
}

// stream runs a streamer; its answer's last part is empty, or says what went wrong.
func (s *Server) stream(ctx context.Context, r *request) {
	if err := s.record(r, nil, false); err != nil && !r.question() {
		s.answer(r, nil, protocol.Refuse(protocol.Failed, "can't record the request, so it is not run: %v", err))
		return
	}
	part := 0
	subject := protocol.ReplySubject(r.sender.Name, r.ID, s.o.Node)
	err := s.streams(ctx, r, func(body any) error {
		if err := ctx.Err(); err != nil && !r.runs {
			return err
		}
		if o, ok := body.(protocol.Output); ok && o.Ended != nil {
			r.ending = o.Ended
		}
		part++
		reply := protocol.Answer(s.o.Node, body, nil)
		reply.Part, reply.More = part, true
		s.received.Add(1)
		data := protocol.Encode(reply)
		if len(data) > protocol.MaxMessage {
			return fmt.Errorf("a part of the answer has %d bytes, more than a message can carry", len(data))
		}
		return s.o.Publish(subject, data)
	})
	switch cause := context.Cause(ctx); {
	case cause == errEnded:
		err = nil
	case cause != nil:
		err = protocol.Refuse(protocol.Failed, "the stream ended, because %v", cause)
	}
	_ = s.record(r, err, true)
	r.over()
	reply := protocol.Answer(s.o.Node, nil, err)
	reply.Part = part + 1
	if err := s.o.Publish(subject, protocol.Encode(reply)); err != nil {
		s.o.Log.Warn("the end of a stream could not be sent", "subject", subject, "error", err)
	}
}

// streams keeps a streamer's panic from ending the agent.
func (s *Server) streams(ctx context.Context, r *request, send func(any) error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			s.o.Log.Error("a streamer panicked", "action", r.Action, "panic", p, "stack", string(debug.Stack()))
			err = protocol.Refuse(protocol.Failed, "the agent has a fault in %s: %v", r.Action, p)
		}
	}()
	return r.streamer(ctx, r.verified(), send)
}
