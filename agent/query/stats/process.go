package stats

import (
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	maxProcesses = 50_000
	ticks        = 100 // a second, of the times in /proc/PID/stat (USER_HZ)

	leastShare = 0.1     // percent, from where on a process is listed
	leastIO    = 100_000 // bytes a second
)

// usage of a process up to a moment.
type process struct {
	name          string
	state         byte
	cpu           int64 // ticks
	began         int64 // ticks after boot: with the id, which process it is
	memory        int64 // bytes
	read, written int64
}

func (r *reading) processes() part {
	var before map[int]process
	return part{
		begin: func() { before = r.everyProcess() },
		end: func(seconds float64) {
			after := r.everyProcess()
			s := &protocol.ProcessStats{Total: len(after)}
			total := r.meminfo()["MemTotal:"]
			all := make([]protocol.Process, 0, len(after))
			for pid, a := range after {
				switch a.state {
				case 'R':
					s.Running++
				case 'Z':
					s.Zombies++
				}
				p := protocol.Process{PID: pid, Name: a.name, Memory: a.memory, Share: percent(float64(a.memory), float64(total))}
				if b, known := before[pid]; known && b.began == a.began {
					p.CPU = rate(b.cpu, a.cpu, seconds*ticks/100)
					p.Read, p.Write = rate(b.read, a.read, seconds), rate(b.written, a.written, seconds)
				}
				all = append(all, p)
			}
			s.ByCPU = r.most(all, func(p protocol.Process) float64 { return p.CPU }, leastShare)
			s.ByMemory = r.most(all, func(p protocol.Process) float64 { return p.Share }, leastShare)
			s.ByIO = r.most(all, func(p protocol.Process) float64 { return p.Read + p.Write }, leastIO)
			r.stats.Processes = s
		},
	}
}

// most are the processes that have the most of something, if it is more than least.
func (r *reading) most(all []protocol.Process, of func(protocol.Process) float64, least float64) []protocol.Process {
	slices.SortFunc(all, func(a, b protocol.Process) int {
		if x, y := of(a), of(b); x != y {
			if x > y {
				return -1
			}
			return 1
		}
		return a.PID - b.PID
	})
	first := []protocol.Process{}
	for _, p := range all {
		if len(first) == r.top || of(p) <= least {
			break
		}
		if info, err := os.Stat(filepath.Join(r.Proc, strconv.Itoa(p.PID))); err == nil {
			if s, ok := info.Sys().(*syscall.Stat_t); ok {
				p.UID = int(s.Uid)
			}
		}
		first = append(first, p)
	}
	return first
}

func (r *reading) everyProcess() map[int]process {
	all := map[int]process{}
	page := int64(os.Getpagesize())
	buffer := make([]byte, 4<<10)
	r.pids(func(pid int) {
		if len(all) == maxProcesses {
			return
		}
		if p, ok := parseProcess(r.small(buffer, pid, "stat"), page); ok {
			p.read, p.written = parseIO(r.small(buffer, pid, "io"))
			all[pid] = p
		}
	})
	if len(all) == maxProcesses {
		r.note("only %d processes are looked at", maxProcesses)
	}
	return all
}

// small reads a file of a process into the buffer; "" where it is gone.
func (r *reading) small(buffer []byte, pid int, file string) string {
	f, err := os.Open(filepath.Join(r.Proc, strconv.Itoa(pid), file))
	if err != nil {
		return ""
	}
	defer f.Close()
	n, _ := io.ReadFull(f, buffer)
	return string(buffer[:n])
}

// parseProcess reads /proc/PID/stat. The name stands in brackets and may have any character in it, brackets too.
func parseProcess(line string, page int64) (process, bool) {
	open, close := strings.IndexByte(line, '('), strings.LastIndexByte(line, ')')
	if open < 0 || close < open {
		return process{}, false
	}
	f := strings.Fields(line[close+1:])
	if len(f) < 22 || len(f[0]) != 1 {
		return process{}, false
	}
	return process{name: strings.Clone(strings.ToValidUTF8(line[open+1:close], "?")), state: f[0][0], cpu: integer(f, 11) + integer(f, 12), began: integer(f, 19), memory: integer(f, 21) * page}, true
}

// parseIO reads /proc/PID/io: what went to and came from disks.
func parseIO(text string) (read, written int64) {
	for line := range strings.Lines(text) {
		f := strings.Fields(line)
		if len(f) != 2 {
			continue
		}
		switch f[0] {
		case "read_bytes:":
			read = integer(f, 1)
		case "write_bytes:":
			written = integer(f, 1)
		}
	}
	return read, written
}

// pids hands the ids of all processes to each.
func (r *reading) pids(each func(pid int)) {
	f, err := os.Open(r.Proc)
	if err != nil {
		r.unread("processes", err)
		return
	}
	defer f.Close()
	for {
		names, err := f.Readdirnames(256)
		for _, n := range names {
			if pid, err := strconv.Atoi(n); err == nil && pid > 0 {
				each(pid)
			}
		}
		if err != nil {
			return
		}
	}
}
