// Package client is the fleet as commands see it: connect as somebody, sign, ask one or all, collect
// what comes back.
//
// An answer counts only if it arrived on the subject that the broker lets nobody but the asked node (or
// the controller) publish on.
package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/url"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

// ErrNoAnswer says that whom we asked did not answer in time.
var ErrNoAnswer = errors.New("no answer")

// Config says where the fleet is and as whom to speak to it.
type Config struct {
	URLs    []string // of controllers, tls:// and wss://
	CA      []byte   // PEM
	Signer  *protocol.Signer
	Name    string        // of the user that Signer is
	Timeout time.Duration // for one address; 0 means 5 s
}

// Client is a connection to the fleet. It is safe for concurrent use.
type Client struct {
	nc     *nats.Conn
	config Config

	mu     sync.Mutex
	denied map[string][]chan error // who waits for an answer to what was published on a subject
}

// Connect connects by the first controller URL that works.
func Connect(ctx context.Context, config Config) (*Client, error) {
	c := &Client{config: config, denied: map[string][]chan error{}}
	to := connect.To{
		URLs: config.URLs, CA: config.CA, Signer: config.Signer, Timeout: config.Timeout, Name: "nix-infra " + config.Name,
		InboxPrefix: strings.TrimSuffix(protocol.ReplySubject(config.Name, "inbox", ""), "."),
	}
	nc, err := dial(ctx, to, nats.ErrorHandler(c.asyncError), nats.MaxReconnects(-1), nats.ReconnectWait(500*time.Millisecond))
	switch {
	case err == nil:
		c.nc = nc
		return c, nil
	case ctx.Err() != nil:
		return nil, ctx.Err()
	}
	return nil, explain(err, config)
}

// dial is To.Dial that gives up when ctx ends: nats.go can't be interrupted while it dials.
func dial(ctx context.Context, to connect.To, extra ...nats.Option) (*nats.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	type result struct {
		nc  *nats.Conn
		err error
	}
	dialled := make(chan result, 1)
	go func() {
		nc, err := to.Dial(extra...)
		dialled <- result{nc, err}
	}()
	select {
	case r := <-dialled:
		return r.nc, r.err
	case <-ctx.Done():
		go func() {
			if r := <-dialled; r.nc != nil {
				r.nc.Close()
			}
		}()
		return nil, ctx.Err()
	}
}

// Closed tells whether the connection has ended for good: credentials that were revoked or expired end it so.
func (c *Client) Closed() bool { return c.nc.IsClosed() }

// Close ends the connection.
func (c *Client) Close() { c.nc.Close() }

// explain turns what a connection fails with into what is wrong and what to do.
func explain(err error, config Config) error {
	var (
		urls     = strings.Join(config.URLs, ", ")
		foreign  x509.UnknownAuthorityError
		host     x509.HostnameError
		invalid  x509.CertificateInvalidError
		badCert  *tls.CertificateVerificationError
		text     = err.Error()
		mentions = func(s string) bool { return strings.Contains(strings.ToLower(text), s) }
	)
	switch {
	case errors.Is(err, nats.ErrAuthExpired) || mentions("authentication expired"):
		return fmt.Errorf("the controller at %s says that the credentials of %s expired; ask for new ones", urls, config.Name)
	case errors.Is(err, nats.ErrAuthRevoked) || mentions("authentication revoked"):
		return fmt.Errorf("the controller at %s says that the credentials of %s were revoked; ask for new ones", urls, config.Name)
	case errors.Is(err, nats.ErrAuthorization) || mentions("authorization violation"):
		return fmt.Errorf("the controller at %s refuses the credentials of %s: expired, revoked or of another fleet", urls, config.Name)
	case errors.As(err, &host):
		return fmt.Errorf("the controller's certificate is not for the address in %s; enroll the controller again with --address (%v)", urls, host)
	case errors.As(err, &invalid) && invalid.Reason == x509.Expired:
		return fmt.Errorf("the certificate of the controller at %s is not valid at this time; check the clocks, and enroll the controller again (%v)", urls, invalid)
	case errors.As(err, &foreign), errors.As(err, &invalid), errors.As(err, &badCert):
		return fmt.Errorf("what answers at %s is not this fleet's controller: its certificate is not by the project's CA; check the controllers in nix-infra.yaml", urls)
	}
	if errors.Is(err, nats.ErrNoServers) {
		text = whyNot(config.URLs, text)
	}
	return fmt.Errorf("can't reach the controller at %s; check that it runs, the address in nix-infra.yaml and the firewall (%s)", urls, text)
}

// whyNot finds out why none of the URLs can be reached, which nats.go does not tell.
func whyNot(urls []string, otherwise string) string {
	for _, s := range urls {
		u, err := url.Parse(s)
		if err != nil {
			continue
		}
		conn, err := net.DialTimeout("tcp", u.Host, 2*time.Second)
		if err != nil {
			return err.Error()
		}
		conn.Close()
	}
	return otherwise
}

// asyncError hears from the broker that something may not be published, and tells who waits for it.
func (c *Client) asyncError(_ *nats.Conn, _ *nats.Subscription, err error) {
	if !errors.Is(err, nats.ErrPermissionViolation) {
		return
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	for subject, waiting := range c.denied {
		if !strings.Contains(err.Error(), `"`+subject+`"`) {
			continue
		}
		for _, w := range waiting {
			select {
			case w <- protocol.Refuse(protocol.OverRole, "the role of %s does not allow this (%s)", c.config.Name, subject):
			default:
			}
		}
	}
}

// listenDenied gives a channel that hears if publishing on a subject is denied.
func (c *Client) listenDenied(subject string) (<-chan error, func()) {
	ch := make(chan error, 1)
	c.mu.Lock()
	c.denied[subject] = append(c.denied[subject], ch)
	c.mu.Unlock()
	return ch, func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		left := c.denied[subject][:0]
		for _, w := range c.denied[subject] {
			if w != ch {
				left = append(left, w)
			}
		}
		if c.denied[subject] = left; len(left) == 0 {
			delete(c.denied, subject)
		}
	}
}

// Ask signs a request to one node, or to protocol.ControllerName, and awaits its answer until ctx ends.
// A refusal comes back as *protocol.Refusal; ErrNoAnswer if nobody is there.
func (c *Client) Ask(ctx context.Context, target string, action protocol.Action, payload any) (*protocol.Reply, error) {
	signed, id, err := c.config.Signer.Request(action, target, payload, time.Now())
	if err != nil {
		return nil, err
	}
	message := protocol.Encode(signed)
	if len(message) > protocol.MaxMessage {
		return nil, fmt.Errorf("the request %s has %d bytes, the limit is %d", action, len(message), protocol.MaxMessage)
	}
	replySubject := protocol.ReplySubject(c.config.Name, id, target)
	replies, err := c.nc.SubscribeSync(replySubject)
	if err != nil {
		return nil, err
	}
	defer replies.Unsubscribe()
	subject := protocol.RequestSubject(target, action)
	denied, done := c.listenDenied(subject)
	defer done()
	if err := c.nc.PublishRequest(subject, replySubject, message); err != nil {
		return nil, err
	}
	return c.await(ctx, replies, denied, target)
}

func (c *Client) await(ctx context.Context, replies *nats.Subscription, denied <-chan error, target string) (*protocol.Reply, error) {
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	go func() {
		select {
		case err := <-denied:
			cancel(err)
		case <-ctx.Done():
		}
	}()
	m, err := replies.NextMsgWithContext(ctx)
	switch {
	case err == nil:
	case ctx.Err() != nil && errors.Is(context.Cause(ctx), &protocol.Refusal{Code: protocol.OverRole}):
		return nil, context.Cause(ctx)
	case errors.Is(err, context.DeadlineExceeded):
		return nil, fmt.Errorf("%w from %s in time", ErrNoAnswer, display(target))
	case errors.Is(err, nats.ErrNoResponders):
		return nil, fmt.Errorf("%w: %s is not connected", ErrNoAnswer, display(target))
	default:
		return nil, err
	}
	if noResponders(m) {
		return nil, fmt.Errorf("%w: %s is not connected", ErrNoAnswer, display(target))
	}
	return parse(m.Data, target)
}

// noResponders tells whether a message is the broker's notice that nobody listens.
func noResponders(m *nats.Msg) bool { return len(m.Data) == 0 && m.Header.Get("Status") == "503" }

func display(target string) string {
	if target == protocol.ControllerName {
		return "the controller"
	}
	return target
}

func parse(data []byte, sender string) (*protocol.Reply, error) {
	r, err := protocol.Decode[protocol.Reply](data)
	if err != nil {
		return nil, fmt.Errorf("the answer of %s: %w", display(sender), err)
	}
	if r.Version != protocol.Version {
		return nil, protocol.Refuse(protocol.OtherVersion, "%s speaks version %d of the protocol, this side version %d; upgrade the older one", display(sender), r.Version, protocol.Version)
	}
	if r.Refused != nil {
		return nil, r.Refused
	}
	return &r, nil
}

const (
	controllerTimeout = 15 * time.Second         // for one request to the controller: they are small, and it answers from memory or a local disk
	uploadTimeout     = protocol.RequestLifetime // for one with blobs: some MiB, beside others, over what may be a slow line
)

// Controller asks the controller and reads its answer into into (nil: only whether it agreed).
func (c *Client) Controller(ctx context.Context, action protocol.Action, payload, into any) error {
	timeout := controllerTimeout
	if action == protocol.PutBlobs {
		timeout = uploadTimeout
	}
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	r, err := c.Ask(ctx, protocol.ControllerName, action, payload)
	if err != nil {
		return err
	}
	if into == nil {
		return nil
	}
	// An answer may come from a newer controller of the same version: fields that are not known here
	// are left out, as nothing that the user ordered depends on them.
	if err := json.Unmarshal(r.Body, into); err != nil {
		return fmt.Errorf("the controller's answer to %s: %w", action, err)
	}
	return nil
}
