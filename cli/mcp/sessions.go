package mcp

import (
	"crypto/rand"
	"net/http"
	"sync"

	"github.com/mark3labs/mcp-go/mcp"
	"github.com/mark3labs/mcp-go/server"
)

// sessions are those of clients that speak a revision before 2026-07-28 over HTTP. Each is of the caller who began it, as they were
// then: nobody else can speak or listen in it, and who has another role, or other credentials, meanwhile has to begin anew, and sees the tools
// that there are now.
type sessions struct {
	mu sync.Mutex
	of map[string]Caller // by id
}

func newSessions() *sessions { return &sessions{of: map[string]Caller{}} }

// admits tells whether a request may go on, as far as its session is concerned. It answers the ones that may not.
func (s *sessions) admits(w http.ResponseWriter, r *http.Request, caller Caller) bool {
	id := r.Header.Get(server.HeaderKeySessionID)
	switch {
	case mcp.IsModernProtocol(r.Header.Get(mcp.HeaderProtocolVersion)): // it has no sessions
		return true
	case id == "" && r.Method != http.MethodPost:
		http.Error(w, "there is no "+server.HeaderKeySessionID+"; begin with initialize", http.StatusBadRequest)
		return false
	case id != "" && !s.isOf(id, caller):
		http.Error(w, "there is no such session, or no longer; begin with initialize", http.StatusNotFound)
		return false
	}
	return true
}

func (s *sessions) isOf(id string, caller Caller) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	of, ok := s.of[id]
	return ok && of == caller
}

// ResolveSessionIdManager gives mcp-go the sessions of who asks; without a request it sweeps those that are idle.
func (s *sessions) ResolveSessionIdManager(r *http.Request) server.SessionIdManager {
	if r == nil {
		return callersSessions{s, Caller{}}
	}
	caller, _ := r.Context().Value(callerKey{}).(Caller)
	return callersSessions{s, caller}
}

// callersSessions are the sessions of a caller.
type callersSessions struct {
	*sessions
	caller Caller
}

func (s callersSessions) Generate() string {
	id := rand.Text()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.of[id] = s.caller
	return id
}

// Validate says that a session has ended where there is none: to a client that is the same.
func (s callersSessions) Validate(id string) (ended bool, err error) {
	return !s.isOf(id, s.caller), nil
}

// Terminate is for the caller's own sessions, which admits has seen to, and for sweeping.
func (s callersSessions) Terminate(id string) (forbidden bool, err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.of, id)
	return false, nil
}
