package heartbeat

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// Host reads the facts of the machine that it runs on. What can't be read is left out: a beat says
// what is known, and a broken machine is the one whose beats matter most.
type Host struct {
	Units *Units // nil: failed units are not known
	// Degraded picks from the failed units those that had not failed before the last confirmed manifest; nil: none
	// are known to.
	Degraded func(failed []string) []string
	Proc     string // "": /proc
	Store    string // "": /nix/store

	mu     sync.Mutex
	boot   string // boot id, which does not change while we run
	kernel string
	of     systems // for which the rest was found out
	nixos  string
	system string
	reboot bool
}

type systems struct{ running, booted string }

// Facts implements Source.
func (h *Host) Facts(context.Context) protocol.Beat {
	h.mu.Lock()
	defer h.mu.Unlock()
	var b protocol.Beat
	if h.boot == "" {
		h.boot = firstLine(h.proc("sys/kernel/random/boot_id"))
		h.kernel = firstLine(h.proc("sys/kernel/osrelease"))
	}
	b.BootID, b.Kernel = h.boot, h.kernel
	h.aboutSystem(&b)
	if h.Units != nil {
		failed := h.Units.Failed()
		b.FailedUnits = failed[:min(len(failed), maxUnits)]
		if h.Degraded != nil {
			degraded := h.Degraded(failed)
			b.Degraded = degraded[:min(len(degraded), maxUnits)]
		}
	}
	b.OverlayIP, _ = OverlayIP()
	b.Vitals = h.vitals()
	return b
}

// aboutSystem fills in what follows from the running closure, found out anew only for another one.
func (h *Host) aboutSystem(b *protocol.Beat) {
	running, err := nix.RunningSystem()
	if err != nil {
		return
	}
	booted, err := nix.BootedSystem()
	if err != nil {
		booted = ""
	}
	profile, err := nix.ProfileTarget()
	if err != nil {
		profile = ""
	}
	if now := (systems{running, booted}); now != h.of {
		h.of = now
		h.nixos = nix.NixOSVersion(running)
		h.system = firstLine(filepath.Join(running, "system"))
		h.reboot = booted != "" && nix.RebootNeeded(booted, running)
	}
	b.Closure, b.NixOS, b.System, b.RebootNeeded = running, h.nixos, h.system, h.reboot
	b.Booted, b.Profile = otherThan(running, booted), otherThan(running, profile)
	if generation, err := nix.CurrentGeneration(); err == nil {
		b.Generation = generation
	}
}

// otherThan is how a beat names a system beside the one that runs: where it is that one, or not known, not at all.
func otherThan(running, closure string) string {
	if closure == running {
		return ""
	}
	return closure
}

func (h *Host) vitals() protocol.Vitals {
	var v protocol.Vitals
	if f := strings.Fields(firstLine(h.proc("uptime"))); len(f) > 0 {
		up, _ := strconv.ParseFloat(f[0], 64)
		v.Uptime = int64(up)
	}
	if f := strings.Fields(firstLine(h.proc("loadavg"))); len(f) >= 3 {
		for i := range v.Load {
			v.Load[i], _ = strconv.ParseFloat(f[i], 64)
		}
	}
	v.MemTotal, v.MemAvailable = memory(h.proc("meminfo"))
	store := h.Store
	if store == "" {
		store = "/nix/store"
	}
	var fs unix.Statfs_t
	if unix.Statfs(store, &fs) == nil {
		v.DiskTotal, v.DiskFree = int64(fs.Blocks)*int64(fs.Bsize), int64(fs.Bavail)*int64(fs.Bsize)
	}
	return v
}

// memory reads two lines of meminfo, in bytes.
func memory(path string) (total, available int64) {
	data, err := os.ReadFile(path)
	if err != nil {
		return 0, 0
	}
	for line := range bytes.Lines(data) {
		f := strings.Fields(string(line))
		if len(f) < 2 {
			continue
		}
		kib, _ := strconv.ParseInt(f[1], 10, 64)
		switch f[0] {
		case "MemTotal:":
			total = kib << 10
		case "MemAvailable:":
			return total, kib << 10
		}
	}
	return total, 0
}

func (h *Host) proc(file string) string {
	if h.Proc == "" {
		return "/proc/" + file
	}
	return filepath.Join(h.Proc, file)
}

func firstLine(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	line, _, _ := strings.Cut(string(data), "\n")
	return strings.TrimSpace(line)
}
