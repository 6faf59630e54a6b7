package query

import (
	"context"
	"errors"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// streamer sends what comes on feed, until ctx ends, and says on done why it did.
type streamer struct {
	feed chan any
	done chan error
}

func newStreamer() *streamer { return &streamer{make(chan any), make(chan error, 8)} }

func (f *streamer) run(ctx context.Context, _ *protocol.Verified, send func(any) error) (err error) {
	defer func() { f.done <- err }()
	if err := send("begun"); err != nil {
		return err
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case part, more := <-f.feed:
			if !more {
				return nil
			}
			if part == "panic" {
				panic("a fault")
			}
			if err := send(part); err != nil {
				return err
			}
		}
	}
}

// ask sends a request and gives its id; answers are next's.
func (a *asker) ask(action protocol.Action, payload any) string {
	a.t.Helper()
	signed, id, err := a.signer.Request(action, node, payload, time.Now())
	if err != nil {
		a.t.Fatal(err)
	}
	if err := a.nc.PublishRequest(protocol.RequestSubject(node, action), protocol.ReplySubject(a.name, id, node), protocol.Encode(signed)); err != nil {
		a.t.Fatal(err)
	}
	return id
}

// next is the next answer that comes to a request.
func (a *asker) next(id string) protocol.Reply {
	a.t.Helper()
	subject := protocol.ReplySubject(a.name, id, node)
	for len(a.kept[subject]) == 0 {
		select {
		case m := <-a.replies:
			r, err := protocol.Decode[protocol.Reply](m.Data)
			if err != nil {
				a.t.Fatal(err)
			}
			a.kept[m.Subject] = append(a.kept[m.Subject], r)
		case <-time.After(30 * time.Second):
			a.t.Fatal("no answer")
		}
	}
	first := a.kept[subject][0]
	a.kept[subject] = a.kept[subject][1:]
	return first
}

// order has a request of anybody go on or end, and gives why that is refused, "" if it isn't.
func (a *asker) order(request string, end bool) protocol.Code {
	a.t.Helper()
	r := a.next(a.ask(protocol.Stream, protocol.StreamOrder{Request: request, End: end}))
	if r.Refused != nil {
		return r.Refused.Code
	}
	return ""
}

func (a *asker) want(id string, part int, more bool, body string) {
	a.t.Helper()
	if r := a.next(id); r.Refused != nil || r.Part != part || r.More != more || string(r.Body) != body {
		a.t.Fatalf("%+v, want part %d with %s", r, part, body)
	}
}

func TestStreamIsEndedByItsOwner(t *testing.T) {
	s := serve(t)
	ann, eve := s.asker("ann", protocol.Viewer), s.asker("eve", protocol.Admin)
	other := s.asker("ann", protocol.Viewer) // another key of the same name
	id := ann.ask(protocol.FollowJournal, nil)
	ann.want(id, 1, true, `"begun"`)
	s.streams.feed <- "one"
	ann.want(id, 2, true, `"one"`)
	for _, stranger := range []*asker{eve, other} {
		for _, end := range []bool{false, true} {
			if code := stranger.order(id, end); code != protocol.Unknown {
				t.Errorf("a stranger's order is answered with %q", code)
			}
		}
	}
	if code := ann.order("another", true); code != protocol.Unknown {
		t.Errorf("an order about nothing is answered with %q", code)
	}
	if r := ann.next(ann.ask(protocol.Stream, "no order")); r.Refused == nil || r.Refused.Code != protocol.Malformed {
		t.Errorf("%+v", r)
	}
	s.effects()
	renewed := ann.ask(protocol.Stream, protocol.StreamOrder{Request: id})
	if r := ann.next(renewed); r.Refused != nil {
		t.Fatalf("renewed: %+v", r)
	}
	ended := ann.ask(protocol.Stream, protocol.StreamOrder{Request: id, End: true})
	ann.want(id, 3, false, "")
	if err := <-s.streams.done; !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
	if code := ann.order(id, true); code != protocol.Unknown {
		t.Errorf("a stream that ended is known: %q", code)
	}
	var ok []string
	_, records := s.effects()
	for _, r := range records {
		if r.Request == renewed {
			t.Errorf("a renewal is on record: %+v", r)
		}
		if r.Outcome == "ok" {
			ok = append(ok, r.Request)
		}
	}
	if !strings.Contains(strings.Join(ok, " "), id) || !strings.Contains(strings.Join(ok, " "), ended) {
		t.Errorf("records %+v", records)
	}
}

// A stream goes on for as long as each renewal comes in time, and no longer.
func TestStreamIsRenewed(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const life = time.Minute
		u := underWay{all: map[string]*answering{}}
		r := &request{Header: protocol.Header{ID: "one"}, sender: protocol.Identity{Key: "ann"}, streamer: newStreamer().run}
		ctx, over := u.begin(t.Context(), r, life)
		defer over()
		order := protocol.StreamOrder{Request: "one"}
		for range 10 {
			time.Sleep(life - time.Second)
			if err := u.order(order, "ann"); err != nil {
				t.Fatal(err)
			}
		}
		last := time.Now()
		<-ctx.Done()
		if took := time.Since(last); took != life || context.Cause(ctx) != errLapsed {
			t.Errorf("it ended %v after it was renewed: %v", took, context.Cause(ctx))
		}
		if err := u.order(order, "ann"); !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) || !strings.Contains(err.Error(), errLapsed.Error()) {
			t.Errorf("renewed too late: %v", err)
		}
	})
}

func TestStreamLapses(t *testing.T) {
	s := serve(t)
	s.stop()
	s.life = time.Second
	s.start()
	ann := s.asker("ann", protocol.Viewer)
	id := ann.ask(protocol.FollowJournal, nil)
	r := ann.next(id)
	for r.More {
		r = ann.next(id)
	}
	if r.Refused == nil || !strings.Contains(r.Refused.Reason, errLapsed.Error()) {
		t.Errorf("%+v", r)
	}
	if err := <-s.streams.done; !errors.Is(err, context.Canceled) {
		t.Errorf("it ended with %v", err)
	}
}

func TestStreamEndings(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Viewer)
	id := ann.ask(protocol.FollowJournal, nil)
	ann.want(id, 1, true, `"begun"`)
	s.streams.feed <- "panic"
	if r := ann.next(id); r.More || r.Part != 2 || r.Refused == nil || !strings.Contains(r.Refused.Reason, "a fault") {
		t.Errorf("after a fault: %+v", r)
	}
	id = ann.ask(protocol.FollowJournal, nil)
	ann.want(id, 1, true, `"begun"`)
	s.streams.feed <- strings.Repeat("x", protocol.MaxMessage)
	if r := ann.next(id); r.More || r.Refused == nil || !strings.Contains(r.Refused.Reason, "more than a message can carry") {
		t.Errorf("after a part that is too large: %+v", r)
	}

	// More than there may be are refused, and one that ends makes room.
	ids := []string{ann.ask(protocol.FollowJournal, nil), ann.ask(protocol.FollowJournal, nil)}
	for _, id := range ids {
		ann.want(id, 1, true, `"begun"`)
	}
	if r := ann.next(ann.ask(protocol.FollowJournal, nil)); r.Refused == nil || !strings.Contains(r.Refused.Reason, "busy") {
		t.Errorf("a third one: %+v", r)
	}
	if r := ann.next(ann.ask(protocol.Ping, nil)); r.Refused != nil {
		t.Errorf("streams keep questions from being answered: %+v", r)
	}
	if code := ann.order(ids[0], true); code != "" {
		t.Fatal(code)
	}
	ann.want(ids[0], 2, false, "")
	deadline := time.Now().Add(30 * time.Second)
	for {
		if r := ann.next(ann.ask(protocol.FollowJournal, nil)); r.Refused == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("no room was made: %+v", r)
		}
	}

	// The agent's end is the end of its streams, and is waited for.
	s.stop()
	if r := ann.next(ids[1]); r.More || r.Refused == nil {
		t.Errorf("after the agent's end: %+v", r)
	}
}

// TestQuestionIsEnded: a question that takes long can be ended like a stream; an order that changes something can't.
func TestQuestionIsEnded(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Deployer)
	id := ann.ask(protocol.ReadJournal, nil) // it waits for the end of its context
	deadline := time.Now().Add(30 * time.Second)
	for ann.order(id, false) != protocol.Invalid { // it is not under way yet; then, it is no stream
		if time.Now().After(deadline) {
			t.Fatal("the question does not begin")
		}
	}
	if code := ann.order(id, true); code != "" {
		t.Fatal(code)
	}
	deadline = time.Now().Add(30 * time.Second)
	for ann.order(id, true) != protocol.Unknown {
		if time.Now().After(deadline) {
			t.Fatal("the question does not end")
		}
	}
	s.block = make(chan struct{})
	defer close(s.block)
	id = ann.ask(protocol.Release, nil)
	for len(s.running()) == 0 {
		time.Sleep(time.Millisecond)
	}
	if code := ann.order(id, true); code != protocol.Unknown {
		t.Errorf("an order that runs can be ended: %q", code)
	}
}

// TestUnencodableAnswer: an answer that no message can carry is a fault of its handler, and not the agent's end.
func TestUnencodableAnswer(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Viewer)
	for range 2 {
		if r := ann.next(ann.ask(protocol.ReadStats, nil)); r.Refused == nil || !strings.Contains(r.Refused.Reason, "a fault in stats") {
			t.Errorf("%+v", r)
		}
	}
}
