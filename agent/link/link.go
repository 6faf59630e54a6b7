// Package link is an agent's connection to the controllers: outbound only, made again for as long as
// the agent lives, and the one place through which it speaks.
//
// Start with Run, the loop that keeps a connection, then upstream.go (what a node asks the controller)
// and dial.go (how one connection is made). Nothing here is trusted: manifests and account JWTs are
// handed on to whoever checks their signatures.
package link

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// ErrDisconnected is what everything that needs the controllers answers while none is reached.
var ErrDisconnected = errors.New("not connected to a controller")

const (
	queuedEvents = 256
	queuedLooks  = 8

	// What waits for Tunnels, in messages and bytes: some windows full of frames.
	queuedFrames     = 8192
	queuedFrameBytes = 16 << 20

	// settled is how long a connection has to last before the next loss starts again with the
	// shortest wait: a broker that accepts and throws out at once must not be hammered.
	settled = time.Minute

	// stuck is how long one round of dialling can possibly take; longer means that the loop hangs.
	stuck = 10 * time.Minute
)

// Options say who connects and who is told.
type Options struct {
	Machine *machine.Machine
	Log     *slog.Logger

	// Requests receives every message on protocol.NodeRequests. While it is full, messages are
	// dropped and that is logged: whoever asks hears nothing and asks again.
	Requests chan *nats.Msg

	// Tunnels is called with every message on protocol.NodeTunnels, one after the other. While it is behind by more than
	// a bound, messages are dropped, which the tunnels' senders find out; nil: the node has no tunnels.
	Tunnels func(*nats.Msg)

	Look      func(protocol.Look) // a hint, unsigned; it must not block
	Account   func(token string)  // an account JWT from a controller, unverified; it must not block
	Connected func()              // a connection is up and subscribed; it must not block
	Backoff   Backoff             // zero: DefaultBackoff
	Patience  time.Duration       // for one answer of a controller; 0: 15 s
}

// Link is safe for concurrent use.
type Link struct {
	o      Options
	node   string
	events chan event
	looks  chan *nats.Msg

	mu      sync.Mutex
	nc      *nats.Conn // nil while there is none
	url     string     // of the connection, or of the last one
	since   time.Time  // of the last change between connected and not
	dialing time.Time  // zero while not dialling
}

type event struct {
	subject string
	data    []byte
}

// New makes a link; Run connects it.
func New(o Options) *Link {
	if o.Backoff == (Backoff{}) {
		o.Backoff = DefaultBackoff
	}
	if o.Patience == 0 {
		o.Patience = 15 * time.Second
	}
	return &Link{o: o, node: o.Machine.Name, since: time.Now(),
		events: make(chan event, queuedEvents), looks: make(chan *nats.Msg, queuedLooks)}
}

// Run keeps a connection until ctx ends. No error of a broker, a refused login included, ends it: the
// operator may renew what was refused, and a node that gave up would need a visit.
//
// Each connection is a new one, by the first transport that works, instead of nats.go's own
// reconnecting: that can't change between tls and wss, stops at login errors unless told otherwise,
// and keeps a buffer of what was said meanwhile, where we would rather say what is true afterwards.
func (l *Link) Run(ctx context.Context) error {
	for attempt := 0; ; attempt++ {
		started := time.Now()
		err := l.once(ctx)
		if ctx.Err() != nil {
			return nil
		}
		if time.Since(started) > settled {
			attempt = 0
		}
		wait := l.o.Backoff.Delay(attempt, RefusedLogin(err))
		l.o.Log.Warn("no connection to a controller", "error", err, "attempt", attempt+1, "next", wait.Round(100*time.Millisecond))
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(wait):
		}
	}
}

// once makes a connection and serves it until it ends; the error says why it did.
func (l *Link) once(ctx context.Context) error {
	lost := make(chan error, 1)
	l.setDialing(time.Now())
	nc, err := l.dial(ctx, l.o.Machine.Answer.Controllers,
		nats.ClosedHandler(func(nc *nats.Conn) { lost <- nc.LastError() }),
		nats.ErrorHandler(l.complain))
	l.setDialing(time.Time{})
	if err != nil {
		return err
	}
	defer nc.Close()
	if err := l.subscribe(ctx, nc); err != nil {
		return fmt.Errorf("%s: %w", nc.ConnectedUrlRedacted(), err)
	}
	l.connected(nc)
	defer l.disconnected()
	if l.o.Connected != nil {
		l.o.Connected()
	}
	return l.serve(ctx, nc, lost)
}

// subscribe makes the subscriptions of a new connection and waits until the broker has them.
func (l *Link) subscribe(ctx context.Context, nc *nats.Conn) error {
	for _, subject := range protocol.NodeRequests(l.node) {
		if _, err := nc.ChanSubscribe(subject, l.o.Requests); err != nil {
			return fmt.Errorf("can't listen to %s: %w", subject, err)
		}
	}
	if _, err := nc.ChanSubscribe(protocol.LookSubject(l.node), l.looks); err != nil {
		return fmt.Errorf("can't listen for looks: %w", err)
	}
	if err := l.subscribeTunnels(nc); err != nil {
		return fmt.Errorf("can't listen for tunnels: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, loginTimeout)
	defer cancel()
	if err := nc.FlushWithContext(ctx); err != nil {
		return fmt.Errorf("the broker does not confirm the subscriptions: %w", err)
	}
	return nil
}

// subscribeTunnels has frames handed over by a goroutine of their own: nothing else waits for a tunnel.
func (l *Link) subscribeTunnels(nc *nats.Conn) error {
	if l.o.Tunnels == nil {
		return nil
	}
	frames, err := nc.Subscribe(protocol.NodeTunnels(l.node), l.o.Tunnels)
	if err != nil {
		return err
	}
	return frames.SetPendingLimits(queuedFrames, queuedFrameBytes)
}

func (l *Link) serve(ctx context.Context, nc *nats.Conn, lost <-chan error) error {
	for {
		select {
		case <-ctx.Done():
			if err := nc.FlushTimeout(500 * time.Millisecond); err != nil {
				l.o.Log.Debug("the last messages may not have left", "error", err)
			}
			return nil
		case err := <-lost:
			if err == nil {
				err = nats.ErrConnectionClosed
			}
			return fmt.Errorf("%s: %w", l.url, err)
		case m := <-l.looks:
			l.look(m)
		case e := <-l.events:
			if err := nc.Publish(e.subject, e.data); err != nil {
				l.o.Log.Debug("event dropped", "error", err)
			}
		}
	}
}

func (l *Link) look(m *nats.Msg) {
	look, err := protocol.Decode[protocol.Look](m.Data)
	if err != nil || look.Version != protocol.Version {
		l.o.Log.Warn("a look that can't be read", "version", look.Version, "error", err)
		return
	}
	l.account(look.Account)
	if l.o.Look != nil {
		l.o.Look(look)
	}
}

func (l *Link) account(token string) {
	if token != "" && l.o.Account != nil {
		l.o.Account(token)
	}
}

// complain logs what the broker holds against a connection that goes on, such as a subject that the
// node's permissions don't have.
func (l *Link) complain(_ *nats.Conn, sub *nats.Subscription, err error) {
	subject := ""
	if sub != nil {
		subject = sub.Subject
	}
	l.o.Log.Warn("the broker complains", "error", err, "subject", subject)
}

func (l *Link) setDialing(t time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.dialing = t
}

func (l *Link) connected(nc *nats.Conn) {
	l.mu.Lock()
	l.nc, l.url, l.since = nc, nc.ConnectedUrlRedacted(), time.Now()
	l.mu.Unlock()
	l.o.Log.Info("connected", "controller", nc.ConnectedUrlRedacted())
}

func (l *Link) disconnected() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.nc, l.since = nil, time.Now()
}

func (l *Link) conn() (*nats.Conn, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nc == nil {
		return nil, ErrDisconnected
	}
	return l.nc, nil
}

// Status tells which controller the link has, "" for none, and since when.
func (l *Link) Status() (url string, since time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.nc == nil {
		return "", l.since
	}
	return l.url, l.since
}

// Check is for a watchdog: an error means that the link will not come back by itself. A controller
// that can't be reached is no such error.
func (l *Link) Check() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	if !l.dialing.IsZero() && time.Since(l.dialing) > stuck {
		return fmt.Errorf("dialling a controller since %s", l.dialing.UTC().Format(time.RFC3339))
	}
	return nil
}

// LocalIPv4 is the address from which the node reaches the controller, "" if there is none.
func (l *Link) LocalIPv4() string {
	nc, err := l.conn()
	if err != nil {
		return ""
	}
	host, _, err := net.SplitHostPort(nc.LocalAddr())
	if err != nil {
		return ""
	}
	if ip := net.ParseIP(host).To4(); ip != nil {
		return ip.String()
	}
	return ""
}

// transport is the scheme of the connection that is, or was last, good.
func (l *Link) transport() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	scheme, _, _ := strings.Cut(l.url, "://")
	return scheme
}
