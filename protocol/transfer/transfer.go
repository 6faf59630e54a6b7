// Package transfer is how files go into a node, over a stream of bytes: a tunnel to protocol.TunnelUpload.
//
// Start here, with what both sides say; send.go is the side that has the files, agent/upload the one that takes them.
//
//	user → node   Hello
//	node → user   Welcome
//	and then, for some files at a time:
//	user → node   Offer
//	node → user   Plan, with a Step for each of them
//	user → node   the bytes of each file that the plan wants, from its offset on, one file after the other
//	node → user   a Result for each of these
//
// A message is its length in four bytes, the highest first, and a JSON document; a file's bytes stand bare, as many as
// were announced. The user ends its direction where another Offer could come, and the node then ends its own.
package transfer

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/nix-infra/nix-infra/protocol"
)

// Version is of what is said here.
const Version = 1

// Limits.
const (
	MaxMessage = 512 << 10 // bytes, of a message without its length
	MaxFiles   = 128       // of an Offer
	MaxPath    = 1024      // bytes, of a file's path below the folder
	MaxName    = 255       // bytes, of each name in it
	MaxDepth   = 64        // names in it
	MaxSize    = 64 << 30  // bytes, of a file
)

// Staging is the folder in an upload's root in which files are put together. No file can be put into it.
const Staging = ".nix-infra-upload"

// Hello begins an upload.
type Hello struct {
	Version int    `json:"v"`
	To      string `json:"to"` // folder, absolute; it need not exist
}

// Welcome answers it.
type Welcome struct {
	Refused *protocol.Refusal `json:"refused,omitempty"`
}

// Offer is some of the files.
type Offer struct {
	Files []File `json:"files"`
}

// File is one of them.
type File struct {
	Path   string `json:"path"` // below the folder
	Size   int64  `json:"size"` // bytes
	Mode   uint32 `json:"mode"` // permissions: 0 to 0777
	SHA256 string `json:"sha256"`
}

// Plan answers an Offer, with a step for each file.
type Plan struct {
	Steps []Step `json:"steps"`
}

// Step is what becomes of a file: it is unchanged, it is refused, or its bytes are wanted.
type Step struct {
	Unchanged bool              `json:"unchanged,omitempty"` // the node has it already
	Refused   *protocol.Refusal `json:"refused,omitempty"`   // it is not wanted; others may be
	Offset    int64             `json:"offset,omitempty"`    // from which on its bytes are wanted: the node has those before it
}

// Result is how a file whose bytes were sent ended.
type Result struct {
	Mismatch bool              `json:"mismatch,omitempty"` // its bytes are not those of its SHA-256; nothing of it was kept
	Refused  *protocol.Refusal `json:"refused,omitempty"`  // and the whole upload ends
}

// Validate checks what can be said without knowing the node.
func (h *Hello) Validate() error {
	if h.Version != Version {
		return fmt.Errorf("it speaks version %d of uploads, this side version %d; upgrade the older one", h.Version, Version)
	}
	if !path.IsAbs(h.To) || path.Clean(h.To) != h.To || len(h.To) > MaxPath || !printable(h.To) {
		return fmt.Errorf("%.80q is no absolute path without . and .. in it", h.To)
	}
	return nil
}

// Validate checks the number and the form of files.
func (o *Offer) Validate() error {
	if len(o.Files) == 0 || len(o.Files) > MaxFiles {
		return fmt.Errorf("%d files at a time; 1 to %d are possible", len(o.Files), MaxFiles)
	}
	for i := range o.Files {
		if err := o.Files[i].Validate(); err != nil {
			return err
		}
	}
	return nil
}

// Validate checks that a file has a name that can only lie below the folder, and a size that is possible.
func (f *File) Validate() error {
	names := strings.Split(f.Path, "/")
	switch {
	case len(f.Path) > MaxPath || len(names) > MaxDepth:
		return fmt.Errorf("the path %.80q… is longer than %d bytes, or has more than %d names", f.Path, MaxPath, MaxDepth)
	case !printable(f.Path):
		return fmt.Errorf("the path %.80q has characters that can't be printed", f.Path)
	case f.Size < 0 || f.Size > MaxSize:
		return fmt.Errorf("%.200q has %d bytes; up to %d are possible", f.Path, f.Size, int64(MaxSize))
	case f.Mode&^0o777 != 0:
		return fmt.Errorf("%.200q: the mode %o is more than permissions", f.Path, f.Mode)
	case !protocol.IsDigest(f.SHA256):
		return fmt.Errorf("%.200q: its digest is not valid", f.Path)
	}
	for _, name := range names {
		if name == "" || name == "." || name == ".." || name == Staging || len(name) > MaxName {
			return fmt.Errorf("the path %.200q has a name in it that a file can't have here: %.80q", f.Path, name)
		}
	}
	return nil
}

// Validate checks the number of steps; whether they fit the offer is for who made it.
func (p *Plan) Validate() error {
	if len(p.Steps) > MaxFiles {
		return fmt.Errorf("a plan of %d steps; up to %d are possible", len(p.Steps), MaxFiles)
	}
	return nil
}

func printable(s string) bool {
	return utf8.ValidString(s) && !strings.ContainsFunc(s, unicode.IsControl)
}

// Write writes a message.
func Write(w io.Writer, message any) error {
	data := protocol.Encode(message)
	if len(data) > MaxMessage {
		return fmt.Errorf("a message of %d bytes; up to %d are possible", len(data), MaxMessage)
	}
	_, err := w.Write(append(binary.BigEndian.AppendUint32(nil, uint32(len(data))), data...))
	return err
}

// ErrMalformed is a message that can't be read, which ends a transfer.
var ErrMalformed = protocol.ErrMalformed

// Read reads a message. io.EOF means that there is none, as the stream ended between two.
func Read[T any](r io.Reader) (T, error) {
	var none T
	var head [4]byte
	if _, err := io.ReadFull(r, head[:]); err != nil {
		return none, err
	}
	size := binary.BigEndian.Uint32(head[:])
	if size > MaxMessage {
		return none, fmt.Errorf("%w: it has %d bytes; up to %d are possible", ErrMalformed, size, MaxMessage)
	}
	var data strings.Builder // it grows as bytes come, not as they are announced
	if n, err := io.CopyN(&data, r, int64(size)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return none, fmt.Errorf("after %d of %d bytes of a message: %w", n, size, err)
	}
	return protocol.Decode[T]([]byte(data.String()))
}
