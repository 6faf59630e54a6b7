package stats

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// proc is a tree of the kernel's files before and, from change on, after two seconds.
type proc struct {
	t      *testing.T
	dir    string
	change func()
}

func newProc(t *testing.T) *proc { return &proc{t: t, dir: t.TempDir(), change: func() {}} }

func (p *proc) write(file, text string) {
	p.t.Helper()
	path := filepath.Join(p.dir, file)
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		p.t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
		p.t.Fatal(err)
	}
}

func (p *proc) read(operations ...string) *protocol.Stats {
	p.t.Helper()
	m := Machine{Proc: p.dir, Sys: filepath.Join(p.dir, "sys"), Statfs: p.statfs, Pause: func(context.Context) (time.Duration, error) { p.change(); return 2 * time.Second, nil }}
	s, err := m.Read(p.t.Context(), protocol.StatsQuery{Operations: operations, Top: 2})
	if err != nil {
		p.t.Fatal(err)
	}
	return s
}

func (p *proc) statfs(mount string, into *unix.Statfs_t) error {
	switch mount {
	case "/":
		*into = unix.Statfs_t{Bsize: 4096, Frsize: 4096, Blocks: 1000, Bfree: 250, Bavail: 200, Files: 100, Ffree: 15}
	case "/data dir", "/data dir/again":
		*into = unix.Statfs_t{Bsize: 1 << 20, Frsize: 4096, Blocks: 1000, Bfree: 100, Bavail: 100}
	case "/boot":
		*into = unix.Statfs_t{Bsize: 4096, Blocks: 1000, Bfree: 300, Bavail: 300}
	default:
		return errors.New("stale handle")
	}
	return nil
}

const psi = "some avg10=1.50 avg60=0.20 avg300=0.03 total=12345\nfull avg10=0.50 avg60=0.00 avg300=0.00 total=99\n"

func TestHealthAndMemory(t *testing.T) {
	p := newProc(t)
	p.write("stat", "cpu  100 0 50 800 50 0 0 0 7 0\ncpu0 1 2 3\ncpu1 1 2 3\nintr 5\n")
	p.change = func() { p.write("stat", "cpu  140 20 70 900 60 5 5 10 7 0\ncpu0 1 2 3\ncpu1 1 2 3\nintr 5\n") }
	p.write("uptime", "3661.55 100.00\n")
	p.write("loadavg", "0.50 1.25 2.00 1/234 5678\n")
	p.write("meminfo", "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    600 kB\nBuffers: 1 kB\nCached: 2 kB\nSwapTotal:      50 kB\nSwapFree:       40 kB\nDirty: 3 kB\nWriteback: 4 kB\nAnonPages: 5 kB\nMapped: 6 kB\nShmem: 7 kB\nHugePages_Total: 0\n")
	p.write("vmstat", "nr_free_pages 9\npgpgin 10\npgpgout 20\npswpin 30\npswpout 40\n")
	for _, r := range []string{"cpu", "memory"} {
		p.write("pressure/"+r, psi)
	}
	s := p.read(protocol.StatsHealth, protocol.StatsMemory)
	h := s.Health
	// 210 ticks: 60 user, 30 system, 10 waiting, 10 stolen, 100 idle.
	if h.CPU != (protocol.CPUShare{User: 28.57, System: 14.29, IOWait: 4.76, Steal: 4.76, Idle: 47.62}) || h.CPUs != 2 {
		t.Errorf("cpu %+v of %d", h.CPU, h.CPUs)
	}
	if h.Uptime != 3661 || h.Load != [3]float64{0.5, 1.25, 2} || h.MemTotal != 1000<<10 || h.MemAvailable != 600<<10 || h.SwapTotal != 50<<10 || h.SwapFree != 40<<10 || s.Interval != 2 {
		t.Errorf("%+v", h)
	}
	if len(h.Pressure) != 2 || *h.Pressure["cpu"].Some != (protocol.Stall{Avg10: 1.5, Avg60: 0.2, Avg300: 0.03, Total: 12345}) || h.Pressure["memory"].Full.Total != 99 {
		t.Errorf("pressure %+v", h.Pressure)
	}
	m := *s.Memory
	if m.Pressure == nil || m.Pressure.Some.Avg10 != 1.5 {
		t.Errorf("pressure %+v", m.Pressure)
	}
	m.Pressure = nil
	if m != (protocol.MemoryStats{Total: 1000 << 10, Free: 100 << 10, Available: 600 << 10, Buffers: 1 << 10, Cached: 2 << 10, SwapTotal: 50 << 10, SwapFree: 40 << 10, Dirty: 3 << 10, Writeback: 4 << 10,
		Anonymous: 5 << 10, Mapped: 6 << 10, Shared: 7 << 10, PagedIn: 10 << 10, PagedOut: 20 << 10, SwapIn: 30, SwapOut: 40}) {
		t.Errorf("%+v", m)
	}
	if s.Disks != nil || s.Network != nil || s.Processes != nil || s.Sockets != nil || s.FileSys != nil || len(s.Notes) != 0 {
		t.Errorf("more than was asked for: %+v", s)
	}
}

func TestDisks(t *testing.T) {
	p := newProc(t)
	const before = "   8 0 sda 100 0 1000 50 200 0 2000 60 0 500 110 0 0 0 0\n   8 1 sda1 1 0 1 1 1 0 1 1 0 1 1\n   7 0 loop0 9 0 9 9 9 0 9 9 0 9 9\n 259 0 nvme0n1 1 0 2 0 0 0 0 0 0 0 0\n"
	p.write("diskstats", before)
	p.write("sys/class/block/sda1/partition", "1\n")
	p.change = func() {
		p.write("diskstats", strings.Replace(before, "sda 100 0 1000 50 200 0 2000 60 0 500 110", "sda 104 0 1400 70 216 0 2800 80 0 1500 2110", 1)+" 8 16 sdb 1 0 1 1 1 0 1 1 0 1 1\n")
	}
	s := p.read(protocol.StatsDiskIO)
	want := []protocol.DiskStats{
		{Name: "sda", Read: 1400 * 512, Written: 2800 * 512, ReadRate: 200 * 512, WriteRate: 400 * 512, Reads: 2, Writes: 8, Await: 2, Utilization: 50, Queue: 1},
		{Name: "nvme0n1", Read: 1024},
		{Name: "sdb", Read: 512, Written: 512},
	}
	if fmt.Sprint(s.Disks) != fmt.Sprint(want) {
		t.Errorf("%+v\nwant %+v", s.Disks, want)
	}
}

func TestFileSystems(t *testing.T) {
	p := newProc(t)
	p.write("self/mountinfo", `22 1 0:30 / / rw,relatime shared:1 - overlay overlay rw
23 22 8:1 / /data\040dir/again rw - ext4 /dev/sda1 rw
24 22 8:1 / /data\040dir rw shared:2 master:1 - ext4 /dev/sda1 rw
25 22 8:2 / /boot rw - vfat /dev/sda2 rw
26 22 0:5 / /proc rw - proc proc rw
27 22 0:6 / /run rw - tmpfs tmpfs rw
28 22 7:0 / /snap rw - squashfs /dev/loop0 rw
29 22 7:1 / /loop rw - ext4 /dev/loop1 rw
30 22 0:40 / /mnt rw - nfs4 server:/x rw
31 22 8:3 / /broken rw - xfs /dev/sda3 rw
short line
`)
	s := p.read(protocol.StatsDiskUsage)
	names := map[string]protocol.FileSystem{}
	for _, f := range s.FileSys {
		names[f.Mount] = f
	}
	if len(s.FileSys) != 3 || s.Interval != 0 {
		t.Fatalf("%+v", s.FileSys)
	}
	if f := names["/"]; f.Total != 1000*4096 || f.Free != 250*4096 || f.Available != 200*4096 || f.Used != 78.95 || f.Inodes != 100 || f.InodesUsed != 85 || f.Mark != "warning" || f.Type != "overlay" {
		t.Errorf("%+v", f)
	}
	if f := names["/boot"]; f.Used != 70 || f.Mark != "attention" || f.Inodes != 0 || f.InodesUsed != 0 {
		t.Errorf("%+v", f)
	}
	if f, ok := names["/data dir"]; !ok || f.Mark != "critical" || f.Device != "/dev/sda1" || f.Total != 1000*4096 {
		t.Errorf("%+v", s.FileSys)
	}
	if notes := strings.Join(s.Notes, "; "); !strings.Contains(notes, "/mnt is not asked") || !strings.Contains(notes, "/broken: stale handle") {
		t.Errorf("notes %s", notes)
	}
}
