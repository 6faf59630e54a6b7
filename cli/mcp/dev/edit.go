package dev

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/aymanbagabas/go-udiff"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/files"
	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
)

type editInput struct {
	Operation string  `json:"operation" enum:"view,create,replace,insert" jsonschema:"view, create (a new file, with the folders it needs), replace (lines, a text, or all of a file) or insert (before a line)"`
	Path      string  `json:"path" jsonschema:"below the project, such as app_modules/web/default.nix"`
	Content   *string `json:"content,omitempty" max:"1048576" jsonschema:"what is to be there; numbers in front of all lines, as in L1: text, are taken off"`
	StartLine int     `json:"start-line,omitempty" jsonschema:"the first line to view or replace, or the one to insert before; lines count from 1"`
	EndLine   int     `json:"end-line,omitempty" jsonschema:"the last line to view or replace; the default is start-line for replace, and the end for view"`
	OldText   string  `json:"old-text,omitempty" max:"1048576" jsonschema:"replaces this text, which must be there once"`
	SHA256    string  `json:"sha256,omitempty" max:"64" jsonschema:"the file's, from when it was viewed: nothing is changed where it is another by now"`
}

func (d *Server) addEdit(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "edit-app-module-files", Title: "Edit the project's modules", Toolset: setFiles, Effect: mcp.Destroys,
		Description: "Views and changes files in " + strings.Join(d.files.Writable(), ", ") + ", and in nothing else. Answers with the difference. " +
			"View a file first, and give its sha256 back with the change. nix-check tells afterwards whether Nix understands it. Nothing is deployed.",
	}, func(_ context.Context, _ *mcp.Call, in editInput) (*mcp.Answer[files.Row], error) {
		if err := in.check(); err != nil {
			return nil, err
		}
		switch in.Operation {
		case "view":
			return d.view(in)
		case "create":
			text, err := d.files.Create(in.Path, unnumbered(*in.Content))
			if err != nil {
				return nil, err
			}
			return changed("Created", &projectfiles.Text{Path: text.Path}, text), nil
		}
		before, after, err := d.files.Change(in.Path, strings.ToLower(in.SHA256), in.edit)
		if err != nil {
			return nil, err
		}
		return changed("Changed", before, after), nil
	})
}

// check refuses inputs that contradict each other.
func (in *editInput) check() error {
	lines := in.StartLine != 0 || in.EndLine != 0
	switch {
	case in.Operation == "view" && (in.Content != nil || in.OldText != ""):
		return errors.New("view shows a file, and takes no content")
	case in.Operation != "view" && in.Content == nil:
		return errors.New("what should be there instead is missing; give content")
	case in.Operation == "create" && (lines || in.OldText != "" || in.SHA256 != ""):
		return errors.New("create makes a new file, and takes nothing but its path and content")
	case in.StartLine < 0 || in.EndLine < 0:
		return errors.New("lines count from 1")
	case in.EndLine != 0 && in.StartLine == 0:
		return errors.New("end-line needs a start-line")
	case in.EndLine != 0 && in.EndLine < in.StartLine:
		return fmt.Errorf("end-line %d comes before start-line %d", in.EndLine, in.StartLine)
	case in.OldText != "" && (lines || in.Operation != "replace"):
		return errors.New("old-text says itself where it is; leave out the lines, and use it with replace only")
	case in.Operation == "insert" && in.StartLine == 0:
		return errors.New("insert before which line? Give start-line; the number after the last line appends")
	case in.Operation == "insert" && in.EndLine != 0:
		return errors.New("insert takes start-line only")
	}
	return nil
}

func (d *Server) view(in editInput) (*mcp.Answer[files.Row], error) {
	text, err := d.files.Read(in.Path)
	if err != nil {
		return nil, err
	}
	lines := text.Lines()
	from, to := max(in.StartLine, 1), len(lines)
	if in.EndLine != 0 {
		to = min(to, in.EndLine)
	}
	if from > max(to, 1) {
		return nil, fmt.Errorf("start-line %d: the file has %d lines", from, len(lines))
	}
	return &mcp.Answer[files.Row]{
		Summary: fmt.Sprintf("%s has %d lines.", mcp.Name(text.Path), len(lines)),
		Parts:   files.Text(text, projectfiles.Numbered(lines[min(from-1, len(lines)):to], from)),
	}, nil
}

// edit makes the new text of the old one.
func (in *editInput) edit(old string) (string, error) {
	content := unnumbered(*in.Content)
	if in.OldText != "" {
		find := unnumbered(strings.ReplaceAll(in.OldText, "\r\n", "\n"))
		switch n := strings.Count(old, find); n {
		case 0:
			return "", errors.New("old-text is not in the file; view it again, and mind the space at the beginning of lines")
		case 1:
			return strings.Replace(old, find, content, 1), nil
		default:
			return "", fmt.Errorf("old-text is in the file %d times; take in more of what is around it, or give lines", n)
		}
	}
	if in.Operation == "replace" && in.StartLine == 0 {
		return content, nil
	}
	var lines []string
	if old != "" {
		lines = strings.SplitAfter(strings.TrimSuffix(old, "\n"), "\n")
		lines[len(lines)-1] += "\n"
	}
	if content != "" && !strings.HasSuffix(content, "\n") {
		content += "\n"
	}
	at := in.StartLine - 1
	var end int // of what is replaced
	if in.Operation == "insert" {
		const maxPad = 1000
		if at > len(lines)+maxPad {
			return "", fmt.Errorf("start-line %d is far beyond the end; the file has %d lines", in.StartLine, len(lines))
		}
		for at > len(lines) { // as the earlier tool did
			lines = append(lines, "\n")
		}
		end = at
	} else {
		if at >= len(lines) {
			return "", fmt.Errorf("start-line %d is beyond the end; the file has %d lines", in.StartLine, len(lines))
		}
		end = min(max(in.EndLine, in.StartLine), len(lines))
	}
	text := strings.Join(lines[:at], "") + content + strings.Join(lines[end:], "")
	if old != "" && !strings.HasSuffix(old, "\n") && end < len(lines) {
		text = strings.TrimSuffix(text, "\n") // the last line stays as it was
	}
	return text, nil
}

var number = regexp.MustCompile(`^L[0-9]+: ?`)

// unnumbered takes off the numbers that a view puts in front of lines, where all lines have one.
func unnumbered(text string) string {
	lines := strings.SplitAfter(strings.ReplaceAll(text, "\r\n", "\n"), "\n")
	for _, l := range lines {
		if l != "" && !number.MatchString(l) {
			return text
		}
	}
	for i, l := range lines {
		lines[i] = number.ReplaceAllString(l, "")
	}
	return strings.Join(lines, "")
}

// changed answers with the difference.
func changed(did string, before, after *projectfiles.Text) *mcp.Answer[files.Row] {
	if before.SHA256 == after.SHA256 {
		did = "Nothing to change in"
	}
	if before.Mixed && before.SHA256 != after.SHA256 {
		did = "Made all line ends LF, which were mixed, and changed"
	}
	diff := udiff.Unified("a/"+before.Path, "b/"+after.Path, before.Content, after.Content)
	return &mcp.Answer[files.Row]{
		Summary: fmt.Sprintf("%s %s, whose sha256 is %s now.", did, mcp.Name(after.Path), after.SHA256),
		Parts:   files.Text(after, diff),
	}
}
