package client

import (
	"context"
	"errors"
	"fmt"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

const (
	openTime = 20 * time.Second // for a tunnel to be there; the node has 10 s of it to reach what is asked for
	lateTime = 5 * time.Second  // for which a tunnel that ended answers a node that missed the end
)

// Tunnel opens a stream of bytes to an address on, or near, a node, or to protocol.TunnelUpload. The node's record may
// come from anybody: v proves it, and what comes back is heard only from who holds the node's own keys. A node that
// can't reach the address, or whose policy does not allow it, says so by a *protocol.Refusal.
//
// ctx is for the opening. The stream ends with its Close or Reset, and breaks with the client's connection where that
// does not come back in time.
func (c *Client) Tunnel(ctx context.Context, node *protocol.NodeRecord, v *protocol.Verifier, to string) (*tunnel.Conn, *protocol.TunnelReply, error) {
	id, err := v.ProveNode(node, time.Now())
	if err != nil {
		return nil, nil, err
	}
	once, err := tunnel.NewKey()
	if err != nil {
		return nil, nil, err
	}
	order := protocol.TunnelOrder{To: to, Public: once.PublicKey().Bytes(), Window: tunnel.DefaultWindow}
	if err := order.Validate(); err != nil {
		return nil, nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, openTime)
	defer cancel()
	o, err := c.orderTunnel(ctx, node.Name, order)
	if err != nil {
		return nil, nil, err
	}
	conn, err := o.connect(ctx, c, tunnel.Agreed{User: c.config.Name, Node: node.Name, ID: o.id, XKey: id.XKey, Order: order, Reply: o.reply}, once)
	if err != nil {
		_ = o.sub.Unsubscribe()
		return nil, nil, err
	}
	go func() {
		<-conn.Done()
		time.AfterFunc(lateTime, func() { _ = o.sub.Unsubscribe() })
	}()
	return conn, &o.reply, nil
}

// opening is a tunnel that was ordered.
type opening struct {
	id    string
	reply protocol.TunnelReply
	sub   *nats.Subscription
	conn  atomic.Pointer[tunnel.Conn] // nil until there are keys
}

// orderTunnel sends the order and awaits the answer. On its subject come the frames, too, after it.
func (c *Client) orderTunnel(ctx context.Context, node string, order protocol.TunnelOrder) (*opening, error) {
	signed, id, err := c.config.Signer.Request(protocol.OpenTunnel, node, order, time.Now())
	if err != nil {
		return nil, err
	}
	o := &opening{id: id}
	answers := make(chan *nats.Msg, 1)
	replies := protocol.ReplySubject(c.config.Name, id, node)
	if o.sub, err = c.nc.Subscribe(replies, func(m *nats.Msg) {
		if conn := o.conn.Load(); conn != nil {
			conn.Deliver(m.Data)
			return
		}
		if tunnel.IsFrame(m.Data) {
			return // too early; it comes again
		}
		select {
		case answers <- m:
		default:
		}
	}); err != nil {
		return nil, err
	}
	subject := protocol.RequestSubject(node, protocol.OpenTunnel)
	denied, done := c.listenDenied(subject)
	defer done()
	if err = c.nc.PublishRequest(subject, replies, protocol.Encode(signed)); err == nil {
		err = o.await(ctx, node, answers, denied)
	}
	if err != nil {
		_ = o.sub.Unsubscribe()
		return nil, err
	}
	return o, nil
}

func (o *opening) await(ctx context.Context, node string, answers <-chan *nats.Msg, denied <-chan error) error {
	select {
	case m := <-answers:
		if noResponders(m) {
			return fmt.Errorf("%w: %s is not connected", ErrNoAnswer, node)
		}
		r, err := parse(m.Data, node)
		if err != nil {
			return err
		}
		if o.reply, err = protocol.Decode[protocol.TunnelReply](r.Body); err != nil {
			return fmt.Errorf("the answer of %s: %w", node, err)
		}
		return nil
	case err := <-denied:
		return err
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return fmt.Errorf("%w from %s in time", ErrNoAnswer, node)
		}
		return ctx.Err()
	}
}

// connect makes this end and waits until the node has shown that it has the same keys.
func (o *opening) connect(ctx context.Context, c *Client, a tunnel.Agreed, once *tunnel.PrivateKey) (*tunnel.Conn, error) {
	keys, err := tunnel.UserKeys(once, a)
	if err != nil {
		return nil, fmt.Errorf("the answer of %s: %w", a.Node, err)
	}
	subject := protocol.TunnelSubject(a.Node, a.User, a.ID)
	conn := tunnel.New(tunnel.Options{Keys: keys, Window: a.Order.Window, PeerWindow: a.Reply.Window, Local: a.User, Remote: a.Node + "/" + a.Order.To,
		Send: func(frame []byte) error { return c.nc.Publish(subject, frame) }})
	o.conn.Store(conn)
	select {
	case <-conn.Heard():
		return conn, nil
	case <-conn.Done():
		err = conn.Err()
	case <-ctx.Done():
		err = ctx.Err()
	}
	conn.Reset("it was given up")
	if errors.Is(err, context.DeadlineExceeded) {
		err = fmt.Errorf("%w from %s that shows that it has the node's key", ErrNoAnswer, a.Node)
	}
	return nil, err
}
