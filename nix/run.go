package nix

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
)

// maxOneLiner bounds the one line of a RunError, in bytes.
const maxOneLiner = 500

// RunError is a run of Nix that it gave up, such as a build. Tail is the end of its log.
type RunError struct {
	What string // what failed, such as "the build"
	Tail []string
	Err  error
}

// Error is one line: the last thing that Nix itself called an error.
func (e *RunError) Error() string {
	if e.DiskFull() {
		return e.What + " failed: the disk is full; free space in /nix (nix-collect-garbage) and try again"
	}
	for i := len(e.Tail) - 1; i >= 0; i-- {
		if reason, ok := strings.CutPrefix(strings.TrimSpace(e.Tail[i]), "error:"); ok && strings.TrimSpace(reason) != "" {
			return e.What + " failed: " + oneLine(reason)
		}
	}
	for i := len(e.Tail) - 1; i >= 0; i-- {
		if line := strings.TrimSpace(e.Tail[i]); line != "" {
			return fmt.Sprintf("%s failed (%v): %s", e.What, e.Err, oneLine(line))
		}
	}
	return fmt.Sprintf("%s failed: %v", e.What, e.Err)
}

func (e *RunError) Unwrap() error { return e.Err }

// DiskFull tells whether it ended for want of disk space.
func (e *RunError) DiskFull() bool {
	for _, line := range e.Tail {
		if strings.Contains(line, "No space left on device") || strings.Contains(line, "Disk quota exceeded") {
			return true
		}
	}
	return false
}

func oneLine(s string) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > maxOneLiner {
		s = s[:maxOneLiner]
	}
	return strings.ToValidUTF8(s, "")
}

// job is a run of one of Nix's programs.
type job struct {
	what    string // for errors, such as "the build"
	program string
	args    []string
	log     func(line string) // told each line of the log as it comes; may be nil
	out     io.Writer         // what it prints as its result; nil: that belongs to the log
	files   []*os.File        // for the program to read, as /dev/fd/3 and so on
	env     []string          // beside our own
}

// run ends with ctx, too. What Nix itself gave up is a *RunError.
func (j job) run(ctx context.Context) error {
	c, err := command(ctx, j.program, j.args...)
	if err != nil {
		return err
	}
	c.Dir, c.ExtraFiles, c.Env = "/", j.files, append(c.Env, j.env...)
	log := &lines{each: j.log}
	c.Stdout, c.Stderr = j.out, log
	if j.out == nil {
		c.Stdout = log
	}
	err = Run(c)
	log.flush()
	if ctx.Err() != nil {
		return fmt.Errorf("%s was stopped: %w", j.what, context.Cause(ctx))
	}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return &RunError{What: j.what, Tail: log.tail, Err: err}
	case err != nil:
		return fmt.Errorf("can't run %s: %w", j.program, err)
	}
	return nil
}
