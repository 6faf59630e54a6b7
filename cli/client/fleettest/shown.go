package fleettest

import "github.com/nix-infra/nix-infra/protocol"

// showManifest answers with what was signed for a node.
func (f *Fleet) showManifest(payload []byte) (any, error) {
	r, err := protocol.Decode[protocol.ManifestRequest](payload)
	if err != nil {
		return nil, err
	}
	n := f.records[r.Node]
	if n == nil {
		return nil, protocol.Refuse(protocol.Unknown, "there is no node %q", r.Node)
	}
	digest := f.manifests[r.Deployment+" "+r.Node]
	switch {
	case r.Deployment == "" && n.Desired == nil:
		return protocol.ManifestReply{}, nil
	case r.Deployment == "":
		digest = n.Desired.Digest
	case digest == "":
		return nil, protocol.Refuse(protocol.Unknown, "deployment %s has no manifest of %s", r.Deployment, r.Node)
	}
	return protocol.ManifestReply{Digest: digest, Manifest: f.blobs[digest]}, nil
}

// pieceSize is small, so that blobs of a test come in several pieces.
const pieceSize = 64

func (f *Fleet) showBlob(payload []byte) (any, error) {
	r, err := protocol.Decode[protocol.BlobRequest](payload)
	if err != nil {
		return nil, err
	}
	data, ok := f.blobs[r.Blob]
	if !ok {
		return nil, protocol.Refuse(protocol.Unknown, "there is no blob %s", r.Blob)
	}
	packed := encoder.EncodeAll(data, nil)
	offset := min(r.Offset, int64(len(packed)))
	return protocol.BlobReply{Size: int64(len(packed)), Data: packed[offset:min(offset+pieceSize, int64(len(packed)))]}, nil
}

// Forge has the controller keep something under a digest that is not its own.
func (f *Fleet) Forge(digest string, data []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.blobs[digest] = data
}
