package fleettest

import (
	"sync"

	"github.com/nix-infra/nix-infra/protocol"
)

// Streams is how a node answers in parts: send gives the next one, and ended is closed when who asked wants no more.
type Streams func(o *protocol.Verified, send func(part any), ended <-chan struct{}) error

// underWay are the requests that a node is answering in parts, and what was ordered about them and others.
type underWay struct {
	mu     sync.Mutex
	ends   map[string]chan struct{} // by id
	orders []protocol.StreamOrder
}

// Orders are the stream orders that the node got.
func (n *Node) Orders() []protocol.StreamOrder {
	n.streams.mu.Lock()
	defer n.streams.mu.Unlock()
	return append([]protocol.StreamOrder(nil), n.streams.orders...)
}

// Forget has the node know nothing more of what it is answering, as one whose agent began anew.
func (n *Node) Forget() {
	n.streams.mu.Lock()
	defer n.streams.mu.Unlock()
	n.streams.ends = nil
}

// order carries out a stream order.
func (n *Node) order(payload []byte) error {
	o, err := protocol.Decode[protocol.StreamOrder](payload)
	if err != nil {
		return err
	}
	n.streams.mu.Lock()
	defer n.streams.mu.Unlock()
	n.streams.orders = append(n.streams.orders, o)
	end, ok := n.streams.ends[o.Request]
	if !ok {
		return protocol.Refuse(protocol.Unknown, "nothing is being answered as request %s", o.Request)
	}
	if o.End {
		close(end)
		delete(n.streams.ends, o.Request)
	}
	return nil
}

// stream answers in parts.
func (n *Node) stream(o *protocol.Verified, streams Streams) {
	subject := protocol.ReplySubject(o.Sender.Name, o.ID, n.Name)
	end := make(chan struct{})
	n.streams.mu.Lock()
	if n.streams.ends == nil {
		n.streams.ends = map[string]chan struct{}{}
	}
	n.streams.ends[o.ID] = end
	n.streams.mu.Unlock()
	part := 0
	err := streams(o, func(body any) {
		part++
		reply := protocol.Answer(n.Name, body, nil)
		reply.Part, reply.More = part, true
		n.nc.Load().Publish(subject, protocol.Encode(reply))
	}, end)
	reply := protocol.Answer(n.Name, nil, err)
	reply.Part = part + 1
	n.nc.Load().Publish(subject, protocol.Encode(reply))
}
