package query

import (
	"bufio"
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strconv"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// MaxSeen is how many request ids a node remembers. Each is good for a minute or two, so this many
// are more than a node can be asked; beyond it requests are refused, never forgotten.
const MaxSeen = 100_000

// key is an id as it is kept: of one size, whatever the sender wrote.
type key [16]byte

func keyOf(id string) key {
	sum := sha256.Sum256([]byte(id))
	return key(sum[:16])
}

// Seen remembers request ids until they have expired, in memory and in a file of lines
// "<hex key> <Unix seconds>\n", so that a request can't be replayed after a restart. It is safe for
// concurrent use and implements protocol.Seen.
type Seen struct {
	path string
	max  int
	now  func() time.Time

	mu    sync.Mutex
	ids   map[key]int64 // expiry, Unix seconds
	file  *os.File
	lines int   // in the file, expired ones included
	limit int   // lines with which the file is written anew
	fault error // why the file does not have what memory has; the next compaction clears it
}

// OpenSeen loads the ids of an earlier run. max 0 means MaxSeen.
func OpenSeen(path string, max int, now func() time.Time) (*Seen, error) {
	if max == 0 {
		max = MaxSeen
	}
	s := &Seen{path: path, max: max, now: now, ids: map[key]int64{}}
	data, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("can't read the ids of earlier requests: %w", err)
	}
	s.load(data)
	if err := s.compact(); err != nil {
		return nil, err
	}
	return s, nil
}

// load takes every line that is one. Torn and damaged ones were not acted upon for longer than they
// were good, or never.
func (s *Seen) load(data []byte) {
	now := s.now().Unix()
	for line := range bytes.Lines(data) {
		name, until, ok := bytes.Cut(bytes.TrimSuffix(line, []byte("\n")), []byte(" "))
		if !ok || !bytes.HasSuffix(line, []byte("\n")) || len(name) != 2*len(key{}) {
			continue
		}
		var k key
		expires, err := strconv.ParseInt(string(until), 10, 64)
		if _, bad := hex.Decode(k[:], name); bad == nil && err == nil && expires >= now && len(s.ids) < s.max {
			s.ids[k] = expires
		}
	}
}

// Add remembers an id until a time and tells whether it was known. The line is in the page cache when
// it returns; Sync puts it on disk.
func (s *Seen) Add(id string, until time.Time) (known bool, err error) {
	k := keyOf(id)
	s.mu.Lock()
	defer s.mu.Unlock()
	if expires, ok := s.ids[k]; ok && expires >= s.now().Unix() {
		return true, nil
	}
	if len(s.ids) >= s.max || s.lines >= s.limit {
		s.drop()
		if len(s.ids) >= s.max {
			return false, fmt.Errorf("%d request ids are remembered already; ask again in a minute", len(s.ids))
		}
		s.fault = s.compact()
	}
	s.ids[k] = until.Unix()
	if s.fault == nil {
		s.fault = s.write(k, until.Unix())
	}
	return false, nil
}

// Sync makes all ids survive a loss of power. An error means that they may not.
func (s *Seen) Sync() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fault != nil {
		if s.fault = s.compact(); s.fault != nil {
			return s.fault
		}
	}
	return s.file.Sync()
}

// Close releases the file.
func (s *Seen) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.file.Close()
}

func (s *Seen) write(k key, expires int64) error {
	line := hex.AppendEncode(nil, k[:])
	line = strconv.AppendInt(append(line, ' '), expires, 10)
	if _, err := s.file.Write(append(line, '\n')); err != nil {
		return fmt.Errorf("can't remember a request's id: %w", err)
	}
	s.lines++
	return nil
}

// drop forgets what has expired.
func (s *Seen) drop() {
	now := s.now().Unix()
	for k, expires := range s.ids {
		if expires < now {
			delete(s.ids, k)
		}
	}
}

// compact writes the file anew with what is in memory.
func (s *Seen) compact() error {
	s.drop()
	var b bytes.Buffer
	w := bufio.NewWriter(&b)
	for k, expires := range s.ids {
		fmt.Fprintf(w, "%x %d\n", k[:], expires)
	}
	w.Flush()
	if err := atomicfile.Write(s.path, b.Bytes(), 0o600); err != nil {
		return err
	}
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		return fmt.Errorf("can't remember requests' ids: %w", err)
	}
	if s.file != nil {
		s.file.Close()
	}
	s.file, s.lines = f, len(s.ids)
	s.limit = max(1024, 4*len(s.ids))
	return nil
}
