package transfer

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// Conn is a stream whose directions end apart.
type Conn interface {
	net.Conn
	CloseWrite() error
}

// Source is a file that is sent.
type Source interface {
	// File describes it: the same each time, until Refresh was called.
	File() File
	// Open opens its bytes.
	Open() (io.ReadSeekCloser, error)
	// Refresh describes it anew: its bytes were not those that File told of.
	Refresh() error
}

// State is what became of a file.
type State string

const (
	Written   State = "written"
	Unchanged State = "unchanged" // the node had it already
	Refused   State = "refused"   // the node does not take it, or it changes all the time
)

// Watcher is told how it goes. Has comes from another goroutine than the rest, and maybe at the same time.
type Watcher struct {
	// Has is told of bytes that the node has of the file in turn: those that were there already, and those that went out.
	Has func(bytes int64)
	// Again is told of bytes that Has told of and that do not count: the file starts anew.
	Again func(bytes int64)
	// Done is told of each file.
	Done func(f File, s State, reason error)
}

// attempts is how often a file is sent whose bytes are not those that were announced: once anew where what the node had of
// it was bad, once where it changed here meanwhile, and once more.
const attempts = 3

// pending is a file that is to be sent.
type pending struct {
	Source
	tried int
}

// Send sends files into a folder of a node. An error means that the transfer broke off; files that were refused alone are
// told to the watcher. What was done is kept by the node, also of the file in turn, and the next Send goes on from there.
func Send(ctx context.Context, conn Conn, to string, files []Source, w Watcher) error {
	stop := context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	err := send(conn, to, files, w)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

func send(conn Conn, to string, files []Source, w Watcher) error {
	if err := Write(conn, Hello{Version: Version, To: to}); err != nil {
		return err
	}
	welcome, err := Read[Welcome](conn)
	if err != nil {
		return broken(err)
	}
	if welcome.Refused != nil {
		return welcome.Refused
	}
	queue := make([]pending, len(files))
	for i, f := range files {
		queue[i] = pending{Source: f}
	}
	for len(queue) > 0 {
		n := min(len(queue), MaxFiles)
		again, err := sendSome(conn, queue[:n], w)
		if err != nil {
			return err
		}
		queue = append(queue[n:], again...)
	}
	if err := conn.CloseWrite(); err != nil {
		return err
	}
	if _, err := Read[Result](conn); !errors.Is(err, io.EOF) {
		return fmt.Errorf("the node did not end the upload: %w", broken(err))
	}
	return nil
}

// broken is an error of reading what the node should have said.
func broken(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	if err == nil {
		return errors.New("it says more than it should")
	}
	return err
}

// sendSome offers some files and sends what is wanted of them. It gives those that have to be offered again.
func sendSome(conn Conn, files []pending, w Watcher) (again []pending, err error) {
	var offer Offer
	for _, f := range files {
		offer.Files = append(offer.Files, f.File())
	}
	if err := Write(conn, offer); err != nil {
		return nil, err
	}
	plan, err := Read[Plan](conn)
	if err != nil {
		return nil, broken(err)
	}
	wanted, err := plan.wanted(offer, files, w)
	if err != nil || len(wanted) == 0 {
		return nil, err
	}
	sent := make(chan error, 1)
	go func() { sent <- sendBytes(conn, wanted, w.Has) }()
	err = func() error {
		for _, f := range wanted {
			r, err := Read[Result](conn)
			switch {
			case err != nil:
				return broken(err)
			case r.Refused != nil:
				return r.Refused
			case !r.Mismatch:
				w.Done(f.offered, Written, nil)
				continue
			}
			w.Again(f.offered.Size)
			if f.tried++; f.tried == attempts {
				w.Done(f.offered, Refused, protocol.Refuse(protocol.Tampered, "what arrives is not what was announced: does it change all the time?"))
				continue
			}
			again = append(again, f.pending)
		}
		return nil
	}()
	if err != nil {
		_ = conn.SetWriteDeadline(time.Unix(1, 0)) // nobody takes the rest
	}
	local := <-sent
	if errors.As(local, new(*localError)) {
		return nil, local // the node heard of it only as of a broken stream
	}
	if err == nil {
		err = local
	}
	if err != nil {
		return nil, err
	}
	for _, f := range again {
		if err := f.Refresh(); err != nil {
			return nil, err
		}
	}
	return again, nil
}

// wantedFile is a file whose bytes are to be sent.
type wantedFile struct {
	pending
	offered File
	offset  int64
}

// wanted reads a plan.
func (p *Plan) wanted(offer Offer, files []pending, w Watcher) ([]wantedFile, error) {
	if len(p.Steps) != len(files) {
		return nil, fmt.Errorf("%w: the node's plan has %d steps for %d files", ErrMalformed, len(p.Steps), len(files))
	}
	var wanted []wantedFile
	for i, s := range p.Steps {
		f := offer.Files[i]
		switch {
		case s.Refused != nil:
			w.Done(f, Refused, s.Refused)
		case s.Unchanged:
			w.Has(f.Size)
			w.Done(f, Unchanged, nil)
		case s.Offset < 0 || s.Offset > f.Size:
			return nil, fmt.Errorf("%w: the node wants %s, which has %d bytes, from %d on", ErrMalformed, f.Path, f.Size, s.Offset)
		default:
			wanted = append(wanted, wantedFile{files[i], f, s.Offset})
		}
	}
	return wanted, nil
}

// localError is of a file here.
type localError struct{ error }

func (e *localError) Unwrap() error { return e.error }

func sendBytes(conn Conn, files []wantedFile, has func(int64)) error {
	buffer := make([]byte, 128<<10)
	for _, f := range files {
		if err := sendFile(conn, f, buffer, has); err != nil {
			if errors.As(err, new(*localError)) {
				_ = conn.SetReadDeadline(time.Unix(1, 0)) // what is awaited does not come
			}
			return err
		}
	}
	return nil
}

// sendFile sends a file from its offset on: as many bytes as were announced. One that has become shorter goes on with zeros,
// and is found out by its digest.
func sendFile(conn Conn, f wantedFile, buffer []byte, has func(int64)) error {
	r, err := f.Open()
	if err != nil {
		return &localError{err}
	}
	defer r.Close()
	if _, err := r.Seek(f.offset, io.SeekStart); err != nil {
		return &localError{err}
	}
	has(f.offset)
	for left := f.offered.Size - f.offset; left > 0; {
		part := buffer[:min(left, int64(len(buffer)))]
		n, err := io.ReadFull(r, part)
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			return &localError{err}
		}
		clear(part[n:])
		if _, err := conn.Write(part); err != nil {
			return err
		}
		left -= int64(len(part))
		has(int64(len(part)))
	}
	return nil
}
