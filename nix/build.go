package nix

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path"
	"strings"
	"sync"
	"unicode/utf8"
)

const (
	tailLines   = 100      // lines that a BuildError keeps
	maxLine     = 4 << 10  // bytes of a line; the rest of a longer one is dropped
	maxPrinted  = 64 << 10 // bytes that nix may print as its result
	maxOneLiner = 500      // bytes of BuildError's one line
)

// BuildRequest says what to build.
type BuildRequest struct {
	Dir     string            // folder of the flake, absolute
	Attr    string            // flake attribute, such as nixosConfigurations."n1".config.system.build.toplevel
	OutLink string            // symbolic link to leave as a gc root; "": none
	Impure  bool              // let the evaluation read what is outside the flake
	Log     func(line string) // told each line of the log as it comes; may be nil
}

// BuildError is a build that Nix gave up. Tail is the end of its log.
type BuildError struct {
	Tail []string
	Err  error
}

// Error is one line: the last thing that Nix itself called an error.
func (e *BuildError) Error() string {
	if e.DiskFull() {
		return "the build failed: the disk is full; free space in /nix (nix-collect-garbage) and deploy again"
	}
	for i := len(e.Tail) - 1; i >= 0; i-- {
		if reason, ok := strings.CutPrefix(strings.TrimSpace(e.Tail[i]), "error:"); ok && strings.TrimSpace(reason) != "" {
			return "the build failed: " + oneLine(reason)
		}
	}
	for i := len(e.Tail) - 1; i >= 0; i-- {
		if line := strings.TrimSpace(e.Tail[i]); line != "" {
			return fmt.Sprintf("the build failed (%v): %s", e.Err, oneLine(line))
		}
	}
	return fmt.Sprintf("the build failed: %v", e.Err)
}

func (e *BuildError) Unwrap() error { return e.Err }

// DiskFull tells whether the build ended for want of disk space.
func (e *BuildError) DiskFull() bool {
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

// Build builds one output and gives its store path. It ends with ctx; a build that Nix itself gave up
// is a *BuildError.
func Build(ctx context.Context, r BuildRequest) (string, error) {
	if !path.IsAbs(r.Dir) || strings.ContainsAny(r.Dir, "#?%") {
		return "", fmt.Errorf("folder %q can't be named in a flake reference: it has to be absolute, without #, ? and %%", r.Dir)
	}
	args := []string{"--extra-experimental-features", "nix-command flakes",
		"build", "path:" + r.Dir + "#" + r.Attr, "--print-out-paths", "--print-build-logs", "--log-format", "raw"}
	if r.OutLink != "" {
		args = append(args, "--out-link", r.OutLink)
	} else {
		args = append(args, "--no-link")
	}
	if r.Impure {
		args = append(args, "--impure")
	}
	c, err := command(ctx, "nix", args...)
	if err != nil {
		return "", err
	}
	c.Dir = "/"
	out := &bounded{limit: maxPrinted}
	c.Stdout = out
	log := &lines{each: r.Log}
	c.Stderr = log
	err = run(c)
	log.flush()
	if ctx.Err() != nil {
		return "", fmt.Errorf("the build was stopped: %w", context.Cause(ctx))
	}
	var exit *exec.ExitError
	switch {
	case errors.As(err, &exit):
		return "", &BuildError{Tail: log.tail, Err: err}
	case err != nil:
		return "", fmt.Errorf("can't run nix: %w", err)
	}
	return builtPath(string(out.data))
}

// builtPath reads what --print-out-paths printed.
func builtPath(printed string) (string, error) {
	p := strings.TrimSpace(printed)
	if err := CheckStorePath(p); err != nil {
		return "", fmt.Errorf("nix build did not print one store path: %w", err)
	}
	return p, nil
}

// lines cuts a stream into lines, hands them on and keeps the last ones.
type lines struct {
	mu   sync.Mutex
	each func(string)
	part []byte
	tail []string
}

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for rest := p; len(rest) > 0; {
		advance, line, err := bufio.ScanLines(rest, false)
		if err != nil {
			return 0, err
		}
		if advance == 0 {
			l.append(rest)
			break
		}
		l.append(line)
		l.end()
		rest = rest[advance:]
	}
	return len(p), nil
}

func (l *lines) append(p []byte) {
	if room := maxLine - len(l.part); len(p) > room {
		p = p[:room]
	}
	l.part = append(l.part, p...)
}

func (l *lines) end() {
	line := string(l.part)
	if !utf8.ValidString(line) {
		line = strings.ToValidUTF8(line, "\uFFFD")
	}
	l.part = l.part[:0]
	if len(l.tail) == tailLines {
		l.tail = append(l.tail[:0], l.tail[1:]...)
	}
	l.tail = append(l.tail, line)
	if l.each != nil {
		l.each(line)
	}
}

func (l *lines) flush() {
	l.mu.Lock()
	defer l.mu.Unlock()
	if len(l.part) > 0 {
		l.end()
	}
}

// bounded keeps what is written up to a limit and refuses the rest.
type bounded struct {
	limit int
	data  []byte
}

func (b *bounded) Write(p []byte) (int, error) {
	if len(b.data)+len(p) > b.limit {
		return 0, io.ErrShortWrite
	}
	b.data = append(b.data, p...)
	return len(p), nil
}
