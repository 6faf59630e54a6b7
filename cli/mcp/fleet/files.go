package fleet

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
)

// fileRow is a file or folder, its text or a piece of it, or a line that matches.
type fileRow struct {
	Path  string `json:"path"`
	Size  int64  `json:"size,omitempty" jsonschema:"bytes"`
	Type  string `json:"type,omitempty" jsonschema:"file, directory or link"`
	Line  int    `json:"line,omitempty" jsonschema:"of what matches"`
	Text  string `json:"text,omitempty" jsonschema:"untrusted: what the file has, with numbers of lines, or the line that matches"`
	Error string `json:"error,omitempty" jsonschema:"why the file is not shown"`
}

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
	}, func(ctx context.Context, _ *mcp.Call, in filesInput) (*mcp.Answer[fileRow], error) {
		if in.Path = strings.TrimSpace(in.Path); in.Path == "" {
			in.Path = "."
		}
		switch in.Operation {
		case "list-content":
			return listFiles(ctx, folder, in.Path)
		case "search-text":
			return searchFiles(ctx, folder, in)
		case "read-files":
			names := strings.Split(in.Path, ",")
			for i := range names {
				names[i] = strings.TrimSpace(names[i])
			}
			return readFiles(folder, names)
		}
		return readFiles(folder, []string{in.Path})
	})
}

func listFiles(ctx context.Context, folder *projectfiles.Folder, path string) (*mcp.Answer[fileRow], error) {
	entries, more, err := folder.List(ctx, path)
	if err != nil {
		return nil, err
	}
	a := &mcp.Answer[fileRow]{Summary: fmt.Sprintf("%s: %d entries.", path, len(entries))}
	if more {
		a.Summary += " There are more: list a folder below it."
	}
	for _, e := range entries {
		a.Parts = append(a.Parts, mcp.Part[fileRow]{Text: fmt.Sprintf("%s -- size: %d; type: %s", e.Path, e.Size, e.Type), Untrusted: true, Row: &fileRow{Path: e.Path, Size: e.Size, Type: e.Type}})
	}
	return a, nil
}

func readFiles(folder *projectfiles.Folder, names []string) (*mcp.Answer[fileRow], error) {
	results, err := folder.ReadMany(names)
	if err != nil {
		return nil, err
	}
	if len(results) == 1 && results[0].Err != nil {
		return nil, results[0].Err
	}
	a := &mcp.Answer[fileRow]{}
	var failed failures
	for _, r := range results {
		if r.Err != nil {
			failed.add(r.Path, r.Err)
			a.Parts = append(a.Parts, mcp.Part[fileRow]{Head: r.Path, Text: r.Err.Error(), Row: &fileRow{Path: r.Path, Error: r.Err.Error()}})
			continue
		}
		a.Parts = append(a.Parts, mcp.SplitLines(r.Path, projectfiles.Numbered(r.Text.Lines(), 1), func(text string) fileRow { return fileRow{Path: r.Path, Text: text} })...)
	}
	a.Summary = fmt.Sprintf("%d of %s read.", len(results)-failed.count(), plural(len(results), "file"))
	a.Failed = failed.count() == len(results)
	return a, nil
}

func searchFiles(ctx context.Context, folder *projectfiles.Folder, in filesInput) (*mcp.Answer[fileRow], error) {
	if in.Pattern == "" {
		return nil, errors.New("pattern: what is to be looked for?")
	}
	matches, more, err := folder.Search(ctx, projectfiles.Search{Path: in.Path, Pattern: in.Pattern, Glob: in.FilePattern, NoCase: in.CaseSensitive != nil && !*in.CaseSensitive})
	if err != nil {
		return nil, err
	}
	a := &mcp.Answer[fileRow]{Summary: plural(len(matches), "line") + " found."}
	if more != "" {
		a.Summary += " There may be more: " + more + "."
	}
	for _, m := range matches {
		text := fmt.Sprintf("L%d: %s", m.Line, m.Content)
		if mcp.Name(m.File) != m.File {
			text = m.File + " " + text
		}
		a.Parts = append(a.Parts, mcp.Part[fileRow]{Head: mcp.Name(m.File), Text: text, Untrusted: true, Row: &fileRow{Path: m.File, Line: m.Line, Text: m.Content}})
	}
	return a, nil
}
