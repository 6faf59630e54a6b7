package client

import (
	"context"
	"fmt"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	uploads   = 4      // blobs at a time
	askDigest = 10_000 // digests in one MissingBlobs request
)

// Uploaded says what an upload amounted to.
type Uploaded struct {
	Blobs int   // that the controller did not have
	Bytes int64 // that were sent, compressed
}

// Upload gives the controller the blobs (by digest) that it does not have yet.
func (c *Client) Upload(ctx context.Context, blobs map[string][]byte) (Uploaded, error) {
	missing, err := c.missing(ctx, blobs)
	if err != nil {
		return Uploaded{}, err
	}
	encoder, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(uploads))
	if err != nil {
		return Uploaded{}, err
	}
	defer encoder.Close()
	group, ctx := errgroup.WithContext(ctx)
	group.SetLimit(uploads)
	sent := make([]int64, len(missing))
	for i, digest := range missing {
		group.Go(func() error {
			packed := encoder.EncodeAll(blobs[digest], nil)
			sent[i] = int64(len(packed))
			return c.putBlob(ctx, digest, packed)
		})
	}
	if err := group.Wait(); err != nil {
		return Uploaded{}, fmt.Errorf("uploading: %w", err)
	}
	done := Uploaded{Blobs: len(missing)}
	for _, n := range sent {
		done.Bytes += n
	}
	return done, nil
}

// missing asks which of the blobs the controller lacks.
func (c *Client) missing(ctx context.Context, blobs map[string][]byte) ([]string, error) {
	var all, missing []string
	for digest := range blobs {
		all = append(all, digest)
	}
	for len(all) > 0 {
		some := all[:min(len(all), askDigest)]
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

func (c *Client) putBlob(ctx context.Context, digest string, packed []byte) error {
	for offset := 0; offset == 0 || offset < len(packed); offset += protocol.ChunkSize {
		piece := protocol.BlobPiece{
			Digest: digest, Size: int64(len(packed)), Offset: int64(offset),
			Data: packed[offset:min(len(packed), offset+protocol.ChunkSize)],
		}
		if err := c.Controller(ctx, protocol.PutBlob, piece, nil); err != nil {
			return err
		}
	}
	return nil
}

// Deploy makes the manifests of a request wanted. They have to be uploaded before.
func (c *Client) Deploy(ctx context.Context, r protocol.DeployRequest) error {
	if err := r.Validate(); err != nil {
		return err
	}
	return c.Controller(ctx, protocol.Deploy, r, nil)
}
