package provision

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
)

// Run runs a command as root and gives its output. An error carries the end of what it said. Where ctx ends before the command,
// so does the connection: to end only the session, the other end would have to answer, and it may be gone.
func (m *Machine) Run(ctx context.Context, stdin io.Reader, argv ...string) ([]byte, error) {
	stop := context.AfterFunc(ctx, func() { m.Close() })
	defer stop()
	session, err := m.client.NewSession()
	if ctx.Err() != nil {
		return nil, context.Cause(ctx)
	} else if err != nil {
		return nil, err
	}
	defer session.Close()
	out, said := &bounded{limit: 4 << 20}, &bounded{limit: 64 << 10}
	session.Stdin, session.Stdout, session.Stderr = stdin, out, said
	if m.user != "root" {
		argv = slices.Concat([]string{"sudo", "-n", "--"}, argv)
	}
	if err := session.Run(quote(argv)); err != nil {
		if ctx.Err() != nil {
			return nil, context.Cause(ctx)
		}
		if err := m.explainSudo(said.String()); err != nil {
			return nil, err
		}
		if text := lastLines(said.String(), 3); text != "" {
			return nil, fmt.Errorf("%w: %s", err, text)
		}
		return nil, err
	}
	if out.full {
		return nil, fmt.Errorf("%s said more than %d bytes", argv[0], out.limit)
	}
	return out.Bytes(), nil
}

// explainSudo is what keeps a user who is not root from becoming root, nil where it is nothing.
func (m *Machine) explainSudo(said string) error {
	what := ""
	switch {
	case m.user == "root":
		return nil
	case strings.Contains(said, "sudo: a password is required"), strings.Contains(said, "sudo: a terminal is required"), strings.Contains(said, "sudo: no tty present"):
		what = "sudo asks %s for a password; let them do without (in /etc/sudoers.d: %s ALL=(ALL) NOPASSWD: ALL), or log in as root"
	case strings.Contains(said, "is not in the sudoers file"), strings.Contains(said, "is not allowed to execute"):
		what = "sudo does not let %s become root; allow it (in /etc/sudoers.d: %s ALL=(ALL) NOPASSWD: ALL), or log in as root"
	case strings.Contains(said, "sudo: not found"), strings.Contains(said, "sudo: command not found"):
		return fmt.Errorf("%s is not root, and there is no sudo on the machine; log in as root", m.user)
	default:
		return nil
	}
	return fmt.Errorf(what, m.user, m.user)
}

// quote makes one command line of argv for the remote shell, which SSH can't do without.
func quote(argv []string) string {
	words := make([]string, len(argv))
	for i, a := range argv {
		words[i] = "'" + strings.ReplaceAll(a, "'", `'\''`) + "'"
	}
	return strings.Join(words, " ")
}

func lastLines(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}

// bounded keeps the first bytes of an output.
type bounded struct {
	bytes.Buffer
	limit int
	full  bool
}

func (b *bounded) Write(p []byte) (int, error) {
	room := b.limit - b.Len()
	if len(p) > room {
		b.full = true
		b.Buffer.Write(p[:max(0, room)])
		return len(p), nil
	}
	return b.Buffer.Write(p)
}
