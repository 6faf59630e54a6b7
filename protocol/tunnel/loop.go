package tunnel

import (
	"sync"
	"time"
)

// maxAfterwards bounds what is answered after a tunnel's end.
const maxAfterwards = 16

// buffers are for frames that are being sealed.
var buffers = sync.Pool{New: func() any { return new([]byte) }}

// loop sends all that this end has to say, until there is nothing left.
func (c *Conn) loop() {
	defer close(c.over)
	timer := time.NewTimer(keepAlive)
	defer timer.Stop()
	var buffer *[]byte
	for {
		c.mu.Lock()
		now := time.Now()
		c.look(now)
		f, counter, ok := c.say(now)
		if !ok && c.ended() {
			c.finished = true
			c.mu.Unlock()
			return
		}
		wake := c.wakeAt()
		c.mu.Unlock()
		if ok {
			if buffer == nil {
				buffer = buffers.Get().(*[]byte)
			}
			*buffer = f.seal(*buffer, c.o.Keys.send, counter)
			_ = c.o.Send(*buffer) // it is sent again
			continue
		}
		if buffer != nil { // there may be nothing to say for hours
			buffers.Put(buffer)
			buffer = nil
		}
		timer.Reset(time.Until(wake))
		select {
		case <-c.wake:
		case <-timer.C:
		}
	}
}

// ended tells whether nothing more is to be done.
func (c *Conn) ended() bool { return c.err != nil || c.out.ended() && c.in.ended }

// look does what is due by time.
func (c *Conn) look(now time.Time) {
	o := &c.out
	if len(o.queue) > 0 && o.due.IsZero() {
		o.due = now.Add(o.wait)
	}
	switch {
	case c.err != nil:
	case !now.Before(c.lastHeard.Add(peerGone)):
		c.fail(ErrGone)
	case c.closed && !now.Before(c.closeBy):
		c.breakOff("nobody reads any more")
	case !o.due.IsZero() && !now.Before(o.due):
		c.pingDue = o.overdue(now) || c.pingDue
	case !now.Before(c.pingAt()):
		c.pingDue = true
	}
}

// pingAt is when to ask an end that says nothing by itself; sooner where it never said anything.
func (c *Conn) pingAt() time.Time {
	select {
	case <-c.heard:
	default:
		return c.lastPing.Add(minWait)
	}
	asked := c.lastPing.Add(keepAlive / 2)
	if at := c.lastHeard.Add(keepAlive); at.After(asked) {
		return at
	}
	return asked
}

// wakeAt is when look has something to do next.
func (c *Conn) wakeAt() time.Time {
	at := c.pingAt()
	for _, t := range []time.Time{c.lastHeard.Add(peerGone), c.out.due, c.closeBy} {
		if !t.IsZero() && t.Before(at) {
			at = t
		}
	}
	return at
}

// say is the next frame to send, if there is one.
func (c *Conn) say(now time.Time) (f frame, counter uint64, ok bool) {
	switch {
	case c.resetDue:
		c.resetDue = false
		f = frame{kind: kindReset, reason: c.reset}
	case c.err != nil:
		return frame{}, 0, false
	case c.ackDue:
		c.ackDue = false
		f = c.in.ack()
	case c.pingDue:
		c.pingDue, c.lastPing = false, now
		f = frame{kind: kindPing}
	case c.out.ready():
		f = c.out.send(now)
	default:
		return frame{}, 0, false
	}
	c.out.counter++
	return f, c.out.counter - 1, true
}

// Deliver takes a frame that came, and what is in its memory. It never waits for a reader, and drops what is not of this
// tunnel.
func (c *Conn) Deliver(b []byte) {
	c.delivering.Lock()
	defer c.delivering.Unlock()
	f, counter, err := open(b, c.o.Keys.receive, c.counter)
	c.mu.Lock()
	if err != nil {
		c.dropped++
		c.mu.Unlock()
		return
	}
	c.counter = counter + 1
	if c.finished {
		f, counter, ok := c.answerLate(f)
		c.mu.Unlock()
		if ok {
			_ = c.o.Send(f.seal(nil, c.o.Keys.send, counter))
		}
		return
	}
	defer c.mu.Unlock()
	now := time.Now()
	c.lastHeard = now
	select {
	case <-c.heard:
	default:
		close(c.heard)
	}
	if c.err != nil {
		return // the reset is on its way
	}
	if err := c.hear(f, counter, now); err != nil {
		c.breakOff(err.Error())
	}
	c.kick()
	c.changed.Broadcast()
}

func (c *Conn) hear(f frame, counter uint64, now time.Time) error {
	switch f.kind {
	case kindData, kindFin:
		c.ackDue = true
		if c.closed && c.in.news(f) {
			c.breakOff("nobody reads any more")
			return nil
		}
		return c.in.take(f, counter)
	case kindPing:
		c.ackDue = true
	case kindAck:
		before := c.out.acked
		err := c.out.ack(f, now)
		if c.closed && c.out.acked > before {
			c.closeBy = now.Add(linger)
		}
		return err
	case kindReset:
		c.fail(&ResetError{f.reason})
	}
	return nil
}

// answerLate is what an end says when all was said, to one that missed it.
func (c *Conn) answerLate(heard frame) (f frame, counter uint64, ok bool) {
	if heard.kind == kindAck || heard.kind == kindReset || c.afterwards == maxAfterwards {
		return frame{}, 0, false
	}
	c.afterwards++
	if f = c.in.ack(); c.reset != "" {
		f = frame{kind: kindReset, reason: c.reset}
	}
	c.out.counter++
	return f, c.out.counter - 1, true
}
