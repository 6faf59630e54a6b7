package reconcile

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

const (
	blobsAtOnce = 8
	blobTries   = 12 // of a controller that is gone, about a minute
)

// cache keeps blobs, uncompressed and named by their digest, up to a number of bytes. Its order is that
// of the files' times. What it gives was checked against its name.
type cache struct {
	dir   string
	limit int64

	mu    sync.Mutex
	size  int64
	files map[string]cached
}

type cached struct {
	size int64
	used time.Time
}

func openCache(dir string, limit int64) (*cache, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("can't read the blob cache: %w", err)
	}
	c := &cache{dir: dir, limit: limit, files: map[string]cached{}}
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil || !protocol.IsDigest(entry.Name()) || !info.Mode().IsRegular() {
			_ = os.RemoveAll(filepath.Join(dir, entry.Name())) // a write that was cut short
			continue
		}
		c.files[entry.Name()] = cached{info.Size(), info.ModTime()}
		c.size += info.Size()
	}
	c.evict()
	return c, nil
}

func (c *cache) get(digest string) ([]byte, bool) {
	c.mu.Lock()
	_, ok := c.files[digest]
	c.mu.Unlock()
	if !ok {
		return nil, false
	}
	file := filepath.Join(c.dir, digest)
	data, err := atomicfile.Read(file, protocol.MaxFileSize)
	c.mu.Lock()
	defer c.mu.Unlock()
	if err != nil || protocol.Digest(data) != digest {
		c.drop(digest)
		return nil, false
	}
	if f, ok := c.files[digest]; ok { // else it was evicted meanwhile, and is no longer counted
		f.used = time.Now()
		_ = os.Chtimes(file, f.used, f.used) // it only orders what goes first
		c.files[digest] = f
	}
	return data, true
}

func (c *cache) put(digest string, data []byte, write writer) error {
	if int64(len(data)) > c.limit {
		return nil
	}
	if err := write(filepath.Join(c.dir, digest), data, 0o600); err != nil {
		return err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.size += int64(len(data)) - c.files[digest].size
	c.files[digest] = cached{int64(len(data)), time.Now()}
	c.evict()
	return nil
}

// evict and drop are called with the lock held, or before anybody else knows of c.
func (c *cache) evict() {
	if c.size <= c.limit {
		return
	}
	order := make([]string, 0, len(c.files))
	for digest := range c.files {
		order = append(order, digest)
	}
	slices.SortFunc(order, func(a, b string) int { return c.files[a].used.Compare(c.files[b].used) })
	for _, digest := range order {
		if c.size <= c.limit {
			return
		}
		c.drop(digest)
	}
}

func (c *cache) drop(digest string) {
	if err := os.Remove(filepath.Join(c.dir, digest)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return
	}
	c.size -= c.files[digest].size
	delete(c.files, digest)
}

// fetch brings all blobs of a manifest and hands each, once, to use.
func (e *Engine) fetch(ctx context.Context, digest string, m *protocol.Manifest, use func(blob string, data []byte) error) error {
	sizes, err := blobSizes(m)
	if err != nil {
		return err
	}
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(blobsAtOnce)
	for _, blob := range m.Blobs() {
		group.Go(func() error {
			data, ok := e.cache.get(blob)
			if !ok {
				var err error
				if data, err = e.fetchBlob(ctx, digest, blob, sizes[blob]); err != nil {
					return err
				}
				if err := e.cache.put(blob, data, e.write); err != nil {
					return fmt.Errorf("can't keep a blob: %w", err)
				}
			}
			if int64(len(data)) != sizes[blob] {
				return fmt.Errorf("blob %s has %d bytes, the manifest says %d", blob, len(data), sizes[blob])
			}
			return use(blob, data)
		})
	}
	return group.Wait()
}

// blobSizes are the sizes of a manifest's blobs, unpacked.
func blobSizes(m *protocol.Manifest) (map[string]int64, error) {
	sizes := map[string]int64{}
	for _, f := range m.Files {
		if known, ok := sizes[f.SHA256]; ok && known != f.Size {
			return nil, fmt.Errorf("file %q has %d bytes by the manifest, and another file of the same content %d", f.Path, f.Size, known)
		}
		sizes[f.SHA256] = f.Size
	}
	return sizes, nil
}

// fetchBlob fetches one blob; what does not hash to its name is fetched again.
func (e *Engine) fetchBlob(ctx context.Context, manifest, blob string, size int64) ([]byte, error) {
	var data []byte
	err := retry(ctx, blobTries, func() error {
		one, cancel := context.WithTimeout(ctx, 2*time.Minute)
		defer cancel()
		packed, err := e.o.Upstream.Blob(one, manifest, blob)
		if err != nil {
			return fmt.Errorf("can't fetch blob %s: %w", blob, err)
		}
		data, err = openBlob(packed, blob, size)
		return err
	})
	return data, err
}

// openBlob unpacks a blob and holds it against its name.
func openBlob(packed []byte, blob string, size int64) ([]byte, error) {
	data, err := unpack(packed, size)
	if err != nil {
		return nil, fmt.Errorf("blob %s: %w", blob, err)
	}
	if protocol.Digest(data) != blob {
		return nil, fmt.Errorf("blob %s arrived with other content than its name says", blob)
	}
	return data, nil
}

// unpack decodes zstd. However the frame was made, it never grows past twice the largest file: that is
// the largest window that encoders use.
func unpack(packed []byte, size int64) ([]byte, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*protocol.MaxFileSize))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	data, err := d.DecodeAll(packed, make([]byte, 0, min(size, protocol.MaxFileSize)))
	if err != nil {
		return nil, fmt.Errorf("can't be decompressed: %w", err)
	}
	return data, nil
}
