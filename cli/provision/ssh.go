package provision

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/cli/project"
)

// Target is a machine as SSH reaches it.
type Target struct {
	User  string
	Host  string
	Port  int
	Jumps []Target // hosts on the way, from the first

	Node        string   // whose host key it has to show, by whatever address; "": that of the address counts
	KeyFiles    []string // private keys; ones that don't exist are left out
	AgentSocket string   // of ssh-agent; "": none
	KnownHosts  string   // file with the pinned host keys, made when it is missing
	Timeout     time.Duration
}

// ParseTarget reads [user@]host[:port]; an IPv6 address with a port stands in brackets.
func ParseTarget(s string) (Target, error) {
	a, err := project.ParseSSHAddress(s)
	if err != nil {
		return Target{}, fmt.Errorf("--ssh %w", err)
	}
	return TargetOf(a), nil
}

// TargetOf is the machine at an address: root's, port 22, where it doesn't say.
func TargetOf(a project.SSHAddress) Target {
	return Target{User: cmp.Or(a.User, "root"), Host: a.Host, Port: cmp.Or(a.Port, 22), Timeout: 15 * time.Second}
}

// Through gives the target behind hosts that are reached with the same keys. One that is itself among them is reached
// through those before it.
func (t Target) Through(jumps []project.SSHAddress) Target {
	for _, a := range jumps {
		j := TargetOf(a)
		if j.Host == t.Host {
			break
		}
		j.KeyFiles, j.AgentSocket, j.KnownHosts, j.Timeout = t.KeyFiles, t.AgentSocket, t.KnownHosts, t.Timeout
		t.Jumps = append(t.Jumps, j)
	}
	return t
}

// Address is host:port.
func (t Target) Address() string { return net.JoinHostPort(t.Host, strconv.Itoa(t.Port)) }

// Machine is an open SSH connection on which commands run as root.
type Machine struct {
	HostKey ssh.PublicKey
	Unknown bool          // nobody had pinned a host key for it: this one is pinned now, for what it is worth
	UserKey ssh.PublicKey // which let us in

	client *ssh.Client
	user   string
	way    []*ssh.Client // to the hosts that it goes through, from the last
}

// Dial connects. The host's key is pinned at the first contact that succeeds; later, a machine with
// another key is refused.
func Dial(ctx context.Context, t Target) (*Machine, error) {
	way, err := t.way(ctx)
	if err != nil {
		return nil, err
	}
	m, err := t.dial(ctx, way)
	if err != nil {
		closeAll(way)
		return nil, err
	}
	return m, nil
}

// Open tells whether something takes connections at the machine's SSH port, or why not.
func (t Target) Open(ctx context.Context) error {
	way, err := t.way(ctx)
	if err != nil {
		return err
	}
	defer closeAll(way)
	ctx, cancel := context.WithTimeout(ctx, t.Timeout)
	defer cancel()
	conn, err := t.connect(ctx, way)
	if err != nil {
		return err
	}
	return conn.Close()
}

// way connects to the hosts that the target is reached through. The last is the first of them.
func (t Target) way(ctx context.Context) ([]*ssh.Client, error) {
	var way []*ssh.Client
	for _, j := range t.Jumps {
		m, err := j.dial(ctx, way)
		if err != nil {
			closeAll(way)
			return nil, fmt.Errorf("the way to %s: %w", t.Host, err)
		}
		way = append([]*ssh.Client{m.client}, way...)
	}
	return way, nil
}

// closeAll begins with the connection that starts here: to end one in another, something has to be sent through that.
func closeAll(way []*ssh.Client) {
	for _, c := range slices.Backward(way) {
		c.Close()
	}
}

// connect makes the TCP connection, from here or from the last host on the way.
func (t Target) connect(ctx context.Context, way []*ssh.Client) (net.Conn, error) {
	var conn net.Conn
	var err error
	if len(way) > 0 {
		conn, err = way[0].DialContext(ctx, "tcp", t.Address())
	} else {
		conn, err = new(net.Dialer).DialContext(ctx, "tcp", t.Address())
	}
	if err != nil {
		return nil, &unreachable{t.Address(), err}
	}
	return conn, nil
}

func (t Target) dial(ctx context.Context, way []*ssh.Client) (*Machine, error) {
	keys, closeAgent, err := t.keys()
	if err != nil {
		return nil, err
	}
	defer closeAgent()
	pins, err := t.pins()
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, t.Timeout)
	defer cancel()
	conn, err := t.connect(ctx, way)
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	m := &Machine{user: t.User, way: way}
	c, channels, requests, err := ssh.NewClientConn(conn, t.Address(), &ssh.ClientConfig{
		User: t.User, Auth: []ssh.AuthMethod{ssh.PublicKeys(noting(keys, &m.UserKey)...)},
		HostKeyCallback: pins.check, HostKeyAlgorithms: pins.algorithms,
	})
	if err != nil {
		conn.Close()
		return nil, t.explain(ctx, err)
	}
	if err := pins.keep(); err != nil {
		c.Close()
		return nil, err
	}
	m.HostKey, m.Unknown, m.client = pins.shown, pins.fresh != nil, ssh.NewClient(c, channels, requests)
	return m, nil
}

// Close ends the connection, whether the other end hears of it or not.
func (m *Machine) Close() error {
	closeAll(m.way)
	return m.client.Close()
}

// errChangedHost is a host that is not the one that was pinned.
type errChangedHost struct{ reason string }

func (e *errChangedHost) Error() string { return e.reason }

// unreachable is a machine to which there is no connection, for now.
type unreachable struct {
	address string
	err     error
}

func (e *unreachable) Unwrap() error { return e.err }

func (e *unreachable) Error() string {
	var name *net.DNSError
	text := ""
	switch {
	case errors.As(e.err, &name):
		text = "the name is not known: check it, or the DNS"
	case errors.Is(e.err, syscall.ECONNREFUSED):
		text = "connection refused: no SSH server listens there, or a firewall says so"
	case errors.Is(e.err, syscall.EHOSTUNREACH), errors.Is(e.err, syscall.ENETUNREACH):
		text = "no route to it: check the address and this machine's network"
	case errors.Is(e.err, context.DeadlineExceeded), errors.Is(e.err, os.ErrDeadlineExceeded):
		text = "no answer: it is off, or a firewall drops what comes"
	default:
		text = e.err.Error()
	}
	return fmt.Sprintf("can't reach %s: %s", e.address, text)
}

// refusedKeys is a machine that takes none of the keys.
type refusedKeys struct{ reason string }

func (e *refusedKeys) Error() string { return e.reason }

func (t Target) explain(ctx context.Context, err error) error {
	var changed *errChangedHost
	switch {
	case errors.As(err, &changed):
		return changed
	case ctx.Err() != nil:
		return &unreachable{t.Address(), context.Cause(ctx)}
	case strings.Contains(err.Error(), "unable to authenticate"):
		return &refusedKeys{fmt.Sprintf("%s@%s does not accept any of the keys (%s, ssh-agent); put the project's public key into its authorized_keys, or give --ssh-key",
			t.User, t.Address(), strings.Join(t.KeyFiles, ", "))}
	}
	if op := (*net.OpError)(nil); errors.As(err, &op) {
		err = op.Err // without the port of this end, which is another one with each try
	}
	return &unreachable{t.Address(), fmt.Errorf("no SSH: %w", err)}
}
