package query

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

var sleepOrder = protocol.CommandOrder{Argv: []string{"sleep", "a b"}}

// recordsOf are the records of a request.
func (s *served) recordsOf(id string) (found []protocol.AuditRecord) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, r := range s.records {
		if r.Request == id {
			found = append(found, r)
		}
	}
	return found
}

// untilEnded is a run that goes on until it is ended, and then says how it ended.
func untilEnded(ctx context.Context, send func(any) error) error {
	if err := send(protocol.Output{}); err != nil {
		return err
	}
	<-ctx.Done()
	return send(protocol.Output{Stdout: []byte("bye"), Ended: &protocol.Ending{Exit: -1, Result: protocol.ResultEnded, Reason: context.Cause(ctx).Error()}})
}

// TestRunIsRecorded: what is run is on record before it begins, with what it is, and afterwards with how it ended.
func TestRunIsRecorded(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Viewer)
	for _, c := range []struct {
		ending          *protocol.Ending
		err             error
		outcome, reason string
	}{
		{&protocol.Ending{Result: protocol.ResultSuccess}, nil, "ok", ""},
		{&protocol.Ending{Exit: 3, Result: protocol.ResultExit, Reason: "exit status 3"}, nil, "ok", "exit status 3"},
		{&protocol.Ending{Exit: -1, Result: protocol.ResultTimeout, Reason: "too long"}, nil, "failed", "too long"},
		{&protocol.Ending{Exit: -1, Result: protocol.ResultMemory, Reason: "too much"}, nil, "failed", "too much"},
		{nil, protocol.Refuse(protocol.Denied, "no rule"), "denied", "no rule"},
	} {
		var before []protocol.AuditRecord
		s.runs <- func(_ context.Context, send func(any) error) error {
			s.mu.Lock()
			before = slices.Clone(s.records)
			s.mu.Unlock()
			if c.err != nil {
				return c.err
			}
			return send(protocol.Output{Ended: c.ending})
		}
		id := ann.ask(protocol.RunCommand, sleepOrder)
		for r := ann.next(id); r.More; r = ann.next(id) {
		}
		records := s.recordsOf(id)
		if len(records) != 2 || records[0] != before[len(before)-1] || records[0].Outcome != "" || records[0].User != "ann" || records[1].Outcome != c.outcome || records[1].Reason != c.reason {
			t.Errorf("%+v: %+v", c, records)
		}
		for _, r := range records {
			if r.Detail != `sleep "a b"` {
				t.Errorf("detail %q", r.Detail)
			}
		}
	}

	// Also what a node refuses is on record with what it was, as long as its sender is proven.
	signed, id, err := ann.signer.Request(protocol.RunScript, node, protocol.ScriptOrder{Module: "app", SHA256: protocol.Digest(nil), Words: []string{"init"}}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	// By the subject of what a viewer may ask: the broker would refuse the other one.
	if err := ann.nc.PublishRequest(protocol.RequestSubject(node, protocol.Ping), protocol.ReplySubject("ann", id, node), protocol.Encode(signed)); err != nil {
		t.Fatal(err)
	}
	if r := ann.next(id); r.Refused == nil || r.Refused.Code != protocol.OverRole {
		t.Fatalf("%+v", r)
	}
	if records := s.recordsOf(id); len(records) != 1 || records[0].Detail != "app: init" || records[0].Outcome != string(protocol.OverRole) {
		t.Errorf("%+v", records)
	}
}

// TestRunNeedsItsRecord: what can't be put on record, or be remembered, is not run, although a viewer may ask for it.
func TestRunNeedsItsRecord(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Viewer)
	s.mu.Lock()
	s.full = errors.New("the disk is full")
	s.mu.Unlock()
	if r := ann.next(ann.ask(protocol.RunCommand, sleepOrder)); r.Refused == nil || r.More || !strings.Contains(r.Refused.Reason, "can't record the request, so it is not run: the disk is full") {
		t.Errorf("%+v", r)
	}
	s.mu.Lock()
	s.full = nil
	s.mu.Unlock()
	s.seen.Close()
	if err := os.RemoveAll(filepath.Dir(s.path)); err != nil { // nothing can be written any more
		t.Fatal(err)
	}
	if r := ann.next(ann.ask(protocol.RunCommand, sleepOrder)); r.Refused == nil || !strings.Contains(r.Refused.Reason, "remember the request's id") {
		t.Errorf("%+v", r)
	}
	if ran, _ := s.effects(); len(ran) > 0 {
		t.Errorf("ran: %v", ran)
	}
}

// TestRunIsEnded: only its sender ends it, and gets to know how it ended; so is one that nobody renews.
func TestRunIsEnded(t *testing.T) {
	s := serve(t)
	ann, eve := s.asker("ann", protocol.Viewer), s.asker("eve", protocol.Admin)
	last := func(id, reason string) protocol.Reply {
		t.Helper()
		r := ann.next(id)
		o, err := protocol.Decode[protocol.Output](r.Body)
		if err != nil || !r.More || string(o.Stdout) != "bye" || o.Ended == nil || o.Ended.Reason != reason {
			t.Errorf("%v %+v", err, r)
		}
		return ann.next(id)
	}
	s.runs <- untilEnded
	id := ann.ask(protocol.RunCommand, sleepOrder)
	ann.next(id)
	if code := eve.order(id, true); code != protocol.Unknown {
		t.Errorf("a stranger's order: %q", code)
	}
	if code := ann.order(id, true); code != "" {
		t.Fatal(code)
	}
	if r := last(id, errEnded.Error()); r.More || r.Refused != nil {
		t.Errorf("%+v", r)
	}
	if records := s.recordsOf(id); len(records) != 2 || records[1].Outcome != "ok" || records[1].Reason != errEnded.Error() {
		t.Errorf("%+v", records)
	}
	s.stop()
	s.life = time.Second
	s.start()
	s.runs <- untilEnded
	id = ann.ask(protocol.RunCommand, sleepOrder)
	ann.next(id)
	if r := last(id, errLapsed.Error()); r.More || r.Refused == nil || !strings.Contains(r.Refused.Reason, errLapsed.Error()) {
		t.Errorf("%+v", r)
	}
	if records := s.recordsOf(id); len(records) != 2 || records[1].Outcome != "failed" {
		t.Errorf("%+v", records)
	}
}

// TestRunIsEndedAtOnce: an order to end it that comes right behind it finds it, however far it is.
func TestRunIsEndedAtOnce(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Viewer)
	for range 20 {
		s.runs <- untilEnded
		id := ann.ask(protocol.RunCommand, sleepOrder)
		if code := ann.order(id, true); code != "" {
			t.Fatalf("refused: %s", code)
		}
		for r := ann.next(id); r.More; r = ann.next(id) {
		}
	}
}

// TestRunsHaveRoom: of each action so many at a time, and none keeps the others, streams or questions from theirs.
func TestRunsHaveRoom(t *testing.T) {
	s := serve(t)
	ann := s.asker("ann", protocol.Operator)
	var ids []string
	for range 2 {
		s.runs <- untilEnded
		ids = append(ids, ann.ask(protocol.RunCommand, sleepOrder))
		ann.next(ids[len(ids)-1])
	}
	if r := ann.next(ann.ask(protocol.RunCommand, sleepOrder)); r.Refused == nil || r.Refused.Reason != "busy: 2 requests of exec are running on web-1; ask again later" {
		t.Errorf("%+v", r)
	}
	s.runs <- untilEnded
	script := ann.ask(protocol.RunScript, protocol.ScriptOrder{Module: "app", SHA256: protocol.Digest(nil)})
	if r := ann.next(script); r.Refused != nil {
		t.Errorf("%+v", r)
	}
	follow := ann.ask(protocol.FollowJournal, nil)
	ann.want(follow, 1, true, `"begun"`)
	if r := ann.next(ann.ask(protocol.Ping, nil)); r.Refused != nil {
		t.Errorf("%+v", r)
	}
	for _, id := range append(ids, script, follow) {
		if code := ann.order(id, true); code != "" {
			t.Errorf("%s", code)
		}
	}
}
