// Package files answers with a project's files: what the tools that read them have in common, those of the fleet's servers and of the
// development server. Package projectfiles says what is open.
package files

import (
	"context"
	"fmt"
	"strings"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
)

// Row is a file or folder, a piece of a file's text, or a line of it that matches.
type Row struct {
	Path   string `json:"path"`
	Type   string `json:"type,omitempty" jsonschema:"file, directory or link"`
	Size   int64  `json:"size,omitempty" jsonschema:"bytes"`
	SHA256 string `json:"sha256,omitempty" jsonschema:"of the whole file; edit-app-module-files of the development server takes it, to change nothing that was not seen"`
	Line   int    `json:"line,omitempty" jsonschema:"of what matches"`
	Text   string `json:"text,omitempty" jsonschema:"untrusted: lines with their numbers, as L1: text (a long file comes in several results), or the line that matches"`
	Error  string `json:"error,omitempty" jsonschema:"why this one could not be read"`
}

// Names takes the names of several files apart, which have commas between them.
func Names(path string) []string {
	names := strings.Split(path, ",")
	for i := range names {
		names[i] = strings.TrimSpace(names[i])
	}
	return names
}

// List answers with a folder and all below it.
func List(ctx context.Context, folder *projectfiles.Folder, path string) (*mcp.Answer[Row], error) {
	entries, more, err := folder.List(ctx, path)
	if err != nil {
		return nil, err
	}
	a := &mcp.Answer[Row]{Summary: fmt.Sprintf("%d files and folders.", len(entries))}
	if more {
		a.Summary = fmt.Sprintf("The first %d files and folders; list a smaller folder to see the others.", len(entries))
	}
	for _, e := range entries {
		a.Parts = append(a.Parts, mcp.Part[Row]{
			Text: fmt.Sprintf("%s -- size: %d; type: %s", e.Path, e.Size, e.Type), Untrusted: true, // names are others' words, too
			Row: &Row{Path: e.Path, Type: e.Type, Size: e.Size},
		})
	}
	return a, nil
}

// Read answers with the texts of files. That one can't be read is an error where it is the only one.
func Read(folder *projectfiles.Folder, names []string) (*mcp.Answer[Row], error) {
	results, err := folder.ReadMany(names)
	if err != nil {
		return nil, err
	}
	if len(results) == 1 && results[0].Err != nil {
		return nil, results[0].Err
	}
	a := &mcp.Answer[Row]{}
	read := 0
	for _, r := range results {
		if r.Err != nil {
			row := Row{Path: r.Path, Error: r.Err.Error()}
			a.Parts = append(a.Parts, mcp.Part[Row]{Head: mcp.Name(r.Path), Text: row.Error, Untrusted: true, Row: &row})
			continue
		}
		read++
		a.Parts = append(a.Parts, Text(r.Text, projectfiles.Numbered(r.Text.Lines(), 1))...)
	}
	if a.Failed = read == 0; a.Failed {
		a.Summary = "None of the files could be read."
	} else {
		a.Summary = fmt.Sprintf("%d of %d files.", read, len(results))
	}
	return a, nil
}

// Text are the parts of an answer that shows a text of a file's.
func Text(t *projectfiles.Text, shown string) []mcp.Part[Row] {
	row := func(text string) Row {
		return Row{Path: t.Path, Type: "file", SHA256: t.SHA256, Text: text}
	}
	head := mcp.Name(t.Path) + " (sha256 " + t.SHA256 + ")"
	if shown == "" {
		r := row("")
		return []mcp.Part[Row]{{Head: head, Text: "(empty)", Row: &r}}
	}
	return mcp.SplitLines(head, shown, row)
}
