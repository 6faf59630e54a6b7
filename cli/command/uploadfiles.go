package command

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"github.com/nix-infra/nix-infra/protocol/transfer"
)

// localFile is a file that is uploaded. It is read for its digest once for all nodes, and again where it has changed.
type localFile struct {
	path string // here

	mu   sync.Mutex
	file transfer.File
	seen fs.FileInfo // what it was like when it was read
}

// gather finds the regular files at and below paths: each is known to the node by the last name of its path and what is below.
// What is skipped is told. A path that is a link itself is followed, as it was named; links in folders are not.
func gather(ctx context.Context, paths []string, skipped func(path, why string)) ([]*localFile, error) {
	var files []*localFile
	tops := map[string]string{}
	for _, p := range paths {
		whole, err := filepath.Abs(p)
		if err != nil {
			return nil, err
		}
		top := filepath.Base(whole)
		if top == "/" {
			return nil, fmt.Errorf("%s: name what is to be uploaded of it", p)
		}
		if other, twice := tops[top]; twice {
			return nil, fmt.Errorf("%s and %s would both become %s; upload them into different folders (--remote-path)", other, p, top)
		}
		tops[top] = p
		if whole, err = filepath.EvalSymlinks(whole); err != nil {
			return nil, fmt.Errorf("what is to be uploaded can't be read: %w", err)
		}
		err = filepath.WalkDir(whole, func(at string, e fs.DirEntry, err error) error {
			if err != nil {
				return fmt.Errorf("what is to be uploaded can't be read: %w", err)
			}
			if err := ctx.Err(); err != nil || e.IsDir() {
				return err
			}
			switch kind := e.Type(); {
			case kind&fs.ModeSymlink != 0:
				skipped(at, "it is a link")
				return nil
			case !kind.IsRegular():
				skipped(at, "it is no regular file")
				return nil
			}
			below, err := filepath.Rel(whole, at)
			if err != nil {
				return err
			}
			f := &localFile{path: at, file: transfer.File{Path: filepath.ToSlash(filepath.Join(top, below))}}
			files = append(files, f)
			return f.read(ctx)
		})
		if err != nil {
			return nil, err
		}
	}
	if len(files) == 0 {
		return nil, fmt.Errorf("there is no file to upload")
	}
	return files, nil
}

// read finds a file's size, permissions and digest.
func (f *localFile) read(ctx context.Context) error {
	file, err := os.Open(f.path)
	if err != nil {
		return err
	}
	defer file.Close()
	info, err := file.Stat()
	if err != nil {
		return err
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("%s is no regular file any more", f.path)
	}
	sum := sha256.New()
	n, err := io.Copy(sum, &stoppable{ctx, file})
	if err != nil {
		return fmt.Errorf("%s: %w", f.path, err)
	}
	f.file.Size, f.file.Mode, f.file.SHA256, f.seen = n, uint32(info.Mode().Perm()), hex.EncodeToString(sum.Sum(nil)), info
	if err := f.file.Validate(); err != nil {
		return fmt.Errorf("can't be uploaded: %w", err)
	}
	return nil
}

// stoppable is a reader that ends with a context.
type stoppable struct {
	ctx context.Context
	io.Reader
}

func (r *stoppable) Read(p []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.Reader.Read(p)
}

// fileSource is a localFile on its way to one node. Another node may have found out already that it has changed.
type fileSource struct {
	*localFile
	ctx    context.Context
	offers transfer.File
}

func (f *localFile) source(ctx context.Context) *fileSource {
	f.mu.Lock()
	defer f.mu.Unlock()
	return &fileSource{f, ctx, f.file}
}

func (s *fileSource) File() transfer.File { return s.offers }

func (s *fileSource) Open() (io.ReadSeekCloser, error) { return os.Open(s.path) }

func (s *fileSource) Refresh() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	info, err := os.Stat(s.path)
	if err != nil {
		return err
	}
	if info.Size() != s.file.Size || !info.ModTime().Equal(s.seen.ModTime()) || s.offers.SHA256 == s.file.SHA256 {
		if err := s.read(s.ctx); err != nil {
			return err
		}
	}
	s.offers = s.file
	return nil
}

// bytesOf is how many bytes files have.
func bytesOf(files []*localFile) (bytes int64) {
	for _, f := range files {
		bytes += f.file.Size
	}
	return bytes
}

// checkFolder tells whether a folder can be a node's.
func checkFolder(to string) error {
	if err := (&transfer.Hello{Version: transfer.Version, To: to}).Validate(); err != nil {
		return fmt.Errorf("--remote-path: %w", err)
	}
	return nil
}
