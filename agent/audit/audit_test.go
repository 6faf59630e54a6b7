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
}

func (s *stream) take(_ context.Context, records [][]byte) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.down {
		return errors.New("out of reach")
	}
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

func (s *stream) wait(t *testing.T, n int) {
	t.Helper()
	for deadline := time.After(10 * time.Second); ; {
		s.mu.Lock()
		have := len(s.got)
		s.mu.Unlock()
		if have >= n {
			return
		}
		select {
		case <-s.news:
		case <-deadline:
			t.Fatalf("%d of %d records arrived", have, n)
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
	for run := 1; run <= 3; run++ {
		l := open(t, dir, s, 0)
		stop := running(t, l)
		record(t, l, protocol.Ping, 3)
		record(t, l, protocol.Release, 2)
		s.wait(t, 5*run)
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
	record(t, l, protocol.Release, 700) // more than a batch
	stop()
	s.down = false
	l = open(t, dir, s, 0)
	stop = running(t, l)
	s.wait(t, 700)
	stop()
	checkChain(t, s.raw)
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
	s.wait(t, 1)
	record(t, l, protocol.Release, 1)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		s.mu.Lock()
		last := s.got[len(s.got)-1]
		s.mu.Unlock()
		if last.Seq == 501 {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the newest that arrived is %d", last.Seq)
		}
	}
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
