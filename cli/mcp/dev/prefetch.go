package dev

import (
	"context"
	"errors"
	"fmt"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/prefetch"
)

type prefetchInput struct {
	Operation    string `json:"operation,omitempty" enum:"hash,verify,convert" jsonschema:"hash (of what is at url; the default), verify (that it has expected_hash) or convert (hash to another format)"`
	URL          string `json:"url,omitempty" max:"2000" jsonschema:"https://…"`
	Format       string `json:"format,omitempty" enum:"nix32,sri,hex" jsonschema:"of the hash in the answer; the default is nix32, and all are given beside it"`
	ExpectedHash string `json:"expected_hash,omitempty" max:"200"`
	Hash         string `json:"hash,omitempty" max:"200" jsonschema:"what to convert"`
	FromFormat   string `json:"from_format,omitempty" enum:"nix32,sri,hex" jsonschema:"of the hash to convert; it is told by its length otherwise"`
	Unpack       bool   `json:"unpack,omitempty" jsonschema:"the hash of the archive's content, as fetchTarball and fetchzip have it"`
}

type hashRow struct {
	URL          string   `json:"url,omitempty" jsonschema:"where it was found"`
	Input        string   `json:"input,omitempty"`
	Hash         string   `json:"hash"`
	Format       string   `json:"format"`
	Size         int64    `json:"size,omitempty" jsonschema:"bytes that were downloaded"`
	Unpack       bool     `json:"unpack"`
	ExpectedHash string   `json:"expected_hash,omitempty"`
	Matches      *bool    `json:"matches,omitempty"`
	AllFormats   allForms `json:"all_formats"`
}

type allForms struct {
	Nix32 string `json:"nix32"`
	SRI   string `json:"sri"`
	Hex   string `json:"hex"`
}

func (d *Server) addPrefetch(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "nix-prefetch-url", Title: "Hashes for Nix", Toolset: setWeb, OpenWorld: true, Timeout: prefetch.MaxTime + 10e9,
		Description: fmt.Sprintf("SHA-256 hashes of files on the web, for fetchurl and fetchTarball: fetches them (https only, up to %d MiB, no machine of a private network), keeps nothing. Also compares and converts hashes.", prefetch.MaxDownload>>20),
	}, func(ctx context.Context, _ *mcp.Call, in prefetchInput) (*mcp.Answer[hashRow], error) {
		if in.Format == "" {
			in.Format = prefetch.Nix32
		}
		if in.Operation == "convert" {
			if in.URL != "" || in.Hash == "" {
				return nil, errors.New("convert takes a hash, and no url")
			}
			h, err := prefetch.ParseHash(in.Hash, in.FromFormat)
			if err != nil {
				return nil, err
			}
			row := in.row(h)
			row.Input = in.Hash
			return &mcp.Answer[hashRow]{Summary: row.Hash, Parts: []mcp.Part[hashRow]{{Row: row}}}, nil
		}
		if in.Hash != "" || in.FromFormat != "" {
			return nil, errors.New("hash and from_format are for convert; verify takes expected_hash")
		}
		return d.prefetch(ctx, in)
	})
}

func (d *Server) prefetch(ctx context.Context, in prefetchInput) (*mcp.Answer[hashRow], error) {
	var expected prefetch.Hash
	switch verify := in.Operation == "verify"; {
	case verify && in.ExpectedHash == "":
		return nil, errors.New("verify needs expected_hash")
	case !verify && in.ExpectedHash != "":
		return nil, errors.New("expected_hash is for the operation verify")
	case verify:
		var err error
		if expected, err = prefetch.ParseHash(in.ExpectedHash, ""); err != nil {
			return nil, fmt.Errorf("expected_hash: %w", err)
		}
	}
	done, err := d.fetching.take(ctx)
	if err != nil {
		return nil, err
	}
	defer done()
	got, err := d.fetcher.Hash(ctx, in.URL, in.Unpack)
	if err != nil {
		return nil, err
	}
	row := in.row(got.Hash)
	row.URL, row.Size = got.URL, got.Bytes
	a := &mcp.Answer[hashRow]{Summary: fmt.Sprintf("%s is the hash (%d bytes were downloaded).", row.Hash, got.Bytes), Parts: []mcp.Part[hashRow]{{Row: row}}}
	if in.ExpectedHash != "" {
		matches := expected == got.Hash
		row.Matches, row.ExpectedHash = &matches, in.ExpectedHash
		if a.Summary = "It has the expected hash."; !matches {
			a.Summary = fmt.Sprintf("It has another hash than expected: %s.", row.Hash)
		}
	}
	return a, nil
}

func (in *prefetchInput) row(h prefetch.Hash) *hashRow {
	return &hashRow{Hash: h.Form(in.Format), Format: in.Format, Unpack: in.Unpack, AllFormats: allForms{h.Form(prefetch.Nix32), h.Form(prefetch.SRI), h.Form(prefetch.Hex)}}
}
