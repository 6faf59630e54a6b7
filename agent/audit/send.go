package audit

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"time"
)

const (
	batchRecords = 256
	retryFirst   = 5 * time.Second
	retryLast    = 2 * time.Minute
	markEvery    = time.Minute // how much is sent again after a crash, at most
)

// Run carries records to the stream until ctx ends, oldest first. What the stream does not take is
// kept and tried again, less and less often.
func (l *Log) Run(ctx context.Context) error {
	retry := retryFirst
	var lastMark time.Time
	for {
		sent, err := l.sendBatch(ctx)
		wait := l.o.Delay + rand.N(l.o.Delay)
		kick := l.kick
		switch {
		case err != nil:
			l.o.Log.Debug("audit records wait for the stream", "error", err, "retry", retry)
			wait, kick = retry+rand.N(retry), nil
			retry = min(2*retry, retryLast)
		case sent == batchRecords:
			wait, retry = 0, retryFirst
		default:
			retry = retryFirst
		}
		if time.Since(lastMark) > markEvery {
			l.mark()
			lastMark = time.Now()
		}
		select {
		case <-ctx.Done():
			l.mark()
			return nil
		case <-kick:
		case <-time.After(wait):
		}
	}
}

func (l *Log) mark() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := l.chain.saveMark(); err != nil {
		l.o.Log.Warn("can't note how far the audit stream is; records will be sent twice", "error", err)
	}
}

// sendBatch sends the next records that the stream does not have and tells how many.
func (l *Log) sendBatch(ctx context.Context) (int, error) {
	b, err := l.unsent()
	if err != nil || len(b.records) == 0 {
		return 0, err
	}
	if err := l.o.Stream(ctx, b.records); err != nil {
		return 0, err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if b.end > l.chain.next {
		l.chain.next, l.chain.sent = b.end, b.last
	}
	return len(b.records), nil
}

type batch struct {
	records [][]byte
	last    uint64 // sequence number of the last one
	end     int64  // place in the chain after it
}

// unsent reads the oldest records that the stream does not have.
func (l *Log) unsent() (batch, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.chain
	if c.lost > 0 {
		l.o.Log.Error("audit records were lost to the stream: it was out of reach for too long", "records", c.lost)
		c.lost = 0
	}
	b := batch{end: c.next, last: c.sent}
	if b.end < c.base {
		if err := b.read(filepath.Join(c.dir, olderFile), c.older, c.base); err != nil {
			return b, err
		}
	}
	if b.end >= c.base && b.end < c.end {
		if err := b.read(filepath.Join(c.dir, currentFile), c.base, c.end); err != nil {
			return b, err
		}
	}
	return b, nil
}

// read adds what one file, which holds the places from begin to end, has after b.end.
func (b *batch) read(path string, begin, end int64) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	lines := bufio.NewReader(io.NewSectionReader(f, b.end-begin, end-b.end))
	for len(b.records) < batchRecords {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return err
		}
		b.end += int64(len(line))
		line = line[:len(line)-1]
		var r struct { // all that is needed of a protocol.AuditRecord
			Seq uint64 `json:"seq"`
		}
		if json.Unmarshal(line, &r) == nil {
			b.records, b.last = append(b.records, line), r.Seq
		}
	}
	return nil
}
