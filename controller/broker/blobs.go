package broker

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	bucket       = "blobs"
	bucketStream = "OBJ_" + bucket
	metaPrefix   = "$O." + bucket + ".M."
	chunkPrefix  = "$O." + bucket + ".C."

	cacheBytes = 64 << 20
	maxReads   = 4 // blobs that are read from the disk at once; each may have 16 MiB
)

// ErrNoBlob says that there is no such blob.
var ErrNoBlob = errors.New("no such blob")

// Blobs are files' contents and signed manifests, named by the SHA-256 of what they decompress to and
// kept in their zstd form, in a JetStream object store. One controller, the leader, writes them.
//
// Reading goes by direct gets instead of the object store's own reader, which makes a consumer for
// each object and needs a permission for flow control.
type Blobs struct {
	store  jetstream.ObjectStore
	stream jetstream.Stream
	cache  *Cache[[]byte]
	reads  chan struct{}

	removing sync.RWMutex // a blob must not be removed while it is put again

	mu      sync.Mutex
	present map[string]time.Time // when it came, or when Load found it
	loading map[string]*load
}

type load struct {
	done chan struct{}
	data []byte
	err  error
}

func openBlobs(ctx context.Context, js jetstream.JetStream, maxBytes int64) (*Blobs, error) {
	if maxBytes == 0 {
		maxBytes = -1
	}
	store, err := js.CreateOrUpdateObjectStore(ctx, jetstream.ObjectStoreConfig{
		Bucket: bucket, Description: "files and manifests by SHA-256, zstd", Storage: jetstream.FileStorage, MaxBytes: maxBytes,
	})
	if err != nil {
		return nil, fmt.Errorf("can't make the object store %s: %w", bucket, err)
	}
	stream, err := js.Stream(ctx, bucketStream)
	if err != nil {
		return nil, fmt.Errorf("can't open the object store %s: %w", bucket, err)
	}
	return &Blobs{
		store: store, stream: stream, cache: NewCache[[]byte](cacheBytes), reads: make(chan struct{}, maxReads),
		present: map[string]time.Time{}, loading: map[string]*load{},
	}, nil
}

// Load finds out which blobs are there. A new leader calls it before it serves.
func (b *Blobs) Load(ctx context.Context) error {
	metas, err := b.subjects(ctx, metaPrefix+">")
	if err != nil {
		return err
	}
	present := make(map[string]time.Time, len(metas))
	now := time.Now()
	for subject := range metas {
		name, err := base64.URLEncoding.DecodeString(strings.TrimPrefix(subject, metaPrefix))
		if err == nil && protocol.IsDigest(string(name)) {
			present[string(name)] = now
		}
	}
	b.mu.Lock()
	defer b.mu.Unlock()
	b.present = present
	return nil
}

func (b *Blobs) subjects(ctx context.Context, filter string) (map[string]uint64, error) {
	info, err := b.stream.Info(ctx, jetstream.WithSubjectFilter(filter))
	if err != nil {
		return nil, fmt.Errorf("can't list the blobs: %w", err)
	}
	return info.State.Subjects, nil
}

// Has tells whether a blob is there.
func (b *Blobs) Has(digest string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	_, ok := b.present[digest]
	return ok
}

// Touch tells whether a blob is there and, if so, protects it from Collect as if it had come now.
func (b *Blobs) Touch(digest string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if _, ok := b.present[digest]; !ok {
		return false
	}
	b.present[digest] = time.Now()
	return true
}

// Put keeps a blob. The caller has verified that compressed decompresses to what digest names.
func (b *Blobs) Put(ctx context.Context, digest string, compressed []byte) error {
	b.removing.RLock()
	defer b.removing.RUnlock()
	if b.Touch(digest) {
		return nil
	}
	// The client makes a buffer of a whole chunk for each object, however small that is: a thousand manifests are small.
	chunk := uint32(min(protocol.ChunkSize, len(compressed)+1))
	meta := jetstream.ObjectMeta{Name: digest, Opts: &jetstream.ObjectMetaOptions{ChunkSize: chunk}}
	if _, err := b.store.Put(ctx, meta, bytes.NewReader(compressed)); err != nil {
		return fmt.Errorf("can't keep blob %s (is the disk full, or blobs.max_bytes reached?): %w", digest, err)
	}
	b.cache.Add(digest, compressed, int64(len(compressed)))
	b.mu.Lock()
	defer b.mu.Unlock()
	b.present[digest] = time.Now()
	return nil
}

// Read gives a blob's zstd form without making room for it in the cache.
func (b *Blobs) Read(ctx context.Context, digest string) ([]byte, error) {
	if data, ok := b.cache.Get(digest); ok {
		return data, nil
	}
	return b.read(ctx, digest)
}

// Get gives a blob's zstd form, which the caller must not change. However many ask for the same blob
// at once, it is read once.
func (b *Blobs) Get(ctx context.Context, digest string) ([]byte, error) {
	if data, ok := b.cache.Get(digest); ok {
		return data, nil
	}
	b.mu.Lock()
	if _, ok := b.present[digest]; !ok {
		b.mu.Unlock()
		return nil, fmt.Errorf("%w: %s", ErrNoBlob, digest)
	}
	l, underway := b.loading[digest]
	if !underway {
		l = &load{done: make(chan struct{})}
		b.loading[digest] = l
	}
	b.mu.Unlock()
	if underway {
		select {
		case <-l.done:
			return l.data, l.err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	l.data, l.err = b.read(ctx, digest)
	if l.err == nil {
		b.cache.Add(digest, l.data, int64(len(l.data)))
	}
	b.mu.Lock()
	delete(b.loading, digest)
	b.mu.Unlock()
	close(l.done)
	return l.data, l.err
}

func (b *Blobs) read(ctx context.Context, digest string) ([]byte, error) {
	select {
	case b.reads <- struct{}{}:
		defer func() { <-b.reads }()
	case <-ctx.Done():
		return nil, ctx.Err()
	}
	info, err := b.store.GetInfo(ctx, digest)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return nil, fmt.Errorf("%w: %s", ErrNoBlob, digest)
	} else if err != nil {
		return nil, fmt.Errorf("can't read blob %s: %w", digest, err)
	}
	data := make([]byte, 0, info.Size)
	seq := uint64(1)
	for range info.Chunks {
		m, err := b.stream.GetMsg(ctx, seq, jetstream.WithGetMsgSubject(chunkPrefix+info.NUID))
		if err != nil {
			return nil, fmt.Errorf("can't read blob %s: %w", digest, err)
		}
		data, seq = append(data, m.Data...), m.Sequence+1
	}
	if uint64(len(data)) != info.Size {
		return nil, fmt.Errorf("blob %s is damaged: %d of %d bytes are there", digest, len(data), info.Size)
	}
	return data, nil
}

// Collect removes the blobs that keep does not name and that are older than age, and what interrupted
// uploads left. It tells how many blobs went.
func (b *Blobs) Collect(ctx context.Context, keep map[string]bool, age time.Duration) (int, error) {
	var old []string
	b.mu.Lock()
	for digest, since := range b.present {
		if !keep[digest] && time.Since(since) >= age {
			old = append(old, digest)
		}
	}
	b.mu.Unlock()
	removed := 0
	for _, digest := range old {
		ok, err := b.removeOlder(ctx, digest, age)
		if err != nil {
			return removed, err
		}
		if ok {
			removed++
		}
	}
	return removed, b.sweep(ctx)
}

// removeOlder removes a blob unless somebody touched it since.
func (b *Blobs) removeOlder(ctx context.Context, digest string, age time.Duration) (bool, error) {
	b.removing.Lock()
	defer b.removing.Unlock()
	b.mu.Lock()
	since, ok := b.present[digest]
	if !ok || time.Since(since) < age {
		b.mu.Unlock()
		return false, nil
	}
	delete(b.present, digest)
	b.mu.Unlock()
	err := b.remove(ctx, digest)
	if err != nil {
		b.mu.Lock()
		b.present[digest] = since
		b.mu.Unlock()
	}
	return err == nil, err
}

// remove takes the entry away before the content, so that no entry ever lacks content.
func (b *Blobs) remove(ctx context.Context, digest string) error {
	b.cache.Remove(digest)
	info, err := b.store.GetInfo(ctx, digest)
	if errors.Is(err, jetstream.ErrObjectNotFound) {
		return nil
	} else if err != nil {
		return fmt.Errorf("can't remove blob %s: %w", digest, err)
	}
	for _, subject := range []string{metaPrefix + base64.URLEncoding.EncodeToString([]byte(digest)), chunkPrefix + info.NUID} {
		if err := b.stream.Purge(ctx, jetstream.WithPurgeSubject(subject)); err != nil {
			return fmt.Errorf("can't remove blob %s: %w", digest, err)
		}
	}
	return nil
}

// sweep removes content that no entry names. Content comes before its entry, so that what is being
// uploaded looks the same: only content older than an hour goes.
func (b *Blobs) sweep(ctx context.Context) error {
	chunks, err := b.subjects(ctx, chunkPrefix+">")
	if err != nil {
		return err
	}
	metas, err := b.subjects(ctx, metaPrefix+">")
	if err != nil || len(chunks) <= len(metas) {
		return err
	}
	for subject := range metas {
		name, err := base64.URLEncoding.DecodeString(strings.TrimPrefix(subject, metaPrefix))
		if err != nil {
			continue
		}
		info, err := b.store.GetInfo(ctx, string(name))
		if errors.Is(err, jetstream.ErrObjectNotFound) {
			continue
		} else if err != nil {
			return err
		}
		delete(chunks, chunkPrefix+info.NUID)
	}
	for subject := range chunks {
		m, err := b.stream.GetMsg(ctx, 1, jetstream.WithGetMsgSubject(subject))
		if err != nil || time.Since(m.Time) < time.Hour {
			continue
		}
		if err := b.stream.Purge(ctx, jetstream.WithPurgeSubject(subject)); err != nil {
			return err
		}
	}
	return nil
}
