// Package prefetch tells the hashes of what is on the web, as a Nix expression needs them.
//
// Start here: a Fetcher fetches, and gives the hash of the file, or of what it unpacks to. fetch.go is the way there, on which
// somebody who chooses the address must not reach what only this machine can; hash.go has the forms of a hash, unpack.go
// reads archives, archive.go has what is in one, nar.go hashes a tree of files as Nix does.
package prefetch

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"time"
)

// What is taken, at most.
const (
	MaxDownload = 512 << 20 // bytes
	MaxUnpacked = 2 << 30   // bytes
	maxEntries  = 200_000   // of an archive
	maxNames    = 64 << 20  // bytes of their names
	MaxTime     = 5 * time.Minute
)

// Fetcher fetches files. It is safe for concurrent use.
type Fetcher struct {
	AllowPrivate bool           // addresses of this machine and of its networks, too
	Roots        *x509.CertPool // nil: the system's

	permit func(netip.AddrPort) error // instead of the rule, for tests
}

// Result is what was fetched.
type Result struct {
	Hash  Hash
	Bytes int64  // that were downloaded
	URL   string // where it was found in the end
}

// Hash fetches a file and gives its SHA-256 or, with unpack, that of the archive's content as a NAR.
func (f *Fetcher) Hash(ctx context.Context, url string, unpack bool) (*Result, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, MaxTime, fmt.Errorf("it took longer than %v", MaxTime))
	defer cancel()
	result, err := f.hash(ctx, url, unpack)
	if err != nil && errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return nil, context.Cause(ctx)
	}
	return result, err
}

func (f *Fetcher) hash(ctx context.Context, url string, unpack bool) (*Result, error) {
	body, final, err := f.get(ctx, url)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	result := &Result{URL: final}
	if !unpack {
		sum := sha256.New()
		if result.Bytes, err = limitedCopy(sum, body); err != nil {
			return nil, err
		}
		sum.Sum(result.Hash[:0])
		return result, nil
	}
	file, err := scratch()
	if err != nil {
		return nil, err
	}
	defer file.Close()
	if result.Bytes, err = limitedCopy(file, body); err != nil {
		return nil, err
	}
	tree, err := unpackFile(ctx, file, result.Bytes)
	if err != nil {
		return nil, fmt.Errorf("can't unpack it: %w", err)
	}
	defer tree.close()
	result.Hash, err = tree.hash(ctx)
	return result, err
}

// limitedCopy copies a download.
func limitedCopy(to io.Writer, from io.Reader) (int64, error) {
	n, err := io.Copy(to, io.LimitReader(from, MaxDownload+1))
	if err == nil && n > MaxDownload {
		err = fmt.Errorf("it is larger than the %d MiB that are fetched here; use nix-prefetch-url in a terminal", MaxDownload>>20)
	}
	return n, err
}

// scratch is a file that is gone when it is closed.
func scratch() (*os.File, error) {
	file, err := os.CreateTemp("", "nix-infra-prefetch-")
	if err != nil {
		return nil, err
	}
	if err := os.Remove(file.Name()); err != nil {
		file.Close()
		return nil, err
	}
	return file, nil
}
