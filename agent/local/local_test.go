package local

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// engine remembers what it was asked for. Followers are told what comes through events, until it is closed:
// then the agent dies.
type engine struct {
	mu       sync.Mutex
	applied  string
	rollback protocol.Rollback
	refuse   error
	events   chan protocol.Event
	followed chan string // each deployment that was asked about; of a real size, so that nobody waits
	left     chan error  // why following ended
}

func newEngine() *engine {
	return &engine{events: make(chan protocol.Event, 100), followed: make(chan string, 100), left: make(chan error, 100)}
}

func (e *engine) Apply(bundle io.Reader) (string, error) {
	data, err := io.ReadAll(bundle)
	e.mu.Lock()
	defer e.mu.Unlock()
	e.applied = string(data)
	return "d-1", errors.Join(err, e.refuse)
}

func (e *engine) RollBack(_ context.Context, r protocol.Rollback) (string, error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.rollback = r
	return "local-1", e.refuse
}

func (e *engine) Follow(ctx context.Context, deployment string, tell func(protocol.Event) error) (err error) {
	defer func() { e.left <- err }()
	e.followed <- deployment
	if deployment == "d-0" {
		return protocol.Refuse(protocol.Unknown, "no deployment d-0")
	}
	for {
		select {
		case <-ctx.Done():
			return ctx.Err()
		case ev := <-e.events:
			if err := tell(ev); err != nil || ev.Phase.Ended() {
				return err
			}
		}
	}
}

// serve runs a server until the test, or stop, ends it.
func serve(t *testing.T, path string, e Engine) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		s := &Server{Path: path, Engine: e, Log: slog.New(slog.DiscardHandler)}
		if err := s.Run(ctx); err != nil {
			t.Error(err)
		}
	}()
	stop = func() {
		cancel()
		<-done
	}
	t.Cleanup(stop)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		c, err := net.Dial("unix", path)
		if err == nil {
			c.Close()
			return stop
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}

func event(phase protocol.Phase) protocol.Event {
	return protocol.Event{Version: protocol.Version, Phase: phase, Reason: "because"}
}

func TestApplyAndFollow(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	e := newEngine()
	serve(t, path, e)
	if info, err := os.Stat(path); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	for _, phase := range []protocol.Phase{protocol.Building, protocol.Confirmed} {
		e.events <- event(phase)
	}
	var told []string
	c := &Client{Path: path, Tell: func(deployment string, ev protocol.Event) { told = append(told, deployment+" "+string(ev.Phase)) }}
	content := strings.Repeat("bundle", 100_000) // more than a socket holds
	deployment, end, err := c.Apply(t.Context(), strings.NewReader(content+"and what was appended since"), int64(len(content)))
	if err != nil || deployment != "d-1" || end.Phase != protocol.Confirmed || end.Reason != "because" || !slices.Equal(told, []string{"d-1 building", "d-1 confirmed"}) {
		t.Errorf("%s, %+v, %v; told %q", deployment, end, err, told)
	}
	if e.applied != content {
		t.Errorf("%d bytes arrived", len(e.applied))
	}
}

func TestRollBackAndRefusals(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	e := newEngine()
	serve(t, path, e)
	c := &Client{Path: path}
	e.events <- event(protocol.RolledBack)
	deployment, end, err := c.RollBack(t.Context(), protocol.Rollback{Generation: 7})
	if err != nil || deployment != "local-1" || end.Phase != protocol.RolledBack || e.rollback.Generation != 7 {
		t.Errorf("%s, %+v, %v", deployment, end, err)
	}
	for _, refuse := range []error{protocol.Refuse(protocol.Outdated, "too old"), errors.New("too old")} {
		e.mu.Lock()
		e.refuse = refuse
		e.mu.Unlock()
		for name, ask := range map[string]func() error{
			"rollback": func() error { _, _, err := c.RollBack(t.Context(), protocol.Rollback{}); return err },
			"apply": func() error {
				_, _, err := c.Apply(t.Context(), strings.NewReader(strings.Repeat("x", 1<<20)), 1<<20)
				return err
			},
		} {
			var refusal *protocol.Refusal
			if err := ask(); !errors.As(err, &refusal) || refusal.Reason != "too old" {
				t.Errorf("%s: %v", name, err)
			}
		}
	}
	_, _, err = c.run(t.Context(), request{Version: protocol.Version, Do: doFollow, Deployment: "d-0"}, nil)
	if !errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) {
		t.Error(err)
	}
}

// A bundle that is shorter than it was is not taken for a whole one, and doesn't keep anybody waiting.
func TestShortBundle(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	serve(t, path, newEngine())
	_, _, err := (&Client{Path: path}).Apply(t.Context(), strings.NewReader("short"), 100)
	if err == nil || !strings.Contains(err.Error(), "5 of 100 bytes") {
		t.Error(err)
	}
}

// The agent that a deployment replaces leaves its clients to the next one.
func TestAgentIsReplaced(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	first := newEngine()
	stop := serve(t, path, first)
	type result struct {
		deployment string
		end        protocol.Event
		err        error
	}
	told := make(chan protocol.Phase, 10)
	done := make(chan result, 1)
	go func() {
		c := &Client{Path: path, Tell: func(_ string, ev protocol.Event) { told <- ev.Phase }}
		d, end, err := c.RollBack(t.Context(), protocol.Rollback{})
		done <- result{d, end, err}
	}()
	first.events <- event(protocol.Activating)
	if phase := <-told; phase != protocol.Activating {
		t.Fatal(phase)
	}
	stop()
	second := newEngine()
	second.events <- event(protocol.Confirmed)
	serve(t, path, second)
	if r := <-done; r.err != nil || r.deployment != "local-1" || r.end.Phase != protocol.Confirmed {
		t.Errorf("%+v", r)
	}
	if d := <-second.followed; d != "local-1" {
		t.Error(d)
	}
}

// A client that goes away takes nothing with it, and is not waited for.
func TestDetach(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	e := newEngine()
	serve(t, path, e)
	ctx, cancel := context.WithCancel(t.Context())
	c := &Client{Path: path, Tell: func(string, protocol.Event) { cancel() }}
	e.events <- event(protocol.Building)
	deployment, _, err := c.RollBack(ctx, protocol.Rollback{})
	if deployment != "local-1" || !errors.Is(err, context.Canceled) {
		t.Errorf("%s, %v", deployment, err)
	}
	if err := <-e.left; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestNoAgent(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	_, _, err := (&Client{Path: path}).RollBack(t.Context(), protocol.Rollback{})
	if err == nil || !strings.Contains(err.Error(), "is it running?") || strings.Contains(err.Error(), "\n") {
		t.Error(err)
	}
}

// What is left behind by an agent that was killed is in nobody's way.
func TestSocketLeftBehind(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	l.Close()
	e := newEngine()
	serve(t, path, e)
	e.events <- event(protocol.Confirmed)
	if _, _, err := (&Client{Path: path}).RollBack(t.Context(), protocol.Rollback{}); err != nil {
		t.Error(err)
	}
}

func TestHostileRequests(t *testing.T) {
	path := filepath.Join(t.TempDir(), "agent.sock")
	e := newEngine()
	serve(t, path, e)
	for name, line := range map[string]string{
		"no json": "hello\n", "endless": strings.Repeat("x", 100<<10), "version": `{"v":9,"do":"rollback","rollback":{}}` + "\n",
		"act": `{"v":1,"do":"format"}` + "\n", "nothing to go back to": `{"v":1,"do":"rollback"}` + "\n", "nothing to follow": `{"v":1,"do":"follow"}` + "\n",
	} {
		t.Run(name, func(t *testing.T) {
			c, err := net.Dial("unix", path)
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			go func() { _, _ = io.WriteString(c, line) }() // it may be closed before its end
			data, _ := io.ReadAll(c)
			if !strings.Contains(string(data), `"refused"`) {
				t.Errorf("answered %q", data)
			}
		})
	}
	if len(e.followed) != 0 || e.applied != "" {
		t.Error("something was done")
	}
}

// Nobody but root and the agent's own user is served, whatever the socket's mode.
func TestOthersAreRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can be somebody else")
	}
	dir, err := os.MkdirTemp("/tmp", "nix-infra-local")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "s")
	e := newEngine()
	serve(t, path, e)
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(path, 0o666)); err != nil {
		t.Fatal(err)
	}
	if out := asNobody(t, path); !strings.Contains(out, "only root") {
		t.Errorf("nobody was told %q", out)
	}
}
