// Package mcp is the framework of the three MCP servers: what every tool of theirs has in common. A tool
// is a typed question (tool.go) with an answer in parts (answer.go), of which no more than a cap goes out at once
// (pages.go); what changes something asks a person first (confirm.go). stdio.go and http.go carry it.
//
// Start here: New makes a server, and Add gives it a tool. The tools are in the packages below: fleet (the
// servers cluster and machine) and dev.
package mcp

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"

	"github.com/nix-infra/nix-infra/protocol"
)

// Options is what a server is and what it may do.
type Options struct {
	Name         string // such as nix-infra-cluster-mcp
	Title        string
	Version      string
	Instructions string // for the assistant: what the server is for, and how to begin

	ReadOnly bool     // there are only tools that change nothing
	Toolsets []string // only tools of these; none: all
	Allow    []string // the tools that change a fleet and need to be named for it

	Caller Caller       // who asks over stdio, or over HTTP where that has no tokens
	Log    *slog.Logger // one line for each call; never stdout's
}

// Caller is who asks, and with whose credentials the fleet is asked.
type Caller struct {
	Name  string        // of the credentials' user; of the token where there are none
	Role  protocol.Role // "" for a server that asks no fleet
	Token string        // the bearer token's name; "" over stdio
	Creds string        // the credentials file; "" without
	Key   string        // the public key of the user in it: a file may have other credentials later
}

// Server is an MCP server. Tools are added before it serves.
type Server struct {
	Options
	mcp   *server.MCPServer
	pages *pages

	key        []byte        // signs what clients hand back
	confirmFor time.Duration // how long a person has to confirm something
	confirmed  confirmations

	toolsets []string
	tools    map[string]*Tool // by name, those that are served
}

// New makes a server without tools.
func New(o Options) *Server {
	s := &Server{Options: o, key: make([]byte, 32), confirmFor: confirmFor, pages: newPages(), tools: map[string]*Tool{}}
	rand.Read(s.key) // it never fails
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	s.mcp = server.NewMCPServer(o.Name, o.Version,
		server.WithTitle(o.Title),
		server.WithInstructions(o.Instructions),
		server.WithToolCapabilities(false),
		server.WithResourceCapabilities(false, false),
		server.WithPromptCapabilities(false),
		server.WithInputSchemaValidation(),
		server.WithOutputSchemaValidation(),
		server.WithToolFilter(s.visible),
	)
	s.addAbout()
	return s
}

// CheckToolsets refuses names of toolsets that the server has none of, and things to allow that no tool
// is for. It is called once all tools were added.
func (s *Server) CheckToolsets(allowable []string) error {
	for _, name := range s.Toolsets {
		if !slices.Contains(s.toolsets, name) {
			return fmt.Errorf("there is no toolset %q; %s has %s", name, s.Name, strings.Join(s.toolsets, ", "))
		}
	}
	for _, name := range s.Allow {
		if !slices.Contains(allowable, name) {
			return fmt.Errorf("--allow %q: use some of %s", name, strings.Join(allowable, ", "))
		}
	}
	if len(s.tools) == 0 {
		return errors.New("no tool is left of those toolsets; name others")
	}
	return nil
}

// visible leaves out tools that the caller's role does not allow. mcp-go asks it when a tool is called, too.
func (s *Server) visible(ctx context.Context, tools []mcp.Tool) []mcp.Tool {
	role := s.callerOf(ctx).Role
	return slices.DeleteFunc(slices.Clone(tools), func(t mcp.Tool) bool {
		own := s.tools[t.Name]
		return own == nil || own.Role != "" && !role.AtLeast(own.Role)
	})
}

// Protocol is the server as mcp-go has it, for clients in the same process.
func (s *Server) Protocol() *server.MCPServer { return s.mcp }

type callerKey struct{}

// withCaller has what ctx is of asked by c.
func withCaller(ctx context.Context, c Caller) context.Context {
	return context.WithValue(ctx, callerKey{}, c)
}

func (s *Server) callerOf(ctx context.Context) Caller {
	if c, ok := ctx.Value(callerKey{}).(Caller); ok {
		return c
	}
	return s.Caller
}
