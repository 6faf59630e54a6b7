package link

import (
	"context"
	"errors"
	"math/rand/v2"
	"net"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

const (
	// tcpTimeout is for the first packet: a network that lets only 443 out answers 4222 with silence.
	tcpTimeout = 5 * time.Second

	// loginTimeout is for TLS and login. A broker that thousands come back to at once needs a while
	// for each, and whoever gives up early comes back as one more.
	loginTimeout = 30 * time.Second

	pingEvery = 20 * time.Second
	pingsLost = 3
)

// Backoff says how long to wait before the next attempt: Base plus a random time of up to Jitter,
// which doubles with each attempt up to Cap. Randomness is most of it: a broker that restarts is
// missed by all its nodes in the same moment.
type Backoff struct {
	Base, Jitter, Cap time.Duration
}

// DefaultBackoff brings ten thousand nodes back within half a minute of a broker's return.
var DefaultBackoff = Backoff{Base: 2 * time.Second, Jitter: 2 * time.Second, Cap: 20 * time.Second}

// Delay is the wait after the given number of failed attempts in a row. Where the login was refused,
// trying again soon is in vain, and each attempt costs the broker a handshake.
func (b Backoff) Delay(attempt int, refused bool) time.Duration {
	jitter := b.Cap
	if !refused && attempt < 16 {
		jitter = min(b.Jitter<<attempt, b.Cap)
	}
	wait := b.Base + rand.N(max(jitter, 1))
	if refused {
		wait += b.Cap / 2
	}
	return wait
}

// RefusedLogin tells whether the broker was reached and did not want us.
func RefusedLogin(err error) bool {
	for _, e := range []error{nats.ErrAuthorization, nats.ErrAuthExpired, nats.ErrAuthRevoked, nats.ErrAccountAuthExpired} {
		if errors.Is(err, e) {
			return true
		}
	}
	return false
}

// dial makes one connection as the node.
func (l *Link) dial(ctx context.Context, urls []string, extra ...nats.Option) (*nats.Conn, error) {
	return Dial(ctx, connect.To{URLs: urls, CA: l.o.Machine.Answer.CA, Signer: l.o.Machine.Signer(), Name: l.node,
		InboxPrefix: protocol.InboxPrefix(l.node)}, extra...)
}

// Dial makes one connection that does not reconnect. ctx ends the attempt, not the connection.
func Dial(ctx context.Context, to connect.To, extra ...nats.Option) (*nats.Conn, error) {
	d := &dialer{ctx: ctx}
	defer d.done()
	to.Timeout = loginTimeout
	return to.Dial(append(extra,
		nats.NoReconnect(),
		nats.SetCustomDialer(d),
		nats.SkipHostLookup(), // the dialer looks up, and can be interrupted
		nats.PingInterval(pingEvery),
		nats.MaxPingsOutstanding(pingsLost),
		nats.FlusherTimeout(10*time.Second), // a peer that takes nothing must not hold up who speaks
		nats.UseOldRequestStyle(),           // no goroutine that waits for answers when none is due
	)...)
}

// dialer opens TCP connections that die with ctx until they are logged in: nats.go takes no context.
type dialer struct {
	ctx context.Context

	mu    sync.Mutex
	stops []func() bool
}

func (d *dialer) Dial(network, address string) (net.Conn, error) {
	c, err := (&net.Dialer{Timeout: tcpTimeout}).DialContext(d.ctx, network, address)
	if err != nil {
		return nil, err
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.stops = append(d.stops, context.AfterFunc(d.ctx, func() { c.Close() }))
	return c, nil
}

func (d *dialer) done() {
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, stop := range d.stops {
		stop()
	}
}
