package dev

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	maxProblems = 10       // that are told of a node
	maxLog      = 12 << 10 // bytes of what Nix said: the end
)

// problem is a mistake, and where it is.
type problem struct {
	File    string `json:"file,omitempty" jsonschema:"of the project"`
	Line    int    `json:"line,omitempty"`
	Column  int    `json:"column,omitempty"`
	Message string `json:"message"`
}

func (p problem) String() string {
	switch {
	case p.File == "":
		return p.Message
	case p.Line == 0:
		return p.File + ": " + p.Message
	}
	return fmt.Sprintf("%s:%d: %s", p.File, p.Line, p.Message)
}

var atLine = regexp.MustCompile(`^([^\s:]+):(\d+): (.+)$`)

// problemOf reads a line of an error of package project's, which may begin with file and line.
func problemOf(line string) problem {
	if m := atLine.FindStringSubmatch(line); m != nil {
		n, _ := strconv.Atoi(m[2])
		return problem{File: m[1], Line: n, Message: m[3]}
	}
	return problem{Message: line}
}

// nodeTree is a node's tree in a folder of its own.
type nodeTree struct {
	*check
	node  string
	dir   string
	files map[string]bool

	private []string // files that something else stands in for
}

// hardware stands in for what the machine alone knows.
const hardware = `# Stands in for the machine's own file, which is not known here.
{ lib ? null, options ? { }, ... }:
if options ? fileSystems then {
  fileSystems."/" = lib.mkDefault { device = "/dev/disk/by-label/nixos"; fsType = "ext4"; };
  boot.loader.grub.devices = lib.mkDefault [ "nodev" ];
} else { }
`

// nothing stands in for a file that an assistant may not read: whoever writes Nix code could have an error say what is in it. It is an
// empty set to whoever reads Nix, JSON or YAML.
const nothing = "{ }\n"

func (t *nodeTree) write(tree *project.Tree) error {
	files := slices.Clone(tree.Files)
	for i, name := range protocol.NodeFiles {
		f := project.File{Path: name, Mode: 0o644, Data: []byte("{ ... }: { }\n")}
		if i == 0 {
			f.Data = []byte(hardware)
		}
		if !slices.ContainsFunc(files, func(has project.File) bool { return has.Path == name }) {
			files = append(files, f)
		}
	}
	for _, f := range files {
		if !isOurs(f.Path) && projectfiles.Private(t.source(f.Path), f.Data) {
			t.private = append(t.private, t.source(f.Path))
			f.Data = []byte(nothing)
		}
		file := filepath.Join(t.dir, filepath.FromSlash(f.Path))
		if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(file, f.Data, f.Mode); err != nil {
			return err
		}
		t.files[f.Path] = true
	}
	return nil
}

// isOurs tells of a file of the tree that no person wrote it.
func isOurs(name string) bool {
	return strings.HasPrefix(name, "nix-infra/") || slices.Contains(protocol.NodeFiles, name)
}

// stoodInFor tells which files were not what they are.
func (t *nodeTree) stoodInFor() []string {
	if len(t.private) == 0 {
		return nil
	}
	shown := strings.Join(t.private[:min(len(t.private), maxProblems)], ", ")
	if over := len(t.private) - maxProblems; over > 0 {
		shown += fmt.Sprintf(" and %d more", over)
	}
	return []string{"private files were checked as if they were { }: " + shown}
}

// source is where a file of the tree comes from in the project.
func (t *nodeTree) source(name string) string {
	switch name {
	case t.node + ".nix":
		return path.Join(t.testDir, "nodes", name)
	case "cluster_node.nix":
		return t.module(t.node)
	case "control_node.nix":
		return controlType
	}
	return name
}

// parse has Nix parse all code of the tree that a person wrote, each file once in a check.
func (t *nodeTree) parse(ctx context.Context) (problems []problem) {
	for name := range t.files {
		source := t.source(name)
		if path.Ext(name) != ".nix" || isOurs(name) || t.parsed[source] {
			continue
		}
		err := nix.Parse(ctx, filepath.Join(t.dir, filepath.FromSlash(name)))
		if err == nil {
			t.parsed[source] = true
			continue
		}
		var failed *nix.RunError
		if !errors.As(err, &failed) {
			return append(problems, problem{File: source, Message: err.Error()})
		}
		problems = append(problems, t.problems(err, strings.Join(failed.Tail, "\n"))...)
	}
	slices.SortFunc(problems, func(a, b problem) int { return strings.Compare(a.String(), b.String()) })
	return problems[:min(len(problems), maxProblems)]
}

// evaluate has Nix evaluate an attribute of the tree, which is a flake.
func (t *nodeTree) evaluate(ctx context.Context, attr string) (drv string, problems []problem, log string) {
	var said strings.Builder
	drv, err := nix.Eval(ctx, t.dir, attr, func(line string) {
		if said.Len() < 4<<20 {
			said.WriteString(line + "\n")
		}
	})
	log = t.mapped(said.String())
	if over := len(log) - maxLog; over > 0 {
		log = "(…)\n" + log[over+strings.IndexByte(log[over:], '\n')+1:]
	}
	if err != nil {
		problems = t.problems(err, said.String())
	}
	return drv, problems, log
}

// place is how Nix names a place in the tree: in the folder, or in the store, where it copies flakes.
var place = regexp.MustCompile(`(\S*?/(?:nix-infra-check-\d+/[^/\s]+|nix/store/[0-9a-z]{32}-source))/([^\s:'"»]+)(?::(\d+)(?::(\d+))?)?`)

// mapped has places in the tree named as in the project.
func (t *nodeTree) mapped(log string) string {
	return place.ReplaceAllStringFunc(log, func(s string) string {
		m := place.FindStringSubmatch(s)
		if !t.files[m[2]] {
			return s
		}
		return t.source(m[2]) + strings.TrimPrefix(s, m[1]+"/"+m[2])
	})
}

// problems are what Nix said, by place: the places after its last error are the nearest.
func (t *nodeTree) problems(err error, said string) []problem {
	message := t.mapped(err.Error())
	if i := strings.LastIndex(said, "error:"); i >= 0 {
		if at := t.places(said[i:]); len(at) > 0 {
			at[0].Message = message
			return at[:1]
		}
		if at := t.places(said[:i]); len(at) > 0 { // the trace, the nearest last
			at[len(at)-1].Message = message
			return at[len(at)-1:]
		}
	}
	return []problem{{Message: message}}
}

func (t *nodeTree) places(said string) (all []problem) {
	for _, m := range place.FindAllStringSubmatch(said, -1) {
		if !t.files[m[2]] || m[3] == "" {
			continue
		}
		line, _ := strconv.Atoi(m[3])
		column, _ := strconv.Atoi(m[4])
		all = append(all, problem{File: t.source(m[2]), Line: line, Column: column})
	}
	return all
}
