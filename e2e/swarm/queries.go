//go:build linux

package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/protocol"
)

// queries are the questions that are measured: each is signed, proven by every agent, put on its record twice, and
// answered.
var queries = []struct {
	name string
	ask  func(context.Context, *client.Client, []string, client.Each) (silent []string, err error)
}{
	{"ping, one broadcast", broadcast(protocol.Ping)},
	{"facts, one broadcast", broadcast(protocol.Facts)},
	{"facts, a request a node", func(ctx context.Context, c *client.Client, nodes []string, each client.Each) ([]string, error) {
		// As the command line asks.
		return c.Put(ctx, client.Question{Nodes: nodes, Action: protocol.Facts, Concurrency: 256}, each)
	}},
}

func broadcast(a protocol.Action) func(context.Context, *client.Client, []string, client.Each) ([]string, error) {
	return func(ctx context.Context, c *client.Client, nodes []string, each client.Each) ([]string, error) {
		return c.Broadcast(ctx, a, nil, nodes, each)
	}
}

const (
	answerWithin = 30 * time.Second
	betweenAsks  = 200 * time.Millisecond
	beatPeriod   = 10 * time.Second // of agents: what they cost at rest is averaged over one

	// recorded is when the records of the last question are with the controller: an agent lets them wait for company
	// for up to 4 s.
	recorded = 5 * time.Second
)

// rounds is how often a question is asked of n nodes.
func rounds(n int) int { return max(20, min(100, 50_000/n)) }

// inquiry is what a question cost.
type inquiry struct {
	rounds []time.Duration // from the question to the last answer, in order of length
	lost   int             // answers that did not come
	used   usage           // CPU for one answer: what the fleet uses at rest is left out, what the records cost later is in
}

// at is a quantile of the rounds, of 0 < q ≤ 1: the shortest time within which that share of them ended.
func (q *inquiry) at(share float64) time.Duration {
	return q.rounds[min(len(q.rounds)-1, int(share*float64(len(q.rounds))+0.5)-1)]
}

// measureQueries prints a table of what asking all nodes costs, beside what an SSH exec costs (0: not known).
func (f *fleet) measureQueries(ctx context.Context, out io.Writer, exec time.Duration) error {
	if err := f.warm(ctx); err != nil {
		return err
	}
	atRest, err := f.rest(ctx)
	if err != nil {
		return err
	}
	memory := int64(0)
	for _, a := range f.agents {
		bytes, err := a.memory()
		if err != nil {
			return err
		}
		memory += bytes
	}
	n := len(f.nodes)
	pid := f.controller.Process.Pid
	fmt.Fprintf(out, "an agent takes %d KiB of live memory; at rest all of it, %d beats in %s, takes %.1f%% of a core for the controller and %.1f%% for the agents\n",
		memory>>10/int64(n), n, beatPeriod, 100*atRest.controller.Seconds(), 100*atRest.agents.Seconds())
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\tROUNDS\tP50\tP99\tLOST\tCPU AN ANSWER\tCONTROLLER\tAGENT\tASKER\tSSH EXECS")
	for _, query := range queries {
		q, err := f.inquire(ctx, rounds(n), atRest, query.ask)
		if err != nil {
			return fmt.Errorf("%s of %d nodes: %w", query.name, n, err)
		}
		share := "-"
		if exec > 0 {
			share = fmt.Sprintf("1/%.0f", float64(exec)/float64(max(q.used.all(), 1)))
		}
		fmt.Fprintf(table, "%s\t%d\t%s\t%s\t%d\t%s\t%s\t%s\t%s\t%s\n", query.name, len(q.rounds), millis(q.at(0.5)), millis(q.at(0.99)), q.lost,
			micros(q.used.all()), micros(q.used.controller), micros(q.used.agents), micros(q.used.asker), share)
	}
	if err := table.Flush(); err != nil {
		return err
	}
	fmt.Fprintf(out, "controller, with broker and etcd: %d MiB resident, %d MiB at most\n", field(pid, "VmRSS")>>20, field(pid, "VmHWM")>>20)
	return nil
}

// warm has every agent prove who asks once: it remembers that.
func (f *fleet) warm(ctx context.Context) error {
	q, err := f.inquire(ctx, 1, usage{}, queries[0].ask)
	if err == nil && q.lost > 0 {
		err = fmt.Errorf("%d of %d agents do not answer", q.lost, len(f.nodes))
	}
	return err
}

// rest is what all takes in a second in which nobody asks anything.
func (f *fleet) rest(ctx context.Context) (usage, error) {
	before := f.used()
	if err := sleep(ctx, beatPeriod); err != nil {
		return usage{}, err
	}
	return f.used().since(before).times(1 / beatPeriod.Seconds()), nil
}

// inquire asks all nodes so many times, one time after the other.
func (f *fleet) inquire(ctx context.Context, rounds int, atRest usage, ask func(context.Context, *client.Client, []string, client.Each) ([]string, error)) (*inquiry, error) {
	q := &inquiry{}
	before, began, answers := f.used(), time.Now(), 0
	for range rounds {
		var refused error
		each := func(node string, _ *protocol.Reply, err error) {
			answers++
			if err != nil {
				refused = fmt.Errorf("%s: %w", node, err)
			}
		}
		within, cancel := context.WithTimeout(ctx, answerWithin)
		asked := time.Now()
		silent, err := ask(within, f.admin, f.nodes, each)
		q.rounds = append(q.rounds, time.Since(asked))
		cancel()
		for _, err := range []error{err, refused, ctx.Err()} {
			if err != nil {
				return nil, err
			}
		}
		q.lost += len(silent)
		if err := sleep(ctx, betweenAsks); err != nil {
			return nil, err
		}
	}
	if err := sleep(ctx, recorded); err != nil {
		return nil, err
	}
	q.used = f.used().since(before).since(atRest.times(time.Since(began).Seconds())).times(1 / float64(max(answers, 1)))
	slices.Sort(q.rounds)
	return q, nil
}

func sleep(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return ctx.Err()
	case <-time.After(d):
		return nil
	}
}

func millis(d time.Duration) string { return fmt.Sprintf("%.1f ms", d.Seconds()*1e3) }
func micros(d time.Duration) string { return fmt.Sprintf("%.0f µs", d.Seconds()*1e6) }
