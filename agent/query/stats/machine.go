package stats

import (
	"strings"

	"github.com/nix-infra/nix-infra/protocol"
)

func (r *reading) health() part {
	var before, after cpuTimes
	h := &protocol.HealthStats{}
	return part{
		begin: func() { before, _ = r.cpu() },
		end: func(float64) {
			r.stats.Health = h
			after, h.CPUs = r.cpu()
			h.CPU = after.since(before)
			if f := strings.Fields(r.file(r.Proc + "/uptime")); len(f) > 0 {
				h.Uptime = int64(float(f, 0))
			}
			load := strings.Fields(r.file(r.Proc + "/loadavg"))
			for i := range h.Load {
				h.Load[i] = float(load, i)
			}
			m := r.meminfo()
			h.MemTotal, h.MemAvailable, h.SwapTotal, h.SwapFree = m["MemTotal:"], m["MemAvailable:"], m["SwapTotal:"], m["SwapFree:"]
			for _, resource := range []string{"cpu", "memory", "io"} {
				if p := r.pressure(resource); p != nil {
					if h.Pressure == nil {
						h.Pressure = map[string]protocol.Pressure{}
					}
					h.Pressure[resource] = *p
				}
			}
		},
	}
}

// cpuTimes are the ticks of /proc/stat: user, nice, system, idle, iowait, irq, softirq, steal. What guests took is
// part of user and nice.
type cpuTimes [8]int64

func (r *reading) cpu() (t cpuTimes, count int) {
	r.lines("stat", 0, func(f []string) {
		switch {
		case len(f) == 0:
		case f[0] == "cpu":
			for i := range t {
				t[i] = integer(f, i+1)
			}
		case strings.HasPrefix(f[0], "cpu"):
			count++
		}
	})
	return t, count
}

func (t cpuTimes) since(before cpuTimes) protocol.CPUShare {
	var d [8]float64
	var all float64
	for i := range t {
		d[i] = float64(max(0, t[i]-before[i])) // iowait may go back
		all += d[i]
	}
	return protocol.CPUShare{User: percent(d[0]+d[1], all), System: percent(d[2]+d[5]+d[6], all), IOWait: percent(d[4], all), Steal: percent(d[7], all), Idle: percent(d[3], all)}
}

// meminfo is /proc/meminfo in bytes, by the words that begin its lines.
func (r *reading) meminfo() map[string]int64 {
	m := map[string]int64{}
	r.lines("meminfo", 0, func(f []string) {
		if len(f) > 1 {
			m[f[0]] = integer(f, 1) << 10
		}
	})
	return m
}

func (r *reading) memory() part {
	return part{end: func(float64) {
		m := r.meminfo()
		s := &protocol.MemoryStats{
			Total: m["MemTotal:"], Free: m["MemFree:"], Available: m["MemAvailable:"], Buffers: m["Buffers:"], Cached: m["Cached:"],
			SwapTotal: m["SwapTotal:"], SwapFree: m["SwapFree:"], Dirty: m["Dirty:"], Writeback: m["Writeback:"],
			Anonymous: m["AnonPages:"], Mapped: m["Mapped:"], Shared: m["Shmem:"], Pressure: r.pressure("memory"),
		}
		r.lines("vmstat", 0, func(f []string) {
			if len(f) != 2 {
				return
			}
			switch n := integer(f, 1); f[0] {
			case "pgpgin":
				s.PagedIn = n << 10
			case "pgpgout":
				s.PagedOut = n << 10
			case "pswpin":
				s.SwapIn = n
			case "pswpout":
				s.SwapOut = n
			}
		})
		r.stats.Memory = s
	}}
}

// pressure is nil where the kernel does not tell it, which is its configuration.
func (r *reading) pressure(resource string) *protocol.Pressure {
	if r.file(r.Proc+"/pressure/"+resource) == "" {
		return nil
	}
	p := &protocol.Pressure{}
	r.lines("pressure/"+resource, 0, func(f []string) {
		if len(f) == 0 {
			return
		}
		s := &protocol.Stall{}
		for _, word := range f[1:] {
			key, value, _ := strings.Cut(word, "=")
			switch v := []string{value}; key {
			case "avg10":
				s.Avg10 = float(v, 0)
			case "avg60":
				s.Avg60 = float(v, 0)
			case "avg300":
				s.Avg300 = float(v, 0)
			case "total":
				s.Total = integer(v, 0)
			}
		}
		switch f[0] {
		case "some":
			p.Some = s
		case "full":
			p.Full = s
		}
	})
	return p
}
