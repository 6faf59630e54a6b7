// Package journal reads the machine's journal, by journalctl: Read what is in it, Follow what comes.
//
// args.go makes the options out of typed fields, each in the form --option=value, so that no text of a request can
// become an option; entry.go reads what journalctl prints. All that is kept in memory is bounded: a line of its
// output, an answer, and what waits to be sent.
package journal

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// Reader reads a journal. The zero value reads that of this machine.
type Reader struct {
	Program string // "": the machine's journalctl
}

// Read gives the newest entries that the query is true of, as many as it wants and an answer carries.
func (r Reader) Read(ctx context.Context, q protocol.JournalQuery) (protocol.JournalPart, error) {
	part := protocol.JournalPart{Entries: []protocol.JournalEntry{}}
	if q.Lines == 0 {
		return part, nil
	}
	var more []string
	since := q.Since
	if q.Before != "" {
		// It is a place in the order in which they are shown. Journalctl takes no beginning beside it.
		more = append(more, "--after-cursor="+q.Before)
		q.Since, q.Until = 0, 0
	}
	size := 0
	err := r.run(ctx, append(options(q), append(more, "--reverse")...), func(e protocol.JournalEntry) bool {
		if since > 0 && e.Time.UnixMicro() < since {
			return false
		}
		if size += sizeOf(e); len(part.Entries) == q.Lines || len(part.Entries) > 0 && size > protocol.MaxAnswer {
			part.Next = part.Entries[len(part.Entries)-1].Cursor
			return false
		}
		part.Entries = append(part.Entries, e)
		return true
	})
	slices.Reverse(part.Entries)
	return part, err
}

// sizeOf is about what an entry takes in an answer, in bytes.
func sizeOf(e protocol.JournalEntry) int {
	return len(e.Message)*5/4 + len(e.Unit) + len(e.Identifier) + len(e.Cursor) + 250
}

// waitDelay is how long journalctl, once it was killed, may keep its output open.
const waitDelay = 2 * time.Second

// run starts journalctl and hands on its entries until take says no, ctx ends or there are no more.
func (r Reader) run(ctx context.Context, options []string, take func(protocol.JournalEntry) bool) error {
	program := r.Program
	if program == "" {
		var err error
		if program, err = nix.LookPath("journalctl"); err != nil {
			return err
		}
	}
	running, cancel := context.WithCancel(ctx)
	defer cancel()
	c := exec.CommandContext(running, program, options...)
	c.WaitDelay = waitDelay
	c.Env = []string{"LC_ALL=C.UTF-8", "SYSTEMD_COLORS=0", "TZ=UTC"}
	complaint := &head{}
	out, in := io.Pipe()
	c.Stdout, c.Stderr = in, complaint
	ended := make(chan error, 1)
	go func() {
		err := nix.Run(c)
		in.Close()
		ended <- err
	}()
	enough, err := entries(out, take)
	cancel() // there may be gigabytes to go
	out.Close()
	failed := <-ended
	switch {
	case enough:
		return nil
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case err != nil:
		return fmt.Errorf("the output of journalctl: %w", err)
	case failed != nil && complaint.line() == "" && exitCode(failed) == 1:
		return nil // with --grep, nothing matched
	case failed != nil:
		return fmt.Errorf("journalctl: %s", first(complaint.line(), failed.Error()))
	}
	return nil
}

func exitCode(err error) int {
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exit.ExitCode()
	}
	return -1
}

func first(s, otherwise string) string {
	if s != "" {
		return s
	}
	return otherwise
}

// head keeps the beginning of what is written to it.
type head struct{ data []byte }

func (h *head) Write(p []byte) (int, error) {
	h.data = append(h.data, p[:min(len(p), 500-len(h.data))]...)
	return len(p), nil
}

func (h *head) line() string {
	line, _, _ := bytes.Cut(bytes.TrimSpace(h.data), []byte("\n"))
	return strings.ToValidUTF8(string(line), "?")
}
