package tunnel

import "time"

// How much is under way at once, and when it is sent again.
const (
	minFlight   = 64 << 10               // bytes; a tunnel on a slow way never has less
	maxQueueing = 200 * time.Millisecond // for which bytes may wait on the way, beyond the time that it takes by itself
	lookAgain   = time.Minute            // after which the way is measured anew
	minWait     = time.Second            // for an ack, before what is under way is sent again
	maxWait     = 5 * time.Second        // the same, after it was sent again several times
)

// chunk is a piece of the stream that the other end is not known to have.
type chunk struct {
	offset uint64
	data   []byte
	fin    bool      // in place of data: the stream's end
	sent   time.Time // the last time; zero: not yet
	again  bool      // it was sent more than once, so that nobody knows which one an ack is for
}

func (c *chunk) end() uint64 {
	if c.fin {
		return c.offset + 1
	}
	return c.offset + uint64(len(c.data))
}

// outbound is what goes out.
type outbound struct {
	room    uint64 // most bytes that are kept
	piece   int    // most bytes in a chunk
	queue   []chunk
	next    int    // of queue, the first that is to be sent, perhaps again
	acked   uint64 // the other end has all before it
	written uint64 // offset after what was written
	sentTo  uint64 // offset after what was ever sent
	limit   uint64 // offset up to which the other end takes
	fin     bool   // the end is in the queue, or was
	counter uint64 // of the next frame
	backAt  uint64 // counter when the last going back began

	flight uint64        // bytes that may be under way
	rtt    time.Duration // smoothed time from a chunk to its ack
	least  time.Duration // the shortest of these since looked
	looked time.Time
	shrunk time.Time // when flight was last made less

	due  time.Time     // when it is gone back, or asked; zero: nothing is waited for
	wait time.Duration // to the next due
}

func newOutbound(room, limit uint64) outbound {
	return outbound{room: room, piece: int(min(maxData, room/4, limit/4)), limit: limit, flight: minFlight, wait: minWait, looked: time.Now()}
}

// ended tells whether the other end has all, and knows that it is all.
func (o *outbound) ended() bool { return o.fin && len(o.queue) == 0 }

// write queues as much of p as there is room for in one chunk.
func (o *outbound) write(p []byte) int {
	n := min(len(p), int(o.room-min(o.room, o.written-o.acked)), o.piece)
	if n == 0 {
		return 0
	}
	if last := len(o.queue) - 1; last >= o.next && len(o.queue[last].data) < o.piece {
		n = min(n, o.piece-len(o.queue[last].data))
		o.queue[last].data = append(o.queue[last].data, p[:n]...)
	} else {
		o.queue = append(o.queue, chunk{offset: o.written, data: append([]byte(nil), p[:n]...)})
	}
	o.written += uint64(n)
	return n
}

// finish queues the end.
func (o *outbound) finish() {
	if !o.fin {
		o.fin = true
		o.queue = append(o.queue, chunk{offset: o.written, fin: true})
	}
}

// abandon forgets what was to be sent.
func (o *outbound) abandon() { o.queue, o.next, o.fin, o.due = nil, 0, true, time.Time{} }

// ready tells whether a chunk may be sent now.
func (o *outbound) ready() bool {
	if o.next == len(o.queue) {
		return false
	}
	c := &o.queue[o.next]
	if under := c.offset - o.acked; under > 0 && c.end()-o.acked > o.flight {
		return false
	}
	return c.fin || c.end() <= o.limit
}

// send takes the next chunk.
func (o *outbound) send(now time.Time) frame {
	c := &o.queue[o.next]
	o.next++
	c.again = !c.sent.IsZero()
	c.sent = now
	o.sentTo = max(o.sentTo, c.end())
	if o.next == 1 {
		o.due = now.Add(o.wait)
	}
	if c.fin {
		return frame{kind: kindFin, offset: c.offset}
	}
	return frame{kind: kindData, offset: c.offset, data: c.data}
}

// ack hears what the other end has.
func (o *outbound) ack(f frame, now time.Time) error {
	if f.received > o.sentTo {
		return errViolation
	}
	o.limit = max(o.limit, f.limit)
	if f.received > o.acked {
		o.progress(f.received, now)
	}
	if f.gap > o.backAt && o.next > 0 {
		o.flight = max(o.flight/2, minFlight)
		o.goBack()
	}
	return nil
}

func (o *outbound) progress(received uint64, now time.Time) {
	o.acked = received
	gone := 0
	for gone < len(o.queue) && o.queue[gone].end() <= received {
		if c := &o.queue[gone]; !c.again && !c.sent.IsZero() {
			o.measured(c, now)
		}
		o.queue[gone].data = nil
		gone++
	}
	o.queue = o.queue[gone:]
	o.next = max(o.next-gone, 0)
	if len(o.queue) == 0 {
		o.queue, o.due = nil, time.Time{}
	} else {
		if c := &o.queue[0]; c.offset < received {
			c.data = c.data[received-c.offset:]
			c.offset = received
		}
		o.due = now.Add(max(minWait, 4*o.rtt))
	}
	o.wait = max(minWait, 4*o.rtt)
}

// measured learns from the time that a chunk took. While the way adds none, more is put onto it, up to twice as
// much in one such time; where bytes wait on it, less is.
func (o *outbound) measured(c *chunk, now time.Time) {
	took := now.Sub(c.sent)
	if now.Sub(o.looked) > lookAgain {
		// The way may have become a longer one. How long it is shows only while hardly anything is on it.
		o.looked, o.flight, o.least = now, minFlight, 0
	}
	if o.rtt == 0 {
		o.rtt = took
	}
	o.rtt += (took - o.rtt) / 8
	if c.sent.Before(o.looked) {
		return
	}
	if o.least == 0 || took < o.least {
		o.least = took
	}
	switch queueing := took - o.least; {
	case queueing < maxQueueing:
		o.flight = min(o.flight+c.end()-c.offset, o.room)
	case queueing > 2*maxQueueing && now.Sub(o.shrunk) > took:
		o.flight = max(o.flight*3/4, minFlight)
		o.shrunk = now
	}
}

// goBack has all that is under way sent again.
func (o *outbound) goBack() { o.next, o.backAt = 0, o.counter }

// overdue does what has to be done when no ack came in time, and tells whether to ask for one.
func (o *outbound) overdue(now time.Time) (ask bool) {
	ask = o.next == 0 // nothing is under way: it waits for room at the other end
	most := maxWait
	if ask {
		most = keepAlive
	} else {
		o.flight = minFlight
		o.goBack()
	}
	o.wait = min(2*o.wait, most)
	o.due = now.Add(o.wait)
	return ask
}
