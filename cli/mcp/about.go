package mcp

import (
	"context"
	"fmt"
	"slices"
	"strings"
)

// Toolset of what every server has.
const toolsetServer = "server"

type about struct {
	Server   string   `json:"server"`
	Version  string   `json:"version"`
	Caller   string   `json:"caller,omitempty" jsonschema:"as whom the fleet is asked"`
	Role     string   `json:"role,omitempty" jsonschema:"what the caller may do: viewer, operator, deployer or admin"`
	ReadOnly bool     `json:"read_only" jsonschema:"whether there are only tools that change nothing"`
	Toolsets []string `json:"toolsets"`
}

// addAbout gives a server the tool that tells what it is.
func (s *Server) addAbout() {
	Add(s, Tool{
		Name: "server-info", Title: "About this server", Toolset: toolsetServer,
		Description: "What this server is, as whom it asks the fleet, and what that may do.",
	}, func(_ context.Context, c *Call, _ struct{}) (*Answer[about], error) {
		d := about{Server: s.Name, Version: s.Version, Caller: c.Caller.Name, Role: string(c.Caller.Role), ReadOnly: s.ReadOnly, Toolsets: slices.Clone(s.toolsets)}
		if len(s.Toolsets) > 0 {
			d.Toolsets = s.Toolsets
		}
		text := fmt.Sprintf("%s %s, with the tools of %s.", d.Server, d.Version, strings.Join(d.Toolsets, ", "))
		if d.Caller != "" {
			text += fmt.Sprintf(" It asks the fleet as %s, whose role is %s.", d.Caller, d.Role)
		}
		if d.ReadOnly {
			text += " It changes nothing."
		}
		return &Answer[about]{Summary: text, Parts: []Part[about]{{Row: &d}}}, nil
	})
}
