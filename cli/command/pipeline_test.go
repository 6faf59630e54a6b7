package command

import (
	"bytes"
	"context"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// A program that takes nothing holds nobody up, and gets no more than can wait.
func TestPipelineThatTakesNothing(t *testing.T) {
	var queued atomic.Int64
	full := make(chan bool, 2)
	lasts := filepath.Join(t.TempDir(), "lasts") // it ends when somebody has written into it
	if err := syscall.Mkfifo(lasts, 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := startPipeline(t.Context(), [][]string{{"cat", lasts}}, &syncBuffer{}, &syncBuffer{}, &queued, func() { full <- true })
	if err != nil {
		t.Fatal(err)
	}
	chunk := make([]byte, 1<<20)
	for range 2 * maxQueued / len(chunk) {
		if _, err := p.Write(chunk); err != nil {
			t.Fatal(err)
		}
	}
	<-full
	if n := queued.Load(); n > maxQueued {
		t.Errorf("%d bytes wait", n)
	}
	p.close()
	if err := os.WriteFile(lasts, nil, 0); err != nil {
		t.Fatal(err)
	}
	if _, err := p.wait(t.Context()); err == nil || !strings.Contains(err.Error(), "cat on this machine takes the output more slowly than it comes") {
		t.Errorf("%v", err)
	}
	for deadline := time.Now().Add(time.Minute); queued.Load() != 0; time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d bytes wait for a program that has ended", queued.Load())
		}
	}
	if len(full) > 0 {
		t.Error("it was told twice")
	}
}

// What a chain of programs makes of a lot of output is complete, and each of them is ended where ctx ends.
func TestPipelineChain(t *testing.T) {
	var queued atomic.Int64
	var out, errs syncBuffer
	p, err := startPipeline(t.Context(), [][]string{{"cat"}, {"tr", "a", "b"}, {"wc", "-c"}}, &out, &errs, &queued, func() {})
	if err != nil {
		t.Fatal(err)
	}
	for range 300 {
		p.Write(bytes.Repeat([]byte("a\n"), 5000))
	}
	p.close()
	if status, err := p.wait(t.Context()); status != 0 || err != nil || strings.TrimSpace(out.String()) != "3000000" || errs.String() != "" {
		t.Errorf("status %d, %v: %q %q", status, err, out.String(), errs.String())
	}
	ctx, end := context.WithCancel(t.Context())
	p, err = startPipeline(ctx, [][]string{{"sleep", "1000"}, {"cat"}}, &out, &errs, &queued, func() {})
	if err != nil {
		t.Fatal(err)
	}
	end()
	if _, err := p.wait(ctx); err != nil {
		t.Errorf("they were not ended in time: %v", err)
	}
	if _, err := startPipeline(t.Context(), [][]string{{"cat"}, {"/nonexistent/program"}}, &out, &errs, &queued, func() {}); err == nil {
		t.Error("a program that is not there was started")
	}
}
