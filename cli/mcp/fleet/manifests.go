package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"
	"unicode/utf8"

	udiff "github.com/aymanbagabas/go-udiff"

	"github.com/nix-infra/nix-infra/protocol"
)

// deployed is what a deployment brought a node, as its manifest says.
type deployed struct {
	*protocol.Manifest
	digest string // of the signed manifest
}

// manifest is what a deployment has for a node; nil where it had no part in it, or brought no files. It counts as of the time at
// which it was signed.
func manifest(ctx context.Context, s *Session, node, deployment string) (*deployed, error) {
	doc, err := s.Manifest(ctx, node, deployment)
	if errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) || err == nil && len(doc) == 0 {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	signed, err := protocol.Decode[protocol.Signed](doc)
	if err != nil {
		return nil, err
	}
	header, err := protocol.Decode[protocol.Header](signed.Header)
	if err != nil {
		return nil, err
	}
	m, _, err := s.Verifier.Manifest(doc, node, time.Unix(header.NotBefore, 0))
	if err != nil {
		return nil, fmt.Errorf("what the controller says was deployed to %s: %w", node, err)
	}
	if len(m.Files) == 0 {
		return nil, nil
	}
	return &deployed{m, protocol.Digest(doc)}, nil
}

// change is a file that is another one, in the same way on some nodes.
type change struct {
	Path   string   `json:"path"`
	Change string   `json:"change" jsonschema:"added, removed, changed or mode"`
	Nodes  []string `json:"nodes"`
	Diff   string   `json:"diff,omitempty" jsonschema:"untrusted: the lines that changed, unified"`
}

// maxCompared is up to which size files are compared line by line, in bytes.
const maxCompared = 1 << 20

// maxDiff is how much of the difference of one file is shown, in bytes.
const maxDiff = 12 << 10

// compare finds out which files differ between two deployments on a node. before may be nil: then all are new.
func compare(ctx context.Context, s *Session, node string, before, after *deployed) ([]change, error) {
	old, files := map[string]protocol.File{}, map[string]protocol.File{}
	if before != nil {
		for _, f := range before.Files {
			old[f.Path] = f
		}
	}
	for _, f := range after.Files {
		files[f.Path] = f
	}
	paths := maps.Clone(old)
	maps.Copy(paths, files)
	var changes []change
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		was, wasThere := old[path]
		is, isThere := files[path]
		c := change{Path: path, Change: "changed", Nodes: []string{node}}
		switch {
		case !wasThere:
			c.Change = "added"
		case !isThere:
			c.Change = "removed"
		case was.SHA256 == is.SHA256 && was.Exec == is.Exec:
			continue
		case was.SHA256 == is.SHA256:
			c.Change = "mode"
		}
		if before != nil && c.Change != "mode" {
			var err error
			if c.Diff, err = diff(ctx, s, node, path, side{before, was, wasThere}, side{after, is, isThere}); err != nil {
				return nil, err
			}
		}
		changes = append(changes, c)
	}
	return changes, nil
}

// side is a file in one of two deployments.
type side struct {
	of    *deployed
	file  protocol.File
	there bool
}

func (x side) content(ctx context.Context, s *Session, node string) ([]byte, error) {
	if !x.there {
		return nil, nil
	}
	return s.Blob(ctx, node, x.of.digest, x.file.SHA256)
}

// diff is the unified difference of a file.
func diff(ctx context.Context, s *Session, node, path string, before, after side) (string, error) {
	if max(before.file.Size, after.file.Size) > maxCompared {
		return fmt.Sprintf("not compared line by line: %s before, %s after", size(before.file.Size), size(after.file.Size)), nil
	}
	old, err := before.content(ctx, s, node)
	if err != nil {
		return "", err
	}
	data, err := after.content(ctx, s, node)
	if err != nil {
		return "", err
	}
	for _, text := range [][]byte{old, data} {
		if !utf8.Valid(text) || bytes.ContainsRune(text, 0) {
			return "not compared line by line: it is no text", nil
		}
	}
	from, to := "before/"+path, "after/"+path
	if !before.there {
		from = "/dev/null"
	}
	if !after.there {
		to = "/dev/null"
	}
	return shorten(udiff.Unified(from, to, string(old), string(data)), maxDiff), nil
}

// shorten cuts a text after so many bytes, at the end of a line, and says so.
func shorten(text string, most int) string {
	if len(text) <= most {
		return text
	}
	end := bytes.LastIndexByte([]byte(text[:most]), '\n') + 1
	return fmt.Sprintf("%s… (%d bytes of this difference left out)\n", text[:end], len(text)-end)
}

// fold puts together what changed in the same way on several nodes.
func fold(all []change) []change {
	var folded []change
	at := map[string]int{}
	for _, c := range all {
		key := c.Path + "\x00" + c.Change + "\x00" + c.Diff
		if i, ok := at[key]; ok {
			folded[i].Nodes = append(folded[i].Nodes, c.Nodes...)
			continue
		}
		at[key] = len(folded)
		folded = append(folded, c)
	}
	for i := range folded {
		slices.Sort(folded[i].Nodes)
	}
	slices.SortStableFunc(folded, func(x, y change) int { return bytes.Compare([]byte(x.Path), []byte(y.Path)) })
	return folded
}
