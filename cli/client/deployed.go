package client

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/klauspost/compress/zstd"

	"github.com/nix-infra/nix-infra/protocol"
)

// Manifest is the signed manifest that a deployment has for a node or, with deployment "", the one that the node
// should have; nil where nothing was ever deployed to it. Who signed it is the caller's to verify.
func (c *Client) Manifest(ctx context.Context, node, deployment string) ([]byte, error) {
	var r protocol.ManifestReply
	if err := c.Controller(ctx, protocol.ShowManifest, protocol.ManifestRequest{Node: node, Deployment: deployment}, &r); err != nil {
		return nil, err
	}
	if len(r.Manifest) > 0 && protocol.Digest(r.Manifest) != r.Digest {
		return nil, fmt.Errorf("the controller's manifest of %s has another content than its name says", node)
	}
	return r.Manifest, nil
}

// Blob is the content of a blob that a node's manifest (by digest) lists.
func (c *Client) Blob(ctx context.Context, node, manifest, blob string) ([]byte, error) {
	request := protocol.BlobRequest{Node: node, BlobQuery: protocol.BlobQuery{Manifest: manifest, Blob: blob}}
	var packed []byte
	for {
		var piece protocol.BlobReply
		request.Offset = int64(len(packed))
		if err := c.Controller(ctx, protocol.ShowBlob, request, &piece); err != nil {
			return nil, err
		}
		packed = append(packed, piece.Data...)
		got := int64(len(packed))
		if piece.Size > protocol.MaxBlobSize || got > piece.Size || got < piece.Size && len(piece.Data) == 0 {
			return nil, fmt.Errorf("the controller sent %d of %d bytes of blob %s", got, piece.Size, blob)
		}
		if got == piece.Size {
			return unpack(packed, blob)
		}
	}
}

// unpack decodes zstd, in memory that is bounded however the frame was made, and checks what came out.
func unpack(packed []byte, blob string) ([]byte, error) {
	d, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecoderMaxMemory(2*protocol.MaxFileSize))
	if err != nil {
		return nil, err
	}
	defer d.Close()
	data, err := d.DecodeAll(packed, nil)
	if err != nil {
		return nil, fmt.Errorf("blob %s can't be decompressed: %w", blob, err)
	}
	if protocol.Digest(data) != blob {
		return nil, fmt.Errorf("blob %s arrived with another content than its name says", blob)
	}
	return data, nil
}

// AskEach is AskMany with the answers read. Like the controller's, they may say more than is known here.
func AskEach[T any](ctx context.Context, c *Client, nodes []string, action protocol.Action, payload any, each func(node string, answer T, err error)) (silent []string, err error) {
	return c.AskMany(ctx, nodes, action, payload, func(node string, r *protocol.Reply, err error) {
		var answer T
		if err == nil {
			if err = json.Unmarshal(r.Body, &answer); err != nil {
				err = fmt.Errorf("the answer of %s to %s: %w", node, action, err)
			}
		}
		each(node, answer, err)
	})
}
