package command

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// tunnelCommand is for programs that want a stream: ssh, by its ProxyCommand.
func (a *app) tunnelCommand() *cobra.Command {
	socket := ""
	c := &cobra.Command{
		Use:    "tunnel NODE HOST:PORT",
		Short:  "Join stdin and stdout with an address on, or near, a node",
		Hidden: true,
		Long: `Join stdin and stdout with a TCP connection of a node's agent, for programs that take a command for their connection.
It never asks for a password: SECRETS_PASS, or a credentials file, has to be there.`,
		Example: `  ssh -o ProxyCommand='nix-infra tunnel -d /srv/fleet web1 127.0.0.1:22' web1`,
		RunE: func(c *cobra.Command, args []string) error {
			if socket != "" {
				return a.joinSocket(c.Context(), socket)
			}
			if len(args) != 2 {
				return errors.New("a NODE and HOST:PORT are needed; see nix-infra tunnel --help")
			}
			return a.tunnel(c.Context(), args[0], args[1])
		},
	}
	c.Flags().StringVar(&socket, "socket", "", "join with this socket instead: what nix-infra ssh has its ssh do")
	return c
}

// joinSocket is the ProxyCommand of nix-infra ssh: the tunnel is that process's.
func (a *app) joinSocket(ctx context.Context, path string) error {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", path)
	if err != nil {
		return err
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	return a.joinStdio(conn.(*net.UnixConn))
}

// lastWords is how long the end of a tunnel may take to get through to the node.
const lastWords = 5 * time.Second

func (a *app) tunnel(ctx context.Context, name, to string) error {
	if err := protocol.CheckAddress(to); err != nil {
		return err
	}
	a.batch = true // stdin is no one to ask
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	node, err := s.Node(ctx, name)
	if err != nil {
		return err
	}
	t := &tunnels{s, node, to}
	c, err := t.open(ctx)
	if err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { c.Reset("it was interrupted") })
	defer stop()
	if err := a.joinStdio(c); err != nil {
		giveUp(c)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		return &outcome{SomeFailed, fmt.Errorf("the tunnel to %s: %w", to, err)}
	}
	_ = c.Close()
	select {
	case <-c.Done():
	case <-time.After(lastWords):
	}
	return nil
}

// joinStdio copies stdin there, and to stdout what comes from there, until that ends.
func (a *app) joinStdio(s tunnel.Stream) error {
	go func() {
		if _, err := io.Copy(s, a.Stdin); err == nil {
			_ = s.CloseWrite() // where the other side is gone, the copy back shows it
		}
	}()
	_, err := io.Copy(a.Stdout, s)
	return err
}
