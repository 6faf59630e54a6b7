package local

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	requestTime = 10 * time.Second // for the line of a request
	bundleTime  = 10 * time.Minute // for a bundle
	answerTime  = 10 * time.Second // for one line of an answer to be taken
	maxClients  = 8
)

// Engine is what a client can use of the agent's.
type Engine interface {
	Apply(bundle io.Reader) (deployment string, err error)
	RollBack(ctx context.Context, r protocol.Rollback) (deployment string, err error)
	Follow(ctx context.Context, deployment string, tell func(protocol.Event) error) error
}

// Server answers on a socket.
type Server struct {
	Path   string
	Engine Engine
	Log    *slog.Logger
}

// Run serves until ctx ends. A socket that can't be made is logged and no error: the agent is of use
// without it.
func (s *Server) Run(ctx context.Context) error {
	l, err := s.listen()
	if err != nil {
		s.Log.Error("nothing can be ordered on the node itself", "error", err)
		return nil
	}
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	var clients sync.WaitGroup
	defer clients.Wait()
	slots := make(chan struct{}, maxClients)
	for {
		c, err := l.AcceptUnix()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			s.Log.Warn("a client can't be answered", "error", err)
			select {
			case <-ctx.Done():
			case <-time.After(time.Second):
			}
			continue
		}
		select {
		case slots <- struct{}{}:
		default:
			c.Close()
			continue
		}
		clients.Go(func() {
			defer func() { <-slots }()
			defer c.Close()
			stop := context.AfterFunc(ctx, func() { c.Close() })
			defer stop()
			s.serve(ctx, c)
		})
	}
}

// listen makes the socket. Only one agent at a time has the folder, so one that is there was left behind.
func (s *Server) listen() (*net.UnixListener, error) {
	if err := os.Remove(s.Path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.Path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(s.Path, 0o600); err != nil {
		l.Close()
		return nil, err
	}
	return l, nil
}

// serve answers one client.
func (s *Server) serve(ctx context.Context, c *net.UnixConn) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	say := func(a answer) error {
		if err := c.SetWriteDeadline(time.Now().Add(answerTime)); err != nil {
			return err
		}
		_, err := c.Write(append(protocol.Encode(a), '\n'))
		return err
	}
	deployment, err := s.order(ctx, c)
	if err == nil {
		err = say(answer{Deployment: deployment})
	}
	if err == nil {
		go func() {
			_, _ = io.Copy(io.Discard, c) // it ends when the client goes away
			cancel()
		}()
		err = s.Engine.Follow(ctx, deployment, func(ev protocol.Event) error { return say(answer{Event: &ev}) })
	}
	var refusal *protocol.Refusal
	if err != nil && deployment == "" && !errors.As(err, &refusal) {
		refusal = protocol.Refuse(protocol.Invalid, "%v", err)
	}
	if refusal != nil || errors.As(err, &refusal) {
		_ = say(answer{Refused: refusal}) // there is nobody else to tell
	}
}

// order does what the client's line asks for.
func (s *Server) order(ctx context.Context, c *net.UnixConn) (deployment string, err error) {
	if err := allowed(c); err != nil {
		return "", err
	}
	if err := c.SetReadDeadline(time.Now().Add(requestTime)); err != nil {
		return "", err
	}
	in := bufio.NewReaderSize(c, 64<<10)
	line, err := in.ReadSlice('\n')
	if err != nil {
		return "", protocol.Refuse(protocol.Malformed, "the request can't be read: %v", err)
	}
	var r request
	if err := json.Unmarshal(line, &r); err != nil {
		return "", protocol.Refuse(protocol.Malformed, "the request: %v", err)
	}
	if r.Version != protocol.Version {
		return "", protocol.Refuse(protocol.OtherVersion, "the request is of version %d, the agent that runs speaks version %d; restart it", r.Version, protocol.Version)
	}
	if err := c.SetReadDeadline(time.Now().Add(bundleTime)); err != nil {
		return "", err
	}
	switch {
	case r.Do == doApply:
		deployment, err = s.Engine.Apply(io.LimitReader(in, r.Size))
	case r.Do == doRollBack && r.Rollback != nil:
		deployment, err = s.Engine.RollBack(ctx, *r.Rollback)
	case r.Do == doFollow && r.Deployment != "":
		deployment = r.Deployment
	default:
		err = fmt.Errorf("the agent that runs can't be asked to %.20q", r.Do)
	}
	if err != nil {
		return "", err
	}
	return deployment, c.SetReadDeadline(time.Time{})
}

// allowed tells whether the client is root, or who the agent itself runs as. The socket's mode says the same;
// this holds from its first moment on.
func allowed(c *net.UnixConn) error {
	raw, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var peer *unix.Ucred
	var errPeer error
	err = raw.Control(func(fd uintptr) { peer, errPeer = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED) })
	if err = errors.Join(err, errPeer); err != nil {
		return err
	}
	if peer.Uid != 0 && int(peer.Uid) != os.Geteuid() {
		return protocol.Refuse(protocol.OverRole, "only root may order something here")
	}
	return nil
}
