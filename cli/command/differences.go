package command

import (
	"bytes"
	"errors"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	udiff "github.com/aymanbagabas/go-udiff"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// differences are those of all nodes.
type differences []difference

// nodeDifference is what a deploy would change on a node, in `diff --json`.
type nodeDifference struct {
	Event      string `json:"event"` // node
	Node       string `json:"node"`
	Deployment string `json:"deployment"`
	Added      int    `json:"added"`
	Removed    int    `json:"removed"`
	Changed    int    `json:"changed"`
	Unknown    string `json:"unknown"`
}

// fileDifference is a file that would change in the same way on some nodes, in `diff --json`.
type fileDifference struct {
	Event   string   `json:"event"` // file
	Path    string   `json:"path"`
	Change  string   `json:"change"` // added, removed, changed or mode
	Nodes   []string `json:"nodes"`
	Added   int      `json:"added"`
	Removed int      `json:"removed"`
	Diff    string   `json:"diff"`
}

// secretDifference is a secret that some nodes would get, lose, or get another value of, in `diff --json`.
type secretDifference struct {
	Event  string   `json:"event"` // secret
	Name   string   `json:"name"`
	Change string   `json:"change"` // added, removed or changed
	Nodes  []string `json:"nodes"`
}

// maxCompared is up to which size files are compared line by line, in bytes.
const maxCompared = 1 << 20

// unify compares the lines of a file.
func (c *change) unify(before, after []byte) error {
	switch {
	case bytes.Equal(before, after) && c.before != nil && c.after != nil:
		return nil
	case len(before) > maxCompared || len(after) > maxCompared || !isText(before) || !isText(after):
		c.unified = fmt.Sprintf("Not compared line by line: %s before, %s after\n", size(int64(len(before))), size(int64(len(after))))
		return nil
	}
	from, to := "deployed/"+c.path, "project/"+c.path
	if c.before == nil {
		from = "/dev/null"
	}
	if c.after == nil {
		to = "/dev/null"
	}
	u, err := udiff.ToUnifiedDiff(from, to, string(before), udiff.Lines(string(before), string(after)), udiff.DefaultContextLines)
	if err != nil {
		return err
	}
	for _, h := range u.Hunks {
		for _, l := range h.Lines {
			switch l.Kind {
			case udiff.Insert:
				c.added++
			case udiff.Delete:
				c.gone++
			}
		}
	}
	c.unified = u.String()
	return nil
}

func isText(data []byte) bool { return utf8.Valid(data) && !bytes.ContainsRune(data, 0) }

func (c *change) kind() string {
	switch {
	case c.before == nil:
		return "added"
	case c.after == nil:
		return "removed"
	case c.before.SHA256 == c.after.SHA256:
		return "mode"
	}
	return "changed"
}

// fold puts together what changes in the same way on many nodes: the lines count, not the whole files, so that nodes
// whose files differ by their names fall together.
func (all differences) fold() []fileDifference {
	var folded []fileDifference
	at := map[string]int{}
	for _, d := range all {
		if d.deployment == "" {
			continue
		}
		for _, c := range d.changes {
			key := c.path + "\x00" + c.kind() + "\x00" + fmt.Sprint(executable(c.before), executable(c.after)) + "\x00" + c.unified
			i, ok := at[key]
			if !ok {
				i = len(folded)
				at[key] = i
				diff := c.unified
				if executable(c.before) != executable(c.after) && c.before != nil && c.after != nil {
					diff = fmt.Sprintf("Executable: %t before, %t after\n", c.before.Exec, c.after.Exec) + diff
				}
				folded = append(folded, fileDifference{"file", c.path, c.kind(), nil, c.added, c.gone, diff})
			}
			folded[i].Nodes = append(folded[i].Nodes, d.node)
		}
	}
	slices.SortStableFunc(folded, func(x, y fileDifference) int { return strings.Compare(x.Path, y.Path) })
	return folded
}

func executable(f *protocol.File) bool { return f != nil && f.Exec }

// tellDifferences shows them, with stat only how many lines change.
func (a *app) tellDifferences(all differences, stat bool) {
	folded, secrets := all.fold(), all.foldSecrets()
	if a.json {
		for _, d := range all {
			a.document(d.document())
		}
		for _, f := range folded {
			if stat {
				f.Diff = ""
			}
			a.document(f)
		}
		for _, d := range secrets {
			a.document(d)
		}
		return
	}
	widest := 0
	for _, f := range folded {
		widest = max(widest, utf8.RuneCountInString(ui.Clean(f.Path)))
	}
	for _, f := range folded {
		on := fmt.Sprintf("on %s: %s", nodes(len(f.Nodes)), some(f.Nodes))
		if stat {
			a.say("%-*s  %-7s  %s %s  %s\n", widest, ui.Clean(f.Path), f.Change, a.out.Paint(ui.Green, fmt.Sprintf("+%d", f.Added)), a.out.Paint(ui.Red, fmt.Sprintf("-%d", f.Removed)), on)
			continue
		}
		a.say("%s %s %s\n", a.out.Paint(ui.Bold, ui.Clean(f.Path)), f.Change, on)
		a.printDiff(f.Diff)
		a.say("\n")
	}
	for _, d := range secrets {
		a.say("secret %s %s on %s: %s\n", d.Name, d.Change, nodes(len(d.Nodes)), some(d.Nodes))
	}
	a.say("%s", all.summary())
}

func (a *app) printDiff(diff string) {
	for _, l := range strings.Split(strings.TrimSuffix(diff, "\n"), "\n") {
		colour := ui.Plain
		switch {
		case strings.HasPrefix(l, "+++"), strings.HasPrefix(l, "---"):
			colour = ui.Bold
		case strings.HasPrefix(l, "+"):
			colour = ui.Green
		case strings.HasPrefix(l, "-"):
			colour = ui.Red
		case strings.HasPrefix(l, "@@"):
			colour = ui.Cyan
		}
		a.say("%s\n", a.out.Paint(colour, ui.Clean(l)))
	}
}

func (d *difference) document() nodeDifference {
	n := nodeDifference{Event: "node", Node: d.node, Deployment: d.deployment, Unknown: d.unknown}
	for _, c := range d.changes {
		switch c.kind() {
		case "added":
			n.Added++
		case "removed":
			n.Removed++
		default:
			n.Changed++
		}
	}
	return n
}

// summary says in a few lines which nodes would change.
func (all differences) summary() string {
	var same, other, secrets, fresh []string
	var b strings.Builder
	for _, d := range all {
		switch {
		case d.unknown != "":
			fmt.Fprintf(&b, "%s can't be compared: %s\n", d.node, ui.Clean(d.unknown))
		case d.deployment == "":
			fresh = append(fresh, d.node)
		case len(d.changes) > 0:
			other = append(other, d.node)
		case len(d.secrets) > 0:
			secrets = append(secrets, d.node)
		default:
			same = append(same, d.node)
		}
	}
	for _, line := range []struct {
		names []string
		says  string
	}{{other, "would get other files"}, {secrets, "would get other secrets only"}, {fresh, "had no deployment yet: all files are new"}, {same, "would get the same files"}} {
		if len(line.names) > 0 {
			fmt.Fprintf(&b, "%s %s: %s\n", nodes(len(line.names)), line.says, some(line.names))
		}
	}
	return b.String()
}

// outcome is the status to exit with.
func (all differences) outcome(exitCode bool) error {
	differ := false
	var unknown []string
	for _, d := range all {
		differ = differ || len(d.changes) > 0 || len(d.secrets) > 0
		if d.unknown != "" {
			unknown = append(unknown, d.node)
		}
	}
	switch {
	case len(unknown) > 0:
		return &outcome{SomeFailed, errors.New("can't be compared: " + some(unknown))}
	case differ && exitCode:
		return &outcome{SomeFailed, nil}
	}
	return nil
}
