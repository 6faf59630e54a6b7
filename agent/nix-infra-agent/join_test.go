package main

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

func TestJoinCommand(t *testing.T) {
	f := testfleet.New(t)
	f.Joins(f.LetIn)
	for name, hand := range map[string]func(text string) (arg string, in io.Reader){
		"a word": func(text string) (string, io.Reader) { return text, nil },
		"a file": func(text string) (string, io.Reader) {
			file := filepath.Join(t.TempDir(), "token")
			if err := os.WriteFile(file, []byte(text+"\n"), 0o600); err != nil {
				t.Fatal(err)
			}
			return file, nil
		},
		"standard input, which does not end": func(text string) (string, io.Reader) {
			r, w := io.Pipe()
			t.Cleanup(func() { w.Close() })
			go io.WriteString(w, text+"\n")
			return "-", r
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			arg, in := hand(f.Token("web-1", time.Now().Add(time.Hour)).String())
			var out strings.Builder
			c := command(in, &out, &out)
			c.SetArgs([]string{"join", arg, "--dir", dir})
			if err := c.ExecuteContext(t.Context()); err != nil || !strings.Contains(out.String(), "is the node web-1") {
				t.Fatal(out.String(), err)
			}
			if m, err := agent.Home(dir).Open(); err != nil || m.Name != "web-1" {
				t.Fatal(m, err)
			}
			if out, err := run(t, nil, "join", f.Token("web-1", time.Now().Add(time.Hour)).String(), "--dir", dir); err != nil || !strings.Contains(out, "already") {
				t.Errorf("again: %s, %v", out, err)
			}
		})
	}
}

func TestJoinCommandRefuses(t *testing.T) {
	f := testfleet.New(t)
	good := f.Token("web-1", time.Now().Add(time.Hour)).String()
	long := filepath.Join(t.TempDir(), "long")
	if err := os.WriteFile(long, make([]byte, protocol.MaxToken+1), 0o600); err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		args   []string
		in     string
		status int
		want   string
	}{
		"no word":          {[]string{}, "", exitRefused, "join --help"},
		"no file":          {[]string{"/no/such/file"}, "", exitRefused, "neither a token nor a file"},
		"nothing on stdin": {[]string{"-"}, "\n", exitRefused, "no token on standard input"},
		"damaged":          {[]string{good[:len(good)-4]}, "", exitRefused, "damaged"},
		"a file that long": {[]string{long}, "", exitRefused, "more than"},
		"ended":            {[]string{f.Token("web-1", time.Now().Add(-time.Hour)).String()}, "", exitRefused, "(expired)"},
	} {
		t.Run(name, func(t *testing.T) {
			out, err := run(t, []byte(c.in), append([]string{"join", "--dir", t.TempDir()}, c.args...)...)
			var e *exitError
			if !errors.As(err, &e) || e.status != c.status || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%v, want %d with %q\n%s", err, c.status, c.want, out)
			}
			if err != nil && strings.Contains(err.Error(), "SU") {
				t.Errorf("the seed is told: %v", err)
			}
		})
	}
}

// An operator who sleeps is waited for as long as was said, and it is said that it is the operator.
func TestJoinCommandUnanswered(t *testing.T) {
	f := testfleet.New(t)
	f.Joins(func(*protocol.EnrolRequest) (protocol.JoinState, error) { return protocol.JoinState{}, nil })
	token := f.Token("web-1", time.Now().Add(time.Hour)).String()
	for timeout := time.Second; ; timeout *= 2 { // which a busy machine may need to ask at all
		out, err := run(t, nil, "join", token, "--dir", t.TempDir(), "--timeout", timeout.String())
		if status(err) != exitUnanswered {
			t.Fatalf("status %d, %v\n%s", status(err), err, out)
		}
		if strings.Contains(err.Error(), "enroll --pending web-1") {
			return
		}
		if timeout > time.Minute {
			t.Fatalf("%v\n%s", err, out)
		}
	}
}
