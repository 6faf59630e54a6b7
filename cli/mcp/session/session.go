// Package session runs programs that take long, for somebody who asks now and then how it goes.
//
// Start here: a Manager starts sessions; each is a program, what it has said, and how it ended. spool.go keeps what it said
// in a file; supervise.go is the process between that sees to it that nothing of a session goes on when it is not wanted.
//
// A session's program is started by a supervisor, which is this program once more. On Linux, every process that comes of the
// session is and stays the supervisor's descendant, whatever it does to get away (setsid, a double fork), because the
// kernel gives orphans to the supervisor. To cancel is to have it end them all, and it does the same when its pipe
// to us is closed, as it is when we end, however we do.
package session

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
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

// Session is a program that runs or ran.
type Session struct {
	ID      string
	Order   Order
	Started time.Time

	control *os.File // closed: the supervisor ends everything
	spool   *spool
	ended   chan struct{} // closed when the program has ended and all that it said is kept
	gone    chan struct{} // closed when the supervisor is gone, too

	mu     sync.Mutex
	status Status
}

// State is how far a session is.
type State string

// States.
const (
	Running   State = "running"
	Finished  State = "finished"  // by itself, with an exit code
	Cancelled State = "cancelled" // by somebody
	Failed    State = "failed"    // the program could not be started, or was killed by a signal
)

// Status is how a session is.
type Status struct {
	State    State
	ExitCode *int // of the program, once it has one
	Ended    time.Time
	Reason   string // of a failure or a cancellation
	Left     int    // processes that the program left running when it ended
	Survived []int  // processes that could not be ended
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

// start starts the supervisor, and what follows it.
func (s *Session) start(supervisor []string) error {
	var opened []*os.File
	pipe := func() (r, w *os.File, err error) {
		r, w, err = os.Pipe()
		if err == nil {
			opened = append(opened, r, w)
		}
		return r, w, err
	}
	fail := func(err error) error {
		for _, f := range opened {
			f.Close()
		}
		return fmt.Errorf("can't start a session: %w", err)
	}
	orders, control, err := pipe()
	if err != nil {
		return fail(err)
	}
	said, output, err := pipe()
	if err != nil {
		return fail(err)
	}
	news, report, err := pipe()
	if err != nil {
		return fail(err)
	}
	argv := slices.Concat(supervisor, s.Order.Argv)
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Dir, cmd.Env = s.Order.Dir, append(os.Environ(), s.Order.Env...)
	cmd.Stdout, cmd.Stderr = output, output
	cmd.ExtraFiles = []*os.File{orders, report}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for us, and we tell it
	if err := cmd.Start(); err != nil {
		return fail(err)
	}
	orders.Close()
	output.Close()
	report.Close()
	s.control = control
	limit := time.AfterFunc(maxTime, func() { s.stop(fmt.Sprintf("it ran for more than %v", maxTime)) })
	exited := make(chan struct{})
	go func() {
		defer limit.Stop()
		s.follow(news, exited)
		_ = cmd.Wait() // what it had to say was in its news
		news.Close()
		control.Close()
		close(s.gone)
	}()
	go func() {
		s.spool.keep(said, exited, func() {
			s.mu.Lock()
			s.status.Ended = time.Now()
			s.mu.Unlock()
			close(s.ended)
		})
		said.Close()
	}()
	return nil
}

// follow takes the supervisor's news, and closes exited when the program has ended.
func (s *Session) follow(news io.Reader, exited chan struct{}) {
	lines := bufio.NewScanner(news)
	told := false
	for lines.Scan() {
		var r report
		if json.Unmarshal(lines.Bytes(), &r) != nil {
			continue
		}
		s.mu.Lock()
		s.status.Survived = r.Survived
		if r.Exit != nil || r.Failure != "" {
			s.status.ExitCode, s.status.Left = r.Exit, r.Left
			switch {
			case s.status.State == Cancelled:
			case r.Failure != "":
				s.status.State, s.status.Reason = Failed, r.Failure
			default:
				s.status.State = Finished
			}
		}
		s.mu.Unlock()
		if (r.Exit != nil || r.Failure != "") && !told {
			told = true
			close(exited)
		}
	}
	if !told {
		s.mu.Lock()
		if s.status.State == Running {
			s.status.State, s.status.Reason = Failed, "what watches over the session was killed; processes of it may be left"
		}
		s.mu.Unlock()
		close(exited)
	}
}

// Status is how the session is now.
func (s *Session) Status() Status {
	s.mu.Lock()
	defer s.mu.Unlock()
	status := s.status
	select {
	case <-s.ended:
	default:
		if status.State != Cancelled {
			status.State = Running // what it said last is not kept yet
			status.ExitCode = nil
		}
	}
	if s.isGone() {
		status.Left = 0
	}
	return status
}

// isGone tells whether no process of the session is there any more.
func (s *Session) isGone() bool {
	select {
	case <-s.gone:
		return true
	default:
		return false
	}
}

// Ended is closed when the program has ended and all that it said can be had.
func (s *Session) Ended() <-chan struct{} { return s.ended }

// Output gives chunks of what the program said, from the chunk number from on: at most as many as count, and at most maxBytes.
func (s *Session) Output(from, count, maxBytes int) (chunks []string, total int, err error) {
	return s.spool.read(from, count, maxBytes)
}

func (s *Session) stop(reason string) {
	s.mu.Lock()
	if s.status.State == Running {
		s.status.State, s.status.Reason = Cancelled, reason
	}
	s.mu.Unlock()
	s.control.Close()
}

// Cancel ends all processes of a session, those too that its program has left behind, and returns when they are gone.
func (s *Session) Cancel(ctx context.Context) error {
	s.stop("it was cancelled")
	select {
	case <-s.gone:
	case <-ctx.Done():
		return fmt.Errorf("the session is being cancelled, and not all its processes have ended yet: %w", context.Cause(ctx))
	}
	if left := s.Status().Survived; len(left) > 0 {
		return fmt.Errorf("these processes could not be ended, perhaps because they run as somebody else: %v", left)
	}
	return nil
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
