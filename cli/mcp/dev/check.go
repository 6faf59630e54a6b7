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
		d.checking.Lock()
		defer d.checking.Unlock()
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		return d.check(ctx, in)
	})
}

func (d *Server) check(ctx context.Context, in checkInput) (*mcp.Answer[checkRow], error) {
	c, err := d.newCheck(in)
	if err != nil {
		return nil, err
	}
	names, err := c.concerned(in)
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
		if a.Parts = append(a.Parts, mcp.Part[checkRow]{Head: head, Text: row.text(), Row: row}); log != "" {
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
	facts   []project.NodeFacts
	dir     string          // for the trees
	missing string          // what can't be done here, and why; "" where Nix is
	program error           // that nix is missing
	parsed  map[string]bool // files of the project that are Nix code
}

func (d *Server) newCheck(in checkInput) (*check, error) {
	p, err := d.Open()
	if err != nil && !errors.Is(err, project.ErrNotInitialised) {
		return nil, err
	}
	c := &check{project: p, parsed: map[string]bool{}}
	if _, err := nix.LookPath("nix"); err != nil {
		c.program = err
		c.missing = "Nix is not installed on this machine, so that only the composition was checked: that all files are there, and all placeholders known."
	}
	if in.TestName != "" {
		if c.testDir, err = d.testDir(in.TestName); err != nil {
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
	if c.testDir != "" {
		of, _ := filepath.Glob(filepath.Join(p.Dir, c.testDir, "nodes", "*.nix"))
		for _, file := range of {
			all = append(all, strings.TrimSuffix(filepath.Base(file), ".nix"))
		}
	}
	slices.Sort(all)
	for _, name := range slices.Compact(all) {
		if project.ValidNodeName(name) == nil {
			c.nodes = append(c.nodes, name)
		}
	}
	for i, name := range c.nodes { // addresses that nobody has, where the project does not say: what the fleet knows is not asked
		c.facts = append(c.facts, project.NodeFacts{Name: name, IPv4: fmt.Sprintf("192.0.2.%d", i%250+1), OverlayIP: fmt.Sprintf("198.51.100.%d", i%250+1)})
	}
	return c, nil
}

// concerned are the nodes that an edit concerns.
func (c *check) concerned(in checkInput) ([]string, error) {
	var chosen []string
	for _, name := range list(in.Nodes) {
		if !slices.Contains(c.nodes, name) {
			return nil, fmt.Errorf("there is no node %.80q in the project; it has %s", name, strings.Join(c.nodes, ", "))
		}
		chosen = append(chosen, name)
	}
	for _, file := range list(in.Path) {
		name := strings.TrimSuffix(path.Base(file), ".nix")
		switch dir := path.Base(path.Dir(path.Clean(file))); {
		case dir == "nodes" && slices.Contains(c.nodes, name):
			chosen = append(chosen, name)
		case dir == "node_types":
			chosen = append(chosen, slices.DeleteFunc(slices.Clone(c.nodes), func(n string) bool { return strings.TrimSuffix(path.Base(c.module(n)), ".nix") != name })...)
		default:
			chosen = append(chosen, c.nodes...)
		}
	}
	if in.Nodes == "" && in.Path == "" {
		chosen = slices.Clone(c.nodes)
		if c.testDir != "" {
			chosen = slices.DeleteFunc(chosen, func(n string) bool {
				_, err := os.Stat(filepath.Join(c.project.Dir, c.testDir, "nodes", n+".nix"))
				return err != nil
			})
		}
	}
	slices.Sort(chosen)
	if chosen = slices.Compact(chosen); len(chosen) == 0 {
		return nil, errors.New("that concerns no node of the project; name some in nodes, or give a node a file in nodes/")
	}
	return chosen, nil
}

// module is the node type of a node.
func (c *check) module(node string) string {
	if slices.Contains(c.project.ControlNodes(), node) && c.project.Settings.Nodes[node].NodeModule == "" {
		return ""
	}
	return c.project.Settings.Node(node).NodeModule
}

func list(s string) []string {
	return strings.FieldsFunc(s, func(r rune) bool { return r == ',' || r == ' ' })
}

// node checks one node, and gives what Nix had to say beside it.
func (c *check) node(ctx context.Context, name string) (*checkRow, string) {
	row := &checkRow{Node: name, Step: "compose"}
	var control []project.NodeFacts
	for _, f := range c.facts {
		if slices.Contains(c.project.ControlNodes(), f.Name) {
			control = append(control, f)
		}
	}
	tree, err := c.project.Tree(project.TreeRequest{
		Node: name, TestDir: c.testDir, Nodes: c.facts, ControlNodes: control, ClusterUUID: c.project.ClusterUUID(),
		Control:     slices.Contains(c.project.ControlNodes(), name),
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
