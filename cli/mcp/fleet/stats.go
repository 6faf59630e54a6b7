package fleet

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// statsRow is the numbers of a node; only those that were asked for are there. Bytes unless said otherwise.
type statsRow struct {
	Node  string `json:"node"`
	Error string `json:"error,omitempty" jsonschema:"why there are no numbers"`
	protocol.Stats
}

func (f *Fleet) addStats(s *mcp.Server) {
	mcp.Add(s, mcp.Tool{
		Name: "system-stats", Title: "Numbers of the system", Toolset: setInspect, Role: protocol.Viewer,
		Description: "How nodes are, by the numbers of their kernels. operation is health (load, CPU, memory, pressure; the default), memory, disk-io, disk-usage, network, processes, sockets, or all. " +
			"Rates and shares are those of one second. The summary names the nodes that stand out; of many nodes, ask for health or disk-usage first.",
	}, func(ctx context.Context, c *mcp.Call, in struct {
		targetInput
		Operation string `json:"operation,omitempty" jsonschema:"health, memory, disk-io, disk-usage, network, processes, sockets or all"`
	}) (*mcp.Answer[statsRow], error) {
		query := protocol.StatsQuery{Operations: []string{strings.ToLower(strings.TrimSpace(in.Operation))}}
		switch query.Operations[0] {
		case "":
			query.Operations[0] = protocol.StatsHealth
		case "all":
			query.Operations = nil
		}
		if err := query.Validate(); err != nil {
			return nil, err
		}
		session, err := f.session(ctx, c)
		if err != nil {
			return nil, err
		}
		nodes, err := f.nodes(ctx, session, in.Target, "all")
		if err != nil {
			return nil, err
		}
		answers, err := ask[protocol.Stats](ctx, session, namesOf(nodes), protocol.ReadStats, query)
		if err != nil {
			return nil, err
		}
		return showStats(answers), nil
	})
}

func showStats(answers []answer[protocol.Stats]) *mcp.Answer[statsRow] {
	a := &mcp.Answer[statsRow]{}
	var failed failures
	for i := range answers {
		r := &answers[i]
		row := statsRow{Node: r.node, Stats: r.said}
		if r.err != nil {
			failed.add(r.node, r.err)
			row.Error = mcp.Clean(failure(r.err))
			a.Parts = append(a.Parts, mcp.Part[statsRow]{Head: r.node, Text: row.Error, Row: &row})
			continue
		}
		a.Parts = append(a.Parts, mcp.Part[statsRow]{Head: r.node, Text: statsText(&r.said), Untrusted: true, Row: &row})
	}
	a.Summary = failed.summary(len(answers)) + outstanding(answers)
	a.Failed = failed.count() == len(answers)
	return a
}

// worst is what a summary says of one number of many nodes.
type worst struct {
	what  string
	from  float64 // what is less is not worth a word
	value func(s *protocol.Stats) (value float64, is string)
}

var worsts = []worst{
	{"highest load for each processor", 0.7, func(s *protocol.Stats) (float64, string) {
		if s.Health == nil || s.Health.CPUs == 0 {
			return 0, ""
		}
		load := s.Health.Load[0] / float64(s.Health.CPUs)
		return load, fmt.Sprintf("%.2f", load)
	}},
	{"most memory in use", 80, func(s *protocol.Stats) (float64, string) {
		if s.Health == nil || s.Health.MemTotal == 0 {
			return 0, ""
		}
		used := 100 - 100*float64(s.Health.MemAvailable)/float64(s.Health.MemTotal)
		return used, fmt.Sprintf("%.0f %%", used)
	}},
	{"most time lost for want of memory", 5, func(s *protocol.Stats) (float64, string) {
		if s.Health == nil || s.Health.Pressure["memory"].Some == nil {
			return 0, ""
		}
		lost := s.Health.Pressure["memory"].Some.Avg10
		return lost, fmt.Sprintf("%.1f %%", lost)
	}},
	{"fullest file system", 70, func(s *protocol.Stats) (most float64, is string) {
		for _, fs := range s.FileSys {
			if fs.Used > most {
				most, is = fs.Used, fmt.Sprintf("%.0f %%", fs.Used)
			}
		}
		return most, is
	}},
}

// outstanding names the nodes that stand out, the worst first.
func outstanding(answers []answer[protocol.Stats]) string {
	var text strings.Builder
	for _, w := range worsts {
		type one struct {
			node, is string
			value    float64
		}
		var all []one
		for i := range answers {
			if value, is := w.value(&answers[i].said); answers[i].err == nil && value >= w.from {
				all = append(all, one{answers[i].node, is, value})
			}
		}
		if len(all) == 0 {
			continue
		}
		slices.SortStableFunc(all, func(x, y one) int {
			if x.value > y.value {
				return -1
			}
			return 1
		})
		var words []string
		for _, o := range all[:min(5, len(all))] {
			words = append(words, o.node+" "+o.is)
		}
		fmt.Fprintf(&text, "\n%s: %s", strings.ToUpper(w.what[:1])+w.what[1:], strings.Join(words, ", "))
		if len(all) > 5 {
			fmt.Fprintf(&text, " and %d more above %g", len(all)-5, w.from)
		}
	}
	return text.String()
}

// statsText is numbers as people read them.
func statsText(s *protocol.Stats) string {
	var b strings.Builder
	line := func(format string, args ...any) { fmt.Fprintf(&b, format+"\n", args...) }
	if h := s.Health; h != nil {
		line("=== HEALTH ===")
		line("up %v, load %.2f %.2f %.2f on %d CPUs", time.Duration(h.Uptime)*time.Second, h.Load[0], h.Load[1], h.Load[2], h.CPUs)
		line("CPU: %.1f %% user, %.1f %% system, %.1f %% waiting for disks, %.1f %% idle", h.CPU.User, h.CPU.System, h.CPU.IOWait, h.CPU.Idle)
		line("memory: %s available of %s; swap: %s free of %s", size(h.MemAvailable), size(h.MemTotal), size(h.SwapFree), size(h.SwapTotal))
		for _, resource := range slices.Sorted(maps.Keys(h.Pressure)) {
			if p := h.Pressure[resource]; p.Some != nil {
				line("pressure of %s: %.1f %% of the last 10 s", resource, p.Some.Avg10)
			}
		}
	}
	if m := s.Memory; m != nil {
		line("=== MEMORY ===")
		line("%s: %s free, %s available, %s buffers, %s cached, %s dirty, %s anonymous, %s shared", size(m.Total), size(m.Free), size(m.Available), size(m.Buffers), size(m.Cached), size(m.Dirty), size(m.Anonymous), size(m.Shared))
		line("swap: %s free of %s; %d pages in, %d out", size(m.SwapFree), size(m.SwapTotal), m.SwapIn, m.SwapOut)
	}
	if s.Disks != nil {
		line("=== DISK-IO ===")
		for _, d := range s.Disks {
			line("%s: reads %s/s, writes %s/s, %.1f ms each, queue %.2f, busy %.1f %%", d.Name, size(int64(d.ReadRate)), size(int64(d.WriteRate)), d.Await, d.Queue, d.Utilization)
		}
	}
	if s.FileSys != nil {
		line("=== DISK-USAGE ===")
		for _, f := range s.FileSys {
			line("%s: %.1f %% of %s, %s free, %.1f %% of inodes %s", f.Mount, f.Used, size(f.Total), size(f.Available), f.InodesUsed, strings.ToUpper(f.Mark))
		}
	}
	if n := s.Network; n != nil {
		line("=== NETWORK ===")
		for _, i := range n.Interfaces {
			line("%s: in %s (%s/s), %d errors, %d dropped; out %s (%s/s), %d errors, %d dropped", i.Name, size(i.Receive.Bytes), size(int64(i.Receive.Rate)), i.Receive.Errors, i.Receive.Dropped,
				size(i.Send.Bytes), size(int64(i.Send.Rate)), i.Send.Errors, i.Send.Dropped)
		}
		var states []string
		for _, state := range slices.Sorted(maps.Keys(n.Connections)) {
			states = append(states, fmt.Sprintf("%d %s", n.Connections[state], state))
		}
		line("TCP: %s; UDP: %d", strings.Join(states, ", "), n.UDP)
	}
	if p := s.Processes; p != nil {
		line("=== PROCESSES ===")
		line("%d, %d running, %d zombies", p.Total, p.Running, p.Zombies)
		for _, list := range []struct {
			by  string
			all []protocol.Process
		}{{"CPU", p.ByCPU}, {"memory", p.ByMemory}, {"I/O", p.ByIO}} {
			for _, q := range list.all {
				line("by %s: %s (pid %d, uid %d): CPU %.1f %%, memory %s (%.1f %%), reads %s/s, writes %s/s", list.by, q.Name, q.PID, q.UID, q.CPU, size(q.Memory), q.Share, size(int64(q.Read)), size(int64(q.Write)))
			}
		}
	}
	if s.Sockets != nil {
		line("=== SOCKETS ===")
		for _, l := range s.Sockets {
			line("%s %s port %d: %s (pid %d, uid %d)", l.Protocol, l.Address, l.Port, l.Process, l.PID, l.UID)
		}
	}
	for _, note := range s.Notes {
		line("note: %s", note)
	}
	return b.String()
}

// size is a number of bytes as people read it.
func size(n int64) string {
	f, unit := float64(n), "B"
	for _, next := range []string{"KiB", "MiB", "GiB", "TiB"} {
		if f < 1024 {
			break
		}
		f, unit = f/1024, next
	}
	if unit == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", f, unit)
}
