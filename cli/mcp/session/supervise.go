package session

import (
	"encoding/json"
	"errors"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"sync"
	"syscall"
	"time"
)

// report is what a supervisor says, as a line of JSON.
type report struct {
	Exit     *int   `json:"exit,omitempty"`    // the program's exit code
	Failure  string `json:"failure,omitempty"` // why it has none
	Left     int    `json:"left,omitempty"`    // processes that it left running
	Survived []int  `json:"survived,omitempty"`
}

// How long processes have to end themselves, and how long is tried to kill them.
const (
	grace     = 5 * time.Second
	killing   = 10 * time.Second
	killEvery = 20 * time.Millisecond
)

// A supervisor that is killed itself can end nothing any more; then at least the program ends, on Linux. A control group could reach
// what the program had started, too, but not what somebody else started for it (a container's daemon, systemd-run), which is in a group of its
// own; and it needs a systemd that gives this user one. That is a second way for little more.

// Supervise runs a program until all that comes of it has ended, or until whoever started us closes file descriptor 3, or is
// gone; then it ends it all. What there is to tell goes to file descriptor 4. It is the whole of a process of its own,
// whose exit code it returns.
func Supervise(argv []string) int {
	control, news := os.NewFile(3, "control"), os.NewFile(4, "news")
	if control == nil || news == nil || len(argv) == 0 {
		return 2
	}
	syscall.CloseOnExec(3)
	syscall.CloseOnExec(4)
	s := &supervisor{news: json.NewEncoder(news)}
	children := make(chan os.Signal, 1)
	signal.Notify(children, syscall.SIGCHLD)
	ends := make(chan os.Signal, 1)
	signal.Notify(ends, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP)
	if err := adoptOrphans(); err != nil {
		s.tell(report{Failure: err.Error()})
		return 1
	}
	cmd := exec.Command(argv[0], argv[1:]...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	cmd.SysProcAttr = withUs(&syscall.SysProcAttr{Setsid: true})
	if err := cmd.Start(); err != nil {
		s.tell(report{Failure: err.Error()})
		return 1
	}
	s.program = cmd.Process.Pid
	letGoOfOutput()
	over := make(chan struct{})
	var once sync.Once
	end := func() { once.Do(func() { close(over) }) }
	go func() {
		_, _ = io.Copy(io.Discard, control) // until it is closed
		end()
	}()
	go func() {
		<-ends
		end()
	}()
	for {
		if s.reap() {
			return 0
		}
		select {
		case <-children:
		case <-over:
			return s.endAll(children)
		}
	}
}

type supervisor struct {
	news    *json.Encoder
	program int
}

func (s *supervisor) tell(r report) { _ = s.news.Encode(r) } // nobody may be there to hear it

// reap takes note of what has ended, and tells whether nothing is left.
func (s *supervisor) reap() bool {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		switch {
		case errors.Is(err, syscall.EINTR):
			continue
		case err != nil:
			return true
		case pid == 0:
			return false
		case pid == s.program && status.Signaled():
			s.tell(report{Failure: "it was ended by the signal " + status.Signal().String(), Left: len(descendants(s.program))})
		case pid == s.program:
			code := status.ExitStatus()
			s.tell(report{Exit: &code, Left: len(descendants(s.program))})
		}
	}
}

// endAll ends all processes: first they are asked to.
func (s *supervisor) endAll(children <-chan os.Signal) int {
	send := func(sig syscall.Signal) {
		for _, pid := range descendants(s.program) {
			_ = syscall.Kill(pid, sig) // one that is not ours to signal is told of in the end
		}
	}
	send(syscall.SIGTERM)
	patience := time.After(grace)
	for asked := true; asked; {
		if s.reap() {
			return 0
		}
		select {
		case <-children:
		case <-patience:
			asked = false
		}
	}
	for until := time.Now().Add(killing); time.Now().Before(until); {
		send(syscall.SIGKILL)
		if s.reap() {
			return 0
		}
		select {
		case <-children:
		case <-time.After(killEvery): // one may have forked while we looked
		}
	}
	s.tell(report{Survived: descendants(s.program)})
	return 1
}
