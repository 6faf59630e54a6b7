// Package policy is what a node's own configuration allows beyond what every node does.
package policy

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"strings"
	"unicode"
)

// File is where a system has its policy, below its store path. docs/policy.md has the form.
const File = "etc/nix-infra/policy.json"

const (
	maxFile  = 64 << 10 // bytes
	maxRoots = 32
)

// Policy is a node's. The zero value allows nothing beyond the defaults.
type Policy struct {
	Files Files
}

// Files says which files may be read.
type Files struct {
	Roots []string // folders, absolute: all files below them
}

// Load reads the policy of a system, by its store path. A system without the file has the zero policy. What is not
// understood is an error: a policy that is half known is none.
func Load(system string) (Policy, error) {
	f, err := os.Open(path.Join(system, File))
	if errors.Is(err, fs.ErrNotExist) {
		return Policy{}, nil
	}
	if err != nil {
		return Policy{}, fmt.Errorf("the node's policy can't be read: %w", err)
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return Policy{}, fmt.Errorf("the node's policy can't be read: %w", err)
	}
	p, err := Parse(data)
	if err != nil {
		return Policy{}, fmt.Errorf("%s of the running system: %w; docs/policy.md has the form", File, err)
	}
	return p, nil
}

// Parse reads the document. Errors are one line and name the field.
func Parse(data []byte) (Policy, error) {
	if len(data) > maxFile {
		return Policy{}, fmt.Errorf("it has more than %d bytes", maxFile)
	}
	var document struct {
		Version int `json:"v"`
		Files   struct {
			Roots []string `json:"roots"`
		} `json:"files"`
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&document); err != nil {
		return Policy{}, fmt.Errorf("it can't be decoded: %w", err)
	}
	if _, err := d.Token(); !errors.Is(err, io.EOF) {
		return Policy{}, errors.New("something follows the document")
	}
	if document.Version != 1 {
		return Policy{}, fmt.Errorf("field \"v\": %d; this agent knows version 1", document.Version)
	}
	roots := document.Files.Roots
	if len(roots) > maxRoots {
		return Policy{}, fmt.Errorf("field \"files.roots\": %d roots; %d are possible", len(roots), maxRoots)
	}
	for _, r := range roots {
		if r == "/" || !path.IsAbs(r) || path.Clean(r) != r || len(r) > 4096 || strings.ContainsFunc(r, unicode.IsControl) {
			return Policy{}, fmt.Errorf("field \"files.roots\": %.80q is no absolute path of a folder below / without . and .. in it", r)
		}
	}
	return Policy{Files: Files{Roots: roots}}, nil
}
