package session

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"slices"
	"sync"
	"syscall"
	"time"
)

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
