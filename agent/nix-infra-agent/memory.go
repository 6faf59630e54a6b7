package main

import (
	"bufio"
	"os"
	"runtime/debug"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// giveBack gives the memory that work has filled back to the kernel: the heap's, and the pages of the
// program itself, all 8 MiB of which starting and a deploy bring in. Those stay in the page cache; the few
// that an idle agent runs through come back by themselves.
func giveBack() {
	debug.FreeOSMemory()
	for _, m := range programMappings() {
		// It only says that nothing is needed now. Where it can't be said, nothing is lost.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, m.start, m.end-m.start, unix.MADV_DONTNEED)
	}
}

type mapping struct{ start, end uintptr }

// programMappings are the parts of this process's own file that are mapped and that it can't write to.
func programMappings() (all []mapping) {
	self, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return nil
	}
	maps, err := os.Open("/proc/self/maps")
	if err != nil {
		return nil
	}
	defer maps.Close()
	for lines := bufio.NewScanner(maps); lines.Scan(); {
		// START-END PERMISSIONS OFFSET DEVICE INODE, and then the file, whose name may have spaces.
		fields := strings.Fields(lines.Text())
		if len(fields) < 6 || !strings.HasSuffix(lines.Text(), " "+self) || !strings.HasPrefix(fields[1], "r-") {
			continue
		}
		from, to, _ := strings.Cut(fields[0], "-")
		start, err1 := strconv.ParseUint(from, 16, 64)
		end, err2 := strconv.ParseUint(to, 16, 64)
		if err1 == nil && err2 == nil && start < end {
			all = append(all, mapping{uintptr(start), uintptr(end)})
		}
	}
	return all
}
