package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"time"
)

// network is the /24 of every lab. It exists only inside the labs' namespaces, so labs don't meet there.
const network = "10.77.0"

// guardRoute keeps this machine from the labs' addresses. The metric makes it beat the default route only, and
// never replace a network that the machine really is on.
var guardRoute = []string{"unreachable", network + ".0/24", "metric", "4096"}

// maxNodes is how many addresses .11 and up have.
const maxNodes = 240

// Dots separate the parts of a namespace's name: labels have none, so no two labs can collide.
const netnsPrefix = "nix-infra-lab."

func (l *Lab) switchNS() string { return filepath.Join("/run/netns", netnsPrefix+l.name) }

func (n *Node) netns() string { return n.lab.switchNS() + "." + n.Name }

// link is the switch's end of the node's cable. It lives in the lab's own namespace, so it need not name the
// lab, and a number keeps it below the 15 characters that an interface name may have.
func (n *Node) link() string { return fmt.Sprintf("v%d", n.index) }

// ensureSwitch makes the switch: a bridge with the operator's address, in a namespace of its own.
func (l *Lab) ensureSwitch(ctx context.Context) error {
	// A test that forgets to enter the lab's network must not reach a real one of these addresses.
	if _, err := run(ctx, append([]string{"ip", "route", "replace"}, guardRoute...)...); err != nil {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	ns := filepath.Base(l.switchNS())
	if _, err := run(ctx, "ip", "-n", ns, "link", "show", "up", "dev", "br0"); err == nil {
		return nil
	}
	_, _ = run(ctx, "ip", "netns", "del", ns) // half-made by somebody who was killed
	for _, args := range [][]string{
		{"netns", "add", ns},
		{"-n", ns, "link", "set", "lo", "up"},
		{"-n", ns, "link", "add", "br0", "type", "bridge", "stp_state", "0", "forward_delay", "0"},
		{"-n", ns, "addr", "add", l.HostIP() + "/24", "dev", "br0"},
		{"-n", ns, "link", "set", "br0", "up"},
	} {
		if _, err := run(ctx, append([]string{"ip"}, args...)...); err != nil {
			return fmt.Errorf("lab %s: switch: %w", l.name, err)
		}
	}
	return nil
}

// ensureCable makes the node's namespace and its link to the switch. What lies inside is set at every boot.
func (n *Node) ensureCable(ctx context.Context) error {
	ns, sw := filepath.Base(n.netns()), filepath.Base(n.lab.switchNS())
	if _, err := run(ctx, "ip", "-n", sw, "link", "show", "dev", n.link()); err == nil {
		return nil
	}
	_, _ = run(ctx, "ip", "netns", "del", ns)
	for _, args := range [][]string{
		{"netns", "add", ns},
		// A fixed address: a node that was made anew must not meet its peers' stale ARP entries.
		{"-n", ns, "link", "add", "eth0", "address", fmt.Sprintf("02:00:0a:4d:00:%02x", 10+n.index),
			"type", "veth", "peer", "name", n.link(), "netns", sw},
		{"-n", sw, "link", "set", n.link(), "master", "br0", "up"},
	} {
		if _, err := run(ctx, append([]string{"ip"}, args...)...); err != nil {
			return fmt.Errorf("node %s: network: %w", n.Name, err)
		}
	}
	return nil
}

// Cut pulls the node's cable. It stays out over reboots.
func (n *Node) Cut(ctx context.Context) error { return n.setLink(ctx, "down") }

// Heal plugs the cable in again.
func (n *Node) Heal(ctx context.Context) error { return n.setLink(ctx, "up") }

func (n *Node) setLink(ctx context.Context, to string) error {
	if _, err := run(ctx, "ip", "-n", filepath.Base(n.lab.switchNS()), "link", "set", n.link(), to); err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	return nil
}

// Dial connects from the operator's side, for clients that live in the test's own process. The address must be
// numeric: names would be looked up outside.
func (l *Lab) Dial(ctx context.Context, proto, address string) (net.Conn, error) {
	var conn net.Conn
	err := inNetwork(l.switchNS(), func() (err error) {
		conn, err = (&net.Dialer{}).DialContext(ctx, proto, address)
		return err
	})
	return conn, err
}

// Listen listens on the operator's side, for servers that live in the test's own process.
func (l *Lab) Listen(ctx context.Context, proto, address string) (net.Listener, error) {
	var listener net.Listener
	err := inNetwork(l.switchNS(), func() (err error) {
		listener, err = (&net.ListenConfig{}).Listen(ctx, proto, address)
		return err
	})
	return listener, err
}

// removeNetwork removes all namespaces of this lab, those that lab.json does not know of too.
func (l *Lab) removeNetwork(ctx context.Context) error {
	names, err := os.ReadDir("/run/netns")
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var errs []error
	for _, e := range names {
		if e.Name() == netnsPrefix+l.name || strings.HasPrefix(e.Name(), netnsPrefix+l.name+".") {
			_, err := run(ctx, "ip", "netns", "del", e.Name())
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// removeGuardRoute takes the unreachable route away with the last lab.
func removeGuardRoute(ctx context.Context) error {
	left, err := filepath.Glob(filepath.Join("/run/netns", netnsPrefix+"*"))
	if err != nil || len(left) > 0 {
		return err
	}
	_, _ = run(ctx, append([]string{"ip", "route", "del"}, guardRoute...)...)
	return nil
}

// answerTime is more than a node's sshd takes for its greeting where the machine has much to do.
const answerTime = 10 * time.Second

// dialTimeout is a TCP connection attempt that gives up before a firewall that drops would let it, and whose reading ends.
func dialTimeout(ctx context.Context, address string) (net.Conn, error) {
	conn, err := (&net.Dialer{Timeout: answerTime}).DialContext(ctx, "tcp", address)
	if err != nil {
		return nil, err
	}
	return conn, conn.SetDeadline(time.Now().Add(answerTime))
}
