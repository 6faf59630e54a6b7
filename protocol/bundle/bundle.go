// Package bundle is a deployment of one node as a file, for the day on which no controller can be reached:
// a tar of the signed manifest, first, and of all blobs that it lists, in order of their digests.
//
//	manifest         the signed document
//	blobs/DIGEST     the zstd form of one blob
//
// Nothing in a bundle is secret, and nothing in it is believed: the manifest's signature and the blobs'
// digests are its reader's to check.
package bundle

import (
	"archive/tar"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

const (
	manifestName = "manifest"
	blobsDir     = "blobs/"
)

// Write writes a bundle to a file, replacing it atomically. manifest is the signed document, and blob gives
// the zstd form of each blob that it lists.
func Write(file string, manifest []byte, blob func(digest string) ([]byte, error)) error {
	digests, err := listed(manifest)
	if err != nil {
		return fmt.Errorf("no bundle of it can be made: %w", err)
	}
	return atomicfile.Stream(file, 0o600, func(w io.Writer) error {
		t := tar.NewWriter(w)
		if err := add(t, manifestName, manifest); err != nil {
			return err
		}
		for _, digest := range digests {
			packed, err := blob(digest)
			if err != nil {
				return err
			}
			if err := add(t, blobsDir+digest, packed); err != nil {
				return err
			}
		}
		return t.Close()
	})
}

// listed are the blobs of a manifest that this side made or is about to verify.
func listed(manifest []byte) ([]string, error) {
	signed, err := protocol.Decode[protocol.Signed](manifest)
	if err != nil {
		return nil, err
	}
	m, err := protocol.Decode[protocol.Manifest](signed.Payload)
	if err != nil {
		return nil, err
	}
	return m.Blobs(), nil
}

func add(t *tar.Writer, name string, data []byte) error {
	if err := t.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: name, Size: int64(len(data)), Mode: 0o600, Format: tar.FormatUSTAR}); err != nil {
		return err
	}
	_, err := t.Write(data)
	return err
}

// Read reads a bundle, with memory for one blob at a time. verify is given the signed document before
// anything else is read, and says which blobs may follow; each one is then handed to blob, once. All of
// them have to be there, and nothing else may be.
func Read(r io.Reader, verify func(manifest []byte) (blobs []string, err error), blob func(digest string, packed []byte) error) error {
	t := tar.NewReader(r)
	name, manifest, err := next(t, protocol.MaxMessage)
	if err != nil {
		return err
	}
	if name != manifestName {
		return fmt.Errorf("it is no bundle: it begins with %.100q in place of the manifest", name)
	}
	wanted, err := verify(manifest)
	if err != nil {
		return err
	}
	wanted = slices.Clone(wanted)
	slices.Sort(wanted)
	for _, digest := range wanted {
		name, packed, err := next(t, protocol.MaxBlobSize)
		if errors.Is(err, errEnd) {
			return fmt.Errorf("%w before blob %s", err, digest)
		}
		if err != nil {
			return err
		}
		if name != blobsDir+digest {
			return fmt.Errorf("the bundle has %.100q in place of blob %s", name, digest)
		}
		if err := blob(digest, packed); err != nil {
			return err
		}
	}
	name, _, err = next(t, 0)
	if errors.Is(err, errEnd) {
		return nil
	}
	if err == nil {
		err = fmt.Errorf("the bundle has %.100q, which its manifest does not list", name)
	}
	return err
}

var errEnd = errors.New("the bundle ends")

// next reads one file.
func next(t *tar.Reader, limit int64) (name string, data []byte, err error) {
	h, err := t.Next()
	if errors.Is(err, io.EOF) {
		return "", nil, errEnd
	}
	if err != nil {
		return "", nil, fmt.Errorf("it is no bundle: %w", err)
	}
	if h.Typeflag != tar.TypeReg || h.Size < 0 || len(h.PAXRecords) > 0 || strings.HasSuffix(h.Name, "/") {
		return "", nil, fmt.Errorf("it is no bundle: %.100q is not a plain file", h.Name)
	}
	if h.Size > limit {
		return "", nil, fmt.Errorf("%.100q in the bundle has %d bytes; %d are possible", h.Name, h.Size, limit)
	}
	// Memory is taken as data comes: the size is only what the header says.
	data, err = io.ReadAll(io.LimitReader(t, limit))
	if err != nil {
		return "", nil, fmt.Errorf("the bundle can't be read to its end: %w", err)
	}
	return h.Name, data, nil
}
