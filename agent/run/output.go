package run

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	gatherTime = 50 * time.Millisecond  // from the first byte of a part until it goes out, unless it is full before
	partTime   = 20 * time.Millisecond  // at least, from part to part
	silentTime = 500 * time.Millisecond // after which a part without anything tells that it runs
	readSize   = 32 << 10               // bytes

	// wasteTime slows down who writes what nobody gets to see. A program that never stops writing would otherwise keep
	// two processors busy for nothing.
	wasteTime = 500 * time.Microsecond
)

// output is what a run writes, on its way. It holds one part: while the connection is slow, what runs waits.
type output struct {
	sealed bool // stdout is kept, and not given out

	mu      sync.Mutex
	room    sync.Cond
	out     bytes.Buffer // with err, at most protocol.OutputChunk
	err     bytes.Buffer
	kept    []byte // stdout, to be sealed
	tooMuch bool   // there was more to keep
	left    int64  // bytes that may still be given out
	dropped int64  // bytes, since the last part
	cut     bool   // something was dropped
	nobody  bool   // nobody takes it any more

	news    chan struct{} // holds one while there is something to give out
	crowded chan struct{} // holds one while somebody waits for room
	ended   chan struct{}
}

func newOutput(limit int64, sealed bool) *output {
	o := &output{sealed: sealed, left: limit, news: make(chan struct{}, 1), crowded: make(chan struct{}, 1), ended: make(chan struct{})}
	o.room.L = &o.mu
	return o
}

// read takes all that comes from a pipe until its end or, where that has a deadline, until nothing is left in it then.
func (o *output) read(r *os.File, take func([]byte) (wasted bool)) {
	buffer := make([]byte, readSize)
	from := io.Reader(r)
	for {
		n, err := from.Read(buffer)
		if n > 0 && take(buffer[:n]) {
			time.Sleep(wasteTime)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			from, err = rest(r)
		}
		if err != nil {
			return
		}
	}
}

// rest is what is in a pipe whose deadline has passed.
func rest(r *os.File) (io.Reader, error) {
	raw, err := r.SyscallConn()
	if err != nil {
		return nil, err
	}
	var n int
	var failed error
	err = raw.Control(func(fd uintptr) { n, failed = unix.IoctlGetInt(int(fd), unix.TIOCINQ) })
	if err = errors.Join(err, failed, r.SetReadDeadline(time.Time{})); err != nil {
		return nil, err
	}
	return io.LimitReader(r, int64(n)), nil
}

func (o *output) stdout(data []byte) (wasted bool) {
	if !o.sealed {
		return o.give(&o.out, data)
	}
	o.mu.Lock()
	defer o.mu.Unlock()
	if len(o.kept)+len(data) > protocol.MaxSealed {
		o.tooMuch = true
		return true
	}
	o.kept = append(o.kept, data...)
	return false
}

func (o *output) stderr(data []byte) (wasted bool) { return o.give(&o.err, data) }

// give waits for room and puts data there, as far as the limit lets it.
func (o *output) give(to *bytes.Buffer, data []byte) (wasted bool) {
	o.mu.Lock()
	defer o.mu.Unlock()
	n := min(int64(len(data)), o.left)
	for held := o.out.Len() + o.err.Len(); held > 0 && held+int(n) > protocol.OutputChunk && !o.nobody; held = o.out.Len() + o.err.Len() {
		tell(o.crowded)
		o.room.Wait()
		n = min(int64(len(data)), o.left)
	}
	if o.nobody {
		return true
	}
	to.Write(data[:n])
	o.left -= n
	o.dropped += int64(len(data)) - n
	if n > 0 || !o.cut { // of what is dropped the first is told at once, and the rest with the next part
		tell(o.news)
	}
	o.cut = o.cut || o.dropped > 0
	return n == 0
}

func tell(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// deliver sends parts until close is called or a part can't be sent.
func (o *output) deliver(send func(protocol.Output) error) error {
	silent := time.After(silentTime)
	for last := time.Now(); ; last = time.Now() {
		select {
		case <-o.ended:
			return nil
		case <-silent:
		case <-o.news:
			gathered := time.After(gatherTime)
			select {
			case <-o.ended:
				return nil
			case <-gathered:
			case <-o.crowded:
				time.Sleep(time.Until(last.Add(partTime)))
			}
		}
		silent = nil
		if err := send(o.take()); err != nil {
			o.mu.Lock()
			o.nobody = true
			o.room.Broadcast()
			o.mu.Unlock()
			return err
		}
	}
}

// take is the next part.
func (o *output) take() protocol.Output {
	o.mu.Lock()
	defer o.mu.Unlock()
	part := protocol.Output{Stdout: bytes.Clone(o.out.Bytes()), Stderr: bytes.Clone(o.err.Bytes()), Dropped: o.dropped}
	o.out.Reset()
	o.err.Reset()
	o.dropped = 0
	select {
	case <-o.crowded:
	default:
	}
	o.room.Broadcast()
	return part
}

// close ends deliver: there is nothing to come.
func (o *output) close() { close(o.ended) }

// seal encrypts what was kept.
func (o *output) seal(seal func([]byte) ([]byte, error)) ([]byte, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	defer clear(o.kept)
	if o.tooMuch {
		return nil, protocol.Refuse(protocol.Failed, "it succeeded, but its output is lost: it has more than %d bytes, which is all that can be sealed", protocol.MaxSealed)
	}
	sealed, err := seal(o.kept)
	if err != nil {
		return nil, fmt.Errorf("it succeeded, but its output is lost: %w", err)
	}
	return sealed, nil
}
