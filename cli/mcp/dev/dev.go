// Package dev has the tools of the development server: an assistant reads and edits a project's modules, has Nix look at
// what it wrote, and runs the project's tests. It asks no fleet, and no secret is read.
//
// Start here: Add gives a server all tools. files.go and edit.go read and edit, by package projectfiles, which keeps to what is open;
// check.go has Nix look, prefetch.go tells hashes of files on the web; tests.go and environment.go start the project's
// own scripts, or the lab, and session.go is how these go.
//
// Whoever may edit __test__ and run tests runs programs here as the user who started the server: --toolsets files,check leaves
// that out.
package dev

import (
	"context"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/prefetch"
	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
	"github.com/nix-infra/nix-infra/cli/mcp/session"
	"github.com/nix-infra/nix-infra/cli/project"
)

// Options are what the tools need of the program around them.
type Options struct {
	Dir          string                           // the project's, absolute
	Open         func() (*project.Project, error) // the project, as it is now
	Supervisor   []string                         // the command that becomes session.Supervise
	Lab          string                           // the lab's program; "" looks for nix-infra-lab on PATH
	AllowPrivate bool                             // nix-prefetch-url may ask machines of the own network
}

// The sets of tools.
const (
	setFiles = "files"
	setCheck = "check"
	setWeb   = "web"
	setTest  = "test"
)

// Server is what the tools share. Close ends what they started.
type Server struct {
	Options
	files    *projectfiles.Folder
	fetcher  prefetch.Fetcher
	sessions *session.Manager

	checking turns // evaluations take memory
	fetching turns // downloads take space
}

// turns bounds how much is done at the same time: as many as it has room for. The others wait for their turn, or until they are given up.
type turns chan struct{}

func (t turns) take(ctx context.Context) (done func(), err error) {
	select {
	case t <- struct{}{}:
		return func() { <-t }, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// Add gives a server its tools.
func Add(s *mcp.Server, o Options) *Server {
	d := &Server{Options: o, files: projectfiles.New(o.Dir), sessions: session.New(session.Options{Supervisor: o.Supervisor}), fetcher: prefetch.Fetcher{AllowPrivate: o.AllowPrivate},
		checking: make(turns, 1), fetching: make(turns, 2)}
	d.addFiles(s)
	d.addEdit(s)
	d.addCheck(s)
	d.addPrefetch(s)
	d.addTests(s)
	d.addEnvironment(s)
	return d
}

// Close ends all sessions.
func (d *Server) Close() { d.sessions.Close() }
