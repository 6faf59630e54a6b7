// Package stats reads how a machine is from the kernel's files: typed numbers, no programs.
//
// Start with Read. Rates and shares are taken from two readings that are a second apart. machine.go has processors,
// memory and pressure, disk.go disks and file systems, network.go interfaces and sockets, process.go processes.
package stats

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// Machine is where the numbers come from. The zero value is this machine.
type Machine struct {
	Proc string // "": /proc
	Sys  string // "": /sys

	// Pause waits between the two readings and tells how long it took; nil: for a second.
	Pause func(ctx context.Context) (time.Duration, error)
	// Statfs asks how full a file system is; nil: unix.Statfs.
	Statfs func(mount string, into *unix.Statfs_t) error
}

// reading is one answer under way.
type reading struct {
	Machine
	top   int
	stats protocol.Stats
}

// note says what is left out, and why.
func (r *reading) note(format string, args ...any) {
	const most = 20
	if len(r.stats.Notes) < most {
		r.stats.Notes = append(r.stats.Notes, fmt.Sprintf(format, args...))
	}
}

// part is an operation at work: begin takes the first reading, end takes the second and fills in the answer. seconds
// is the time between them.
type part struct {
	begin func()
	end   func(seconds float64)
}

// Read carries out the operations. What the machine does not tell is left out, and noted.
func (m Machine) Read(ctx context.Context, q protocol.StatsQuery) (*protocol.Stats, error) {
	if m.Proc == "" {
		m.Proc = "/proc"
	}
	if m.Sys == "" {
		m.Sys = "/sys"
	}
	if m.Pause == nil {
		m.Pause = second
	}
	if m.Statfs == nil {
		m.Statfs = unix.Statfs
	}
	r := &reading{Machine: m, top: q.Top}
	if r.top == 0 {
		r.top = 5
	}
	wanted := q.Operations
	if len(wanted) == 0 {
		wanted = protocol.StatsOperations
	}
	var parts []part
	for _, p := range []struct {
		operation string
		part      func() part
	}{
		{protocol.StatsHealth, r.health}, {protocol.StatsMemory, r.memory}, {protocol.StatsDiskIO, r.disks}, {protocol.StatsDiskUsage, r.usage},
		{protocol.StatsNetwork, r.network}, {protocol.StatsProcesses, r.processes}, {protocol.StatsSockets, r.sockets},
	} {
		if slices.Contains(wanted, p.operation) {
			parts = append(parts, p.part())
		}
	}
	pauses := false
	for _, p := range parts {
		if p.begin != nil {
			pauses = true
			p.begin()
		}
	}
	if pauses {
		took, err := r.Pause(ctx)
		if err != nil {
			return nil, err
		}
		r.stats.Interval = took.Seconds()
	}
	r.stats.Time = time.Now().UTC()
	for _, p := range parts {
		p.end(r.stats.Interval)
	}
	return &r.stats, ctx.Err()
}

func second(ctx context.Context) (time.Duration, error) {
	begin := time.Now()
	select {
	case <-ctx.Done():
		return 0, ctx.Err()
	case <-time.After(time.Second):
		return time.Since(begin), nil
	}
}

// maxFile bounds what is read of one of the kernel's files, in bytes.
const maxFile = 8 << 20

// lines hands the lines of a file in proc to each, without the first skip of them. A file that is not there, or can't be
// read, is noted.
func (r *reading) lines(file string, skip int, each func(fields []string)) {
	f, err := os.Open(filepath.Join(r.Proc, file))
	if err != nil {
		r.unread(file, err)
		return
	}
	defer f.Close()
	limited := &io.LimitedReader{R: f, N: maxFile}
	scan := bufio.NewScanner(limited)
	scan.Buffer(make([]byte, 0, 4<<10), 64<<10)
	for scan.Scan() {
		if skip--; skip < 0 {
			each(strings.Fields(scan.Text()))
		}
	}
	if err := scan.Err(); err != nil {
		r.unread(file, err)
	}
	if limited.N == 0 {
		r.note("%s: what comes after %d bytes is left out", file, maxFile)
	}
}

func (r *reading) unread(file string, err error) {
	var path *fs.PathError
	if errors.As(err, &path) {
		err = path.Err
	}
	r.note("%s: %v", file, err)
}

// file is the small file of a path, up to its first line break.
func (r *reading) file(path string) string {
	f, err := os.Open(path)
	if err != nil {
		return ""
	}
	defer f.Close()
	var buffer [512]byte
	n, _ := io.ReadFull(f, buffer[:])
	line, _, _ := bytes.Cut(buffer[:n], []byte("\n"))
	return strings.TrimSpace(string(line))
}

// integer reads a number of the kernel's; what is none, or there is not, is 0.
func integer(fields []string, i int) int64 {
	if i >= len(fields) {
		return 0
	}
	n, err := strconv.ParseInt(fields[i], 10, 64)
	if err != nil {
		return 0
	}
	return n
}

func float(fields []string, i int) float64 {
	if i >= len(fields) {
		return 0
	}
	f, err := strconv.ParseFloat(fields[i], 64)
	if err != nil || f != f || f > 1e18 || f < -1e18 {
		return 0
	}
	return f
}

// percent is part of whole in percent with two decimals, 0 where there is no whole.
func percent(part, whole float64) float64 {
	if whole <= 0 {
		return 0
	}
	return round(100 * part / whole)
}

// rate is the growth of a counter a second. One that began anew has none.
func rate(before, after int64, seconds float64) float64 {
	if seconds <= 0 || after < before {
		return 0
	}
	return round(float64(after-before) / seconds)
}

func round(f float64) float64 { return float64(int64(f*100+0.5)) / 100 }
