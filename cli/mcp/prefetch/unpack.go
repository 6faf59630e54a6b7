package prefetch

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/bzip2"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"

	"github.com/klauspost/compress/zstd"
)

// unpackFile reads an archive, whatever it is called: what it is shows in its first bytes.
func unpackFile(ctx context.Context, file *os.File, size int64) (_ *tree, err error) {
	head := make([]byte, 512)
	n, err := file.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	head = head[:n]
	content, err := scratch()
	if err != nil {
		return nil, err
	}
	t := &tree{root: &entry{below: map[string]*entry{}}, content: content}
	defer func() {
		if err != nil {
			t.close()
		}
	}()
	has := func(magic string) bool { return bytes.HasPrefix(head, []byte(magic)) }
	from := func() io.Reader { return stopped{ctx, io.NewSectionReader(file, 0, size)} }
	switch {
	case has("PK\x03\x04"):
		err = t.zip(ctx, file, size)
	case has("\x1f\x8b"):
		var z *gzip.Reader
		if z, err = gzip.NewReader(from()); err == nil {
			err = t.tar(z)
		}
	case has("BZh"):
		err = t.tar(bzip2.NewReader(from()))
	case has("\x28\xb5\x2f\xfd"):
		var z *zstd.Decoder
		if z, err = zstd.NewReader(from(), zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(256<<20)); err == nil {
			err = t.tar(z)
			z.Close()
		}
	case has("\xfd7zXZ\x00"):
		err = t.xz(ctx, from())
	case len(head) > 262 && string(head[257:262]) == "ustar":
		err = t.tar(from())
	default:
		err = errors.New("it is no archive that is known here: tar (also compressed by gzip, bzip2, xz or zstd) or zip")
	}
	if err != nil {
		return nil, err
	}
	if len(t.root.below) == 1 {
		for _, only := range t.root.below {
			if only.below != nil {
				t.root = only
			}
		}
	}
	return t, nil
}

// stopped reads until ctx ends.
type stopped struct {
	ctx context.Context
	r   io.Reader
}

func (s stopped) Read(p []byte) (int, error) {
	if s.ctx.Err() != nil {
		return 0, context.Cause(s.ctx)
	}
	return s.r.Read(p)
}

// xz has the program of that name unpack: there is none in Go's own library.
func (t *tree) xz(ctx context.Context, from io.Reader) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	program, err := exec.LookPath("xz")
	if err != nil {
		return errors.New("it is compressed by xz, and the program xz is not installed here")
	}
	cmd := exec.CommandContext(ctx, program, "--decompress", "--stdout", "--memlimit-decompress=256MiB")
	cmd.Stdin, cmd.Env = from, []string{}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	err = t.tar(out)
	if err == nil {
		_, err = io.Copy(io.Discard, io.LimitReader(out, MaxUnpacked)) // padding
	}
	cancel()
	if ended := cmd.Wait(); err == nil && ended != nil && ctx.Err() == nil {
		err = fmt.Errorf("xz: %w", ended)
	}
	return err
}

func (t *tree) tar(from io.Reader) error {
	// What is skipped inside of the archive counts, too: so little unpacks to so much.
	r := tar.NewReader(&bounded{from, MaxUnpacked})
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		switch h.Typeflag {
		case tar.TypeReg, tar.TypeGNUSparse:
			err = t.file(h.Name, h.Mode&0o100 != 0, r)
		case tar.TypeDir:
			_, err = t.folder(h.Name)
		case tar.TypeSymlink:
			err = t.link(h.Name, h.Linkname)
		case tar.TypeLink:
			err = t.hardLink(h.Name, h.Linkname)
		case tar.TypeXGlobalHeader:
		default:
			err = fmt.Errorf("%.100q is a device or the like", h.Name)
		}
		if err != nil {
			return err
		}
	}
}

// bounded is a reader that fails after so many bytes.
type bounded struct {
	r    io.Reader
	left int64
}

func (b *bounded) Read(p []byte) (int, error) {
	if b.left <= 0 {
		return 0, fmt.Errorf("it unpacks to more than the %d MiB that are looked at here", MaxUnpacked>>20)
	}
	n, err := b.r.Read(p[:min(int64(len(p)), b.left)])
	b.left -= int64(n)
	return n, err
}

// directory is a zip file whose directory is bounded while it is read: all of it is kept in memory.
type directory struct {
	file *os.File
	left int64 // bytes; less than 0 is no bound
}

func (d *directory) ReadAt(p []byte, at int64) (int, error) {
	if d.left >= 0 {
		if d.left -= int64(len(p)); d.left < 0 {
			return 0, fmt.Errorf("its directory has more than %d MiB", maxDirectory>>20)
		}
	}
	return d.file.ReadAt(p, at)
}

const maxDirectory = 32 << 20

func (t *tree) zip(ctx context.Context, file *os.File, size int64) error {
	d := &directory{file, maxDirectory}
	z, err := zip.NewReader(d, size)
	if err != nil && !errors.Is(err, zip.ErrInsecurePath) {
		return err
	}
	d.left = -1
	for _, f := range z.File {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		if err := t.zipped(f); err != nil {
			return err
		}
	}
	return nil
}

func (t *tree) zipped(f *zip.File) error {
	mode := f.Mode()
	if mode.IsDir() {
		_, err := t.folder(f.Name)
		return err
	}
	r, err := f.Open()
	if err != nil {
		return fmt.Errorf("%.100q: %w", f.Name, err)
	}
	defer r.Close()
	switch {
	case mode.IsRegular():
		return t.file(f.Name, mode&0o100 != 0, r)
	case mode&fs.ModeSymlink != 0:
		target, err := io.ReadAll(io.LimitReader(r, maxTarget+1))
		if err != nil {
			return err
		}
		return t.link(f.Name, string(target))
	}
	return fmt.Errorf("%.100q is a device or the like", f.Name)
}
