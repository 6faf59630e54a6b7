package audit

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// Files of a chain. The current file and the one before it hold one encoded record a line; the mark
// holds the sequence number of the last record that the stream acknowledged.
const (
	currentFile = "audit.log"
	olderFile   = "audit.log.1"
	markFile    = "audit.sent"
)

// maxRecord bounds one record: what others wrote into it is cut (shorten).
const maxRecord = 16 << 10

// chain is the record on disk. It remembers no record in memory, only places in the files, counted in
// bytes since the beginning of the older file as Open found it: so they stay what they are when the
// files change places.
type chain struct {
	dir   string
	max   int64
	file  *os.File // current
	older int64    // place where the older file begins
	base  int64    // place where the older file ends and the current one begins
	end   int64    // place where the current file ends

	seq  uint64 // of the last record
	prev string // its digest

	sent     uint64 // the last record that the stream has
	next     int64  // place of the record after it
	lost     uint64 // records that went with an old file before the stream had them
	repaired string // what Open had to put right, for the log
}

func openChain(dir string, max int64) (*chain, error) {
	c := &chain{dir: dir, max: max}
	if err := c.readMark(); err != nil {
		return nil, err
	}
	c.next = -1
	if err := c.follow(filepath.Join(dir, olderFile)); err != nil {
		return nil, err
	}
	c.base = c.end
	path := filepath.Join(dir, currentFile)
	if err := c.follow(path); err != nil {
		return nil, err
	}
	if c.next < 0 {
		c.next = c.end
	}
	c.sent = min(c.sent, c.seq) // a mark that is ahead belongs to a chain that is gone
	var err error
	if c.file, err = os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600); err != nil {
		return nil, fmt.Errorf("can't open the audit chain: %w", err)
	}
	if err := c.dropTorn(); err != nil {
		c.file.Close()
		return nil, err
	}
	return c, nil
}

// follow walks the whole lines of one file and takes its last record as the chain's end.
func (c *chain) follow(path string) error {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("can't read the audit chain: %w", err)
	}
	defer f.Close()
	for lines := bufio.NewReaderSize(f, maxRecord); ; {
		line, err := lines.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return nil
		} else if err != nil {
			return fmt.Errorf("can't read the audit chain: %w", err)
		}
		c.link(path, line[:len(line)-1])
		c.end += int64(len(line))
	}
}

func (c *chain) link(path string, line []byte) {
	r, err := protocol.Decode[protocol.AuditRecord](line)
	if err != nil {
		c.repaired = fmt.Sprintf("%s has a line that is no record: %v", path, err)
		return
	}
	if c.prev != "" && r.Prev != c.prev {
		c.repaired = fmt.Sprintf("%s: record %d does not continue record %d; it was changed or one is missing", path, r.Seq, c.seq)
	}
	c.seq, c.prev = r.Seq, protocol.Digest(line)
	if r.Seq > c.sent && c.next < 0 {
		c.next = c.end
	}
}

// dropTorn cuts a last line that was being written when the machine stopped.
func (c *chain) dropTorn() error {
	size, err := c.file.Seek(0, io.SeekEnd)
	if err != nil {
		return err
	}
	if torn := size - (c.end - c.base); torn > 0 {
		c.repaired = fmt.Sprintf("a torn record of %d bytes at the end was dropped", torn)
		if err := c.file.Truncate(c.end - c.base); err != nil {
			return fmt.Errorf("can't drop a torn audit record: %w", err)
		}
	}
	return nil
}

// append completes r, which continues the chain only if it was written.
func (c *chain) append(r *protocol.AuditRecord, sync bool) error {
	if c.end-c.base > c.max {
		if err := c.rotate(); err != nil {
			return err
		}
	}
	shorten(r)
	r.Seq, r.Prev = c.seq+1, c.prev
	line := protocol.Encode(r)
	n, err := c.file.WriteAt(append(line, '\n'), c.end-c.base)
	if err == nil && sync {
		err = c.file.Sync()
	}
	if err != nil {
		if n > 0 {
			err = errors.Join(err, c.file.Truncate(c.end-c.base))
		}
		return fmt.Errorf("audit chain: %w", err)
	}
	c.end += int64(n)
	c.seq, c.prev = r.Seq, protocol.Digest(line)
	return nil
}

// shorten cuts what a hostile sender could make long.
func shorten(r *protocol.AuditRecord) {
	cut := func(s string, max int) string {
		if len(s) > max {
			return strings.ToValidUTF8(s[:max], "") + "…"
		}
		return s
	}
	r.User, r.Request, r.Target = cut(r.User, 64), cut(r.Request, 64), cut(r.Target, 64)
	r.Action = protocol.Action(cut(string(r.Action), 64))
	r.Payload, r.Outcome, r.Reason, r.Detail = cut(r.Payload, 64), cut(r.Outcome, 64), cut(r.Reason, 1024), cut(r.Detail, 1100)
}

// rotate begins a new current file. What the stream does not have of the oldest is lost to it.
func (c *chain) rotate() error {
	if err := c.file.Sync(); err != nil {
		return fmt.Errorf("audit chain: %w", err)
	}
	if err := os.Rename(c.file.Name(), filepath.Join(c.dir, olderFile)); err != nil {
		return fmt.Errorf("audit chain: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(c.dir, currentFile), os.O_CREATE|os.O_RDWR|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("audit chain: %w", err)
	}
	c.file.Close()
	if c.next < c.base {
		if first, ok := firstSeq(filepath.Join(c.dir, olderFile)); ok {
			c.lost += first - 1 - c.sent
			c.sent = first - 1
		}
		c.next = c.base
	}
	c.file, c.older, c.base = f, c.base, c.end
	return atomicfile.SyncDir(c.dir)
}

func firstSeq(path string) (uint64, bool) {
	f, err := os.Open(path)
	if err != nil {
		return 0, false
	}
	defer f.Close()
	head := make([]byte, maxRecord)
	n, _ := io.ReadFull(f, head)
	line, _, whole := bytes.Cut(head[:n], []byte{'\n'})
	if !whole {
		return 0, false
	}
	r, err := protocol.Decode[protocol.AuditRecord](line)
	return r.Seq, err == nil
}

// readMark continues where the stream's acknowledgements ended. A lost mark means that records are
// sent again, and the stream drops them by their ids.
func (c *chain) readMark() error {
	data, err := os.ReadFile(filepath.Join(c.dir, markFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("can't read the audit chain's mark: %w", err)
	}
	c.sent, _ = strconv.ParseUint(strings.TrimSpace(string(data)), 10, 64)
	return nil
}

// saveMark writes over the mark in place, which a crash of the agent can't undo and which costs no sync.
func (c *chain) saveMark() error {
	f, err := os.OpenFile(filepath.Join(c.dir, markFile), os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(f, "%020d\n", c.sent) // of one length, so that nothing of an earlier one is left
	return errors.Join(err, f.Close())
}

func (c *chain) close() error {
	return errors.Join(c.file.Sync(), c.file.Close())
}
