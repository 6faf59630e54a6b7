package dev

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// Bounds of a check.
const (
	maxChecked = 5               // nodes that are evaluated
	checkTime  = 5 * time.Minute // for all of it
)

type checkInput struct {
	Path     string `json:"path,omitempty" max:"16384" jsonschema:"what was edited, with commas between: the nodes that it concerns are checked; without path and nodes, all are"`
	Nodes    string `json:"nodes,omitempty" jsonschema:"check these nodes, with commas between"`
	TestName string `json:"test-name,omitempty" max:"128" jsonschema:"check the nodes of this test, a folder in __test__"`
}

// checkRow is what came of one node.
type checkRow struct {
	Node       string    `json:"node"`
	OK         bool      `json:"ok"`
	Step       string    `json:"step" jsonschema:"how far it came: compose (the node's files and their placeholders), parse, or evaluate"`
	Derivation string    `json:"derivation,omitempty" jsonschema:"the system that would be built"`
	Problems   []problem `json:"problems,omitempty"`
	Warnings   []string  `json:"warnings,omitempty"`
}

func (d *Server) addCheck(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "nix-check", Title: "Check with Nix", Toolset: setCheck, OpenWorld: true, Timeout: checkTime + 10*time.Second,
		Description: fmt.Sprintf("Tells whether the systems of nodes can be evaluated as the project's files are now: composes each node's files as a deployment does, parses them, and evaluates the system (nothing is built; up to %d nodes). Mistakes come with file and line of the project.", maxChecked),
	}, func(ctx context.Context, _ *mcp.Call, in checkInput) (*mcp.Answer[checkRow], error) {
		ctx, cancel := context.WithTimeoutCause(ctx, checkTime, fmt.Errorf("checking took longer than %v; check fewer nodes", checkTime))
		defer cancel()
		done, err := d.checking.take(ctx)
		if err != nil {
			return nil, err
		}
		defer done()
		return d.check(ctx, in)
	})
}

func (d *Server) check(ctx context.Context, in checkInput) (*mcp.Answer[checkRow], error) {
	edited, err := d.edited(in.Path)
	if err != nil {
		return nil, err
	}
	if in.TestName, err = testOf(in.TestName, edited); err != nil {
		return nil, err
	}
	c, err := d.newCheck(in.TestName)
	if err != nil {
		return nil, err
	}
	names, err := c.concerned(list(in.Nodes), edited)
	if err != nil {
		return nil, err
	}
	left := names[min(len(names), maxChecked):]
	names = names[:len(names)-len(left)]
	if c.dir, err = os.MkdirTemp("", "nix-infra-check-"); err != nil {
		return nil, err
	}
	defer os.RemoveAll(c.dir)
	a := &mcp.Answer[checkRow]{}
	good := 0
	var steps []string
	for _, name := range names {
		row, log := c.node(ctx, name)
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if row.OK {
			good++
		}
		steps = append(steps, row.Step)
		head := name + ": " + row.Step
		if a.Parts = append(a.Parts, mcp.Part[checkRow]{Head: head, Text: row.text(), Untrusted: true, Row: row}); log != "" {
			a.Parts = append(a.Parts, mcp.Part[checkRow]{Head: head, Text: log, Untrusted: true})
		}
	}
	a.Failed = good < len(names)
	a.Summary = fmt.Sprintf("%d of %d nodes are good.", good, len(names))
	if c.missing != "" && slices.Contains(steps, "compose") {
		a.Summary += " " + c.missing
	}
	if len(left) > 0 {
		a.Summary += fmt.Sprintf(" Not checked, because %d are checked at a time: %s.", maxChecked, strings.Join(left, ", "))
	}
	return a, nil
}

func (r *checkRow) text() string {
	var lines []string
	for _, p := range r.Problems {
		lines = append(lines, p.String())
	}
	lines = append(lines, r.Warnings...)
	if r.OK {
		lines = append(lines, "good")
	}
	return strings.Join(lines, "\n")
}

// check is one check in the making.
type check struct {
	project *project.Project
	testDir string
	nodes   []string // all that are known
	own     []string // of these, those of the test, or all where there is none
	facts   []project.NodeFacts
	dir     string          // for the trees
	missing string          // what can't be done here, and why; "" where Nix is
	program error           // that nix is missing
	parsed  map[string]bool // files of the project that are Nix code
}

// edited are the files and folders that a call names, in their shortest form. They have to be there: what is misspelt was not checked.
func (d *Server) edited(names string) (clean []string, err error) {
	for _, name := range list(names) {
		if _, err := d.files.IsFolder(name); err != nil {
			return nil, err
		}
		clean = append(clean, path.Clean(name))
	}
	return clean, nil
}

// testOf is the test that a check is of: what lies in a test is checked with it.
func testOf(named string, edited []string) (string, error) {
	for _, file := range edited {
		parts := strings.Split(file, "/")
		if parts[0] != testsDir || len(parts) < 3 {
			continue
		}
		if named != "" && parts[1] != named {
			return "", fmt.Errorf("%.200q is not of the test %s; check one test at a time", file, named)
		}
		named = parts[1]
	}
	return named, nil
}

func (d *Server) newCheck(test string) (*check, error) {
	p, err := d.Open()
	if err != nil && !errors.Is(err, project.ErrNotInitialised) {
		return nil, err
	}
	c := &check{project: p, parsed: map[string]bool{}}
	if _, err := nix.LookPath("nix"); err != nil {
		c.program = err
		c.missing = "Nix is not installed on this machine, so that only the composition was checked: that all files are there, and all placeholders known."
	}
	if test != "" {
		if c.testDir, err = d.testDir(test); err != nil {
			return nil, err
		}
	}
	servers, err := p.Servers()
	if err != nil {
		return nil, err
	}
	files, err := p.NodeFiles()
	if err != nil {
		return nil, err
	}
	all := slices.Concat(files, slices.Collect(maps.Keys(p.Settings.Nodes)), p.ControlNodes())
	for _, s := range servers {
		all = append(all, s.Name)
	}
	var ofTest []string
	if c.testDir != "" {
		entries, _ := os.ReadDir(filepath.Join(p.Dir, c.testDir, "nodes")) // a test may have none
		for _, e := range entries {
			if name, ok := strings.CutSuffix(e.Name(), ".nix"); ok {
				ofTest = append(ofTest, name)
			}
		}
	}
	all = slices.DeleteFunc(append(all, ofTest...), func(name string) bool { return project.ValidNodeName(name) != nil })
	slices.Sort(all)
	c.nodes = slices.Compact(all)
	if c.own = c.nodes; c.testDir != "" {
		c.own = slices.DeleteFunc(slices.Clone(c.nodes), func(name string) bool { return !slices.Contains(ofTest, name) })
	}
	for i, name := range c.nodes { // addresses that nobody has, where the project does not say: what the fleet knows is not asked
		c.facts = append(c.facts, project.NodeFacts{Name: name, IPv4: fmt.Sprintf("192.0.2.%d", i%250+1), OverlayIP: fmt.Sprintf("198.51.100.%d", i%250+1)})
	}
	return c, nil
}

// concerned are the nodes that a check is of: those that are named, and those that what was edited concerns.
func (c *check) concerned(nodes, edited []string) ([]string, error) {
	var chosen []string
	for _, name := range nodes {
		if !slices.Contains(c.nodes, name) {
			return nil, fmt.Errorf("there is no node %.80q in the project; it has %s", name, strings.Join(c.nodes, ", "))
		}
		chosen = append(chosen, name)
	}
	for _, file := range edited {
		name := strings.TrimSuffix(path.Base(file), ".nix")
		switch path.Dir(file) {
		case path.Join(c.testDir, "nodes"), "nodes":
			if !slices.Contains(c.nodes, name) {
				return nil, fmt.Errorf("%.200q is no node's: a node's name is of letters a to z, digits and dashes, and its file ends in .nix", file)
			}
			chosen = append(chosen, name)
		case "node_types":
			chosen = append(chosen, slices.DeleteFunc(slices.Clone(c.nodes), func(n string) bool { return !slices.Contains(c.types(n), file) })...)
		default:
			chosen = append(chosen, c.own...)
		}
	}
	if len(nodes)+len(edited) == 0 {
		chosen = slices.Clone(c.own)
	}
	slices.Sort(chosen)
	if chosen = slices.Compact(chosen); len(chosen) == 0 {
		return nil, errors.New("that concerns no node of the project; name some in nodes, or give a node a file in nodes/")
	}
	return chosen, nil
}

// module is the file of a node's type, below the project; "" where it has none.
func (c *check) module(node string) string {
	module := c.project.Settings.Node(node).NodeModule
	if c.isControl(node) && c.project.Settings.Nodes[node].NodeModule == "" || module == "" {
		return ""
	}
	if module = path.Clean(module); !strings.Contains(module, "/") {
		module = path.Join("node_types", module)
	}
	return strings.TrimSuffix(module, ".nix") + ".nix"
}

// types are the files of node types that a node is made of.
func (c *check) types(node string) []string {
	if c.isControl(node) {
		return []string{controlType, c.module(node)}
	}
	return []string{c.module(node)}
}

// noCluster stands in for the cluster's id, which its nodes know each other by.
const noCluster = "00000000-0000-0000-0000-000000000000"

const controlType = "node_types/control_node.nix"

func (c *check) isControl(node string) bool { return slices.Contains(c.project.ControlNodes(), node) }

func list(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// node checks one node, and gives what Nix had to say beside it.
func (c *check) node(ctx context.Context, name string) (*checkRow, string) {
	row := &checkRow{Node: name, Step: "compose"}
	var control []project.NodeFacts
	for _, f := range c.facts {
		if c.isControl(f.Name) {
			control = append(control, f)
		}
	}
	tree, err := c.project.Tree(project.TreeRequest{
		Node: name, TestDir: c.testDir, Nodes: c.facts, ControlNodes: control, ClusterUUID: noCluster,
		Control:     c.isControl(name),
		TrustedKeys: func() ([]string, error) { return nil, nil }, // they are among the secrets
	})
	if err != nil {
		for line := range strings.SplitSeq(err.Error(), "\n") {
			row.Problems = append(row.Problems, problemOf(line))
		}
		return row, ""
	}
	row.Warnings = tree.Warnings
	if c.program != nil {
		row.OK = true
		return row, ""
	}
	t := &nodeTree{check: c, node: name, dir: filepath.Join(c.dir, name), files: map[string]bool{}}
	if err := t.write(tree); err != nil {
		row.Problems = append(row.Problems, problem{Message: err.Error()})
		return row, ""
	}
	row.Warnings = append(row.Warnings, t.stoodInFor()...)
	row.Step = "parse"
	if row.Problems = t.parse(ctx); len(row.Problems) > 0 {
		return row, ""
	}
	row.Step = "evaluate"
	var log string
	row.Derivation, row.Problems, log = t.evaluate(ctx, protocol.SystemAttr(name))
	row.OK = len(row.Problems) == 0
	return row, log
}
