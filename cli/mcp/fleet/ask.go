package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// patience is how long a node may take for its answer.
const patience = 20 * time.Second

// answer is what a node said; err is a refusal of its, or client.ErrNoAnswer.
type answer[T any] struct {
	node string
	said T
	err  error
}

// ask asks nodes the same, and gives their answers in the nodes' order. bound cuts each one as it comes, where many large ones would
// take too much memory.
func ask[T any](ctx context.Context, s *Session, nodes []string, action protocol.Action, payload any, bound ...func(*T)) ([]answer[T], error) {
	at := make(map[string]int, len(nodes))
	answers := make([]answer[T], len(nodes))
	for i, node := range nodes {
		at[node], answers[i] = i, answer[T]{node: node, err: client.ErrNoAnswer}
	}
	answered := 0
	_, err := s.Put(ctx, client.Question{Nodes: nodes, Action: action, Payload: payload, Patience: patience, End: true},
		func(node string, r *protocol.Reply, err error) {
			answered++
			mcp.Progress(ctx, answered, len(nodes))
			a := &answers[at[node]]
			if a.err = err; err != nil {
				return
			}
			if err := json.Unmarshal(r.Body, &a.said); err != nil { // a newer agent may say more
				a.err = fmt.Errorf("its answer to %s: %w", action, err)
			}
			for _, cut := range bound {
				cut(&a.said)
			}
		})
	if err == nil {
		err = ctx.Err()
	}
	return answers, err
}

// failures are nodes that did not answer, or not as hoped, by why.
type failures struct {
	whys  []string
	nodes map[string][]string
}

func (f *failures) add(node string, err error) {
	why := failure(err)
	if f.nodes == nil {
		f.nodes = map[string][]string{}
	}
	if !slices.Contains(f.whys, why) {
		f.whys = append(f.whys, why)
	}
	f.nodes[why] = append(f.nodes[why], node)
}

// failure is why in a line.
func failure(err error) string {
	var r *protocol.Refusal
	switch {
	case errors.Is(err, client.ErrNoAnswer):
		return "no answer"
	case errors.As(err, &r):
		return fmt.Sprintf("refused (%s): %.300q", mcp.Name(string(r.Code)), r.Reason) // both are the node's to say
	}
	return fmt.Sprintf("%.300s", err)
}

func (f *failures) count() (n int) {
	for _, nodes := range f.nodes {
		n += len(nodes)
	}
	return n
}

// shownWhys is how many reasons stand in a summary.
const shownWhys = 8

// summary says how many of the nodes answered, and about the others why not.
func (f *failures) summary(asked int) string {
	text := fmt.Sprintf("%d of %s answered.", asked-f.count(), plural(asked, "node"))
	for i, why := range f.whys {
		if i == shownWhys {
			return text + fmt.Sprintf(" And %d more reasons.", len(f.whys)-i)
		}
		text += fmt.Sprintf(" %s: %s.", some(f.nodes[why]), strings.TrimSuffix(why, "."))
	}
	return text
}
