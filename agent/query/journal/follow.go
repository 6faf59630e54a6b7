package journal

import (
	"context"
	"errors"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	// beginTime bounds the search for what is there already.
	beginTime = 25 * time.Second
	// gather is how long entries are gathered before they are sent together.
	gather = 100 * time.Millisecond
	// maxWaiting bounds what waits to be sent, in bytes: entries that come while it is full are dropped, and counted.
	maxWaiting = 256 << 10
)

// Follow sends the newest entries, and then those that come, until ctx ends. The first part, which may be empty, is
// sent at once. A receiver that is slower than the journal costs no memory: it misses entries, and is told how many.
func (r Reader) Follow(ctx context.Context, q protocol.JournalQuery, send func(protocol.JournalPart) error) error {
	if q.Before != "" || q.Until != 0 {
		return protocol.Refuse(protocol.Invalid, "what is to come can't be followed up to a cursor or a time")
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	if err := send(protocol.JournalPart{Entries: []protocol.JournalEntry{}}); err != nil {
		return err
	}
	from, err := r.begin(ctx, q, send)
	if err != nil {
		return err
	}
	q.Since = 0
	w := &waiting{news: make(chan struct{}, 1)}
	ended := make(chan error, 1)
	go func() {
		err := r.run(ctx, append(options(q), "--follow", "--no-tail", from), w.add)
		if err == nil {
			err = errors.New("journalctl ended by itself")
		}
		ended <- err
	}()
	wait := func(err error) error { cancel(); <-ended; return err }
	for {
		select {
		case err := <-ended:
			if part, any := w.take(); any {
				if failed := send(part); failed != nil {
					return failed
				}
			}
			return err
		case <-w.news:
		}
		select {
		case <-ctx.Done():
			return wait(ctx.Err())
		case <-time.After(gather):
		}
		part, _ := w.take()
		if err := send(part); err != nil {
			return wait(err)
		}
	}
}

// begin sends what is there already, and gives the option for where to go on.
func (r Reader) begin(ctx context.Context, q protocol.JournalQuery, send func(protocol.JournalPart) error) (string, error) {
	from := "--since=" + stamp(time.Now().UnixMicro())
	reading, cancel := context.WithTimeout(ctx, beginTime)
	defer cancel()
	part, err := r.Read(reading, q)
	if err != nil || len(part.Entries) == 0 {
		return from, err
	}
	part.Next = "" // how many of the older ones are shown is the asker's choice
	return "--after-cursor=" + part.Entries[len(part.Entries)-1].Cursor, send(part)
}

// waiting are entries that are not sent yet.
type waiting struct {
	news chan struct{} // there are some

	mu   sync.Mutex
	part protocol.JournalPart
	size int
}

func (w *waiting) add(e protocol.JournalEntry) bool {
	w.mu.Lock()
	if n := sizeOf(e); w.size+n > maxWaiting {
		w.part.Dropped++
	} else {
		w.part.Entries = append(w.part.Entries, e)
		w.size += n
	}
	w.mu.Unlock()
	select {
	case w.news <- struct{}{}:
	default:
	}
	return true
}

func (w *waiting) take() (part protocol.JournalPart, any bool) {
	w.mu.Lock()
	defer w.mu.Unlock()
	part = w.part
	w.part, w.size = protocol.JournalPart{}, 0
	if part.Entries == nil {
		part.Entries = []protocol.JournalEntry{}
	}
	return part, len(part.Entries) > 0 || part.Dropped > 0
}
