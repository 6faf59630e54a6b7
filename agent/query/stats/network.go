package stats

import (
	"encoding/hex"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	maxInterfaces = 500
	maxListeners  = 500
	maxInodes     = 200_000 // open files that are looked through for who has a socket
)

func (r *reading) network() part {
	var before []protocol.Interface
	return part{
		begin: func() { before = r.interfaces() },
		end: func(seconds float64) {
			n := &protocol.NetworkStats{Interfaces: r.interfaces(), Connections: map[string]int{}, Pressure: r.pressure("io")}
			for i := range n.Interfaces {
				a := &n.Interfaces[i]
				for _, b := range before {
					if b.Name == a.Name {
						a.Receive.Rate, a.Send.Rate = rate(b.Receive.Bytes, a.Receive.Bytes, seconds), rate(b.Send.Bytes, a.Send.Bytes, seconds)
					}
				}
			}
			for _, file := range []string{"net/tcp", "net/tcp6"} {
				r.socketLines(file, func(s socket) { n.Connections[s.state.String()]++ })
			}
			for _, file := range []string{"net/udp", "net/udp6"} {
				r.socketLines(file, func(socket) { n.UDP++ })
			}
			r.stats.Network = n
		},
	}
}

func (r *reading) interfaces() []protocol.Interface {
	all := []protocol.Interface{}
	r.lines("net/dev", 2, func(f []string) {
		line := strings.Join(f, " ")
		name, rest, ok := strings.Cut(line, ":")
		n := strings.Fields(rest)
		if !ok || name == "lo" || len(n) < 16 || len(all) == maxInterfaces {
			return
		}
		one := func(at int) protocol.Traffic {
			return protocol.Traffic{Bytes: integer(n, at), Packets: integer(n, at+1), Errors: integer(n, at+2), Dropped: integer(n, at+3)}
		}
		all = append(all, protocol.Interface{Name: name, Receive: one(0), Send: one(8)})
	})
	return all
}

// state is a TCP state as the kernel numbers them.
type state int

var states = []string{1: "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2", "time-wait", "close", "close-wait", "last-ack", "listen", "closing", "new-syn-recv"}

const (
	closed    state = 7
	listening state = 10
)

func (s state) String() string {
	if s < 1 || int(s) >= len(states) {
		return fmt.Sprintf("state-%d", int(s))
	}
	return states[s]
}

// socket is a line of /proc/net/tcp and its like.
type socket struct {
	address netip.Addr
	port    int
	state   state
	uid     int
	inode   int64
}

func (r *reading) socketLines(file string, each func(socket)) {
	if _, err := os.Stat(filepath.Join(r.Proc, file)); err != nil {
		return // a kernel without IPv6
	}
	r.lines(file, 1, func(f []string) {
		if len(f) < 10 {
			return
		}
		number, err := strconv.ParseUint(f[3], 16, 8)
		address, port, ok := endpoint(f[1])
		if err == nil && ok {
			each(socket{address, port, state(number), int(integer(f, 7)), integer(f, 9)})
		}
	})
}

// endpoint reads 0100007F:0016: words of 32 bits in the machine's order, which is little-endian where NixOS runs.
func endpoint(s string) (netip.Addr, int, bool) {
	host, port, _ := strings.Cut(s, ":")
	b, err := hex.DecodeString(host)
	number, err2 := strconv.ParseUint(port, 16, 16)
	if err != nil || err2 != nil || len(b) != 4 && len(b) != 16 {
		return netip.Addr{}, 0, false
	}
	for i := 0; i < len(b); i += 4 {
		slices.Reverse(b[i : i+4])
	}
	address, ok := netip.AddrFromSlice(b)
	return address, int(number), ok
}

func (r *reading) sockets() part {
	return part{end: func(float64) {
		r.stats.Sockets = []protocol.Listener{}
		wanted := map[int64]int{} // index in the answer by inode
		cut := 0
		for _, kind := range []struct {
			name  string
			waits state
		}{{"tcp", listening}, {"udp", closed}} {
			for _, version := range []string{"", "6"} {
				r.socketLines("net/"+kind.name+version, func(s socket) {
					if s.state != kind.waits {
						return
					}
					if len(r.stats.Sockets) == maxListeners {
						cut++
						return
					}
					wanted[s.inode] = len(r.stats.Sockets)
					r.stats.Sockets = append(r.stats.Sockets, protocol.Listener{Protocol: kind.name, Address: s.address.String(), Port: s.port, UID: s.uid})
				})
			}
		}
		if cut > 0 {
			r.note("%d more sockets are left out", cut)
		}
		r.owners(wanted)
	}}
}

// owners finds the processes that have sockets, by their open files.
func (r *reading) owners(wanted map[int64]int) {
	left := maxInodes
	r.pids(func(pid int) {
		if len(wanted) == 0 || left <= 0 {
			return
		}
		dir := filepath.Join(r.Proc, strconv.Itoa(pid))
		f, err := os.Open(filepath.Join(dir, "fd"))
		if err != nil {
			return
		}
		defer f.Close()
		names, _ := f.Readdirnames(left)
		left -= len(names)
		for _, n := range names {
			target, err := os.Readlink(filepath.Join(dir, "fd", n))
			number, isSocket := strings.CutPrefix(target, "socket:[")
			if err != nil || !isSocket {
				continue
			}
			inode, _ := strconv.ParseInt(strings.TrimSuffix(number, "]"), 10, 64)
			if i, ok := wanted[inode]; ok {
				r.stats.Sockets[i].PID, r.stats.Sockets[i].Process = pid, r.file(filepath.Join(dir, "comm"))
				delete(wanted, inode)
			}
		}
	})
	if left <= 0 {
		r.note("more files are open than are looked through: whose some sockets are is not known")
	}
}
