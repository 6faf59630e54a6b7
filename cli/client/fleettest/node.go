package fleettest

import (
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// Node is an enrolled node that is connected and beats.
type Node struct {
	Name   string
	fleet  *Fleet
	nc     atomic.Pointer[nats.Conn]
	script Script // under fleet.mu

	streams underWay
	tunnels tunnels
}

// XKey is the node's private curve key.
func (f *Fleet) XKey(node string) nkeys.KeyPair {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.xkeys[node]
}

// Script is what a node does.
type Script struct {
	// Ends tells how the node ends a manifest; nil: confirmed.
	Ends func(m *protocol.Manifest) protocol.Report
	// Dies is the phase in which the node goes off the network, and the controller calls it lost.
	Dies protocol.Phase
	// Lines are the build log of every manifest.
	Lines []string
	// Answers is what the node says to a request; nil: yes, and to a ping a Pong.
	Answers func(o *protocol.Verified) (any, error)
	// Streams is how it answers the actions that it has here, in parts.
	Streams map[protocol.Action]Streams
	// Tunnels is what is at the other end of a tunnel to an address: what it returns has the node's end, and closes it.
	Tunnels func(to string) (func(c *tunnel.Conn), error)
}

// Script has the node do so from here on.
func (n *Node) Script(s Script) {
	n.fleet.mu.Lock()
	defer n.fleet.mu.Unlock()
	n.script = s
}

func (n *Node) does() Script {
	n.fleet.mu.Lock()
	defer n.fleet.mu.Unlock()
	return n.script
}

// Register makes a node known that was never seen.
func (f *Fleet) Register(name string, tags ...string) {
	key, err := nkeys.CreateUser()
	must(f.t, err)
	public, err := key.PublicKey()
	must(f.t, err)
	xkey, err := nkeys.CreateCurveKeys()
	must(f.t, err)
	curve, err := xkey.PublicKey()
	must(f.t, err)
	jwt, err := f.Authority.Keys.IssueNode(name, public, curve)
	must(f.t, err)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.xkeys[name] = xkey
	f.records[name] = &protocol.NodeState{NodeRecord: protocol.NodeRecord{
		JWT: jwt, Name: name, Tags: tags, IPv4: "192.0.2.7", System: "x86_64-linux", By: "test", Enrolled: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}}
}

// Add makes a node that is connected.
func (f *Fleet) Add(name string, tags ...string) *Node {
	f.Register(name, tags...)
	n := &Node{Name: name, fleet: f}
	n.connect()
	f.mu.Lock()
	f.nodes[name] = n
	f.mu.Unlock()
	n.beat(protocol.Beat{})
	return n
}

func (n *Node) connect() {
	nc := n.fleet.Connect(n.Name, protocol.Node)
	n.nc.Store(nc)
	for _, subject := range protocol.NodeRequests(n.Name) {
		_, err := nc.Subscribe(subject, n.serve)
		must(n.fleet.t, err)
	}
	_, err := nc.Subscribe(protocol.NodeTunnels(n.Name), n.frame)
	must(n.fleet.t, err)
	must(n.fleet.t, nc.Flush())
}

// Vanish takes the node off the network; the controller knows at once.
func (n *Node) Vanish() {
	n.nc.Load().Close()
	n.fleet.mu.Lock()
	defer n.fleet.mu.Unlock()
	delete(n.fleet.nodes, n.Name)
	if r := n.fleet.records[n.Name]; r != nil {
		r.Online = false
	}
}

// Return brings a node back that vanished.
func (n *Node) Return() {
	n.connect()
	n.fleet.mu.Lock()
	n.fleet.nodes[n.Name] = n
	n.fleet.mu.Unlock()
	n.beat(protocol.Beat{})
	n.fleet.mu.Lock()
	defer n.fleet.mu.Unlock()
	for _, d := range n.fleet.deployments {
		n.fleet.advance(d)
	}
}

// Silence takes the node off the network, and the controller has not noticed yet.
func (n *Node) Silence() {
	n.nc.Load().Close()
	n.fleet.mu.Lock()
	defer n.fleet.mu.Unlock()
	delete(n.fleet.nodes, n.Name)
}

// Say publishes anything as this node, as far as the broker lets it.
func (n *Node) Say(subject string, data []byte) {
	n.nc.Load().Publish(subject, data)
	n.nc.Load().Flush()
}

func (n *Node) beat(b protocol.Beat) {
	now := time.Now().UTC()
	b.Version, b.Interval, b.System, b.NixOS, b.Agent = protocol.Version, 10, "x86_64-linux", "25.11", "test"
	n.fleet.mu.Lock()
	defer n.fleet.mu.Unlock()
	r := n.fleet.records[n.Name]
	r.Online, r.LastSeen, r.Beat = true, &now, &b
}

func (n *Node) serve(m *nats.Msg) {
	o, id, err := n.fleet.verified(m.Data, n.Name, protocol.Everyone)
	if id.Name == "" {
		return
	}
	var body any
	script := n.does()
	if err == nil && script.Streams[o.Action] != nil {
		go n.stream(o, script.Streams[o.Action])
		return
	}
	switch answers := script.Answers; {
	case err != nil:
	case o.Action == protocol.OpenTunnel && script.Tunnels != nil:
		body, err = n.openTunnel(o, script.Tunnels)
	case o.Action == protocol.Stream:
		err = n.order(o.Payload)
	case answers != nil:
		body, err = answers(o)
	case o.Action == protocol.Ping:
		body = protocol.Pong{Agent: "test", Time: time.Now().UTC()}
	}
	header := protocol.Header{}
	if o != nil {
		header = o.Header
	}
	n.nc.Load().Publish(protocol.ReplySubject(id.Name, header.ID, n.Name), protocol.Encode(protocol.Answer(n.Name, body, err)))
}

// deploy goes through a manifest as an agent would, in no time.
func (n *Node) deploy(m *protocol.Manifest) {
	say := func(e protocol.Event) {
		e.Version, e.Time = protocol.Version, time.Now().UTC()
		n.Say(protocol.EventSubject(n.Name, m.Deployment), protocol.Encode(e)) // and is heard before what comes next is known
	}
	script := n.does()
	for _, e := range []protocol.Event{{Phase: protocol.Building, Lines: script.Lines}, {Phase: protocol.Activating}} {
		n.fleet.progress(m.Deployment, n.Name, e.Phase, nil)
		say(e)
		if script.Dies == e.Phase {
			n.Vanish()
			return
		}
	}
	report := protocol.Report{Phase: protocol.Confirmed, Closure: "/nix/store/00000000000000000000000000000000-nixos-system", Generation: 2, Built: true}
	if script.Ends != nil {
		report = script.Ends(m)
	}
	report.Version, report.Deployment, report.Serial, report.Mode = protocol.Version, m.Deployment, m.Serial, m.Mode
	report.Started, report.Ended = m.Created, m.Created.Add(time.Second)
	n.beat(protocol.Beat{Serial: m.Serial, Deployment: m.Deployment, Phase: report.Phase, Reason: report.Reason, Closure: report.Closure, Generation: report.Generation})
	n.fleet.progress(m.Deployment, n.Name, report.Phase, &report)
	say(protocol.Event{Phase: report.Phase, Reason: report.Reason})
}
