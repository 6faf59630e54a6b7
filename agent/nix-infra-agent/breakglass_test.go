package main

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/local"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

// engine is one whose deployments all go the same way.
type engine struct {
	events   []protocol.Event
	refuse   error
	bundle   []byte
	rollback protocol.Rollback
	detached chan struct{} // closed when the follower left
}

func (e *engine) Apply(r io.Reader) (deployment string, err error) {
	e.bundle, err = io.ReadAll(r)
	return "d-1", errors.Join(err, e.refuse)
}

func (e *engine) RollBack(_ context.Context, r protocol.Rollback) (string, error) {
	e.rollback = r
	return "local-1", e.refuse
}

func (e *engine) Follow(ctx context.Context, _ string, tell func(protocol.Event) error) error {
	for _, ev := range e.events {
		if err := tell(ev); err != nil || ev.Phase.Ended() {
			return err
		}
	}
	<-ctx.Done()
	close(e.detached)
	return nil
}

// agentDir is the folder of an agent that runs, as far as its socket goes.
func agentDir(t *testing.T, e *engine) string {
	t.Helper()
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		_ = (&local.Server{Path: agent.Socket(dir), Engine: e, Log: slog.New(slog.DiscardHandler)}).Run(ctx)
	}()
	t.Cleanup(func() { cancel(); <-done })
	testfleet.Eventually(t, "the socket", func() bool {
		c, err := net.Dial("unix", agent.Socket(dir))
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	return dir
}

// status is the exit status that main makes of an error.
func status(err error) int {
	var e *exitError
	switch {
	case err == nil:
		return 0
	case errors.As(err, &e):
		return e.status
	}
	return 1
}

func events(phases ...protocol.Phase) (all []protocol.Event) {
	for _, p := range phases {
		ev := protocol.Event{Version: protocol.Version, Time: time.Now().UTC(), Phase: p}
		if p.Ended() {
			ev.Reason = "because"
		}
		all = append(all, ev)
	}
	return all
}

func TestBreakGlass(t *testing.T) {
	file := filepath.Join(t.TempDir(), "bundle")
	if err := os.WriteFile(file, []byte("a bundle"), 0o600); err != nil {
		t.Fatal(err)
	}
	const path = "/nix/store/00000000000000000000000000000000-sys"
	for name, c := range map[string]struct {
		args   []string
		end    protocol.Phase
		refuse error
		status int
		want   string
	}{
		"confirmed":      {[]string{"apply", file}, protocol.Confirmed, nil, 0, "confirmed: because"},
		"rolled back":    {[]string{"apply", file}, protocol.RolledBack, nil, exitFailed, "rolled-back: because"},
		"failed":         {[]string{"rollback"}, protocol.FailedPhase, nil, exitFailed, "failed: because"},
		"generation":     {[]string{"rollback", "--to", "7"}, protocol.Confirmed, nil, 0, "confirmed"},
		"path":           {[]string{"rollback", "--to", path}, protocol.Confirmed, nil, 0, "confirmed"},
		"refused":        {[]string{"apply", file}, "", protocol.Refuse(protocol.Outdated, "too old"), exitRefused, "too old"},
		"no such file":   {[]string{"apply", "/no/such/file"}, "", nil, exitRefused, "no such file"},
		"a folder":       {[]string{"apply", "/"}, "", nil, exitRefused, "no file"},
		"no file":        {[]string{"apply"}, "", nil, exitRefused, "--help"},
		"not a target":   {[]string{"rollback", "--to", "yesterday"}, "", nil, exitRefused, "neither"},
		"too much":       {[]string{"rollback", "7"}, "", nil, exitRefused, "--help"},
		"no such option": {[]string{"rollback", "--generation", "7"}, "", nil, exitRefused, "unknown flag"},
	} {
		t.Run(name, func(t *testing.T) {
			e := &engine{events: events(protocol.Accepted, protocol.Activating, c.end), refuse: c.refuse}
			dir := agentDir(t, e)
			out, err := run(t, nil, append(c.args, "--dir", dir)...)
			if err != nil {
				out += err.Error()
			}
			if status(err) != c.status || !strings.Contains(out, c.want) {
				t.Errorf("status %d, %q", status(err), out)
			}
			if c.end == "" {
				return
			}
			if !strings.Contains(out, "activating\n") {
				t.Errorf("no progress: %q", out)
			}
			switch {
			case c.args[0] == "apply":
				if string(e.bundle) != "a bundle" {
					t.Errorf("%q arrived", e.bundle)
				}
			case name == "generation" && e.rollback != (protocol.Rollback{Generation: 7}), name == "path" && e.rollback != (protocol.Rollback{Path: path}):
				t.Errorf("rollback to %+v", e.rollback)
			}
		})
	}
}

func TestBreakGlassJSON(t *testing.T) {
	lines := protocol.Event{Phase: protocol.Building, Lines: []string{"one", "two"}}
	dir := agentDir(t, &engine{events: append([]protocol.Event{lines}, events(protocol.Activating, protocol.Confirmed)...)})
	out, err := run(t, nil, "rollback", "--json", "--dir", dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []progressDocument
	for s := bufio.NewScanner(strings.NewReader(out)); s.Scan(); {
		var d progressDocument
		if err := json.Unmarshal(s.Bytes(), &d); err != nil || d.Deployment != "local-1" {
			t.Fatalf("%s: %v", s.Text(), err)
		}
		got = append(got, d)
	}
	if len(got) != 4 || got[0].Event != "log" || len(got[0].Lines) != 2 || got[1].Phase != protocol.Activating || got[2].Event != "progress" ||
		got[3].Event != "result" || got[3].Phase != protocol.Confirmed || got[3].Reason != "because" {
		t.Errorf("%+v", got)
	}
}

// Ctrl-C leaves the agent to its work, and says so.
func TestBreakGlassDetaches(t *testing.T) {
	e := &engine{events: events(protocol.Accepted, protocol.Activating), detached: make(chan struct{})}
	dir := agentDir(t, e)
	ctx, cancel := context.WithCancel(t.Context())
	out := &until{text: "activating\n", then: cancel}
	c := command(nil, out, out)
	c.SetArgs([]string{"rollback", "--dir", dir})
	err := c.ExecuteContext(ctx)
	if status(err) != exitInterrupted || !strings.Contains(err.Error(), "goes on with deployment local-1") || !strings.Contains(err.Error(), "nix-infra-agent status") {
		t.Errorf("status %d, %v", status(err), err)
	}
	<-e.detached
}

// until does something once a text was written.
type until struct {
	bytes.Buffer
	text string
	then func()
}

func (u *until) Write(p []byte) (int, error) {
	n, err := u.Buffer.Write(p)
	if strings.Contains(u.String(), u.text) {
		u.then()
	}
	return n, err
}

// Without an agent nothing is done, and it is said what to look at.
func TestBreakGlassWithoutAgent(t *testing.T) {
	if _, err := run(t, nil, "rollback", "--dir", t.TempDir()); status(err) != exitRefused || !strings.Contains(err.Error(), "systemctl status nix-infra-agent") {
		t.Error(err)
	}
}

// A build can't paint on the terminal of who watches it.
func TestPrintable(t *testing.T) {
	var out bytes.Buffer
	p := &progress{out: &out}
	p.tell("d-1", protocol.Event{Phase: protocol.Building, Lines: []string{"a\x1b[2Jb\tc é \u009b"}})
	if out.String() != "  | a?[2Jb\tc é ?\n" {
		t.Errorf("%q", out.String())
	}
}

func TestHelpHasExamples(t *testing.T) {
	for _, name := range []string{"apply", "rollback", "status"} {
		out, err := run(t, nil, name, "--help")
		if err != nil || !strings.Contains(out, "nix-infra-agent "+name) || !strings.Contains(out, "Examples:") || !strings.Contains(out, "--json") {
			t.Errorf("%s: %v\n%s", name, err, out)
		}
	}
}
