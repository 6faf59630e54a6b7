package dev

import (
	"context"
	"fmt"
	"strings"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/files"
	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
)

type readInput struct {
	Operation string `json:"operation,omitempty" enum:"list-content,read-file,read-files" jsonschema:"list-content (a folder and all below it; the default), read-file, or read-files (path is a list with commas)"`
	Path      string `json:"path,omitempty" max:"16384" jsonschema:"below the project, such as nodes/web1.nix; the default is . for all that can be read"`
}

type searchInput struct {
	Pattern       string `json:"pattern" max:"1000" jsonschema:"a regular expression in RE2's syntax, of one line"`
	Path          string `json:"path,omitempty" jsonschema:"file or folder below the project; the default is . for all that can be read"`
	FilePattern   string `json:"file-pattern,omitempty" max:"1000" jsonschema:"only files of such names, such as *.nix; with a slash, of such paths"`
	CaseSensitive *bool  `json:"case-sensitive,omitempty" jsonschema:"the default is true"`
}

func (d *Server) addFiles(s *mcp.Server) {
	open := strings.Join(d.files.Readable(), ", ")
	mcp.Add(s, mcp.Tool{
		Name: "read-project-files", Title: "Read the project's files", Toolset: setFiles,
		Description: "Lists and reads the project's files. Open are " + open + "; not hidden files, secrets, keys, or what links lead to elsewhere. Begin with list-content.",
	}, func(ctx context.Context, _ *mcp.Call, in readInput) (*mcp.Answer[files.Row], error) {
		if in.Path == "" {
			in.Path = "."
		}
		switch in.Operation {
		case "read-file":
			return files.Read(d.files, []string{in.Path})
		case "read-files":
			return files.Read(d.files, files.Names(in.Path))
		}
		return files.List(ctx, d.files, in.Path)
	})
	mcp.Add(s, mcp.Tool{
		Name: "search", Title: "Search the project's files", Toolset: setFiles,
		Description: "Finds lines by a regular expression in the project's files that are open (" + open + ").",
	}, func(ctx context.Context, _ *mcp.Call, in searchInput) (*mcp.Answer[projectfiles.Match], error) {
		if in.Path == "" {
			in.Path = "."
		}
		found, more, err := d.files.Search(ctx, projectfiles.Search{Path: in.Path, Pattern: in.Pattern, Glob: in.FilePattern, NoCase: in.CaseSensitive != nil && !*in.CaseSensitive})
		if err != nil {
			return nil, err
		}
		a := &mcp.Answer[projectfiles.Match]{Summary: fmt.Sprintf("%d lines match.", len(found))}
		if more != "" {
			a.Summary = fmt.Sprintf("%d lines match, and %s.", len(found), more)
		}
		for _, m := range found {
			a.Parts = append(a.Parts, mcp.Part[projectfiles.Match]{Text: fmt.Sprintf("%s:%d: %s", m.File, m.Line, m.Content), Untrusted: true, Row: &m})
		}
		return a, nil
	})
}
