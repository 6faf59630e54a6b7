package fleettest

import (
	"net"
	"sync"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// tunnels are a node's, by the subject on which their frames come.
type tunnels struct {
	mu     sync.Mutex
	all    map[string]*tunnel.Conn
	orders []protocol.TunnelOrder
}

// TunnelOrders are the orders to open a tunnel that the node got.
func (n *Node) TunnelOrders() []protocol.TunnelOrder {
	n.tunnels.mu.Lock()
	defer n.tunnels.mu.Unlock()
	return append([]protocol.TunnelOrder(nil), n.tunnels.orders...)
}

func (n *Node) frame(m *nats.Msg) {
	n.tunnels.mu.Lock()
	c := n.tunnels.all[m.Subject]
	n.tunnels.mu.Unlock()
	if c != nil {
		c.Deliver(m.Data)
	}
}

// openTunnel makes the node's end of a tunnel, as an agent does.
func (n *Node) openTunnel(o *protocol.Verified, open func(to string) (func(*tunnel.Conn), error)) (any, error) {
	order, err := protocol.Decode[protocol.TunnelOrder](o.Payload)
	if err != nil {
		return nil, err
	}
	n.tunnels.mu.Lock()
	n.tunnels.orders = append(n.tunnels.orders, order)
	n.tunnels.mu.Unlock()
	serve, err := open(order.To)
	if err != nil {
		return nil, err
	}
	once, err := tunnel.NewKey()
	if err != nil {
		return nil, err
	}
	reply := protocol.TunnelReply{Public: once.PublicKey().Bytes(), Window: tunnel.DefaultWindow, Rule: "test"}
	keys, err := tunnel.NodeKeys(once, n.fleet.XKey(n.Name), tunnel.Agreed{User: o.Sender.Name, Node: n.Name, ID: o.ID, Order: order, Reply: reply})
	if err != nil {
		return nil, err
	}
	c := tunnel.New(tunnel.Options{Keys: keys, Window: reply.Window, PeerWindow: order.Window, Local: n.Name, Remote: o.Sender.Name,
		Send: func(frame []byte) error {
			return n.nc.Load().Publish(protocol.ReplySubject(o.Sender.Name, o.ID, n.Name), frame)
		}})
	n.tunnels.mu.Lock()
	defer n.tunnels.mu.Unlock()
	if n.tunnels.all == nil {
		n.tunnels.all = map[string]*tunnel.Conn{}
	}
	n.tunnels.all[protocol.TunnelSubject(n.Name, o.Sender.Name, o.ID)] = c
	go func() {
		<-c.Heard()
		serve(c)
	}()
	return reply, nil
}

// Dial is a Script's Tunnels that connects to the address itself.
func Dial(to string) (func(*tunnel.Conn), error) {
	conn, err := net.Dial("tcp", to)
	if err != nil {
		return nil, protocol.Refuse(protocol.Failed, "%v", err)
	}
	return func(c *tunnel.Conn) { _ = tunnel.Join(c, conn.(*net.TCPConn), to) }, nil
}
