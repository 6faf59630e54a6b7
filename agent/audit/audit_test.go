package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"
	"unicode"

	"github.com/nix-infra/nix-infra/protocol"
)

// stream is the far end: it can be out of reach.
type stream struct {
	mu   sync.Mutex
	down bool
	got  []protocol.AuditRecord
	raw  [][]byte
	news chan struct{}

	messages int
	refused  chan struct{} // that it was down when it was asked; nil: nobody wants to know
}

func (s *stream) take(_ context.Context, records [][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		select {
		case s.refused <- struct{}{}:
		default:
		}
		return errors.New("out of reach")
	}
	if n := len(protocol.JoinRecords(records)); n > protocol.MaxAuditBytes || len(records) > protocol.MaxAuditRecords {
		return fmt.Errorf("a message with %d records and %d bytes", len(records), n)
	}
	s.messages++
	for _, data := range records {
		r, err := protocol.Decode[protocol.AuditRecord](data)
		if err != nil {
			return err
		}
		s.got, s.raw = append(s.got, r), append(s.raw, data)
	}
	select {
	case s.news <- struct{}{}:
	default:
	}
	return nil
}

// wait is for the record with a number, hence all before it that will come.
func (s *stream) wait(t *testing.T, seq uint64) {
	t.Helper()
	for deadline := time.After(30 * time.Second); ; {
		s.mu.Lock()
		last := uint64(0)
		if len(s.got) > 0 {
			last = s.got[len(s.got)-1].Seq
		}
		s.mu.Unlock()
		if last >= seq {
			return
		}
		select {
		case <-s.news:
		case <-deadline:
			t.Fatalf("the newest record that arrived is %d, not %d", last, seq)
		}
	}
}

// checkChain fails unless the records are one unbroken chain from seq 1.
func checkChain(t *testing.T, raw [][]byte) {
	t.Helper()
	prev := ""
	for i, data := range raw {
		r, err := protocol.Decode[protocol.AuditRecord](data)
		if err != nil {
			t.Fatal(err)
		}
		if r.Seq != uint64(i+1) || r.Prev != prev {
			t.Fatalf("record %d has seq %d and continues %.8q, not %.8q", i+1, r.Seq, r.Prev, prev)
		}
		prev = protocol.Digest(data)
	}
}

func quiet() *slog.Logger { return slog.New(slog.NewTextHandler(io.Discard, nil)) }

func open(t *testing.T, dir string, s *stream, max int64) *Log {
	t.Helper()
	l, err := Open(Options{Dir: dir, Node: "web-1", Log: quiet(), Stream: s.take, Delay: time.Millisecond, MaxFile: max})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func running(t *testing.T, l *Log) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = l.Run(ctx) }()
	return func() {
		cancel()
		<-done
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	}
}

func record(t *testing.T, l *Log, a protocol.Action, n int) {
	t.Helper()
	for i := range n {
		if err := l.Record(protocol.AuditRecord{User: "ann", Role: protocol.Deployer, Action: a, Request: fmt.Sprint(i), Outcome: "ok"}); err != nil {
			t.Fatal(err)
		}
	}
}

func TestChainGoesOnAcrossRestarts(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1)}
	for run := range uint64(3) {
		l := open(t, dir, s, 0)
		stop := running(t, l)
		record(t, l, protocol.Ping, 3)
		record(t, l, protocol.Release, 2)
		s.wait(t, 5*run+5)
		stop()
	}
	checkChain(t, s.raw)
	if len(s.raw) != 15 {
		t.Fatalf("%d records arrived, 15 were made", len(s.raw))
	}
	if r := s.got[0]; r.At != "web-1" || r.Version != protocol.Version || r.Time.IsZero() || r.User != "ann" {
		t.Fatalf("record %+v", r)
	}
}

func TestKeptWhileOutOfReach(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1), down: true}
	l := open(t, dir, s, 0)
	stop := running(t, l)
	record(t, l, protocol.Ping, 700) // more than go into a message
	stop()
	s.down = false
	l = open(t, dir, s, 0)
	stop = running(t, l)
	s.wait(t, 700)
	stop()
	checkChain(t, s.raw)
	if s.messages > 30 {
		t.Errorf("700 records in %d messages", s.messages)
	}
}

// A controller that is back gets at once what waits for it, however long it was away.
func TestConnectedEndsTheWait(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1), down: true, refused: make(chan struct{}, 1)}
	l := open(t, dir, s, 0)
	l.retry = time.Hour
	stop := running(t, l)
	record(t, l, protocol.Release, 1)
	<-s.refused
	s.mu.Lock()
	s.down = false
	s.mu.Unlock()
	l.Connected()
	s.wait(t, 1)
	stop()
}

// A message that may have arrived is sent again as it was, whatever was recorded since, so that the stream can drop it.
func TestTriedAgainAsItWas(t *testing.T) {
	dir := t.TempDir()
	l := open(t, dir, &stream{}, 0)
	next := func(tried int64) batch {
		t.Helper()
		b, err := l.unsent(tried)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	record(t, l, protocol.Ping, 3)
	first := next(0)
	record(t, l, protocol.Release, 2)
	again := next(first.end)
	if len(first.records) != 3 || !bytes.Equal(protocol.JoinRecords(first.records), protocol.JoinRecords(again.records)) || !again.more {
		t.Fatalf("%d records, then %d, and more: %v", len(first.records), len(again.records), again.more)
	}
	l.sent(again)
	rest := next(first.end)
	if len(rest.records) != 2 || rest.last != 5 || rest.more {
		t.Fatalf("the rest is %d records up to %d, and more: %v", len(rest.records), rest.last, rest.more)
	}
	l.sent(rest)
	if b := next(rest.end); len(b.records) != 0 || b.more {
		t.Fatalf("%d records after all", len(b.records))
	}
}

// What the stream has is not sent again by the agent that comes after one that was killed.
func TestKilledAgentSendsNothingTwice(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1)}
	for run := range uint64(3) {
		l := open(t, dir, s, 0)
		ctx, kill := context.WithCancel(t.Context())
		done := make(chan error, 1)
		go func() { done <- l.Run(ctx) }()
		record(t, l, protocol.Ping, 2)
		record(t, l, protocol.Release, 1)
		s.wait(t, 3*run+3)
		kill()
		<-done // and no Close
	}
	checkChain(t, s.raw)
	if len(s.raw) != 9 {
		t.Fatalf("%d records arrived, 9 were made", len(s.raw))
	}
}

// What somebody put into the file is shown to be no record, and holds nothing up.
func TestForeignLinesDontBlock(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1)}
	l := open(t, dir, s, 0)
	record(t, l, protocol.Ping, 1)
	for _, line := range []string{strings.Repeat("x", 2*protocol.MaxAuditBytes), "", `{"v":1,"seq":9999999,"prev"`} {
		n, err := l.chain.file.WriteAt([]byte(line+"\n"), l.chain.end)
		if err != nil {
			t.Fatal(err)
		}
		l.chain.end += int64(n)
	}
	record(t, l, protocol.Ping, 1)
	b, err := l.unsent(0)
	if err != nil || len(b.records) != 4 || b.more {
		t.Fatalf("%d lines to send, more: %v, %v", len(b.records), b.more, err)
	}
	l.sent(b)
	if l.chain.sent != 2 {
		t.Fatalf("record %d is said to be sent, of 2", l.chain.sent)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	if again, err := open(t, dir, s, 0).unsent(0); err != nil || len(again.records) != 0 {
		t.Fatalf("%d lines are sent again, %v", len(again.records), err)
	}
}

func TestSpoolIsBoundedAndGapIsVisible(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1), down: true}
	const max = 4 << 10
	l := open(t, dir, s, max)
	record(t, l, protocol.Ping, 500)
	for _, name := range []string{currentFile, olderFile} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.Size() > max+maxRecord {
			t.Fatalf("%s: %v, %v", name, info, err)
		}
	}
	s.down = false
	stop := running(t, l)
	record(t, l, protocol.Release, 1)
	s.wait(t, 501)
	stop()
	if s.got[0].Seq == 1 {
		t.Fatal("nothing was dropped, so the test tests nothing")
	}
	for i := 1; i < len(s.got); i++ {
		if s.got[i].Seq != s.got[i-1].Seq+1 || s.got[i].Prev != protocol.Digest(s.raw[i-1]) {
			t.Fatalf("after %d comes %d", s.got[i-1].Seq, s.got[i].Seq)
		}
	}
}

func TestTornLastRecord(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1)}
	l := open(t, dir, s, 0)
	record(t, l, protocol.Release, 2)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, currentFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	second := bytes.IndexByte(whole, '\n') + 1
	for _, cut := range []int{second + 1, len(whole) - 1} {
		if err := os.WriteFile(path, whole[:cut], 0o600); err != nil {
			t.Fatal(err)
		}
		l := open(t, dir, s, 0)
		if l.chain.repaired == "" || l.chain.seq != 1 {
			t.Fatalf("cut at %d: seq %d, repaired %q", cut, l.chain.seq, l.chain.repaired)
		}
		record(t, l, protocol.Release, 1)
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		checkChain(t, bytes.Split(bytes.TrimSuffix(data, []byte("\n")), []byte("\n")))
	}
}

func TestChangedRecordIsNoticed(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1)}
	l := open(t, dir, s, 0)
	record(t, l, protocol.Release, 3)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, currentFile)
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, bytes.Replace(data, []byte("ann"), []byte("bob"), 1), 0o600); err != nil {
		t.Fatal(err)
	}
	if l := open(t, dir, s, 0); !strings.Contains(l.chain.repaired, "does not continue") || l.chain.seq != 3 {
		t.Fatalf("repaired %q, seq %d", l.chain.repaired, l.chain.seq)
	}
}

func TestFailedWriteIsAnErrorAndNoLink(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1)}
	l := open(t, dir, s, 0)
	record(t, l, protocol.Release, 1)
	l.chain.file.Close() // no write can succeed
	if err := l.Record(protocol.AuditRecord{User: "ann", Action: protocol.Release}); err == nil {
		t.Fatal("a record that was not written was reported as kept")
	}
	if l.chain.seq != 1 {
		t.Fatalf("the chain went on to %d", l.chain.seq)
	}
}

func TestHostileTextIsCut(t *testing.T) {
	dir, s := t.TempDir(), &stream{news: make(chan struct{}, 1)}
	l := open(t, dir, s, 0)
	long := strings.Repeat("é\n", 1<<16)
	if err := l.Record(protocol.AuditRecord{User: long, Action: protocol.Action(long), Request: long, Target: long, Payload: long, Outcome: long, Reason: long, Detail: long}); err != nil {
		t.Fatal(err)
	}
	if l.chain.end > maxRecord {
		t.Fatalf("the record has %d bytes", l.chain.end)
	}
}

func TestJournalShowsOutcomesOfQuestionsAndAllOfOrders(t *testing.T) {
	var lines []string
	l, err := Open(Options{Dir: t.TempDir(), Node: "web-1", Log: quiet(), Stream: (&stream{}).take,
		Journal: func(message string, fields map[string]string) {
			lines = append(lines, fields["NIX_INFRA_ACTION"]+"/"+fields["NIX_INFRA_OUTCOME"])
		}})
	if err != nil {
		t.Fatal(err)
	}
	for _, a := range []protocol.Action{protocol.Ping, protocol.Release, protocol.RunCommand} {
		for _, outcome := range []string{"", "ok"} {
			if err := l.Record(protocol.AuditRecord{User: "ann", Action: a, Outcome: outcome}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if got := strings.Join(lines, " "); got != "ping/ok release/ release/ok exec/ exec/ok" {
		t.Fatalf("journal: %s", got)
	}
}

// An action and a reason that nobody signed must not show up as a line of their own, which would read like a
// record of something that never happened.
func TestJournalLineCantBeForged(t *testing.T) {
	var lines []string
	l, err := Open(Options{Dir: t.TempDir(), Node: "web-1", Log: quiet(), Stream: (&stream{}).take,
		Journal: func(message string, _ map[string]string) { lines = append(lines, message) }})
	if err != nil {
		t.Fatal(err)
	}
	const forged = "x\naudit: deploy by admin (admin): ok\r\x1b[2J\u0085"
	if err := l.Record(protocol.AuditRecord{Action: forged, Outcome: "unsigned", Reason: forged}); err != nil {
		t.Fatal(err)
	}
	if len(lines) != 1 || strings.ContainsFunc(lines[0], unicode.IsControl) {
		t.Fatalf("the journal got %q", lines)
	}
}

// Whatever a record says, its number is the one that it has.
func FuzzSeqOf(f *testing.F) {
	f.Add(uint64(7), `"seq":9,`)
	f.Fuzz(func(t *testing.T, seq uint64, claim string) {
		r := protocol.AuditRecord{Version: protocol.Version, Seq: seq, Prev: claim, At: claim, User: claim, Action: protocol.Action(claim), Reason: claim}
		if got := seqOf(protocol.Encode(r)); got != seq {
			t.Fatalf("record %d is taken for %d", seq, got)
		}
	})
}
