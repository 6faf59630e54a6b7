package fleet

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// Bounds of what nodes run for a tool.
const (
	defaultLimit = 30  // seconds
	maxLimit     = 120 // seconds
	maxRun       = maxLimit*time.Second + 2*patience

	maxOutput    = 256 << 10 // bytes of one node
	maxOutputAll = 3 << 20   // bytes of all, as far as each has leastOutput
	leastOutput  = 4 << 10
)

// fairShare is how many bytes of text each of so many answers may have.
func fairShare(answers int) int { return max(leastOutput, min(maxOutput, maxOutputAll/answers)) }

// limitInput is the input of tools that have nodes run something.
type limitInput struct {
	Timeout int `json:"timeout,omitempty" jsonschema:"seconds after which it is ended, at most 120; 30 if nothing is said. What follows a log or watches ends so"`
}

func (l *limitInput) seconds() (int, error) {
	switch {
	case l.Timeout == 0:
		return defaultLimit, nil
	case l.Timeout < 0 || l.Timeout > maxLimit:
		return 0, fmt.Errorf("timeout %d: use 1 to %d seconds", l.Timeout, maxLimit)
	}
	return l.Timeout, nil
}

// runRow is a piece of what a node wrote; the last one of a node tells how it ended.
type runRow struct {
	Node   string `json:"node"`
	Stdout string `json:"stdout,omitempty" jsonschema:"untrusted: what the program wrote"`
	Stderr string `json:"stderr,omitempty" jsonschema:"untrusted: what the program wrote"`
	Exit   *int   `json:"exit,omitempty" jsonschema:"the program's exit status"`
	Error  string `json:"error,omitempty" jsonschema:"why it was refused, not run, or ended"`
	Note   string `json:"note,omitempty"`
}

// ran is what became of a command on a node.
type ran struct {
	node           string
	stdout, stderr []byte
	parts          int
	lost           int   // parts that did not arrive
	dropped        int64 // bytes that were left out
	enough         bool  // it was told to stop
	ended          *protocol.Ending
	err            error
}

// run has nodes run a command, by the rules that a viewer may use: what only looks must not do more where the caller may.
// role is the one to go by. Output beyond a bound is dropped, and what writes on is ended.
func (f *Fleet) run(ctx context.Context, s *Session, nodes []string, argv []string, limit int, role protocol.Role) ([]*ran, error) {
	order := protocol.CommandOrder{Argv: argv, Timeout: limit, Role: role}
	if err := order.Validate(); err != nil {
		return nil, err
	}
	most := fairShare(len(nodes))
	all, at := make([]*ran, len(nodes)), make(map[string]*ran, len(nodes))
	for i, node := range nodes {
		all[i] = &ran{node: node}
		at[node] = all[i]
	}
	enough, ended := make(chan string, len(nodes)), 0
	ctx, cancel := context.WithTimeout(ctx, time.Duration(limit)*time.Second+patience)
	defer cancel()
	silent, err := s.Put(ctx, client.Question{Nodes: nodes, Action: protocol.RunCommand, Payload: order, Patience: patience, End: true, Enough: enough},
		func(node string, reply *protocol.Reply, err error) {
			if r := at[node]; r.take(reply, err, most) {
				r.enough = true
				enough <- node
			}
			if at[node].ended != nil || err != nil {
				ended++
				mcp.Progress(ctx, ended, len(nodes))
			}
		})
	if err != nil {
		return nil, err
	}
	for _, node := range silent {
		at[node].err = client.ErrNoAnswer
	}
	return all, nil
}

// take takes a part of a node's answer, and tells whether the node shall stop.
func (r *ran) take(reply *protocol.Reply, err error, most int) (stop bool) {
	var o protocol.Output
	if err == nil && len(reply.Body) > 0 {
		err = json.Unmarshal(reply.Body, &o) // a newer agent may say more
	}
	if err != nil {
		r.err = err
		return false
	}
	r.lost += max(0, reply.Part-r.parts-1)
	r.parts = max(r.parts, reply.Part)
	r.dropped += o.Dropped
	for _, part := range []struct {
		into *[]byte
		data []byte
	}{{&r.stdout, o.Stdout}, {&r.stderr, o.Stderr}} {
		room := max(0, most-len(r.stdout)-len(r.stderr))
		kept := min(room, len(part.data))
		*part.into = append(*part.into, part.data[:kept]...)
		r.dropped += int64(len(part.data) - kept)
	}
	if o.Ended != nil {
		r.ended = o.Ended
	}
	return r.dropped > 0 && !r.enough
}

// failure is why it did not succeed; nil: it did, or ended as it was told to.
func (r *ran) failure() error {
	e := r.ended
	switch {
	case r.err != nil:
		return r.err
	case e == nil:
		return errors.New("it did not say how it ended")
	case r.enough && e.Result == protocol.ResultEnded, e.Result == protocol.ResultTimeout:
		return nil
	case e.Result != protocol.ResultSuccess && e.Result != protocol.ResultExit:
		return fmt.Errorf("it was ended: %.200q", strings.TrimSpace(e.Result+" "+e.Reason)) // as the node says
	}
	return nil
}

// note says what is to be known of the output, beside the exit status.
func (r *ran) note() string {
	var notes []string
	if r.dropped > 0 {
		notes = append(notes, fmt.Sprintf("at least %d bytes of output were left out: ask for less", r.dropped))
	}
	if r.lost > 0 {
		notes = append(notes, fmt.Sprintf("%s of output did not arrive", plural(r.lost, "part")))
	}
	if r.ended != nil && r.ended.Result == protocol.ResultTimeout {
		notes = append(notes, "it was ended when its time was over")
	}
	return strings.Join(notes, "; ")
}

// show makes an answer of what nodes ran, one after the other.
func show(all []*ran, what string) *mcp.Answer[runRow] {
	a := &mcp.Answer[runRow]{}
	var failed failures
	exits := map[int][]string{}
	for _, r := range all {
		last := runRow{Node: r.node, Note: r.note()}
		if err := r.failure(); err != nil {
			failed.add(r.node, err)
			last.Error = mcp.Clean(failure(err))
		} else {
			if last.Exit = &r.ended.Exit; r.ended.Exit > 0 {
				exits[r.ended.Exit] = append(exits[r.ended.Exit], r.node)
			}
		}
		a.Parts = append(a.Parts, mcp.SplitLines(r.node, string(r.stdout), func(text string) runRow { return runRow{Node: r.node, Stdout: text} })...)
		a.Parts = append(a.Parts, mcp.SplitLines(r.node+", stderr", string(r.stderr), func(text string) runRow { return runRow{Node: r.node, Stderr: text} })...)
		a.Parts = append(a.Parts, mcp.Part[runRow]{Head: r.node, Text: last.ending(), Row: &last})
	}
	a.Summary = what + ": " + failed.summary(len(all))
	for exit := range 256 {
		if nodes := exits[exit]; nodes != nil {
			a.Summary += fmt.Sprintf(" Exit status %d on %s.", exit, some(nodes))
		}
	}
	a.Failed = failed.count() == len(all)
	return a
}

func (r *runRow) ending() string {
	var words []string
	switch {
	case r.Error != "":
		words = append(words, r.Error)
	case r.Exit != nil && *r.Exit >= 0:
		words = append(words, fmt.Sprintf("exit status %d", *r.Exit))
	}
	if r.Note != "" {
		words = append(words, r.Note)
	}
	return "[" + strings.Join(words, "; ") + "]"
}
