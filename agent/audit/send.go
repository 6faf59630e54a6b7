package audit

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	retryFirst = 5 * time.Second
	retryLast  = 2 * time.Minute
)

// Run carries records to the stream until ctx ends, oldest first, many to a message. What the stream does not take is
// kept and tried again, less and less often, and at once where Connected says so.
func (l *Log) Run(ctx context.Context) error {
	retry := l.retry
	var tried int64 // where the message ends that the stream may have got or not
	for {
		b, err := l.unsent(tried)
		if err == nil && len(b.records) > 0 {
			tried = b.end
			if err = l.o.Stream(ctx, b.records); err == nil {
				l.sent(b)
			}
		}
		wait := l.o.Delay + rand.N(l.o.Delay)
		kick := l.kick
		switch {
		case err != nil:
			l.o.Log.Debug("audit records wait for the stream", "error", err, "retry", retry)
			wait, kick = retry+rand.N(retry), nil
			retry = min(2*retry, retryLast)
		case b.more:
			wait, retry = 0, l.retry
		default:
			retry = l.retry
		}
		select {
		case <-ctx.Done():
			return nil
		case <-kick:
		case <-l.reached:
			retry = l.retry
		case <-time.After(wait):
		}
	}
}

// Connected says that a controller is reached again. It does not block.
func (l *Log) Connected() {
	select {
	case l.reached <- struct{}{}:
	default:
	}
}

// sent notes that the stream has a batch.
func (l *Log) sent(b batch) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if b.end <= l.chain.next {
		return // they went with an old file meanwhile
	}
	l.chain.next, l.chain.sent = b.end, min(b.last, l.chain.seq)
	if err := l.chain.saveMark(); err != nil {
		l.o.Log.Warn("can't note how far the audit stream is; a restart will send records twice", "error", err)
	}
}

// batch is what goes into one message.
type batch struct {
	records [][]byte
	bytes   int
	last    uint64 // sequence number of the last one
	end     int64  // place in the chain after it
	more    bool   // there are records after it
}

// unsent reads the oldest records that the stream does not have. Where a message with them was on its way before, up to
// the place tried, it makes the same one again: the stream knows it by its content.
func (l *Log) unsent(tried int64) (batch, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.chain
	if c.lost > 0 {
		l.o.Log.Error("audit records were lost to the stream: it was out of reach for too long", "records", c.lost)
		c.lost = 0
	}
	b, end := batch{end: c.next, last: c.sent}, c.end
	if tried > c.next {
		end = tried
	}
	if b.end < c.base {
		if err := b.read(filepath.Join(c.dir, olderFile), c.older, min(c.base, end)); err != nil {
			return b, err
		}
	}
	if b.end >= c.base && b.end < end {
		if err := b.read(filepath.Join(c.dir, currentFile), c.base, end); err != nil {
			return b, err
		}
	}
	b.more = b.end < c.end
	return b, nil
}

// read adds what one file, which holds the places from begin on, has between b.end and end, as far as it fits.
func (b *batch) read(path string, begin, end int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewReader(io.NewSectionReader(f, b.end-begin, end-b.end))
	for len(b.records) < protocol.MaxAuditRecords {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		record := line[:len(line)-1]
		if len(record) <= maxRecord { // more is none of ours, and no stream would take it
			if len(b.records) > 0 && b.bytes+len(line) > protocol.MaxAuditBytes {
				return nil
			}
			b.records, b.bytes, b.last = append(b.records, record), b.bytes+len(line), max(b.last, seqOf(record))
		}
		b.end += int64(len(line))
	}
	return nil
}

// seqOf finds the number of an encoded record, 0 where it has none: decoding all of it would cost as much as the rest of
// its way. What is no record goes to the stream, too, where it is shown to be none.
func seqOf(record []byte) uint64 {
	_, rest, _ := bytes.Cut(record, []byte(`"seq":`))
	number, _, _ := bytes.Cut(rest, []byte(","))
	seq, err := strconv.ParseUint(string(number), 10, 64)
	if err != nil {
		return 0
	}
	return seq
}
