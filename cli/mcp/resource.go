package mcp

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// Resource is something that can be read by its address, beside what tools tell.
type Resource struct {
	URI         string // with {name} at its end where there are many of them
	Name        string
	Description string
	Toolset     string // it is left out where that is
}

// maxResource is how long a resource may be, in bytes. There is no cursor for resources.
const maxResource = 4 * maxPage

// AddResource gives the server a resource. read gets what stands at {name}, and gives an answer, of which the text is shown, up to a
// bound.
func AddResource[Row any](s *Server, r Resource, read func(ctx context.Context, c *Call, name string) (*Answer[Row], error)) {
	if !s.has(r.Toolset) {
		return
	}
	prefix, _, many := strings.Cut(r.URI, "{")
	handle := func(ctx context.Context, request mcp.ReadResourceRequest) ([]mcp.ResourceContents, error) {
		c := &Call{Caller: s.callerOf(ctx), server: s, tool: &Tool{Name: request.Params.URI}}
		began := time.Now()
		a, err := guarded(ctx, c, func(ctx context.Context) (*Answer[Row], error) {
			return read(ctx, c, strings.TrimPrefix(request.Params.URI, prefix))
		})
		c.record(&mcp.CallToolResult{}, err, time.Since(began))
		if err != nil {
			return nil, errors.New(explain(ctx, err))
		}
		whole := a.render()
		end := whole.fits(0, maxResource)
		text := whole.text(whole.parts[:end])
		if left := len(whole.parts) - end; left > 0 {
			text += fmt.Sprintf("\n%d of %d results were left out here; tools tell them page by page.\n", left, len(whole.parts))
		}
		return []mcp.ResourceContents{mcp.TextResourceContents{URI: request.Params.URI, MIMEType: "text/plain", Text: text}}, nil
	}
	if many {
		s.mcp.AddResourceTemplate(mcp.NewResourceTemplate(r.URI, r.Name, mcp.WithTemplateDescription(r.Description), mcp.WithTemplateMIMEType("text/plain")), server.ResourceTemplateHandlerFunc(handle))
		return
	}
	s.mcp.AddResource(mcp.NewResource(r.URI, r.Name, mcp.WithResourceDescription(r.Description), mcp.WithMIMEType("text/plain")), handle)
}

// has tells whether a toolset is served.
func (s *Server) has(toolset string) bool {
	return len(s.Toolsets) == 0 || slices.Contains(s.Toolsets, toolset)
}

// Prompt is a text to begin a piece of work with, which people choose in their client.
type Prompt struct {
	Name, Title, Description string
	Arguments                []PromptArgument
	Toolset                  string // it is left out where that is
}

// PromptArgument is what a prompt is about.
type PromptArgument struct {
	Name, Description string
	Required          bool
}

// maxPromptArgument is how long an argument of a prompt may be, in bytes.
const maxPromptArgument = 500

// AddPrompt gives the server a prompt. Its text is made of the arguments, none of which has more than a line.
func (s *Server) AddPrompt(p Prompt, text func(arguments map[string]string) string) {
	if !s.has(p.Toolset) {
		return
	}
	options := []mcp.PromptOption{mcp.WithPromptDescription(p.Description), mcp.WithPromptTitle(p.Title)}
	for _, a := range p.Arguments {
		about := []mcp.ArgumentOption{mcp.ArgumentDescription(a.Description)}
		if a.Required {
			about = append(about, mcp.RequiredArgument())
		}
		options = append(options, mcp.WithArgument(a.Name, about...))
	}
	s.mcp.AddPrompt(mcp.NewPrompt(p.Name, options...), func(_ context.Context, r mcp.GetPromptRequest) (*mcp.GetPromptResult, error) {
		given := map[string]string{}
		for _, a := range p.Arguments {
			value := clean(r.Params.Arguments[a.Name])
			if a.Required && value == "" {
				return nil, fmt.Errorf("the prompt %s needs %s: %s", p.Name, a.Name, a.Description)
			}
			if len(value) > maxPromptArgument {
				return nil, fmt.Errorf("%s has %d bytes, %d are possible", a.Name, len(value), maxPromptArgument)
			}
			given[a.Name] = value
		}
		return mcp.NewGetPromptResult(p.Description, []mcp.PromptMessage{mcp.NewPromptMessage(mcp.RoleUser, mcp.NewTextContent(text(given)))}), nil
	})
}
