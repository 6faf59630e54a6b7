package controller

import (
	"context"
	"errors"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/controller/broker"
	"github.com/nix-infra/nix-infra/protocol"
)

// What was deployed to a node may be seen by people too, held back or not.

func (t *term) showManifest(ctx context.Context, order *protocol.Verified) (any, error) {
	q, err := payload[protocol.ManifestRequest](order)
	if err != nil {
		return nil, err
	}
	if err := order.Sender.Reach(q.Node); err != nil {
		return nil, err
	}
	if !t.fleet.enrolled(q.Node) {
		return nil, unknownNode(q.Node)
	}
	digest := ""
	if q.Deployment == "" {
		d, ok := t.fleet.wanted(q.Node)
		if !ok {
			return protocol.ManifestReply{}, nil
		}
		digest = d.Digest
	} else {
		p, has, _ := t.fleet.part(q.Deployment, q.Node)
		if !has {
			return nil, protocol.Refuse(protocol.Unknown, "no deployment %s that names %s is on record (any more)", short(q.Deployment, 64), q.Node)
		}
		digest = p.Digest
	}
	doc, err := t.document(ctx, digest, t.blobs.Get)
	if errors.Is(err, broker.ErrNoBlob) {
		return nil, protocol.Refuse(protocol.Unknown, "the manifest of %s in deployment %s is not kept any more", q.Node, q.Deployment)
	} else if err != nil {
		return nil, err
	}
	return protocol.ManifestReply{Digest: digest, Manifest: doc}, nil
}

func (t *term) showBlob(ctx context.Context, order *protocol.Verified) (any, error) {
	q, err := payload[protocol.BlobRequest](order)
	if err != nil {
		return nil, err
	}
	if err := order.Sender.Reach(q.Node); err != nil {
		return nil, err
	}
	if !t.fleet.onRecord(q.Node, q.Manifest) {
		return nil, noBlob(q.Node)
	}
	return t.piece(ctx, q.Node, q.BlobQuery)
}

// noBlob is one refusal for all that can't be had, so that nobody can find out what others' trees hold.
func noBlob(node string) error {
	return protocol.Refuse(protocol.Unknown, "there is no such manifest for %s, or it does not list this blob", short(node, 64))
}

// piece is a piece of a blob that a node's manifest lists. That the manifest is the node's was checked.
func (t *term) piece(ctx context.Context, node string, q protocol.BlobQuery) (any, error) {
	listed, err := t.listing(ctx, q.Manifest)
	if errors.Is(err, broker.ErrNoBlob) {
		return nil, noBlob(node)
	} else if err != nil {
		return nil, err
	}
	if _, ok := slices.BinarySearch(listed, q.Blob); !ok {
		return nil, noBlob(node)
	}
	content, err := t.blobs.Get(ctx, q.Blob)
	if err != nil {
		return nil, err
	}
	size := int64(len(content))
	if q.Offset < 0 || q.Offset > size {
		return nil, protocol.Refuse(protocol.Invalid, "offset %d of a blob of %d bytes", q.Offset, size)
	}
	end := min(size, q.Offset+t.pace.next(time.Now()))
	return protocol.BlobReply{Size: size, Data: content[q.Offset:end]}, nil
}
