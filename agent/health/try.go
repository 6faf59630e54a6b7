package health

import (
	"bufio"
	"bytes"
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/nix-infra/nix-infra/nix"
)

const (
	maxBody     = 1 << 20   // bytes of an answer, or of a file, that are looked at
	maxHeader   = 256 << 10 // bytes of an answer before its body
	maxLastLine = 4 << 10   // bytes of a command's output that are kept, from its end
	shown       = 60        // bytes of a body that did not match
	leftBehind  = time.Second
)

func tryUnit(ctx context.Context, unit string, state UnitState) error {
	switch now, err := state(ctx, unit); {
	case err != nil:
		return err
	case now == "not-found":
		return fmt.Errorf("there is no unit %s", unit)
	case now != "active":
		return fmt.Errorf("%s is %s", unit, now)
	}
	return nil
}

func tryTCP(ctx context.Context, address string) error {
	var d net.Dialer
	conn, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return err
	}
	return conn.Close()
}

// wanted is what an answer has to be.
type wanted struct {
	status int            // 0: any from 200 to 299
	body   string         // a part of the body; "": any
	regex  *regexp.Regexp // matches in the body; nil: any
}

// tryHTTP asks once, on a connection of its own, with HTTP/1.1, and follows nothing. It is done by hand because the
// agent has all of that already for its websocket, and http.Client would bring HTTP/2, proxies and cookies.
func tryHTTP(ctx context.Context, u *url.URL, w wanted) error {
	conn, err := dialHTTP(ctx, u)
	if err != nil {
		return err
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, u.String(), nil)
	if err != nil {
		return err
	}
	req.Close = true
	req.Header.Set("User-Agent", "nix-infra-agent")
	if err := req.Write(conn); err != nil {
		return err
	}
	in := bufio.NewReader(io.LimitReader(conn, maxHeader+maxBody))
	resp, err := http.ReadResponse(in, req)
	for err == nil && resp.StatusCode < 200 && resp.StatusCode != http.StatusSwitchingProtocols {
		resp, err = http.ReadResponse(in, req) // that was only news
	}
	if err != nil {
		return fmt.Errorf("%s: %w", u, err)
	}
	defer resp.Body.Close()
	if w.status == 0 && (resp.StatusCode < 200 || resp.StatusCode > 299) || w.status != 0 && resp.StatusCode != w.status {
		to := ""
		if l := resp.Header.Get("Location"); l != "" {
			to = fmt.Sprintf(", to %.200q", l)
		}
		return fmt.Errorf("%s answered %s%s", u, resp.Status, to)
	}
	return w.matchBody(u, resp.Body)
}

func (w wanted) matchBody(u *url.URL, from io.Reader) error {
	if w.body == "" && w.regex == nil {
		return nil
	}
	body, err := io.ReadAll(io.LimitReader(from, maxBody))
	var missing string
	switch {
	case w.body != "" && !bytes.Contains(body, []byte(w.body)):
		missing = fmt.Sprintf("%.200q", w.body)
	case w.regex != nil && !w.regex.Match(body):
		missing = fmt.Sprintf("what matches %.200q", w.regex)
	default:
		return nil
	}
	if err != nil { // the answer broke off before it came that far
		return fmt.Errorf("%s: %w", u, err)
	}
	return fmt.Errorf("%s answered without %s: %q", u, missing, body[:min(len(body), shown)])
}

func dialHTTP(ctx context.Context, u *url.URL) (net.Conn, error) {
	port := u.Port()
	if u.Scheme == "https" {
		if port == "" {
			port = "443"
		}
		return (&tls.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	}
	if port == "" {
		port = "80"
	}
	return (&net.Dialer{}).DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
}

// tryCommand runs a program as root, in a process group of its own, which ends with ctx.
func tryCommand(ctx context.Context, argv []string) error {
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Dir = "/"
	c.Env = []string{"PATH=" + nix.SearchPath(), "HOME=/root"}
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	c.WaitDelay = leftBehind
	out := &lastLine{}
	c.Stdout, c.Stderr = out, out
	err := nix.Run(c)
	if errors.Is(err, exec.ErrWaitDelay) && ctx.Err() == nil {
		_ = syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
		return fmt.Errorf("%s left a process behind", argv[0])
	}
	said := out.String()
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil && said == "":
		return ctx.Err()
	case ctx.Err() != nil:
		return errors.New(said)
	case said != "":
		return fmt.Errorf("%w: %s", err, said)
	}
	return err
}

// lastLine keeps the end of what is written to it.
type lastLine struct{ data []byte }

func (l *lastLine) Write(p []byte) (int, error) {
	l.data = append(l.data, p...)
	if n := len(l.data) - maxLastLine; n > 0 {
		l.data = append(l.data[:0], l.data[n:]...)
	}
	return len(p), nil
}

func (l *lastLine) String() string {
	s := strings.TrimSpace(string(l.data))
	return strings.TrimSpace(s[strings.LastIndexByte(s, '\n')+1:])
}

// tryFile looks at a file. Where its file system hangs, the look is left behind, and the try ends with ctx.
func tryFile(ctx context.Context, path, contains string) error {
	done := make(chan error, 1)
	go func() { done <- lookAt(path, contains) }()
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

func lookAt(path, contains string) error {
	info, err := os.Stat(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return fmt.Errorf("%s is not there", path)
	case err != nil || contains == "":
		return err
	case !info.Mode().IsRegular():
		return fmt.Errorf("%s is no regular file that could be read", path)
	}
	f, err := os.OpenFile(path, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, maxBody))
	if err != nil {
		return err
	}
	if !bytes.Contains(data, []byte(contains)) {
		return fmt.Errorf("%s does not contain %.200q", path, contains)
	}
	return nil
}
