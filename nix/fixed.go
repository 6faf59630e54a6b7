package nix

import (
	"bytes"
	"context"
	"fmt"
	"path"
	"regexp"
	"strings"
)

// Fixed is a store object that is known by its content.
type Fixed struct {
	Path string // store path
	Hash string // of its NAR: sha256: and Nix's base 32
}

var fixedHash = regexp.MustCompile(`^sha256:[0-9abcdfghijklmnpqrsvwxyz]{52}$`)

// AddFixed adds a folder, or a file, to the store under its own name. It is the output of any fixed-output derivation with
// that name and this hash (mode recursive). What is there already is not added again. Nothing keeps it from the
// garbage collector: see SetRoot.
func AddFixed(ctx context.Context, dir string) (Fixed, error) {
	if !path.IsAbs(dir) {
		return Fixed{}, fmt.Errorf("%q can't be added to the store: its path is not absolute", dir)
	}
	out := &bounded{limit: maxPrinted}
	if err := (job{what: "adding to the store", program: "nix-store", args: []string{"--add-fixed", "--recursive", "sha256", dir}, out: out}).run(ctx); err != nil {
		return Fixed{}, err
	}
	f := Fixed{Path: strings.TrimSpace(string(out.data))}
	if err := CheckStorePath(f.Path); err != nil {
		return Fixed{}, fmt.Errorf("nix-store --add-fixed did not print one store path: %w", err)
	}
	out = &bounded{limit: maxPrinted}
	if err := (job{what: "asking for a hash", program: "nix-store", args: []string{"--query", "--hash", f.Path}, out: out}).run(ctx); err != nil {
		return Fixed{}, err
	}
	if f.Hash = string(bytes.TrimSpace(out.data)); !fixedHash.MatchString(f.Hash) {
		return Fixed{}, fmt.Errorf("nix-store --query --hash printed %.100q, which is no hash", f.Hash)
	}
	return f, nil
}
