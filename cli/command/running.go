package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// exitDocument ends what a node has to say about what it ran, in --json.
type exitDocument struct {
	Node    string `json:"node"`
	Exit    *int   `json:"exit"`
	Piped   *int   `json:"piped"`
	Result  string `json:"result"`
	Reason  string `json:"reason"`
	Rule    string `json:"rule"`
	Millis  int64  `json:"ms"`
	Dropped int64  `json:"dropped"`
	Lost    int    `json:"lost"`
}

// work is what nodes are to run, and what becomes of their output.
type work struct {
	action  protocol.Action
	payload func(node string) any
	pipe    [][]string // programs that run here, over the output of each node
	merge   bool       // stderr goes where stdout goes
	quiet   bool       // stdout is not shown
	instead string     // what there is to do where a node does not allow it
}

// running is a work under way.
type running struct {
	*question
	work
	outlet *outlet
	runs   map[string]*nodeRun // by node
	enough chan string         // nodes whose output nobody takes any more
	queued atomic.Int64        // see maxQueued
	ending sync.WaitGroup
}

// nodeRun is what one node runs.
type nodeRun struct {
	name           string
	stdout, stderr *stream
	pipeline       *pipeline

	parts   int
	lost    int // parts that did not arrive
	dropped int64
	ended   *protocol.Ending
	sealed  []byte
	piped   *int        // exit status of the last program here
	err     error       // it was refused, broke off, or could not be piped
	silent  bool        // it does not answer, or no longer
	cut     bool        // its end was not awaited
	enough  atomic.Bool // it was told to stop, because nobody takes its output
}

// endTime is how long nodes are waited for that were told to stop: a process has some seconds to end by itself.
const endTime = 10 * time.Second

func (q *question) running(w work) (*running, error) {
	outlet, err := q.outlet()
	if err != nil {
		return nil, err
	}
	r := &running{question: q, work: w, outlet: outlet, runs: map[string]*nodeRun{}, enough: make(chan string, len(q.nodes))}
	for _, n := range q.nodes {
		r.runs[n.Name] = &nodeRun{name: n.Name, stdout: outlet.stdout(n.Name), stderr: outlet.stderrOf(n.Name, w.merge)}
	}
	return r, nil
}

// run has the nodes run something, shows what they write, and tells how it went by its error. Ctrl-C ends what they run.
func (q *question) run(ctx context.Context, w work) (*running, error) {
	r, err := q.running(w)
	if err != nil {
		return nil, err
	}
	silent, err := q.session.Put(ctx, client.Question{Nodes: namesOf(q.nodes), Action: w.action, PayloadOf: w.payload, Concurrency: q.o.concurrency,
		Patience: q.o.timeout, End: true, Linger: endTime, Enough: r.enough, Gone: func(node string) { r.lose(ctx, r.runs[node]) }},
		func(node string, reply *protocol.Reply, err error) { r.take(ctx, r.runs[node], reply, err) })
	for _, name := range silent {
		if n := r.runs[name]; !n.silent {
			n.cut = true
			r.lose(ctx, n)
		}
	}
	r.ending.Wait()
	if err != nil {
		return nil, err
	}
	return r, r.outcome(ctx)
}

// take takes a part of a node's answer.
func (r *running) take(ctx context.Context, n *nodeRun, reply *protocol.Reply, err error) {
	var o protocol.Output
	if err == nil && len(reply.Body) > 0 {
		err = json.Unmarshal(reply.Body, &o) // a newer agent may say more
	}
	if err != nil {
		n.err = err
		r.end(ctx, n)
		return
	}
	n.lost += max(0, reply.Part-n.parts-1)
	n.parts = max(n.parts, reply.Part)
	n.dropped += o.Dropped
	if len(o.Sealed) > 0 {
		n.sealed = o.Sealed
	}
	if o.Ended != nil {
		n.ended = o.Ended
	}
	r.show(ctx, n, &o)
	if !reply.More {
		r.end(ctx, n)
	}
}

// lose gives up on a node.
func (r *running) lose(ctx context.Context, n *nodeRun) {
	n.silent = true
	r.end(ctx, n)
}

func (r *running) show(ctx context.Context, n *nodeRun, o *protocol.Output) {
	if len(o.Stdout) > 0 && !r.quiet {
		r.output(ctx, n).Write(o.Stdout)
	}
	if len(o.Stderr) > 0 {
		n.stderr.Write(o.Stderr)
	}
}

// output is where a node's stdout goes. Programs that run over it are started when there is something for them.
func (r *running) output(ctx context.Context, n *nodeRun) io.Writer {
	switch {
	case len(r.pipe) == 0:
		return n.stdout
	case n.pipeline == nil && n.err == nil:
		var err error
		full := func() {
			n.enough.Store(true)
			r.enough <- n.name
		}
		if n.pipeline, err = startPipeline(ctx, r.pipe, n.stdout, n.stderr, &r.queued, full); err != nil {
			n.err = err
			full()
		}
	}
	if n.pipeline == nil {
		return io.Discard
	}
	return n.pipeline
}

// end awaits the end of what runs here over a node's output, without keeping the others waiting.
func (r *running) end(ctx context.Context, n *nodeRun) {
	if n.err == nil && !n.silent {
		r.output(ctx, n) // it has an end, and nothing before it
	}
	r.ending.Go(func() {
		if n.pipeline != nil {
			n.pipeline.close()
			status, err := n.pipeline.wait(ctx)
			if n.piped = &status; err != nil {
				n.piped, n.err = nil, errors.Join(n.err, err)
			}
		}
		n.stdout.end()
		n.stderr.end()
		r.tellEnd(ctx, n)
	})
}

// tellEnd says how it ended on a node to those who read documents, and of what was left out to everybody.
func (r *running) tellEnd(ctx context.Context, n *nodeRun) {
	r.outlet.mu.Lock()
	defer r.outlet.mu.Unlock()
	if !r.json {
		if n.dropped > 0 {
			fmt.Fprintf(r.Stderr, "%s: %s of output were left out: there was more than the node lets through\n", n.name, size(n.dropped))
		}
		return
	}
	d := exitDocument{Node: n.name, Piped: n.piped, Dropped: n.dropped, Lost: n.lost}
	var refused *protocol.Refusal
	switch e := n.ended; {
	case e != nil:
		d.Exit, d.Result, d.Reason, d.Rule, d.Millis = &e.Exit, e.Result, e.Reason, e.Rule, e.Millis
	case n.cut:
		d.Result = "interrupted"
	case n.silent:
		d.Result = "no-answer"
	case n.refused() && errors.As(n.err, &refused):
		d.Result, d.Reason = "refused", refused.Reason
	case n.err != nil:
		d.Result, d.Reason = "failed", n.err.Error()
	case ctx.Err() != nil:
		d.Result = "interrupted"
	default:
		d.Result, d.Reason = "failed", errUntold.Error()
	}
	r.document(d)
}

// errUntold is of a node whose answer ends without its end.
var errUntold = errors.New("it did not say how it ended")

// refused tells whether a node said no: then nothing was run there.
func (n *nodeRun) refused() bool {
	var r *protocol.Refusal
	return n.parts == 0 && errors.As(n.err, &r) && r.Code != protocol.Failed
}

// failure is why it did not succeed on a node that answered; nil: it did. The exit status of programs that run here over the
// output counts in place of the node's, as in a shell.
func (n *nodeRun) failure(pipe [][]string) error {
	e := n.ended
	switch {
	case n.err != nil:
		return n.err
	case n.lost > 0:
		return fmt.Errorf("%s of its output did not arrive", plural(n.lost, "part"))
	case n.piped != nil && *n.piped != 0:
		return fmt.Errorf("%s exited with %d", ui.Clean(pipe[len(pipe)-1][0]), *n.piped)
	case e == nil:
		return errUntold
	case n.piped != nil && (n.enough.Load() || e.Result == protocol.ResultExit):
		return nil
	case e.Result != protocol.ResultSuccess && e.Result != protocol.ResultExit:
		return errors.New(first(e.Reason, "it was ended: "+e.Result))
	case e.Exit != 0:
		return fmt.Errorf("exited with %d", e.Exit)
	}
	return nil
}

// alike is nodes that failed for the same reason.
type alike struct {
	err   error
	nodes []string
}

// outcome is how it went, for the exit status.
func (r *running) outcome(ctx context.Context) error {
	var (
		failures                  []*alike
		silent, lost              []string
		succeeded, failed, denied int
	)
	for _, name := range namesOf(r.nodes) {
		n := r.runs[name]
		if n.silent {
			if silent = append(silent, name); n.parts > 0 {
				lost = append(lost, name)
			}
			continue
		}
		err := n.failure(r.pipe)
		switch {
		case err == nil:
			succeeded++
			continue
		case n.refused():
			denied++
		default:
			failed++
		}
		failures = addAlike(failures, name, err)
	}
	if ctx.Err() != nil {
		if len(lost) > 0 {
			return &outcome{Interrupted, fmt.Errorf("interrupted; %s did not say that it ended: it does within a minute", some(lost))}
		}
		return &outcome{Interrupted, errors.New("interrupted; nothing of it runs any more")}
	}
	var errs []error
	for _, f := range failures {
		err := fmt.Errorf("%s: %w", some(f.nodes), f.err)
		if r.instead != "" && errors.Is(f.err, &protocol.Refusal{Code: protocol.Denied}) {
			err = fmt.Errorf("%w; %s", err, r.instead)
		}
		errs = append(errs, err)
	}
	if len(silent) > 0 {
		err := errors.New("no answer from " + some(silent))
		if len(lost) > 0 {
			err = fmt.Errorf("%w; what began on %s ends within a minute", err, some(lost))
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		return nil
	}
	err, status := errs[0], SomeFailed
	if len(errs) > 1 {
		err = &errorList{"not all nodes did it:", errs}
	}
	switch {
	case failed > 0:
	case denied > 0 && succeeded == 0:
		status = Refused
	case denied == 0:
		status = Unanswered
	}
	return &outcome{status, err}
}

func addAlike(all []*alike, node string, err error) []*alike {
	for _, a := range all {
		if a.err.Error() == err.Error() {
			a.nodes = append(a.nodes, node)
			return all
		}
	}
	return append(all, &alike{err, []string{node}})
}
