package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"strconv"
	"strings"
	"sync"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/protocol"
)

type forwardOptions struct {
	targets    []string
	localPort  int
	remotePort int
	remoteHost string
}

// portForwardCommand is port-forward. With overlay, ports are those of the node's address in the cluster's overlay
// network, as in the group cluster, else those of its loopback.
func (a *app) portForwardCommand(overlay bool) *cobra.Command {
	host, where := "127.0.0.1", "on its loopback"
	if overlay {
		host, where = protocol.OverlayHost, "of its address in the overlay network"
	}
	var o forwardOptions
	c := &cobra.Command{
		Use:   "port-forward NODE [LOCAL:]REMOTE...",
		Short: "Reach ports of a node from here, through its agent",
		Long: `Listen on ports of this machine's loopback, and join each connection to one with a port of a node, through a tunnel to
its agent, until Ctrl-C. Nothing of the node has to be reachable.

REMOTE is a port ` + where + `, or HOST:PORT of something that the node reaches and its policy allows
(docs/policy.md). LOCAL is the port here, the same one if none is given, and 0 for any that is free.`,
		Example: `  nix-infra port-forward db1 5432
  nix-infra port-forward web1 8080:80 8443:443
  nix-infra port-forward web1 5432:db.internal:5432
  nix-infra port-forward --target=db1 --local-port=3307 --remote-port=3306`,
		RunE: func(c *cobra.Command, args []string) error {
			node, forwards, err := o.forwards(args, host)
			if err != nil {
				return err
			}
			return a.portForward(c.Context(), node, forwards)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&o.targets, "target", nil, "the `node`, in place of NODE; of several, the first")
	f.IntVar(&o.localPort, "local-port", 0, "in place of LOCAL")
	f.IntVar(&o.remotePort, "remote-port", 0, "in place of REMOTE")
	f.StringVar(&o.remoteHost, "remote-host", "", "with --remote-port, something that the node reaches (default: the node itself)")
	return c
}

// forward is a port here, and what it leads to.
type forward struct {
	local  string // port
	remote string // host:port, as the node understands it
}

// forwards tells the node and the ports from what was given.
func (o *forwardOptions) forwards(args []string, host string) (string, []forward, error) {
	node, specs, err := oneNode("port-forward", o.targets, args)
	if err != nil {
		return "", nil, err
	}
	var all []forward
	if o.remotePort != 0 {
		local := o.localPort
		if local == 0 {
			local = o.remotePort
		}
		all = append(all, forward{strconv.Itoa(local), net.JoinHostPort(first(o.remoteHost, host), strconv.Itoa(o.remotePort))})
	} else if o.localPort != 0 || o.remoteHost != "" {
		return "", nil, errors.New("--local-port and --remote-host need --remote-port")
	}
	for _, s := range specs {
		all = append(all, parseForward(s, host))
	}
	if len(all) == 0 {
		return "", nil, fmt.Errorf("which port? Name it (nix-infra port-forward %s 5432)", node)
	}
	for _, f := range all {
		if n, err := strconv.Atoi(f.local); err != nil || n < 0 || n > 65535 {
			return "", nil, fmt.Errorf("port %q of this machine is not a number from 0 to 65535", f.local)
		}
		if err := protocol.CheckAddress(f.remote); err != nil {
			return "", nil, err
		}
	}
	return node, all, nil
}

// parseForward reads [LOCAL:][HOST:]PORT; an IPv6 address stands in brackets.
func parseForward(s, host string) forward {
	port, rest := s, ""
	if i := strings.LastIndex(s, ":"); i >= 0 {
		rest, port = s[:i], s[i+1:]
	}
	local := port
	if before, after, more := strings.Cut(rest, ":"); rest != "" && isNumber(before) {
		local, rest = before, after
		if more && rest == "" {
			return forward{local, s} // as in 80::80, which is no address
		}
	}
	if rest != "" {
		host = rest
		if bare, ok := strings.CutPrefix(rest, "["); ok && strings.HasSuffix(bare, "]") {
			host = strings.TrimSuffix(bare, "]")
		}
	}
	return forward{local, net.JoinHostPort(host, port)}
}

func isNumber(s string) bool {
	_, err := strconv.ParseUint(s, 10, 32)
	return err == nil
}

func (a *app) portForward(ctx context.Context, name string, forwards []forward) error {
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	node, err := s.Node(ctx, name)
	if err != nil {
		return err
	}
	var saying sync.Mutex
	var listening []*listening
	defer func() {
		for _, l := range listening {
			l.close()
		}
	}()
	for _, f := range forwards {
		l, err := a.listen(ctx, s, node, f)
		if err != nil {
			return err
		}
		l.saying = &saying
		listening = append(listening, l)
	}
	var connections sync.WaitGroup
	for _, l := range listening {
		l.announce()
		for _, socket := range l.sockets {
			connections.Go(func() { l.serve(ctx, socket, &connections) })
		}
	}
	<-ctx.Done()
	for _, l := range listening {
		l.close()
	}
	connections.Wait()
	return ctx.Err()
}

// listening is a forward with its sockets here.
type listening struct {
	*app
	to      *tunnels
	local   string // host:port
	sockets []net.Listener
	saying  *sync.Mutex // of connections that end at the same time
}

// listen opens a forward, and finds out whether there is something to forward to, rather than have the first connection
// find that out.
func (a *app) listen(ctx context.Context, s *session, node *protocol.NodeState, f forward) (*listening, error) {
	to := &tunnels{s, node, f.remote}
	socket, err := net.Listen("tcp", net.JoinHostPort("127.0.0.1", f.local))
	if errors.Is(err, syscall.EADDRINUSE) {
		return nil, fmt.Errorf("port %s of this machine is taken; name another one (nix-infra port-forward %s 0:%s takes any)", f.local, node.Name, f.remote)
	} else if err != nil {
		return nil, fmt.Errorf("can't listen on port %s of this machine: %w", f.local, err)
	}
	l := &listening{app: a, to: to, local: socket.Addr().String(), sockets: []net.Listener{socket}}
	probe, err := to.open(ctx)
	if err != nil {
		l.close()
		return nil, err
	}
	giveUp(probe)
	_, port, _ := net.SplitHostPort(l.local)
	if six, err := net.Listen("tcp", net.JoinHostPort("::1", port)); err == nil { // where there is IPv6, programs may try it first
		l.sockets = append(l.sockets, six)
	}
	return l, nil
}

func (l *listening) close() {
	for _, s := range l.sockets {
		s.Close()
	}
}

// forwardDocument is what `port-forward --json` says.
type forwardDocument struct {
	Event  string `json:"event"` // listening, or closed: a connection ended
	Node   string `json:"node"`
	Local  string `json:"local"`
	Remote string `json:"remote"`

	*closedConnection
}

type closedConnection struct {
	Sent     int64  `json:"sent"` // bytes, to the node
	Received int64  `json:"received"`
	Error    string `json:"error"`
}

func (l *listening) announce() {
	l.saying.Lock()
	defer l.saying.Unlock()
	l.say("%s → %s %s\n", l.local, l.to.node.Name, l.to.to)
	if l.json {
		l.document(forwardDocument{"listening", l.to.node.Name, l.local, l.to.to, nil})
	}
}

func (l *listening) serve(ctx context.Context, socket net.Listener, connections *sync.WaitGroup) {
	for {
		c, err := socket.Accept()
		if err != nil {
			return // it was closed
		}
		connections.Go(func() { l.connect(ctx, c.(*net.TCPConn)) })
	}
}

func (l *listening) connect(ctx context.Context, local *net.TCPConn) {
	closed := &closedConnection{}
	c, err := l.to.open(ctx)
	if err != nil {
		_ = local.SetLinger(0) // whoever connected sees that it was not served
		local.Close()
	} else {
		err = join(ctx, c, local, "the connection to "+l.local)
		closed.Sent, closed.Received, _ = c.Counts()
	}
	l.saying.Lock()
	defer l.saying.Unlock()
	if err != nil && ctx.Err() == nil {
		closed.Error = message(err)
		l.note("%s: %s", l.local, closed.Error)
	}
	if l.json {
		l.document(forwardDocument{"closed", l.to.node.Name, l.local, l.to.to, closed})
	}
}
