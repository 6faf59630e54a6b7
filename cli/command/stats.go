package command

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// statsDocument is the numbers of a node in `stats --json`.
type statsDocument struct {
	Node string `json:"node"`
	protocol.Stats
}

func (a *app) statsCommand() *cobra.Command {
	var o asking
	var query protocol.StatsQuery
	c := &cobra.Command{
		Use:   "stats [SELECTOR]...",
		Short: "Show how nodes are: processors, memory, disks, network, processes, sockets",
		Long: `Show how nodes (all, if none is selected) are, by the numbers of their kernels. Rates and shares are those of one
second.

Operations: ` + strings.Join(protocol.StatsOperations, ", ") + `; all is each of them.`,
		Example: `  nix-infra stats web1
  nix-infra stats @web --op memory,processes --top 10
  nix-infra stats all --op disk-usage --json | jq -r 'select(.file_systems[].mark == "critical") | .node'`,
		RunE: func(c *cobra.Command, args []string) error {
			if slices.Contains(query.Operations, "all") {
				query.Operations = nil
			}
			if err := query.Validate(); err != nil {
				return err
			}
			q, err := a.question(c.Context(), args, o)
			if err != nil {
				return err
			}
			defer q.session.Close()
			return put(c.Context(), q, protocol.ReadStats, query, func(node string, _ int, s protocol.Stats) {
				if a.json {
					a.document(statsDocument{node, s})
					return
				}
				q.print(node, q.statsLines(&s)...)
			})
		},
	}
	f := c.Flags()
	f.StringSliceVar(&query.Operations, "op", []string{protocol.StatsHealth}, "operations")
	f.IntVar(&query.Top, "top", 5, "processes in each list, at most 100")
	o.flags(c)
	return c
}

// statsLines are what was asked for, part by part.
func (q *question) statsLines(s *protocol.Stats) []string {
	var lines []string
	part := func(name string, rows [][]ui.Cell) {
		lines = append(lines, q.out.Paint(ui.Bold, strings.ToUpper(name)))
		lines = append(lines, q.columns(rows)...)
	}
	if s.Health != nil {
		part("health", healthRows(s.Health))
	}
	if s.Memory != nil {
		part("memory", memoryRows(s.Memory))
	}
	if s.Disks != nil {
		part("disk-io", diskRows(s.Disks))
	}
	if s.FileSys != nil {
		part("disk-usage", usageRows(s.FileSys))
	}
	if s.Network != nil {
		part("network", networkRows(s.Network))
	}
	if p := s.Processes; p != nil {
		part("processes", [][]ui.Cell{ui.Text(fmt.Sprintf("%d, %d running, %d zombies", p.Total, p.Running, p.Zombies))})
		for _, l := range []struct {
			by   string
			list []protocol.Process
		}{{"cpu", p.ByCPU}, {"memory", p.ByMemory}, {"i/o", p.ByIO}} {
			if len(l.list) > 0 {
				lines = append(lines, q.columns(processRows(l.by, l.list))...)
			}
		}
	}
	if s.Sockets != nil {
		part("sockets", socketRows(s.Sockets))
	}
	for _, n := range s.Notes {
		lines = append(lines, q.out.Paint(ui.Dim, "note: "+ui.Clean(n)))
	}
	return lines
}

func healthRows(h *protocol.HealthStats) [][]ui.Cell {
	rows := [][]ui.Cell{
		ui.Text("up", (time.Duration(h.Uptime) * time.Second).String()),
		ui.Text("load", fmt.Sprintf("%.2f %.2f %.2f on %s", h.Load[0], h.Load[1], h.Load[2], plural(h.CPUs, "processor"))),
		ui.Text("cpu", fmt.Sprintf("%.1f %% user, %.1f %% system, %.1f %% waits for disks, %.1f %% stolen, %.1f %% idle", h.CPU.User, h.CPU.System, h.CPU.IOWait, h.CPU.Steal, h.CPU.Idle)),
		ui.Text("memory", fmt.Sprintf("%s available of %s", size(h.MemAvailable), size(h.MemTotal))),
		ui.Text("swap", swap(h.SwapFree, h.SwapTotal)),
	}
	for _, resource := range slices.Sorted(maps.Keys(h.Pressure)) {
		p := h.Pressure[resource]
		rows = append(rows, ui.Text("pressure", resource+" "+pressure(&p)))
	}
	return rows
}

func swap(free, total int64) string {
	if total == 0 {
		return "none"
	}
	return fmt.Sprintf("%s free of %s", size(free), size(total))
}

func pressure(p *protocol.Pressure) string {
	var words []string
	for _, l := range []struct {
		name  string
		stall *protocol.Stall
	}{{"some", p.Some}, {"full", p.Full}} {
		if l.stall != nil {
			words = append(words, fmt.Sprintf("%s %.2f/%.2f/%.2f %%", l.name, l.stall.Avg10, l.stall.Avg60, l.stall.Avg300))
		}
	}
	return strings.Join(words, ", ")
}

func memoryRows(m *protocol.MemoryStats) [][]ui.Cell {
	var rows [][]ui.Cell
	for _, r := range []struct {
		name  string
		bytes int64
	}{{"total", m.Total}, {"free", m.Free}, {"available", m.Available}, {"buffers", m.Buffers}, {"cached", m.Cached}, {"dirty", m.Dirty}, {"writeback", m.Writeback},
		{"anonymous", m.Anonymous}, {"mapped", m.Mapped}, {"shared", m.Shared}, {"paged in", m.PagedIn}, {"paged out", m.PagedOut}} {
		rows = append(rows, ui.Text(r.name, size(r.bytes)))
	}
	rows = append(rows, ui.Text("swap", swap(m.SwapFree, m.SwapTotal)), ui.Text("swapped", fmt.Sprintf("%d pages in, %d out", m.SwapIn, m.SwapOut)))
	if m.Pressure != nil {
		rows = append(rows, ui.Text("pressure", pressure(m.Pressure)))
	}
	return rows
}

func diskRows(disks []protocol.DiskStats) [][]ui.Cell {
	rows := [][]ui.Cell{ui.Text("DISK", "READ/s", "WRITE/s", "READS/s", "WRITES/s", "AWAIT", "QUEUE", "BUSY")}
	for _, d := range disks {
		rows = append(rows, ui.Text(d.Name, size(int64(d.ReadRate)), size(int64(d.WriteRate)), fmt.Sprintf("%.1f", d.Reads), fmt.Sprintf("%.1f", d.Writes),
			fmt.Sprintf("%.1f ms", d.Await), fmt.Sprintf("%.2f", d.Queue), fmt.Sprintf("%.1f %%", d.Utilization)))
	}
	return rows
}

func usageRows(all []protocol.FileSystem) [][]ui.Cell {
	rows := [][]ui.Cell{ui.Text("MOUNT", "USED", "SIZE", "FREE", "INODES", "MARK")}
	for _, f := range all {
		row := ui.Text(f.Mount, fmt.Sprintf("%.1f %%", f.Used), size(f.Total), size(f.Available), fmt.Sprintf("%.1f %%", f.InodesUsed), f.Mark)
		row[5].Colour = map[string]ui.Colour{"attention": ui.Yellow, "warning": ui.Yellow, "critical": ui.Red}[f.Mark]
		rows = append(rows, row)
	}
	return rows
}

func networkRows(n *protocol.NetworkStats) [][]ui.Cell {
	rows := [][]ui.Cell{ui.Text("INTERFACE", "IN/s", "IN", "ERRORS", "DROPPED", "OUT/s", "OUT", "ERRORS", "DROPPED")}
	for _, i := range n.Interfaces {
		rows = append(rows, ui.Text(i.Name, size(int64(i.Receive.Rate)), size(i.Receive.Bytes), fmt.Sprint(i.Receive.Errors), fmt.Sprint(i.Receive.Dropped),
			size(int64(i.Send.Rate)), size(i.Send.Bytes), fmt.Sprint(i.Send.Errors), fmt.Sprint(i.Send.Dropped)))
	}
	var states []string
	for _, s := range slices.Sorted(maps.Keys(n.Connections)) {
		states = append(states, fmt.Sprintf("%d %s", n.Connections[s], s))
	}
	rows = append(rows, ui.Text(fmt.Sprintf("tcp: %s; udp: %d", strings.Join(states, ", "), n.UDP)))
	if n.Pressure != nil {
		rows = append(rows, ui.Text("pressure of I/O: "+pressure(n.Pressure)))
	}
	return rows
}

func processRows(by string, list []protocol.Process) [][]ui.Cell {
	rows := [][]ui.Cell{ui.Text("BY "+strings.ToUpper(by), "PID", "UID", "CPU", "MEMORY", "READ/s", "WRITE/s")}
	for _, p := range list {
		rows = append(rows, ui.Text(p.Name, fmt.Sprint(p.PID), fmt.Sprint(p.UID), fmt.Sprintf("%.1f %%", p.CPU), fmt.Sprintf("%s (%.1f %%)", size(p.Memory), p.Share), size(int64(p.Read)), size(int64(p.Write))))
	}
	return rows
}

func socketRows(all []protocol.Listener) [][]ui.Cell {
	rows := [][]ui.Cell{ui.Text("SOCKET", "ADDRESS", "PORT", "UID", "PID", "PROCESS")}
	for _, s := range all {
		rows = append(rows, ui.Text(s.Protocol, s.Address, fmt.Sprint(s.Port), fmt.Sprint(s.UID), number(uint64(s.PID)), s.Process))
	}
	return rows
}
