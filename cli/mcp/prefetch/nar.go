package prefetch

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"io"
	"maps"
	"slices"
)

// hash is the SHA-256 of the tree as a NAR, which is what Nix calls the hash of a folder.
func (t *tree) hash(ctx context.Context) (Hash, error) {
	sum := sha256.New()
	w := &narWriter{w: bufio.NewWriterSize(sum, 64<<10), content: t.content, ctx: ctx}
	w.strings("nix-archive-1")
	w.entry(t.root)
	if w.err == nil {
		w.err = w.w.Flush()
	}
	return Hash(sum.Sum(nil)), w.err
}

// narWriter writes a NAR: each token is its length (64 bits, little-endian), its bytes, and zeros up to a multiple of eight.
type narWriter struct {
	w       *bufio.Writer
	content io.ReaderAt
	ctx     context.Context
	err     error // the first one
}

func (w *narWriter) strings(tokens ...string) {
	for _, s := range tokens {
		w.length(int64(len(s)))
		w.write([]byte(s))
		w.pad(int64(len(s)))
	}
}

func (w *narWriter) length(n int64) {
	w.write(binary.LittleEndian.AppendUint64(nil, uint64(n)))
}

func (w *narWriter) pad(n int64) {
	w.write(make([]byte, (8-n%8)%8))
}

func (w *narWriter) write(p []byte) {
	if w.err == nil {
		_, w.err = w.w.Write(p)
	}
}

func (w *narWriter) entry(e *entry) {
	if w.err == nil {
		w.err = w.ctx.Err()
	}
	if w.err != nil {
		return
	}
	w.strings("(", "type")
	switch {
	case e.below != nil:
		w.strings("directory")
		for _, name := range slices.Sorted(maps.Keys(e.below)) { // by their bytes
			w.strings("entry", "(", "name", name, "node")
			w.entry(e.below[name])
			w.strings(")")
		}
	case e.target != "":
		w.strings("symlink", "target", e.target)
	default:
		w.strings("regular")
		if e.executable {
			w.strings("executable", "")
		}
		w.strings("contents")
		w.length(e.size)
		if w.err == nil {
			_, w.err = io.Copy(w.w, io.NewSectionReader(w.content, e.at, e.size))
		}
		w.pad(e.size)
	}
	w.strings(")")
}
