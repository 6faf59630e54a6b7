// Package tunnel is a stream of bytes, both ways, between a user and a node, over messages that a broker carries and
// that may get lost. The broker can't read it, change it, play it again or end it as if it had ended by itself.
//
// Start with New: a Conn is a net.Conn whose frames go out by a function and come in by Deliver, so that the user's
// end, the node's end and tests use the same one. keys.go has the key agreement, frame.go what travels, out.go and
// in.go the two directions of one end, loop.go what is sent when.
//
// A message may be lost wherever nobody takes it: on reconnecting, at a broker that restarts, at a receiver that is
// behind. So each byte has an offset, the receiver says up to where it has all of them, and the sender keeps the rest
// and sends it again from there on (go-back-N: messages between two connections keep their order, so that what
// follows a lost one is rarely worth keeping). How much may be under way is bounded twice: by the receiver's window,
// which bounds the memory at both ends, and by what the way there takes without a queue, as an agent's connection
// has other things to carry.
package tunnel

import (
	"errors"
	"io"
	"net"
	"os"
	"sync"
	"time"
)

// Windows, in bytes: how much an end takes in before it is read.
const (
	DefaultWindow = 2 << 20
	MinWindow     = 64 << 10
)

// Times of a tunnel.
const (
	keepAlive = 20 * time.Second // after which an end that heard nothing asks
	peerGone  = 60 * time.Second // after which an end that heard nothing gives up
	linger    = 30 * time.Second // how long Close's rest may go without any progress
)

// ErrGone ends a tunnel whose other end was not heard of for a minute.
var ErrGone = errors.New("nothing was heard from the other end of the tunnel for a minute")

// ResetError is why the other end broke the tunnel off: what it sent before may not be all.
type ResetError struct{ Reason string }

func (e *ResetError) Error() string { return "the other end broke the tunnel off: " + e.Reason }

// Options are one end's surroundings.
type Options struct {
	Keys       Keys
	Window     int64 // of this end; 0: DefaultWindow
	PeerWindow int64 // of the other end, as it said; 0: DefaultWindow

	// Send sends a frame to the other end, whose Deliver it is for. It may block, for as long as it takes to get the
	// frame out, and it does not keep it. What it can't send is sent again later.
	Send func(frame []byte) error

	Local, Remote string // what LocalAddr and RemoteAddr say
}

// Conn is one end of a tunnel. It is safe for concurrent use.
type Conn struct {
	o     Options
	wake  chan struct{} // the loop has something to look at
	heard chan struct{} // closed by the first frame
	over  chan struct{} // closed when nothing more is to be said

	delivering sync.Mutex // Deliver takes one frame after the other
	counter    uint64     // the least that a frame may have

	mu          sync.Mutex
	changed     sync.Cond // something that Read or Write may wait for
	in          inbound
	out         outbound
	err         error  // why it ended early; nil: it did not
	reset       string // to be told to the other end
	resetDue    bool
	ackDue      bool
	pingDue     bool
	closed      bool      // by Close: nobody reads
	closeBy     time.Time // when the rest is given up
	lastHeard   time.Time
	lastPing    time.Time
	finished    bool
	afterwards  int // answers after the end
	dropped     int64
	read, write deadline
}

// New makes an end and starts it. It lives until both ends have ended their directions, or one of them breaks it off;
// Close is needed in any case.
func New(o Options) *Conn {
	if o.Window == 0 {
		o.Window = DefaultWindow
	}
	if o.PeerWindow == 0 {
		o.PeerWindow = DefaultWindow
	}
	o.Window, o.PeerWindow = max(o.Window, MinWindow), max(o.PeerWindow, MinWindow)
	now := time.Now()
	c := &Conn{o: o, wake: make(chan struct{}, 1), heard: make(chan struct{}), over: make(chan struct{}), lastHeard: now, lastPing: now, pingDue: true}
	c.changed.L = &c.mu
	c.in.window, c.in.told = uint64(o.Window), uint64(o.Window)
	c.out = newOutbound(uint64(o.Window), uint64(o.PeerWindow))
	go c.loop()
	return c
}

// Heard is closed when the first frame of the other end came, which proves that it has the keys.
func (c *Conn) Heard() <-chan struct{} { return c.heard }

// Done is closed when nothing is left to do: both directions have ended and the other end knows it, or the tunnel
// was broken off, by whichever end. Frames may be delivered for some seconds more: the other end may have missed the
// last one.
func (c *Conn) Done() <-chan struct{} { return c.over }

// Err is why the tunnel ended before both directions had; nil where it did not.
func (c *Conn) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

// Counts are the bytes that the other end is known to have, those that came from it, and how many frames were dropped
// because they are not of this tunnel.
func (c *Conn) Counts() (sent, received, dropped int64) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sent, received = int64(min(c.out.acked, c.out.written)), int64(c.in.received)
	if c.in.ended {
		received--
	}
	return sent, received, c.dropped
}

// Read gives what came, in order. It is io.EOF only where the other end has ended its direction; a tunnel that broke
// gives what came before that, and then the error.
func (c *Conn) Read(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for {
		switch {
		case c.closed:
			return 0, net.ErrClosed
		case c.read.passed():
			return 0, os.ErrDeadlineExceeded
		case len(p) == 0:
			return 0, nil
		case len(c.in.chunks) > 0:
			n := c.in.read(p)
			if c.in.worthTelling() {
				c.ackDue = true
				c.kick()
			}
			return n, nil
		case c.in.ended:
			return 0, io.EOF
		case c.err != nil:
			return 0, c.err
		}
		c.changed.Wait()
	}
}

// Write takes p and returns, once there is room for all of it; it does not wait until the other end has it.
func (c *Conn) Write(p []byte) (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	written := 0
	for {
		switch {
		case written == len(p):
			return written, nil
		case c.err != nil:
			return written, c.err
		case c.closed || c.out.fin:
			return written, net.ErrClosed
		case c.write.passed():
			return written, os.ErrDeadlineExceeded
		}
		if n := c.out.write(p[written:]); n > 0 {
			written += n
			c.kick()
			continue
		}
		c.changed.Wait()
	}
}

// CloseWrite ends this end's direction, after all that was written.
func (c *Conn) CloseWrite() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err != nil {
		return c.err
	}
	c.out.finish()
	c.kick()
	c.changed.Broadcast()
	return nil
}

// Close ends both directions. What was written still goes out; Done tells when the other end has it. If more comes
// from there, the tunnel breaks, so that the other end knows that nobody has read it.
func (c *Conn) Close() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	c.closed, c.closeBy = true, time.Now().Add(linger)
	c.in.discard()
	if c.err == nil {
		c.out.finish()
	}
	c.read.stop()
	c.write.stop()
	c.kick()
	c.changed.Broadcast()
	return nil
}

// Reset breaks the tunnel off, at once, and tells the other end why.
func (c *Conn) Reset(reason string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.breakOff(reason)
}

func (c *Conn) breakOff(reason string) {
	if c.err != nil || c.finished {
		return
	}
	c.reset, c.resetDue = reason[:min(len(reason), maxReason)], true
	c.fail(errors.New("the tunnel was broken off: " + reason))
}

// fail ends the tunnel early.
func (c *Conn) fail(err error) {
	if c.err != nil || c.finished {
		return
	}
	c.err = err
	c.out.abandon()
	c.kick()
	c.changed.Broadcast()
}

// kick has the loop look.
func (c *Conn) kick() {
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// Addr names an end of a tunnel.
type Addr string

func (Addr) Network() string  { return "tunnel" }
func (a Addr) String() string { return string(a) }

// LocalAddr names this end.
func (c *Conn) LocalAddr() net.Addr { return Addr(c.o.Local) }

// RemoteAddr names the other end.
func (c *Conn) RemoteAddr() net.Addr { return Addr(c.o.Remote) }

// SetDeadline sets both deadlines.
func (c *Conn) SetDeadline(t time.Time) error {
	return errors.Join(c.SetReadDeadline(t), c.SetWriteDeadline(t))
}

// SetReadDeadline is when Read gives up; zero: never.
func (c *Conn) SetReadDeadline(t time.Time) error { return c.setDeadline(&c.read, t) }

// SetWriteDeadline is when Write gives up; zero: never.
func (c *Conn) SetWriteDeadline(t time.Time) error { return c.setDeadline(&c.write, t) }

type deadline struct {
	at    time.Time
	timer *time.Timer
}

func (d *deadline) passed() bool { return !d.at.IsZero() && !time.Now().Before(d.at) }

func (d *deadline) stop() {
	if d.timer != nil {
		d.timer.Stop()
	}
}

func (c *Conn) setDeadline(d *deadline, t time.Time) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return net.ErrClosed
	}
	d.stop()
	d.at = t
	if !t.IsZero() {
		d.timer = time.AfterFunc(time.Until(t), func() {
			c.mu.Lock()
			defer c.mu.Unlock()
			c.changed.Broadcast()
		})
	}
	c.changed.Broadcast()
	return nil
}
