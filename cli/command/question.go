package command

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// asking is how nodes are asked, and how their text is told apart.
type asking struct {
	timeout     time.Duration
	concurrency int
	prefix      string
}

func (o *asking) flags(c *cobra.Command) {
	f := c.Flags()
	f.DurationVar(&o.timeout, "timeout", 30*time.Second, "how long a node may take for its answer")
	o.manyFlags(f)
}

// manyFlags are those that are about several nodes.
func (o *asking) manyFlags(f *pflag.FlagSet) {
	f.IntVar(&o.concurrency, "concurrency", 256, "so many nodes work on it at the same time")
	f.StringVar(&o.prefix, "prefix", "auto", "name the node in front of each line: auto (where several are asked), always or never")
}

// question is a question to some nodes under way.
type question struct {
	*app
	session *session
	nodes   []protocol.NodeState
	o       asking
	named   bool // lines have the node's name in front of them
	width   int  // of the longest name

	missed func(node string, err error) // told at once who does not answer, or not as hoped; nil: that is told at the end
}

// question connects and finds out who is asked.
func (a *app) question(ctx context.Context, selectors []string, o asking) (*question, error) {
	me, err := a.identity()
	if err != nil {
		return nil, err
	}
	return a.questionAs(ctx, me, selectors, o)
}

// questionAs is question for an identity that was opened before.
func (a *app) questionAs(ctx context.Context, me *identity, selectors []string, o asking) (*question, error) {
	switch {
	case o.concurrency < 1:
		return nil, fmt.Errorf("--concurrency %d: use 1 or more", o.concurrency)
	case o.timeout <= 0:
		return nil, fmt.Errorf("--timeout %v: use more than 0", o.timeout)
	case o.prefix != "auto" && o.prefix != "always" && o.prefix != "never":
		return nil, fmt.Errorf("--prefix %q: use auto, always or never", o.prefix)
	}
	s, err := a.connectAs(ctx, me)
	if err != nil {
		return nil, err
	}
	nodes, err := a.selected(ctx, s.Client, selectors)
	if err != nil {
		s.Close()
		return nil, err
	}
	q := &question{app: a, session: s, nodes: nodes, o: o, named: o.prefix == "always" || o.prefix == "auto" && len(nodes) > 1}
	for _, n := range nodes {
		q.width = max(q.width, len(n.Name))
	}
	return q, nil
}

// put asks the nodes and hands each good answer, or part of one, on as it comes. Nodes that are at work still when
// the command is interrupted are told to stop.
func put[T any](ctx context.Context, q *question, action protocol.Action, payload any, each func(node string, part int, answer T)) error {
	var r asked
	var err error
	r.silent, err = q.session.Put(ctx, client.Question{Nodes: namesOf(q.nodes), Action: action, Payload: payload,
		Concurrency: q.o.concurrency, Patience: q.o.timeout, End: true, Gone: func(node string) { q.tell(node, client.ErrNoAnswer) }},
		func(node string, reply *protocol.Reply, err error) {
			var answer T
			if err == nil && len(reply.Body) > 0 {
				err = json.Unmarshal(reply.Body, &answer) // a newer agent may say more
			}
			switch {
			case err != nil:
				q.tell(node, err)
				r.failed = append(r.failed, fmt.Errorf("%s: %w", node, err))
			case len(reply.Body) > 0:
				each(node, reply.Part, answer)
			}
		})
	if err == nil {
		err = ctx.Err()
	}
	if err != nil {
		return err
	}
	return r.outcome()
}

func (q *question) tell(node string, err error) {
	if q.missed != nil {
		q.missed(node, err)
	}
}

// print prints lines of a node's, which are clean, with its name in front where that is wanted.
func (q *question) print(node string, lines ...string) {
	var b strings.Builder
	for _, l := range lines {
		if q.named {
			b.WriteString(q.out.Paint(ui.Cyan, node+":") + strings.Repeat(" ", q.width-len(node)+1))
		}
		b.WriteString(strings.TrimRight(l, " ") + "\n")
	}
	q.out.Printf("%s", b.String())
}

// cut says that a node has more than is shown, and how to see it.
func (q *question) cut(node, what, next string) {
	if !q.json {
		fmt.Fprintf(q.Stderr, "%s: %s\n", node, ui.Clean(what))
		return
	}
	q.document(cutDocument{node, true, next})
}

// cutDocument ends what a node has to say in --json, where it has more.
type cutDocument struct {
	Node string `json:"node"`
	Cut  bool   `json:"cut"`
	Next string `json:"next"`
}

// columns makes lines of rows, columns as wide as they need to be.
func (q *question) columns(rows [][]ui.Cell) []string {
	var widths []int
	for _, row := range rows {
		for i := range row {
			row[i].Text = ui.Clean(row[i].Text)
			if i == len(widths) {
				widths = append(widths, 0)
			}
			widths[i] = max(widths[i], utf8.RuneCountInString(row[i].Text))
		}
	}
	lines := make([]string, len(rows))
	for n, row := range rows {
		var b strings.Builder
		for i, cell := range row {
			b.WriteString(q.out.Paint(cell.Colour, cell.Text))
			if i < len(row)-1 {
				b.WriteString(strings.Repeat(" ", widths[i]-utf8.RuneCountInString(cell.Text)+2))
			}
		}
		lines[n] = b.String()
	}
	return lines
}
