package main

import (
	"os"
	"strconv"
	"strings"
	"testing"
)

// resident are the kilobytes of files that are mapped into this process and in memory.
func resident(t *testing.T) int {
	t.Helper()
	data, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, "RssFile:"); ok {
			n, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return n
		}
	}
	t.Skip("the kernel does not tell")
	return 0
}

func TestGiveBack(t *testing.T) {
	mapped := programMappings()
	if len(mapped) < 2 {
		t.Fatalf("code and constants are mapped at %v", mapped)
	}
	before := resident(t)
	giveBack()
	if after := resident(t); after >= before {
		t.Errorf("%d kB of files before, %d kB after", before, after)
	}
}
