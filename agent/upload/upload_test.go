package upload

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/transfer"
)

// node is a server with its root.
type node struct {
	t      *testing.T
	root   string
	server *Server

	mu      sync.Mutex
	records []protocol.AuditRecord
}

func newNode(t *testing.T) *node {
	t.Helper()
	n := &node{t: t, root: filepath.Join(t.TempDir(), "uploads")}
	n.server = New(Options{Node: "n1", Log: slog.New(slog.DiscardHandler), Root: func(to string, role protocol.Role) (string, error) {
		if to != n.root && !strings.HasPrefix(to, n.root+"/") {
			return "", protocol.Refuse(protocol.Denied, "no uploads at %s", to)
		}
		return n.root, nil
	}, Audit: func(r protocol.AuditRecord) error {
		n.mu.Lock()
		defer n.mu.Unlock()
		n.records = append(n.records, r)
		return nil
	}})
	return n
}

// serve begins an upload, and gives the user's end and what Serve returns.
func (n *node) serve(user string) (*stream, <-chan error) {
	here, there := pipe()
	ended := make(chan error, 1)
	go func() {
		err := n.server.Serve(n.t.Context(), there, protocol.Identity{Name: user, Role: protocol.Operator})
		if err == nil {
			there.CloseWrite()
		} else {
			there.Close()
		}
		ended <- err
	}()
	n.t.Cleanup(func() { here.Close() })
	return here, ended
}

// stream is one end of a connection whose directions end apart, as a tunnel's do.
type stream struct {
	net.Conn // writes
	in       net.Conn
	budget   int64 // bytes that may be written still, before the connection breaks; < 0: any number
}

func pipe() (*stream, *stream) {
	a, b := net.Pipe()
	c, d := net.Pipe()
	return &stream{a, d, -1}, &stream{c, b, -1}
}

func (s *stream) Read(p []byte) (int, error) { return s.in.Read(p) }
func (s *stream) CloseWrite() error          { return s.Conn.Close() }
func (s *stream) Close() error               { return errors.Join(s.Conn.Close(), s.in.Close()) }
func (s *stream) SetDeadline(t time.Time) error {
	return errors.Join(s.Conn.SetDeadline(t), s.in.SetReadDeadline(t))
}
func (s *stream) SetReadDeadline(t time.Time) error { return s.in.SetReadDeadline(t) }

var errCut = errors.New("the way is cut")

func (s *stream) Write(p []byte) (int, error) {
	if s.budget < 0 {
		return s.Conn.Write(p)
	}
	n, err := s.Conn.Write(p[:min(int64(len(p)), s.budget)])
	if s.budget -= int64(n); s.budget == 0 && err == nil {
		s.Close()
		err = errCut
	}
	return n, err
}

// source is a file in memory.
type source struct {
	path  string
	data  []byte
	mode  uint32
	said  *transfer.File // what File tells, where it is not what is there
	reads int64          // bytes, all together
}

func (s *source) File() transfer.File {
	if s.said != nil {
		return *s.said
	}
	mode := s.mode
	if mode == 0 {
		mode = 0o644
	}
	return transfer.File{Path: s.path, Size: int64(len(s.data)), Mode: mode, SHA256: protocol.Digest(s.data)}
}

type reader struct {
	*bytes.Reader
	s *source
}

func (r reader) Close() error { return nil }
func (r reader) Read(p []byte) (int, error) {
	n, err := r.Reader.Read(p)
	r.s.reads += int64(n)
	return n, err
}

func (s *source) Open() (io.ReadSeekCloser, error) { return reader{bytes.NewReader(s.data), s}, nil }
func (s *source) Refresh() error                   { s.said = nil; return nil }

// sent is what a Send told.
type sent struct {
	states map[string]transfer.State
	errs   map[string]error
	bytes  int64
	err    error
}

func (n *node) send(c *stream, to string, files ...transfer.Source) *sent {
	s := &sent{states: map[string]transfer.State{}, errs: map[string]error{}}
	var mu sync.Mutex
	s.err = transfer.Send(n.t.Context(), c, to, files, transfer.Watcher{
		Has:   func(b int64) { mu.Lock(); defer mu.Unlock(); s.bytes += b },
		Again: func(b int64) { mu.Lock(); defer mu.Unlock(); s.bytes -= b },
		Done:  func(f transfer.File, state transfer.State, err error) { s.states[f.Path], s.errs[f.Path] = state, err },
	})
	return s
}

// upload is a whole one.
func (n *node) upload(to string, files ...transfer.Source) *sent {
	n.t.Helper()
	c, ended := n.serve("ann")
	s := n.send(c, to, files...)
	c.Close()
	<-ended
	return s
}

// staged are the names in the staging folder.
func (n *node) staged() []string {
	entries, _ := os.ReadDir(filepath.Join(n.root, transfer.Staging))
	var names []string
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func content(seed uint64, size int) []byte {
	data := make([]byte, size)
	rand.NewChaCha8([32]byte{byte(seed)}).Read(data)
	return data
}

func TestUpload(t *testing.T) {
	n := newNode(t)
	big := &source{path: "site/big.bin", data: content(1, 300<<10)}
	files := []transfer.Source{big, &source{path: "run.sh", data: []byte("#!/bin/sh\n"), mode: 0o777}, &source{path: "site/a/b/empty"},
		&source{path: "copy", data: big.data}, &source{path: "secret", data: []byte("x"), mode: 0o600}}
	for i := range 2 * transfer.MaxFiles {
		files = append(files, &source{path: fmt.Sprintf("many/%03d", i), data: content(uint64(i), i)})
	}
	to := filepath.Join(n.root, "in", "here")
	s := n.upload(to, files...)
	if s.err != nil {
		t.Fatal(s.err)
	}
	want := map[string]os.FileMode{"run.sh": 0o755, "secret": 0o600, "site/big.bin": 0o644}
	total := int64(0)
	for _, f := range files {
		f := f.(*source)
		at := filepath.Join(to, f.path)
		got, err := os.ReadFile(at)
		if err != nil || !bytes.Equal(got, f.data) || s.states[f.path] != transfer.Written {
			t.Errorf("%s: %v, %d bytes, %s", f.path, err, len(got), s.states[f.path])
		}
		if info, err := os.Stat(at); err == nil && want[f.path] != 0 && info.Mode().Perm() != want[f.path] {
			t.Errorf("%s has mode %v", f.path, info.Mode())
		}
		total += int64(len(f.data))
	}
	if s.bytes != total {
		t.Errorf("told of %d bytes of %d", s.bytes, total)
	}
	if left := n.staged(); len(left) > 0 {
		t.Errorf("left in the staging folder: %v", left)
	}

	// A second time nothing is sent, but for what is another one; permissions follow.
	for _, f := range files {
		f.(*source).reads = 0
	}
	big.data = slices.Concat(big.data, []byte("more"))
	files[1].(*source).mode = 0o644
	s = n.upload(to, files...)
	if s.err != nil {
		t.Fatal(s.err)
	}
	for _, f := range files {
		f := f.(*source)
		if f == big {
			if s.states[f.path] != transfer.Written {
				t.Errorf("%s: %s", f.path, s.states[f.path])
			}
		} else if s.states[f.path] != transfer.Unchanged || f.reads != 0 {
			t.Errorf("%s: %s, %d bytes were read", f.path, s.states[f.path], f.reads)
		}
	}
	if info, _ := os.Stat(filepath.Join(to, "run.sh")); info.Mode().Perm() != 0o644 {
		t.Errorf("run.sh has mode %v", info.Mode())
	}
	if len(n.records) != 2 || n.records[0].Outcome != "ok" || n.records[0].User != "ann" || !strings.Contains(n.records[0].Reason, "261 files") || !strings.Contains(n.records[1].Reason, "260 were unchanged") {
		t.Errorf("on record: %+v", n.records)
	}
}

// Wherever the way is cut, what is there is whole, and the next upload goes on: it sends no byte twice that the node has.
func TestUploadResumes(t *testing.T) {
	data, other := content(2, 300<<10), content(3, 200<<10)
	const first, block = 300 << 10, 128 << 10
	all := int64(len(data) + len(other))
	for _, after := range []int64{-10_000, -10_001, -10_002, -10_004, -10_005, -100, -1, 0, 1, block - 1, block, block + 1, first - 1, first, first + 1, all - 1, all} {
		t.Run(fmt.Sprint(after), func(t *testing.T) {
			n := newNode(t)
			a, b := &source{path: "a", data: data}, &source{path: "d/b", data: other}
			var messages bytes.Buffer // what goes out before the files' bytes
			must(t, transfer.Write(&messages, transfer.Hello{Version: 1, To: n.root}), transfer.Write(&messages, transfer.Offer{Files: []transfer.File{a.File(), b.File()}}))
			head := int64(messages.Len())
			cut := head + after
			if after <= -10_000 {
				cut = 1 - (after + 10_000) // bytes of the first message
			}
			c, ended := n.serve("ann")
			c.budget = cut
			n.send(c, n.root, a, b)
			if err := <-ended; err == nil && cut < head {
				t.Error("the node took an upload that was cut for a whole one")
			}
			for _, f := range []*source{a, b} {
				if got, err := os.ReadFile(filepath.Join(n.root, f.path)); err == nil && !bytes.Equal(got, f.data) {
					t.Errorf("%s is half there: %d bytes", f.path, len(got))
				}
			}
			had := int64(0)
			for _, name := range n.staged() {
				info, err := os.Stat(filepath.Join(n.root, transfer.Staging, name))
				if err != nil {
					t.Fatal(err)
				}
				had += info.Size()
			}
			for _, f := range []*source{a, b} {
				if _, err := os.Stat(filepath.Join(n.root, f.path)); err == nil {
					had += int64(len(f.data))
				}
			}
			if want := max(0, cut-head); had != want {
				t.Errorf("the node has %d bytes of the %d that went out", had, want)
			}
			a.reads, b.reads = 0, 0
			s := n.upload(n.root, a, b)
			if s.err != nil {
				t.Fatal(s.err)
			}
			if sent := a.reads + b.reads; sent != all-had {
				t.Errorf("%d bytes were sent again", sent+had-all)
			}
			for _, f := range []*source{a, b} {
				if got, err := os.ReadFile(filepath.Join(n.root, f.path)); err != nil || !bytes.Equal(got, f.data) {
					t.Errorf("%s: %v, %d bytes", f.path, err, len(got))
				}
			}
			if left := n.staged(); len(left) > 0 {
				t.Errorf("left in the staging folder: %v", left)
			}
		})
	}
}

// What a broken upload left counts for nothing before the whole is proven: damaged, it is sent anew.
func TestDamagedRest(t *testing.T) {
	n := newNode(t)
	f := &source{path: "a", data: content(4, 200<<10)}
	c, ended := n.serve("ann")
	c.budget = 150 << 10
	n.send(c, n.root, f)
	<-ended
	staged := n.staged()
	if len(staged) != 1 {
		t.Fatalf("in the staging folder: %v", staged)
	}
	rest := filepath.Join(n.root, transfer.Staging, staged[0])
	damaged, err := os.ReadFile(rest)
	if err != nil {
		t.Fatal(err)
	}
	damaged[7] ^= 1
	if err := os.WriteFile(rest, damaged, 0o600); err != nil {
		t.Fatal(err)
	}
	s := n.upload(n.root, f)
	if got, err := os.ReadFile(filepath.Join(n.root, "a")); s.err != nil || err != nil || !bytes.Equal(got, f.data) || s.bytes != int64(len(f.data)) {
		t.Errorf("%v, %v, told of %d bytes", s.err, err, s.bytes)
	}
}

// A file that changes under the upload is offered anew as it is then; one that is never what it was said to be is refused.
func TestFileChanges(t *testing.T) {
	n := newNode(t)
	f := &source{path: "a", data: []byte("longer than it is now")}
	said := f.File()
	f.said, f.data = &said, []byte("short")
	s := n.upload(n.root, f)
	if got, _ := os.ReadFile(filepath.Join(n.root, "a")); s.err != nil || string(got) != "short" || s.states["a"] != transfer.Written {
		t.Errorf("%v, %q, %v", s.err, got, s.states)
	}
	liar := &liar{source{path: "b", data: []byte("never")}}
	s = n.upload(n.root, liar, &source{path: "c", data: []byte("good")})
	if s.err != nil || s.states["b"] != transfer.Refused || s.states["c"] != transfer.Written {
		t.Errorf("%v, %v", s.err, s.states)
	}
	if _, err := os.Lstat(filepath.Join(n.root, "b")); err == nil || len(n.staged()) > 0 {
		t.Errorf("something of it is there: %v, %v", err, n.staged())
	}
}

type liar struct{ source }

func (l *liar) File() transfer.File {
	f := l.source.File()
	f.SHA256 = protocol.Digest([]byte("another"))
	return f
}

// A newer upload of the same file by the same user goes on where one is whose end nobody noticed.
func TestOvertakes(t *testing.T) {
	n := newNode(t)
	f := &source{path: "a", data: content(5, 256<<10)}
	first, ended := n.serve("ann")
	if err := transfer.Write(first, transfer.Hello{Version: 1, To: n.root}); err != nil {
		t.Fatal(err)
	}
	if w, err := transfer.Read[transfer.Welcome](first); err != nil || w.Refused != nil {
		t.Fatal(w, err)
	}
	if err := transfer.Write(first, transfer.Offer{Files: []transfer.File{f.File()}}); err != nil {
		t.Fatal(err)
	}
	if _, err := transfer.Read[transfer.Plan](first); err != nil {
		t.Fatal(err)
	}
	if _, err := first.Write(f.data[:100<<10]); err != nil {
		t.Fatal(err)
	}
	s := n.upload(n.root, f)
	if err := <-ended; !errors.Is(err, errOvertaken) {
		t.Errorf("the first one ended by %v", err)
	}
	if got, _ := os.ReadFile(filepath.Join(n.root, "a")); s.err != nil || !bytes.Equal(got, f.data) || f.reads != 156<<10 {
		t.Errorf("%v, %d bytes were sent", s.err, f.reads)
	}
}

// An end of ctx ends it on both sides.
func TestEnds(t *testing.T) {
	n := newNode(t)
	here, there := pipe()
	defer here.Close()
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- n.server.Serve(ctx, there, protocol.Identity{Name: "ann", Role: protocol.Operator}) }()
	if err := transfer.Write(here, transfer.Hello{Version: 1, To: n.root}); err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Errorf("ended by %v", err)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	mute, _ := pipe()
	defer mute.Close()
	go cancel()
	if err := transfer.Send(cancelled, mute, n.root, []transfer.Source{&source{path: "a"}}, transfer.Watcher{}); !errors.Is(err, context.Canceled) {
		t.Errorf("sending ended by %v", err)
	}
}
