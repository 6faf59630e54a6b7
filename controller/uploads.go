package controller

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	maxSpools    = 64
	spoolIdle    = 10 * time.Minute
	spoolCrowded = time.Minute
)

// uploads puts pieces of blobs together, in files, until all are there.
type uploads struct {
	dir string

	mu    sync.Mutex
	open  map[spoolKey]*spool
	count int // names the files
}

type spoolKey struct{ user, digest string }

type spool struct {
	mu       sync.Mutex
	path     string
	size     int64
	received int64
	touched  time.Time // guarded by uploads.mu
}

// newUploads starts with an empty folder: who was uploading when the controller stopped starts again.
func newUploads(dir string) (*uploads, error) {
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("can't clear the folder for uploads: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("can't make the folder for uploads: %w", err)
	}
	return &uploads{dir: dir, open: map[spoolKey]*spool{}}, nil
}

// piece adds a piece whose form was checked. With the last one it gives the whole.
func (u *uploads) piece(user string, p protocol.BlobPiece) (whole []byte, done bool, err error) {
	n := int64(len(p.Data))
	if n == p.Size {
		return p.Data, true, nil
	}
	key := spoolKey{user, p.Digest}
	s, err := u.spool(key, p)
	if err != nil {
		return nil, false, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if !u.has(key, s) || p.Offset > s.received { // another run of the same user sent the end of it meanwhile
		return nil, false, protocol.Refuse(protocol.Conflict, "blob %s: the next piece is the one at %d of %d bytes; send the blob again from its start", p.Digest, s.received, s.size)
	}
	if err := s.write(p); err != nil {
		return nil, false, fmt.Errorf("can't take in blob %s: %w", p.Digest, err)
	}
	s.received = max(s.received, p.Offset+n)
	if s.received < s.size {
		return nil, false, nil
	}
	if whole, err = os.ReadFile(s.path); err != nil {
		return nil, false, fmt.Errorf("can't take in blob %s: %w", p.Digest, err)
	}
	u.drop(key, s)
	return whole, true, nil
}

func (s *spool) write(p protocol.BlobPiece) (err error) {
	f, err := os.OpenFile(s.path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(p.Data, p.Offset)
	return errors.Join(err, f.Close())
}

// spool finds the file for an upload. The first piece makes a new one, unless the same user sends the same already: two
// runs put together what either would.
func (u *uploads) spool(key spoolKey, p protocol.BlobPiece) (*spool, error) {
	u.mu.Lock()
	defer u.mu.Unlock()
	now := time.Now()
	s, ok := u.open[key]
	if ok && p.Size != s.size { // it was compressed in another way
		u.remove(key, s)
		ok = false
	}
	if !ok {
		if p.Offset != 0 {
			return nil, protocol.Refuse(protocol.Conflict, "blob %s: the first piece is not here (any more); send the blob again from its start", p.Digest)
		}
		if len(u.open) >= maxSpools {
			u.sweep(now, spoolCrowded)
		}
		if len(u.open) >= maxSpools {
			return nil, protocol.Refuse(protocol.Failed, "%d uploads are under way; try again in a minute", len(u.open))
		}
		u.count++
		s = &spool{path: filepath.Join(u.dir, fmt.Sprint(u.count)), size: p.Size}
		u.open[key] = s
	}
	s.touched = now
	return s, nil
}

func (u *uploads) has(key spoolKey, s *spool) bool {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.open[key] == s
}

func (u *uploads) drop(key spoolKey, s *spool) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.remove(key, s)
}

// remove forgets an upload. u.mu is held.
func (u *uploads) remove(key spoolKey, s *spool) {
	if u.open[key] == s {
		delete(u.open, key)
	}
	_ = os.Remove(s.path) // it may not have been written yet; the next start clears the folder
}

func (u *uploads) sweep(now time.Time, idle time.Duration) {
	for key, s := range u.open {
		if now.Sub(s.touched) > idle {
			u.remove(key, s)
		}
	}
}

// clean removes uploads that were abandoned.
func (u *uploads) clean(now time.Time) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.sweep(now, spoolIdle)
}
