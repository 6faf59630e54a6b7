package client

import (
	"context"
	"errors"
	"fmt"
	"iter"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	uploads    = 4       // requests at a time
	beginnings = 5       // of an upload, where the controller lost what it had of a blob
	batchBytes = 2 << 20 // of blobs, before compression, that one of them sends one after the other
)

// Uploaded says what an upload amounted to.
type Uploaded struct {
	Blobs int   // that the controller did not have
	Bytes int64 // that were sent, compressed
}

// Upload gives the controller the blobs (by digest) that it does not have yet. Where it lost the beginning of one, because
// another controller leads now or another run was faster, what is missing then is sent again.
func (c *Client) Upload(ctx context.Context, blobs map[string][]byte) (done Uploaded, err error) {
	for range beginnings {
		var sent Uploaded
		sent, err = c.upload(ctx, blobs)
		done.Blobs, done.Bytes = max(done.Blobs, sent.Blobs), done.Bytes+sent.Bytes
		if !errors.Is(err, &protocol.Refusal{Code: protocol.Conflict}) {
			break
		}
	}
	return done, err
}

// upload sends what is missing now.
func (c *Client) upload(ctx context.Context, blobs map[string][]byte) (Uploaded, error) {
	missing, err := c.missing(ctx, blobs)
	if err != nil {
		return Uploaded{}, err
	}
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(uploads))
	if err != nil {
		return Uploaded{}, err
	}
	defer encoder.Close()
	var sent atomic.Int64
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(uploads)
	for batch := range batches(missing, blobs) {
		group.Go(func() error {
			p := packer{send: func(pieces []protocol.BlobPiece) error {
				return c.Controller(ctx, protocol.PutBlobs, protocol.BlobPieces{Pieces: pieces}, nil)
			}}
			for _, digest := range batch {
				packed := encoder.EncodeAll(blobs[digest], nil)
				sent.Add(int64(len(packed)))
				if err := p.add(digest, packed); err != nil {
					return err
				}
			}
			return p.flush()
		})
	}
	if err = group.Wait(); err != nil {
		err = fmt.Errorf("uploading: %w", err)
	}
	return Uploaded{len(missing), sent.Load()}, err
}

// batches splits blobs into parts of about batchBytes, so that several can be compressed and sent at a
// time. The pieces of a blob have to come in order, so all of one are in one part.
func batches(digests []string, blobs map[string][]byte) iter.Seq[[]string] {
	return func(yield func([]string) bool) {
		start, size := 0, 0
		for i, digest := range digests {
			size += len(blobs[digest])
			if size >= batchBytes || i-start+1 == protocol.MaxPieces || i == len(digests)-1 {
				if !yield(digests[start : i+1]) {
					return
				}
				start, size = i+1, 0
			}
		}
	}
}

// packer sends blobs in as few requests as their size allows.
type packer struct {
	send   func([]protocol.BlobPiece) error
	pieces []protocol.BlobPiece
	size   int
}

func (p *packer) add(digest string, packed []byte) error {
	for offset := 0; offset == 0 || offset < len(packed); offset += protocol.ChunkSize {
		data := packed[offset:min(len(packed), offset+protocol.ChunkSize)]
		if len(p.pieces) == protocol.MaxPieces || p.size+len(data) > protocol.PackSize {
			if err := p.flush(); err != nil {
				return err
			}
		}
		p.pieces = append(p.pieces, protocol.BlobPiece{Digest: digest, Size: int64(len(packed)), Offset: int64(offset), Data: data})
		p.size += len(data)
	}
	return nil
}

func (p *packer) flush() error {
	if len(p.pieces) == 0 {
		return nil
	}
	err := p.send(p.pieces)
	p.pieces, p.size = nil, 0
	return err
}

// missing asks which of the blobs the controller lacks.
func (c *Client) missing(ctx context.Context, blobs map[string][]byte) ([]string, error) {
	var all, missing []string
	for digest := range blobs {
		all = append(all, digest)
	}
	for len(all) > 0 {
		some := all[:min(len(all), protocol.MaxDigests)]
		all = all[len(some):]
		var lacks protocol.DigestList
		if err := c.Controller(ctx, protocol.MissingBlobs, protocol.DigestList{Digests: some}, &lacks); err != nil {
			return nil, err
		}
		for _, digest := range lacks.Digests {
			if _, ok := blobs[digest]; !ok {
				return nil, fmt.Errorf("the controller lacks blob %q, which it was not asked about", digest)
			}
			missing = append(missing, digest)
		}
	}
	return missing, nil
}

// Deploy makes the manifests of a request wanted. They have to be uploaded before.
func (c *Client) Deploy(ctx context.Context, r protocol.DeployRequest) error {
	if err := r.Validate(); err != nil {
		return err
	}
	return c.Controller(ctx, protocol.Deploy, r, nil)
}
