package fleet

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/files"
	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
)

type filesInput struct {
	Operation     string `json:"operation" enum:"list-content,read-file,read-files,search-text"`
	Path          string `json:"path,omitempty" jsonschema:"file or folder, relative to the project's; for read-files several, separated by commas; the project if nothing is said" max:"20480"`
	Pattern       string `json:"pattern,omitempty" jsonschema:"what search-text looks for: a regular expression (RE2)" max:"1000"`
	FilePattern   string `json:"file-pattern,omitempty" jsonschema:"in which files: a glob, such as *.nix" max:"200"`
	CaseSensitive *bool  `json:"case-sensitive,omitempty" jsonschema:"true if nothing is said"`
}

func (f *Fleet) addFiles(s *mcp.Server) {
	folder := projectfiles.New(f.Dir)
	mcp.Add(s, mcp.Tool{
		Name: "configuration-files", Title: "Read the project's files", Toolset: setFiles,
		Description: "Read the configuration that the fleet is deployed from: list-content lists a folder with all below it, read-file and read-files give texts with numbers of lines, and search-text " +
			"gives the lines that match. Open are " + strings.Join(folder.Readable(), ", ") + ". Paths are relative; hidden files and links that lead out are refused.",
	}, func(ctx context.Context, _ *mcp.Call, in filesInput) (*mcp.Answer[files.Row], error) {
		if in.Path = strings.TrimSpace(in.Path); in.Path == "" {
			in.Path = "."
		}
		switch in.Operation {
		case "list-content":
			return files.List(ctx, folder, in.Path)
		case "search-text":
			return searchFiles(ctx, folder, in)
		case "read-files":
			return files.Read(folder, files.Names(in.Path))
		}
		return files.Read(folder, []string{in.Path})
	})
}

func searchFiles(ctx context.Context, folder *projectfiles.Folder, in filesInput) (*mcp.Answer[files.Row], error) {
	if in.Pattern == "" {
		return nil, errors.New("pattern: what is to be looked for?")
	}
	matches, more, err := folder.Search(ctx, projectfiles.Search{Path: in.Path, Pattern: in.Pattern, Glob: in.FilePattern, NoCase: in.CaseSensitive != nil && !*in.CaseSensitive})
	if err != nil {
		return nil, err
	}
	a := &mcp.Answer[files.Row]{Summary: plural(len(matches), "line") + " found."}
	if more != "" {
		a.Summary += " There may be more: " + more + "."
	}
	for _, m := range matches {
		text := fmt.Sprintf("L%d: %s", m.Line, m.Content)
		if mcp.Name(m.File) != m.File {
			text = m.File + " " + text
		}
		a.Parts = append(a.Parts, mcp.Part[files.Row]{Head: mcp.Name(m.File), Text: text, Untrusted: true, Row: &files.Row{Path: m.File, Line: m.Line, Text: m.Content}})
	}
	return a, nil
}
