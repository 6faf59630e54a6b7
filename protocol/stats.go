package protocol

import "time"

// Stats answers ReadStats: the numbers of the kernel, in base units. A part that was not asked for is nil.
type Stats struct {
	Time     time.Time `json:"time"`
	Interval float64   `json:"interval"` // seconds between the two readings that rates and shares are taken from; 0: one reading

	Health    *HealthStats  `json:"health,omitempty"`
	Memory    *MemoryStats  `json:"memory,omitempty"`
	Disks     []DiskStats   `json:"disks,omitempty"`
	FileSys   []FileSystem  `json:"file_systems,omitempty"`
	Network   *NetworkStats `json:"network,omitempty"`
	Processes *ProcessStats `json:"processes,omitempty"`
	Sockets   []Listener    `json:"sockets,omitempty"`

	Notes []string `json:"notes,omitempty"` // what was left out and why, a line each
}

// HealthStats are how a machine is, in short.
type HealthStats struct {
	Uptime       int64               `json:"uptime"` // seconds
	Load         [3]float64          `json:"load"`   // 1, 5 and 15 minutes
	CPUs         int                 `json:"cpus"`
	CPU          CPUShare            `json:"cpu"`
	MemTotal     int64               `json:"mem_total"` // bytes, as are the next three
	MemAvailable int64               `json:"mem_available"`
	SwapTotal    int64               `json:"swap_total"`
	SwapFree     int64               `json:"swap_free"`
	Pressure     map[string]Pressure `json:"pressure,omitempty"` // by cpu, memory and io, where the kernel knows
}

// CPUShare is what the processors did, in percent of all of their time.
type CPUShare struct {
	User   float64 `json:"user"` // with nice
	System float64 `json:"system"`
	IOWait float64 `json:"iowait"`
	Steal  float64 `json:"steal"`
	Idle   float64 `json:"idle"`
}

// Pressure is how much of the time was lost for want of a resource: by some of the tasks, and by all of them.
type Pressure struct {
	Some *Stall `json:"some,omitempty"`
	Full *Stall `json:"full,omitempty"`
}

// Stall is a line of the kernel's pressure stall information.
type Stall struct {
	Avg10  float64 `json:"avg10"` // percent, of the last 10, 60 and 300 s
	Avg60  float64 `json:"avg60"`
	Avg300 float64 `json:"avg300"`
	Total  int64   `json:"total"` // microseconds since boot
}

// MemoryStats are what memory is used for, in bytes, and its traffic since boot.
type MemoryStats struct {
	Total     int64     `json:"total"`
	Free      int64     `json:"free"`
	Available int64     `json:"available"`
	Buffers   int64     `json:"buffers"`
	Cached    int64     `json:"cached"`
	SwapTotal int64     `json:"swap_total"`
	SwapFree  int64     `json:"swap_free"`
	Dirty     int64     `json:"dirty"`
	Writeback int64     `json:"writeback"`
	Anonymous int64     `json:"anonymous"`
	Mapped    int64     `json:"mapped"`
	Shared    int64     `json:"shared"`
	PagedIn   int64     `json:"paged_in"` // bytes from disks, and to them
	PagedOut  int64     `json:"paged_out"`
	SwapIn    int64     `json:"swap_in"` // pages from swap, and to it
	SwapOut   int64     `json:"swap_out"`
	Pressure  *Pressure `json:"pressure,omitempty"`
}

// DiskStats are a disk's traffic. Loop devices, RAM disks and partitions are left out.
type DiskStats struct {
	Name        string  `json:"name"`
	Read        int64   `json:"read"` // bytes since boot
	Written     int64   `json:"written"`
	ReadRate    float64 `json:"read_rate"` // bytes a second
	WriteRate   float64 `json:"write_rate"`
	Reads       float64 `json:"reads"` // requests a second
	Writes      float64 `json:"writes"`
	Await       float64 `json:"await"`       // milliseconds that a request took
	Utilization float64 `json:"utilization"` // percent of the time in which it had something to do
	Queue       float64 `json:"queue"`       // requests under way, on average
}

// FileSystem is how full a file system on a disk is. Each is listed once, however often it is mounted.
type FileSystem struct {
	Mount      string  `json:"mount"`
	Device     string  `json:"device"`
	Type       string  `json:"type"`
	Total      int64   `json:"total"` // bytes, as are the next two
	Free       int64   `json:"free"`
	Available  int64   `json:"available"` // to others than root
	Used       float64 `json:"used"`      // percent of what is used and available together, as df has it
	Inodes     int64   `json:"inodes"`    // 0: it has no fixed number
	InodesFree int64   `json:"inodes_free"`
	InodesUsed float64 `json:"inodes_used"`    // percent
	Mark       string  `json:"mark,omitempty"` // attention from 70 % of Used, warning from 80 % of either, critical from 90 % of Used
}

// NetworkStats are the traffic of the machine.
type NetworkStats struct {
	Interfaces  []Interface    `json:"interfaces"`         // without lo
	Connections map[string]int `json:"connections"`        // of TCP, by state: established, time-wait, …
	UDP         int            `json:"udp"`                // sockets
	Pressure    *Pressure      `json:"pressure,omitempty"` // of I/O
}

// Interface is an interface's traffic.
type Interface struct {
	Name    string  `json:"name"`
	Receive Traffic `json:"receive"`
	Send    Traffic `json:"send"`
}

// Traffic is one direction's, since boot.
type Traffic struct {
	Bytes   int64   `json:"bytes"`
	Packets int64   `json:"packets"`
	Errors  int64   `json:"errors"`
	Dropped int64   `json:"dropped"`
	Rate    float64 `json:"rate"` // bytes a second
}

// ProcessStats are how many processes there are, and the ones that take the most.
type ProcessStats struct {
	Total    int       `json:"total"`
	Running  int       `json:"running"`
	Zombies  int       `json:"zombies"`
	ByCPU    []Process `json:"by_cpu"`    // above 0.1 %
	ByMemory []Process `json:"by_memory"` // above 0.1 %
	ByIO     []Process `json:"by_io"`     // above 100 kB/s
}

// Process is a process. Its command line is left out: it may have a secret in it.
type Process struct {
	PID    int     `json:"pid"`
	Name   string  `json:"name"`
	UID    int     `json:"uid"`
	CPU    float64 `json:"cpu"`    // percent of one processor
	Memory int64   `json:"memory"` // bytes that are resident
	Share  float64 `json:"share"`  // percent of the machine's memory
	Read   float64 `json:"read"`   // bytes a second from disks, and to them
	Write  float64 `json:"write"`
}

// Listener is a socket that waits for others: a TCP one that listens, or an UDP one without a peer.
type Listener struct {
	Protocol string `json:"protocol"` // tcp or udp
	Address  string `json:"address"`
	Port     int    `json:"port"`
	UID      int    `json:"uid"`           // whose it is
	PID      int    `json:"pid,omitempty"` // one that has it; 0: not known
	Process  string `json:"process,omitempty"`
}
