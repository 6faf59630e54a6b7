package stats

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

const tcp = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0100007F:0CEA 00000000:0000 0A 00000000:00000000 00:00000000 00000000   998        0 111 1 0000000000000000 100 0 0 10 0
   1: 0F02000A:0016 0202000A:D2F0 01 00000000:00000000 02:000A 00000000     0        0 222 4 0
   2: 0F02000A:0016 0202000A:D2F1 06 00000000:00000000 02:000A 00000000     0        0 0 4 0
   3: broken
`

const tcp6 = `  sl  local_address                         remote_address                        st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 00000000000000000000000000000000:0016 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 333 1 0
   1: B80D0120000000000000000001000000:01BB 00000000000000000000000000000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 444 1 0
`

const udp = `  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode ref pointer drops
   0: 00000000:0035 00000000:0000 07 00000000:00000000 00:00000000 00000000   101        0 555 2 0 0
   1: 00000000:9999 0202000A:0035 01 00000000:00000000 00:00000000 00000000   101        0 666 2 0 0
`

func network(t *testing.T) *proc {
	p := newProc(t)
	dev := "Inter-|   Receive                                                |  Transmit\n face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n" +
		"    lo: 9 9 9 9 0 0 0 0 9 9 9 9 0 0 0 0\n  eth0:%d 10 1 2 0 0 0 0 %d 20 3 4 0 0 0 0\n"
	p.write("net/dev", fmt.Sprintf(dev, 1000, 2000))
	p.change = func() { p.write("net/dev", fmt.Sprintf(dev, 3000, 2500)) }
	p.write("net/tcp", tcp)
	p.write("net/tcp6", tcp6)
	p.write("net/udp", udp)
	p.write("pressure/io", psi)
	for pid, inodes := range map[string][]string{"42": {"socket:[111]", "/dev/null", "socket:[999]"}, "7": {"pipe:[333]", "socket:[333]"}} {
		p.write(pid+"/comm", "server"+pid+"\n")
		for i, to := range inodes {
			if err := os.MkdirAll(filepath.Join(p.dir, pid, "fd"), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink(to, filepath.Join(p.dir, pid, "fd", fmt.Sprint(i))); err != nil {
				t.Fatal(err)
			}
		}
	}
	return p
}

func TestNetwork(t *testing.T) {
	n := network(t).read(protocol.StatsNetwork).Network
	want := protocol.Interface{Name: "eth0", Receive: protocol.Traffic{Bytes: 3000, Packets: 10, Errors: 1, Dropped: 2, Rate: 1000}, Send: protocol.Traffic{Bytes: 2500, Packets: 20, Errors: 3, Dropped: 4, Rate: 250}}
	if len(n.Interfaces) != 1 || n.Interfaces[0] != want {
		t.Errorf("%+v", n.Interfaces)
	}
	if fmt.Sprint(n.Connections) != "map[established:1 listen:3 time-wait:1]" || n.UDP != 2 || n.Pressure == nil {
		t.Errorf("%+v", n)
	}
}

func TestSockets(t *testing.T) {
	s := network(t).read(protocol.StatsSockets)
	want := []protocol.Listener{
		{Protocol: "tcp", Address: "127.0.0.1", Port: 3306, UID: 998, PID: 42, Process: "server42"},
		{Protocol: "tcp", Address: "::", Port: 22, PID: 7, Process: "server7"},
		{Protocol: "tcp", Address: "2001:db8::1", Port: 443},
		{Protocol: "udp", Address: "0.0.0.0", Port: 53, UID: 101},
	}
	if fmt.Sprint(s.Sockets) != fmt.Sprint(want) || len(s.Notes) != 0 {
		t.Errorf("%+v, notes %v", s.Sockets, s.Notes)
	}
}

func TestProcesses(t *testing.T) {
	p := newProc(t)
	stat := func(pid int, name string, state string, ticks, began, pages int) {
		p.write(fmt.Sprintf("%d/stat", pid), fmt.Sprintf("%d (%s) %s 1 1 1 0 -1 4194560 1 0 0 0 %d 0 0 0 20 0 1 0 %d 12345 %d 184467 1 1 0 0", pid, name, state, ticks, began, pages))
	}
	page := os.Getpagesize()
	p.write("meminfo", fmt.Sprintf("MemTotal: %d kB\n", 1000*page/1024))
	stat(1, "init", "S", 100, 1, 10)
	stat(2, "a (b) c", "R", 100, 2, 500)
	stat(3, "gone", "S", 0, 3, 1)
	stat(4, "new id", "S", 1000, 4, 0)
	stat(5, "zombie", "Z", 0, 5, 0)
	p.write("2/io", "rchar: 1\nread_bytes: 0\nwrite_bytes: 0\ncancelled_write_bytes: 0\n")
	p.write("self/stat", "not a pid")
	p.change = func() {
		stat(1, "init", "S", 101, 1, 10)
		stat(2, "a (b) c", "R", 250, 2, 500)
		if err := os.RemoveAll(filepath.Join(p.dir, "3")); err != nil {
			t.Fatal(err)
		}
		stat(4, "new id", "S", 2000, 400, 0) // another process with the id of one that ended
		p.write("2/io", "rchar: 1\nread_bytes: 500000\nwrite_bytes: 100000\n")
	}
	s := p.read(protocol.StatsProcesses).Processes
	if s.Total != 4 || s.Running != 1 || s.Zombies != 1 {
		t.Errorf("%+v", s)
	}
	if len(s.ByCPU) != 2 || s.ByCPU[0].PID != 2 || s.ByCPU[0].Name != "a (b) c" || s.ByCPU[0].CPU != 75 || s.ByCPU[1].PID != 1 || s.ByCPU[1].CPU != 0.5 {
		t.Errorf("by CPU %+v", s.ByCPU)
	}
	if len(s.ByMemory) != 2 || s.ByMemory[0].PID != 2 || s.ByMemory[0].Share != 50 || s.ByMemory[0].Memory != int64(500*page) || s.ByMemory[1].PID != 1 {
		t.Errorf("by memory %+v", s.ByMemory)
	}
	if len(s.ByIO) != 1 || s.ByIO[0].Read != 250000 || s.ByIO[0].Write != 50000 {
		t.Errorf("by I/O %+v", s.ByIO)
	}
}

// TestThisMachine: the formats are those of a kernel that runs.
func TestThisMachine(t *testing.T) {
	s, err := Machine{}.Read(t.Context(), protocol.StatsQuery{})
	if err != nil {
		t.Fatal(err)
	}
	if h := s.Health; h.Uptime <= 0 || h.MemTotal <= 0 || h.MemAvailable > h.MemTotal || h.CPUs < 1 || s.Memory.Total != h.MemTotal || s.Interval < 1 {
		t.Errorf("%+v", h)
	}
	if c := s.Health.CPU; c.User+c.System+c.IOWait+c.Steal+c.Idle < 99.9 || c.User+c.System+c.IOWait+c.Steal+c.Idle > 100.1 {
		t.Errorf("%+v", c)
	}
	if s.Processes.Total < 2 || s.Processes.ByMemory == nil || s.Network == nil || s.Sockets == nil {
		t.Errorf("%+v", s)
	}
	if len(protocol.Encode(s)) > protocol.MaxAnswer {
		t.Errorf("%d bytes", len(protocol.Encode(s)))
	}
}

func FuzzProcess(f *testing.F) {
	f.Add("1 (a) S 1 1 1 0 -1 4194560 1 0 0 0 5 5 0 0 20 0 1 0 77 12345 10 184467")
	f.Add(")(")
	f.Fuzz(func(t *testing.T, text string) {
		if p, ok := parseProcess(text, 4096); ok {
			protocol.Encode(p.name)
		}
		parseIO(text)
		endpoint(text)
		unescape(text)
	})
}
