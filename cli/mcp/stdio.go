package mcp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"

	"github.com/mark3labs/mcp-go/server"
)

// maxMessage is how long a message of a client may be, in bytes.
const maxMessage = 4 << 20

// callsAtOnce is how many calls of a client are worked on at the same time over stdio.
const callsAtOnce = 8

// ServeStdio speaks with one client, until in ends or ctx does. Nothing but the protocol goes to out.
func (s *Server) ServeStdio(ctx context.Context, in io.Reader, out io.Writer) error {
	stdio := server.NewStdioServer(s.mcp)
	server.WithWorkerPoolSize(callsAtOnce)(stdio)
	stdio.SetErrorLogger(slog.NewLogLogger(s.Log.Handler(), slog.LevelWarn))
	err := stdio.Listen(ctx, &lines{in: bufio.NewReaderSize(in, 64<<10)}, out)
	if errors.Is(err, context.Canceled) {
		return nil
	}
	return err
}

// lines reads lines that are no longer than a message may be. One that is longer becomes a line that is no message, which the client
// is told of, and takes no memory.
type lines struct {
	in   *bufio.Reader
	left []byte
	err  error
}

func (l *lines) Read(p []byte) (int, error) {
	for len(l.left) == 0 {
		if l.err != nil {
			return 0, l.err
		}
		l.left, l.err = l.line()
	}
	n := copy(p, l.left)
	l.left = l.left[n:]
	return n, nil
}

// tooLong stands in the place of a line that is too long. It is no JSON.
var tooLong = []byte("(a message that is too long)\n")

func (l *lines) line() (line []byte, err error) {
	long := false
	for {
		part, err := l.in.ReadSlice('\n')
		if long = long || len(line)+len(part) > maxMessage; !long {
			line = append(line, part...)
		}
		if errors.Is(err, bufio.ErrBufferFull) {
			continue
		}
		switch {
		case long:
			return tooLong, err
		case err == nil && len(bytes.TrimSpace(line)) == 0:
			line = line[:0] // nothing is said
			continue
		}
		return line, err
	}
}
