package dev

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
)

type readInput struct {
	Operation string `json:"operation,omitempty" enum:"list-content,read-file,read-files" jsonschema:"list-content (a folder and all below it; the default), read-file, or read-files (path is a list with commas)"`
	Path      string `json:"path,omitempty" max:"16384" jsonschema:"below the project, such as nodes/web1.nix; the default is . for all that can be read"`
}

// fileRow is a file or folder, or a piece of a file's text.
type fileRow struct {
	Path   string `json:"path"`
	Type   string `json:"type,omitempty" jsonschema:"file, directory or link"`
	Size   int64  `json:"size,omitempty" jsonschema:"bytes"`
	SHA256 string `json:"sha256,omitempty" jsonschema:"of the whole file; edit-app-module-files takes it, to change nothing that was not seen"`
	Text   string `json:"text,omitempty" jsonschema:"lines with their numbers, as L1: text; a long file comes in several results"`
	Error  string `json:"error,omitempty" jsonschema:"why this one could not be read"`
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
	}, func(ctx context.Context, _ *mcp.Call, in readInput) (*mcp.Answer[fileRow], error) {
		if in.Path == "" {
			in.Path = "."
		}
		switch in.Operation {
		case "read-file":
			return d.read([]string{in.Path})
		case "read-files":
			names := strings.Split(in.Path, ",")
			for i := range names {
				names[i] = strings.Trim(names[i], " ")
			}
			return d.read(names)
		}
		return d.list(ctx, in.Path)
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

func (d *Server) list(ctx context.Context, path string) (*mcp.Answer[fileRow], error) {
	entries, more, err := d.files.List(ctx, path)
	if err != nil {
		return nil, err
	}
	a := &mcp.Answer[fileRow]{Summary: fmt.Sprintf("%d files and folders.", len(entries))}
	if more {
		a.Summary = fmt.Sprintf("The first %d files and folders; list a smaller folder to see the others.", len(entries))
	}
	for _, e := range entries {
		a.Parts = append(a.Parts, mcp.Part[fileRow]{
			Text: fmt.Sprintf("%s -- size: %d; type: %s", e.Path, e.Size, e.Type), Untrusted: true, // names are others' words, too
			Row: &fileRow{Path: e.Path, Type: e.Type, Size: e.Size},
		})
	}
	return a, nil
}

func (d *Server) read(names []string) (*mcp.Answer[fileRow], error) {
	results, err := d.files.ReadMany(names)
	if err != nil {
		return nil, err
	}
	a := &mcp.Answer[fileRow]{}
	read := 0
	for _, r := range results {
		if r.Err != nil {
			if len(results) == 1 {
				return nil, r.Err
			}
			row := fileRow{Path: r.Path, Error: r.Err.Error()}
			a.Parts = append(a.Parts, mcp.Part[fileRow]{Head: mcp.Name(r.Path), Text: row.Error, Untrusted: true, Row: &row})
			continue
		}
		read++
		a.Parts = append(a.Parts, textParts(r.Text, projectfiles.Numbered(r.Text.Lines(), 1))...)
	}
	if a.Failed = read == 0; a.Failed {
		a.Summary = "None of the files could be read."
	} else {
		a.Summary = fmt.Sprintf("%d of %d files.", read, len(results))
	}
	return a, nil
}

// textParts are the parts of an answer that shows a text of a file's.
func textParts(t *projectfiles.Text, shown string) []mcp.Part[fileRow] {
	row := func(text string) fileRow {
		return fileRow{Path: t.Path, Type: "file", SHA256: t.SHA256, Text: text}
	}
	head := mcp.Name(t.Path) + " (sha256 " + t.SHA256 + ")"
	if shown == "" {
		r := row("")
		return []mcp.Part[fileRow]{{Head: head, Text: "(empty)", Row: &r}}
	}
	return mcp.SplitLines(head, shown, row)
}

// errNothing is about a change that has nothing to say what.
var errNothing = errors.New("what should be there instead is missing; give content")
