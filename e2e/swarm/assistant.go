//go:build linux

package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"text/tabwriter"
	"time"

	mcpclient "github.com/mark3labs/mcp-go/client"
	"github.com/mark3labs/mcp-go/client/transport"
	"github.com/mark3labs/mcp-go/mcp"
)

// calls are what an assistant asks of the whole fleet. The numbers of a kernel are those of a second, which each agent waits.
var calls = []struct {
	name, tool string
	inputs     map[string]any
}{
	{"fleet-status", "fleet-status", nil},
	{"system-stats, health", "system-stats", map[string]any{"target": "all"}},
}

const callRounds = 20

// assistant is a client of the machines' MCP server, which runs in a process of its own.
type assistant struct {
	client *mcpclient.Client
	server *exec.Cmd
}

func (f *fleet) assistant(ctx context.Context) (*assistant, error) {
	cmd := f.cli(ctx, "mcp", "machine")
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	a := &assistant{mcpclient.NewClient(transport.NewIO(out, in, io.NopCloser(strings.NewReader("")))), cmd}
	if err = a.client.Start(ctx); err == nil {
		_, err = a.client.Initialize(ctx, mcp.InitializeRequest{Params: mcp.InitializeParams{ProtocolVersion: mcp.ProtocolVersion20251125, ClientInfo: mcp.Implementation{Name: "swarm", Version: "1"}}})
	}
	if err != nil {
		a.close()
		return nil, fmt.Errorf("the MCP server: %w", err)
	}
	return a, nil
}

func (a *assistant) close() {
	_ = a.client.Close() // its stdin ends, and it does
	_ = a.server.Wait()
}

// page is a page of an answer, as far as it is counted.
type page struct {
	bytes   int
	Summary string            `json:"summary"`
	Results []json.RawMessage `json:"results"`
	Next    string            `json:"next"`
}

func (a *assistant) call(ctx context.Context, tool string, inputs map[string]any) (*page, error) {
	r, err := a.client.CallTool(ctx, mcp.CallToolRequest{Params: mcp.CallToolParams{Name: tool, Arguments: inputs}})
	if err != nil {
		return nil, err
	}
	whole, err := json.Marshal(r)
	if err != nil {
		return nil, err
	}
	if r.IsError {
		return nil, fmt.Errorf("%s: %.500s", tool, whole)
	}
	data, err := json.Marshal(r.StructuredContent)
	if err != nil {
		return nil, err
	}
	p := &page{bytes: len(whole)}
	return p, json.Unmarshal(data, p)
}

// measured is what a call of a tool cost.
type measured struct {
	rounds  []time.Duration // to the first page, in order of length
	pages   int             // of one answer
	largest int             // bytes of a page, over the wire
	server  time.Duration   // CPU of the MCP server for a call
}

// measureCall calls a tool so many times, and goes through all pages of the last answer.
func (f *fleet) measureCall(ctx context.Context, a *assistant, tool string, inputs map[string]any, rounds int) (*measured, error) {
	m := &measured{}
	before := cpu(a.server.Process.Pid)
	var p *page
	for range rounds {
		began := time.Now()
		var err error
		if p, err = a.call(ctx, tool, inputs); err != nil {
			return nil, err
		}
		m.rounds = append(m.rounds, time.Since(began))
	}
	m.server = (cpu(a.server.Process.Pid) - before) / time.Duration(rounds)
	slices.Sort(m.rounds)
	seen, again := 0, map[string]any{}
	for {
		m.pages, m.largest, seen = m.pages+1, max(m.largest, p.bytes), seen+len(p.Results)
		if p.Next == "" {
			break
		}
		again["cursor"] = p.Next
		var err error
		if p, err = a.call(ctx, tool, again); err != nil {
			return nil, err
		}
	}
	if seen != len(f.nodes) {
		return nil, fmt.Errorf("%s told of %d of %d nodes: %s", tool, seen, len(f.nodes), p.Summary)
	}
	return m, nil
}

// measureAssistant prints a table of what asking all nodes takes through the MCP server.
func (f *fleet) measureAssistant(ctx context.Context, out io.Writer) error {
	a, err := f.assistant(ctx)
	if err != nil {
		return err
	}
	defer a.close()
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "BY THE MCP SERVER\tROUNDS\tP50\tLONGEST\tPAGES\tLARGEST PAGE\tCPU OF THE SERVER")
	for _, c := range calls {
		m, err := f.measureCall(ctx, a, c.tool, c.inputs, callRounds)
		if err != nil {
			return err
		}
		q := inquiry{rounds: m.rounds}
		fmt.Fprintf(table, "%s\t%d\t%s\t%s\t%d\t%d KiB\t%s\n", c.name, len(m.rounds), millis(q.at(0.5)), millis(m.rounds[len(m.rounds)-1]), m.pages, m.largest>>10, millis(m.server))
	}
	return table.Flush()
}
