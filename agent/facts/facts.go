// Package facts makes a node's nix-infra/facts.json, by which the NixOS module in a deployed tree finds the programs that
// enrolment installed: they are put into the Nix store, so that the node's own configuration can have them in its
// units without fetching or building anything.
package facts

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"sync"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	agentName      = "nix-infra-agent"
	controllerName = "nix-infra-controller"
)

// DefaultController is the folder of a controller on the same machine.
const DefaultController = "/var/lib/" + controllerName

// Source makes the facts of one node. It is safe for concurrent use.
type Source struct {
	Node       string
	Dir        string // the agent's folder; its bin/nix-infra-agent is what enrolment installed last, which may not be running yet
	Controller string // the controller's folder, which may be missing
	Roots      string // gc roots; "": nix.RootsDir

	// Add puts a folder into the store; nil: nix.AddFixed.
	Add func(ctx context.Context, dir string) (nix.Fixed, error)

	mu    sync.Mutex
	known map[string]stored
}

// stored is a program that is in the store, and the file that it was made of.
type stored struct {
	file os.FileInfo
	nix.Fixed
}

// File gives the document. What did not change since the last call is not put into the store again.
func (s *Source) File(ctx context.Context) ([]byte, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	doc := protocol.NodeFacts{Version: protocol.Version, Node: s.Node, System: system()}
	var err error
	doc.Agent, err = s.program(ctx, agentName, filepath.Join(s.Dir, "bin", agentName))
	if errors.Is(err, fs.ErrNotExist) { // it was started from elsewhere
		doc.Agent, err = s.program(ctx, agentName, "/proc/self/exe")
	}
	if err != nil {
		return nil, err
	}
	doc.Controller, err = s.program(ctx, controllerName, filepath.Join(s.Controller, "bin", controllerName))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return nil, err
	}
	if doc.Controller != nil {
		_, err := os.Stat(filepath.Join(s.Controller, "controller.yaml"))
		doc.Controller.Settings = err == nil
	}
	return append(protocol.Encode(doc), '\n'), nil
}

// system is what Nix calls the machine that this program was made for.
func system() string {
	arch := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	return arch + "-" + runtime.GOOS
}

// program puts a file into the store as NAME/bin/NAME, with a gc root until a deployed system refers to it.
func (s *Source) program(ctx context.Context, name, file string) (*protocol.StoredProgram, error) {
	info, err := os.Stat(file)
	if err != nil {
		return nil, fmt.Errorf("%s can't be put into the store: %w", name, err)
	}
	have, known := s.known[name]
	if !known || !same(have.file, info) || !exists(have.Path) {
		if have.Fixed, err = s.put(ctx, name, file); err != nil {
			return nil, fmt.Errorf("%s can't be put into the store: %w", name, err)
		}
		have.file = info
		if s.known == nil {
			s.known = map[string]stored{}
		}
		s.known[name] = have
	}
	return &protocol.StoredProgram{Name: name, Hash: have.Hash}, nil
}

func same(a, b os.FileInfo) bool {
	return os.SameFile(a, b) && a.Size() == b.Size() && a.ModTime().Equal(b.ModTime())
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}

func (s *Source) put(ctx context.Context, name, file string) (nix.Fixed, error) {
	work := filepath.Join(s.Dir, "store")
	if err := os.RemoveAll(work); err != nil { // what an agent that was killed has left
		return nix.Fixed{}, err
	}
	defer os.RemoveAll(work)
	folder := filepath.Join(work, name)
	if err := os.MkdirAll(filepath.Join(folder, "bin"), 0o755); err != nil {
		return nix.Fixed{}, err
	}
	if err := copyProgram(filepath.Join(folder, "bin", name), file); err != nil {
		return nix.Fixed{}, err
	}
	add, roots := s.Add, s.Roots
	if add == nil {
		add = nix.AddFixed
	}
	if roots == "" {
		roots = nix.RootsDir
	}
	fixed, err := add(ctx, folder)
	if err != nil {
		return nix.Fixed{}, err
	}
	return fixed, nix.SetRoot(roots, name, fixed.Path)
}

// copyProgram goes by the open file: enrolment may replace it at any time.
func copyProgram(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
