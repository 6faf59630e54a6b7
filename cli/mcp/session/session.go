// Package session runs programs that take long, for somebody who asks now and then how it goes.
//
// Start here: a Manager starts sessions; each is a program, what it has said, and how it ended. run.go is one of them;
// spool.go keeps what it said in a file; supervise.go is the process between that sees to it that nothing of a session goes on when it is not wanted.
//
// A session's program is started by a supervisor, which is this program once more. On Linux, every process that comes of the
// session is and stays the supervisor's descendant, whatever it does to get away (setsid, a double fork), because the
// kernel gives orphans to the supervisor. To cancel is to have it end them all, and it does the same when its pipe
// to us is closed, as it is when we end, however we do.
package session

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"
)

// Bounds.
const (
	MaxRunning = 4         // at a time
	maxLeft    = 16        // that ended and left processes running
	maxKept    = 32        // sessions, with those that ended
	maxSpooled = 256 << 20 // bytes of output of all; sessions that ended are forgotten for it
	keepFor    = time.Hour
	maxTime    = 4 * time.Hour // of one session
)

// Options are a manager's surroundings.
type Options struct {
	Supervisor []string // the command that runs Supervise on the arguments that are added to it
}

// Manager has sessions. It is safe for concurrent use; Close ends them all.
type Manager struct {
	o Options

	mu       sync.Mutex
	closed   bool
	number   int
	sessions []*Session // the oldest first
}

// New makes a manager.
func New(o Options) *Manager { return &Manager{o: o} }

// Order is what to run.
type Order struct {
	Tool      string // whose session it is
	Operation string
	Subject   string // such as a test's name
	Dir       string // where it runs
	Argv      []string
	Env       []string // added to our own
}

// Start starts a program. It goes on when ctx ends: only Cancel, Close and time end it.
func (m *Manager) Start(o Order) (*Session, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.purge()
	running, left := 0, 0
	for _, s := range m.sessions {
		switch status := s.Status(); {
		case status.State == Running:
			running++
		case status.Left > 0:
			left++
		}
	}
	switch {
	case m.closed:
		return nil, errors.New("the server is about to end")
	case running >= MaxRunning:
		return nil, fmt.Errorf("%d sessions are running, and more at a time are not allowed; wait for one, or cancel it", running)
	case left >= maxLeft:
		return nil, fmt.Errorf("%d sessions ended and left processes that still run, and more are not allowed; cancel some", left)
	}
	m.number++
	s := &Session{ID: fmt.Sprintf("session_%d_%d", m.number, time.Now().UnixMilli()), Order: o, Started: time.Now(), ended: make(chan struct{}), gone: make(chan struct{})}
	s.status.State = Running
	var err error
	if s.spool, err = newSpool(); err != nil {
		return nil, fmt.Errorf("can't start a session: %w", err)
	}
	if err := s.start(m.o.Supervisor); err != nil {
		s.spool.close()
		return nil, err
	}
	m.sessions = append(m.sessions, s)
	return s, nil
}

// Get finds a session; nil is none.
func (m *Manager) Get(id string) *Session {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range m.sessions {
		if s.ID == id {
			return s
		}
	}
	return nil
}

// List gives the sessions, the oldest first. Those that ended an hour ago are forgotten.
func (m *Manager) List() []*Session {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.purge()
	return slices.Clone(m.sessions)
}

// purge forgets old sessions of which nothing runs.
func (m *Manager) purge() {
	over := len(m.sessions) - maxKept + 1
	var spooled int64
	for _, s := range m.sessions {
		spooled += s.spool.kept()
	}
	m.sessions = slices.DeleteFunc(m.sessions, func(s *Session) bool {
		select {
		case <-s.ended:
		default:
			return false
		}
		if !s.isGone() {
			return false
		}
		s.mu.Lock()
		old := time.Since(s.status.Ended) > keepFor
		s.mu.Unlock()
		if !old && over <= 0 && spooled <= maxSpooled {
			return false
		}
		over--
		spooled -= s.spool.kept()
		s.spool.close()
		return true
	})
}

// Close ends all sessions, and waits until their processes are gone.
func (m *Manager) Close() {
	m.mu.Lock()
	m.closed = true
	sessions := m.sessions
	m.mu.Unlock()
	for _, s := range sessions {
		s.stop("the server ended")
	}
	for _, s := range sessions {
		<-s.gone // the supervisor has a bound
		s.spool.close()
	}
}
