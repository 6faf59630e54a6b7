package controller

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/klauspost/compress/zstd"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/protocol"
)

// fleetBlobs are what a deploy to many nodes uploads: a manifest for each node, and the files that all share.
func fleetBlobs(p *person, nodes, files int) [][]byte {
	t := p.r.t
	random := rand.NewChaCha8([32]byte{1})
	var blobs [][]byte
	var listed []protocol.File
	for i := range files {
		data := make([]byte, 4000)
		random.Read(data[:1000])
		blobs = append(blobs, data)
		listed = append(listed, protocol.File{Path: fmt.Sprintf("modules/m%04d.nix", i), SHA256: protocol.Digest(data), Size: int64(len(data))})
	}
	id := protocol.NewID()
	for i := range nodes {
		name := fmt.Sprintf("n%d", i)
		m := &protocol.Manifest{Version: protocol.Version, Node: name, Serial: 1, Deployment: id, Mode: protocol.Switch,
			Files: listed, Attr: protocol.SystemAttr(name), Timeout: 60, BuildTimeout: 60, Settle: 1}
		blobs = append(blobs, value[[]byte](t)(p.Signer.Manifest(m)))
	}
	return blobs
}

// uploadTogether sends small blobs as the CLI does: packed, and four requests at a time.
func (p *person) uploadTogether(t testing.TB, blobs [][]byte) {
	var g errgroup.Group
	g.SetLimit(4)
	var pack protocol.BlobPieces
	size := 0
	flush := func() {
		full := pack
		g.Go(func() error { _, err := p.ask(protocol.PutBlobs, full); return err })
		pack, size = protocol.BlobPieces{}, 0
	}
	encoder := value[*zstd.Encoder](t)(zstd.NewWriter(nil))
	for _, data := range blobs {
		packed := encoder.EncodeAll(data, nil)
		if size+len(packed) > protocol.PackSize/2 {
			flush()
		}
		size += len(packed)
		pack.Pieces = append(pack.Pieces, protocol.BlobPiece{Digest: protocol.Digest(data), Size: int64(len(packed)), Data: packed})
	}
	flush()
	must(t, g.Wait())
}

// BenchmarkUpload is what a deploy to 1,000 nodes with 100 files uploads, request by request on the wire.
func BenchmarkUpload(b *testing.B) {
	r := startRig(b)
	dora := r.person("dora", protocol.Deployer)
	for b.Loop() {
		b.StopTimer()
		blobs := fleetBlobs(dora, 1000, 100)
		b.StartTimer()
		dora.uploadTogether(b, blobs)
	}
}
