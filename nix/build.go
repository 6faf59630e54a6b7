package nix

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"path"
	"strings"
	"sync"
	"unicode/utf8"
)

const (
	tailLines  = 100      // lines that a RunError keeps
	maxLine    = 4 << 10  // bytes of a line; the rest of a longer one is dropped
	maxPrinted = 64 << 10 // bytes that nix may print as its result
)

// BuildRequest says what to build.
type BuildRequest struct {
	Dir     string            // folder of the flake, absolute
	Attr    string            // flake attribute, such as nixosConfigurations."n1".config.system.build.toplevel
	OutLink string            // symbolic link to leave as a gc root; "": none
	Impure  bool              // let the evaluation read what is outside the flake
	Netrc   string            // file by which Nix logs in to caches and sources; "": as it is configured
	Log     func(line string) // told each line of the log as it comes; may be nil
}

// Build builds one output and gives its store path. It ends with ctx; a build that Nix itself gave up
// is a *RunError.
func Build(ctx context.Context, r BuildRequest) (string, error) {
	if !path.IsAbs(r.Dir) || strings.ContainsAny(r.Dir, "#?%") {
		return "", fmt.Errorf("folder %q can't be named in a flake reference: it has to be absolute, without #, ? and %%", r.Dir)
	}
	args := []string{"--extra-experimental-features", features,
		"build", "path:" + r.Dir + "#" + r.Attr, "--print-out-paths", "--print-build-logs", "--log-format", "raw"}
	if r.OutLink != "" {
		args = append(args, "--out-link", r.OutLink)
	} else {
		args = append(args, "--no-link")
	}
	if r.Impure {
		args = append(args, "--impure")
	}
	args = append(args, netrcArgs(r.Netrc)...)
	out := &bounded{limit: maxPrinted}
	if err := (job{what: "the build", program: "nix", args: args, log: r.Log, out: out}).run(ctx); err != nil {
		return "", err
	}
	return builtPath(string(out.data))
}

// netrcArgs name the file to log in by. Nix hands it on to its daemon, which takes it from users that it trusts, as root is.
func netrcArgs(file string) []string {
	if file == "" {
		return nil
	}
	return []string{"--option", "netrc-file", file}
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
