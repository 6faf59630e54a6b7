package agent_test

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

// told collects what a machine says while it joins.
type told struct {
	mu    sync.Mutex
	lines []string
}

func (s *told) tell(what string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.lines = append(s.lines, what)
}

func (s *told) has(text string) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Contains(strings.Join(s.lines, "\n"), text)
}

func (s *told) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return strings.Join(s.lines, "\n")
}

func join(t *testing.T, dir string, token *protocol.Token, timeout time.Duration) (bool, *told, error) {
	t.Helper()
	said := &told{}
	already, err := agent.Join(t.Context(), agent.JoinOptions{Dir: dir, Token: token, Timeout: timeout, Tell: said.tell})
	if err != nil && strings.Contains(err.Error(), "\n") {
		t.Errorf("an error of more than one line: %v", err)
	}
	return already, said, err
}

func TestJoin(t *testing.T) {
	t.Parallel()
	f := testfleet.New(t)
	hour := time.Now().Add(time.Hour)
	dead := fmt.Sprint("tls://127.0.0.1:", testfleet.Port(t)) // nobody listens there
	f.Joins(f.LetIn)
	for name, urls := range map[string][]string{"tls": f.URLs()[:1], "wss": f.URLs()[1:], "wss where tls does not work": {dead, f.URLs()[1]}} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(t.TempDir(), "agent")
			token := f.Token("web-1", hour, urls...)
			if already, said, err := join(t, dir, token, 5*time.Minute); already || err != nil {
				t.Fatalf("%v: %v\n%s", already, err, said)
			}
			m, err := agent.Home(dir).Open()
			if err != nil {
				t.Fatal(err)
			}
			if m.Name != "web-1" || m.Answer.Fleet.Operator != f.Public.Operator || string(m.Answer.CA) != string(f.CA) || fmt.Sprint(m.Answer.Controllers) != fmt.Sprint(urls) {
				t.Errorf("it is %+v", m.Answer)
			}
			if already, _, err := join(t, dir, token, 5*time.Minute); !already || err != nil {
				t.Errorf("again: %v, %v", already, err)
			}
			if _, _, err := join(t, dir, f.Token("db-1", hour), 5*time.Minute); err == nil || !strings.Contains(err.Error(), "is the node web-1") {
				t.Errorf("as another node: %v", err)
			}
			if _, _, err := join(t, dir, testfleet.New(t).Token("web-1", hour), 5*time.Minute); err == nil || !strings.Contains(err.Error(), "another operator") {
				t.Errorf("into another fleet: %v", err)
			}
		})
	}
}

// The operator answers after a while; the machine asks with the same keys all the time, and is told at once.
func TestJoinWaitsForTheOperator(t *testing.T) {
	t.Parallel()
	f := testfleet.New(t)
	token := f.Token("web-1", time.Now().Add(time.Hour))
	_, key, err := token.Signer()
	if err != nil {
		t.Fatal(err)
	}
	var signed atomic.Bool
	keys := make(chan string, 100)
	f.Joins(func(r *protocol.EnrolRequest) (protocol.JoinState, error) {
		keys <- r.Key
		if !signed.Load() {
			return protocol.JoinState{}, nil
		}
		return f.LetIn(r)
	})
	dir, said := t.TempDir(), &told{}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	start := func(ctx context.Context) {
		go func() {
			_, err := agent.Join(ctx, agent.JoinOptions{Dir: dir, Token: token, Timeout: time.Hour, Tell: said.tell})
			ended <- err
		}()
	}
	start(ctx)
	first := <-keys
	cancel() // somebody pressed Ctrl-C
	if err := <-ended; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	start(t.Context())
	if again := <-keys; again != first {
		t.Error("it came again with other keys")
	}
	testfleet.Eventually(t, "it says whom it waits for", func() bool { return said.has("wait for the operator") && said.has(first) })
	if _, _, err := join(t, dir, token, time.Second); err == nil {
		t.Error("two join at once")
	}
	for len(keys) > 0 {
		<-keys
	}
	nc := f.Controller()
	nudge := func() {
		t.Helper()
		if err := nc.Publish(protocol.JoinNudge("web-1", key), nil); err != nil {
			t.Fatal(err)
		}
	}
	const nudges = 5 // by itself it asks every ten seconds
	begun := time.Now()
	for range nudges {
		nudge()
		<-keys
	}
	if took := time.Since(begun); took > (nudges-1)*10*time.Second {
		t.Errorf("%d nudges took %s: it asks when it would have anyway", nudges, took)
	}
	signed.Store(true)
	nudge()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if m, err := agent.Home(dir).Open(); err != nil || m.Answer.User == "" {
		t.Fatal(err)
	}
}

func TestJoinThatFails(t *testing.T) {
	t.Parallel()
	f, stranger := testfleet.New(t), testfleet.New(t)
	hour := time.Now().Add(time.Hour)
	answers := map[string]func(*protocol.EnrolRequest) (protocol.JoinState, error){
		"used": func(*protocol.EnrolRequest) (protocol.JoinState, error) {
			return protocol.JoinState{}, protocol.Refuse(protocol.Conflict, "the token was used by another machine")
		},
		"void": func(*protocol.EnrolRequest) (protocol.JoinState, error) {
			return protocol.JoinState{}, protocol.Refuse(protocol.Revoked, "the operator has taken it back")
		},
		"nobody": func(*protocol.EnrolRequest) (protocol.JoinState, error) { return protocol.JoinState{}, nil },
		"later": func(*protocol.EnrolRequest) (protocol.JoinState, error) {
			return protocol.JoinState{}, errors.New("etcd hiccups")
		},
		"forged": func(r *protocol.EnrolRequest) (protocol.JoinState, error) { return stranger.LetIn(r) },
		"others": func(r *protocol.EnrolRequest) (protocol.JoinState, error) {
			other, err := agent.Home(f.TB.TempDir()).Request(r.Name)
			if err != nil {
				return protocol.JoinState{}, err
			}
			return f.LetIn(other)
		},
	}
	f.Joins(func(r *protocol.EnrolRequest) (protocol.JoinState, error) { return answers[r.Name](r) })
	foreign := stranger.Token("web-1", hour)
	foreign.Controllers, foreign.CA = f.URLs(), f.Token("web-1", hour).CA
	strange := f.Token("web-1", hour)
	strange.CA = stranger.Token("web-1", hour).CA
	for name, c := range map[string]struct {
		token *protocol.Token
		want  string
		code  protocol.Code // "": it goes on trying
	}{
		"a token that was used":         {f.Token("used", hour), "used by another machine", protocol.Conflict},
		"a token that was taken back":   {f.Token("void", hour), "taken it back", protocol.Revoked},
		"a token that has ended":        {f.Token("web-1", time.Now().Add(-time.Minute)), "ended at", protocol.Expired},
		"another fleet's token":         {foreign, "does not take the token", protocol.Untrusted},
		"an operator who sleeps":        {f.Token("nobody", hour), "enroll --pending nobody", ""},
		"a controller that can't":       {f.Token("later", hour), "etcd hiccups", ""},
		"a forged answer":               {f.Token("forged", hour), "not that", ""},
		"another machine's answer":      {f.Token("others", hour), "not that", ""},
		"nobody there":                  {f.Token("web-1", hour, "tls://127.0.0.1:1"), "not yet: ", ""},
		"somebody else's broker, by CA": {strange, "is not the token's fleet", ""},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			dir, said := filepath.Join(t.TempDir(), "agent"), &told{}
			ctx, enough := context.WithCancel(t.Context())
			defer enough()
			_, err := agent.Join(ctx, agent.JoinOptions{Dir: dir, Token: c.token, Tell: func(what string) {
				said.tell(what)
				if c.code == "" && strings.Contains(what, c.want) {
					enough()
				}
			}})
			if c.code == "" && !errors.Is(err, context.Canceled) || c.code != "" && (!errors.Is(err, &protocol.Refusal{Code: c.code}) || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v, want %q (%s)\n%s", err, c.want, c.code, said)
			}
			if _, err := agent.Home(dir).Open(); err == nil {
				t.Error("it is a node")
			}
		})
	}
}

// One that gives up says why, in a line.
func TestJoinGivesUp(t *testing.T) {
	t.Parallel()
	token := testfleet.New(t).Token("web-1", time.Now().Add(time.Hour), "tls://127.0.0.1:1")
	if _, _, err := join(t, t.TempDir(), token, time.Second); !errors.Is(err, agent.ErrNotAnswered) || !strings.Contains(err.Error(), "within 1s") || !strings.Contains(err.Error(), "127.0.0.1:1") {
		t.Error(err)
	}
}
