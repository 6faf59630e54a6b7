package local

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	againAfter  = 500 * time.Millisecond
	againWithin = 3 * time.Minute // of an agent that a deployment replaces
)

// Client speaks to the agent that listens on a socket.
type Client struct {
	Path string
	Tell func(deployment string, ev protocol.Event) // of each event; may be nil
}

// Apply hands a bundle of so many bytes over and follows it to its end, which it returns. A refusal is a *protocol.Refusal. Where
// ctx ends first, deployment is what goes on without the client.
func (c *Client) Apply(ctx context.Context, bundle io.Reader, size int64) (deployment string, end protocol.Event, err error) {
	return c.run(ctx, request{Version: protocol.Version, Do: doApply, Size: size}, io.LimitReader(bundle, size))
}

// RollBack orders a rollback, and is else as Apply.
func (c *Client) RollBack(ctx context.Context, r protocol.Rollback) (deployment string, end protocol.Event, err error) {
	return c.run(ctx, request{Version: protocol.Version, Do: doRollBack, Rollback: &r}, nil)
}

// run orders, and follows over as many connections as it takes.
func (c *Client) run(ctx context.Context, r request, bundle io.Reader) (deployment string, end protocol.Event, err error) {
	deployment, end, err = c.ask(ctx, r, bundle)
	for lost := time.Now(); deployment != "" && err != nil && ctx.Err() == nil; {
		var refusal *protocol.Refusal
		if errors.As(err, &refusal) {
			break
		}
		if time.Since(lost) > againWithin {
			err = fmt.Errorf("the agent doesn't answer any more (%w); see nix-infra-agent status and journalctl -u nix-infra-agent", err)
			break
		}
		select {
		case <-ctx.Done():
		case <-time.After(againAfter):
		}
		var again string
		if again, end, err = c.ask(ctx, request{Version: protocol.Version, Do: doFollow, Deployment: deployment}, nil); again != "" {
			lost = time.Now()
		}
	}
	if ctx.Err() != nil {
		err = ctx.Err()
	}
	return deployment, end, err
}

// ask is one connection. With a deployment, the order was taken over, whatever the error.
func (c *Client) ask(ctx context.Context, r request, bundle io.Reader) (deployment string, end protocol.Event, err error) {
	conn, err := (&net.Dialer{Timeout: answerTime}).DialContext(ctx, "unix", c.Path)
	if err != nil {
		return "", end, fmt.Errorf("the agent can't be reached, as root, on %s: %w; is it running? (systemctl status nix-infra-agent)", c.Path, err)
	}
	defer conn.Close()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	sent := make(chan error, 1)
	go func() { sent <- send(conn, r, bundle) }()
	lines := bufio.NewScanner(conn)
	lines.Buffer(nil, maxLine)
	for lines.Scan() {
		var a answer
		if err := json.Unmarshal(lines.Bytes(), &a); err != nil {
			return deployment, end, fmt.Errorf("the agent's answer can't be read: %w", err)
		}
		switch {
		case a.Refused != nil:
			return deployment, end, a.Refused
		case a.Deployment != "":
			deployment = a.Deployment
		case a.Event != nil:
			if c.Tell != nil {
				c.Tell(deployment, *a.Event)
			}
			if a.Event.Phase.Ended() {
				return deployment, *a.Event, nil
			}
		}
	}
	err = lines.Err()
	conn.Close()
	if cause := <-sent; errors.Is(cause, errShort) {
		return deployment, end, cause
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	return deployment, end, fmt.Errorf("the agent broke off: %w", err)
}

var errShort = errors.New("the bundle became shorter")

// send breaks the connection off where the bundle turns out to be shorter than it was.
func send(conn net.Conn, r request, bundle io.Reader) error {
	_, err := conn.Write(append(protocol.Encode(r), '\n'))
	if err != nil || bundle == nil {
		return err
	}
	n, err := io.Copy(conn, bundle)
	if err == nil && n < r.Size {
		conn.Close()
		err = fmt.Errorf("%w: it ended after %d of %d bytes", errShort, n, r.Size)
	}
	return err
}
