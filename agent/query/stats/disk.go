package stats

import (
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	sectorSize     = 512 // bytes, in /proc/diskstats whatever the disk has
	maxDisks       = 200
	maxFileSystems = 200
)

// traffic is a disk's line of /proc/diskstats.
type traffic struct {
	reads, read, readMillis      int64
	writes, written, writeMillis int64
	busyMillis, weightedMillis   int64
}

func (r *reading) disks() part {
	var before map[string]traffic
	return part{
		begin: func() { before, _ = r.traffic() },
		end: func(seconds float64) {
			after, names := r.traffic()
			r.stats.Disks = []protocol.DiskStats{}
			for _, name := range names {
				a, b := after[name], before[name]
				d := protocol.DiskStats{Name: name, Read: a.read, Written: a.written}
				if _, known := before[name]; known {
					d.ReadRate, d.WriteRate = rate(b.read, a.read, seconds), rate(b.written, a.written, seconds)
					d.Reads, d.Writes = rate(b.reads, a.reads, seconds), rate(b.writes, a.writes, seconds)
					d.Utilization = min(100, rate(b.busyMillis, a.busyMillis, seconds)/10)
					d.Queue = rate(b.weightedMillis, a.weightedMillis, seconds*1000)
					if done := a.reads - b.reads + a.writes - b.writes; done > 0 {
						d.Await = round(float64(max(0, a.readMillis-b.readMillis+a.writeMillis-b.writeMillis)) / float64(done))
					}
				}
				r.stats.Disks = append(r.stats.Disks, d)
			}
		},
	}
}

func (r *reading) traffic() (all map[string]traffic, names []string) {
	all = map[string]traffic{}
	r.lines("diskstats", 0, func(f []string) {
		if len(f) < 14 || len(all) == maxDisks {
			return
		}
		name := f[2]
		if strings.HasPrefix(name, "loop") || strings.HasPrefix(name, "ram") || r.partition(name) {
			return
		}
		names = append(names, name)
		all[name] = traffic{reads: integer(f, 3), read: integer(f, 5) * sectorSize, readMillis: integer(f, 6),
			writes: integer(f, 7), written: integer(f, 9) * sectorSize, writeMillis: integer(f, 10),
			busyMillis: integer(f, 12), weightedMillis: integer(f, 13)}
	})
	return all, names
}

func (r *reading) partition(name string) bool {
	_, err := os.Stat(filepath.Join(r.Sys, "class/block", filepath.Base(name), "partition"))
	return err == nil
}

// Of these types no file system is on a disk, and those are not asked: one whose server is gone would not answer.
var (
	notOnDisk = []string{"tmpfs", "devtmpfs", "ramfs", "squashfs", "overlay", "proc", "sysfs", "cgroup", "cgroup2", "devpts", "mqueue", "hugetlbfs", "debugfs", "tracefs", "securityfs",
		"pstore", "bpf", "configfs", "fusectl", "efivarfs", "binfmt_misc", "autofs", "rpc_pipefs", "nsfs", "selinuxfs", "iso9660"}
	elsewhere = []string{"nfs", "nfs4", "cifs", "smb3", "ceph", "9p", "afs", "glusterfs", "lustre"}
)

func (r *reading) usage() part {
	return part{end: func(float64) {
		r.stats.FileSys = []protocol.FileSystem{}
		byDevice := map[string]int{} // index in the answer
		r.lines("self/mountinfo", 0, func(f []string) {
			dash := slices.Index(f, "-")
			if dash < 5 || dash+2 >= len(f) {
				return
			}
			fs := protocol.FileSystem{Mount: unescape(f[4]), Type: f[dash+1], Device: unescape(f[dash+2])}
			switch {
			case slices.Contains(notOnDisk, fs.Type) && fs.Mount != "/", strings.HasPrefix(fs.Device, "/dev/loop"):
				return
			case slices.Contains(elsewhere, fs.Type) || strings.HasPrefix(fs.Type, "fuse"):
				r.note("%s is not asked: it is a file system of type %s", fs.Mount, fs.Type)
				return
			}
			if i, known := byDevice[f[2]]; known {
				if known := &r.stats.FileSys[i]; len(fs.Mount) < len(known.Mount) {
					known.Mount = fs.Mount
				}
				return
			}
			if len(r.stats.FileSys) == maxFileSystems {
				return
			}
			if r.fill(&fs) {
				byDevice[f[2]] = len(r.stats.FileSys)
				r.stats.FileSys = append(r.stats.FileSys, fs)
			}
		})
	}}
}

// fill asks how full a file system is.
func (r *reading) fill(fs *protocol.FileSystem) bool {
	var s unix.Statfs_t
	if err := r.Statfs(fs.Mount, &s); err != nil {
		r.note("%s: %v", fs.Mount, err)
		return false
	}
	if s.Blocks == 0 {
		return false
	}
	block := int64(s.Frsize)
	if block == 0 {
		block = int64(s.Bsize)
	}
	fs.Total, fs.Free, fs.Available = int64(s.Blocks)*block, int64(s.Bfree)*block, int64(s.Bavail)*block
	fs.Used = percent(float64(fs.Total-fs.Free), float64(fs.Total-fs.Free+fs.Available))
	fs.Inodes, fs.InodesFree = int64(s.Files), int64(s.Ffree)
	fs.InodesUsed = percent(float64(fs.Inodes-fs.InodesFree), float64(fs.Inodes))
	switch {
	case fs.Used >= 90:
		fs.Mark = "critical"
	case fs.Used >= 80 || fs.InodesUsed >= 80:
		fs.Mark = "warning"
	case fs.Used >= 70:
		fs.Mark = "attention"
	}
	return true
}

// unescape reads a path as the kernel writes it: blanks and backslashes as three octal digits.
func unescape(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '\\' && i+3 < len(s) {
			if n, err := strconv.ParseUint(s[i+1:i+4], 8, 8); err == nil {
				b.WriteByte(byte(n))
				i += 3
				continue
			}
		}
		b.WriteByte(s[i])
	}
	return b.String()
}
