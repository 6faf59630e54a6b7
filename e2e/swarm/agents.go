//go:build linux

package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"
)

// agentsCommand is the first argument of a process that runs agents.
const agentsCommand = "agents"

// filesOfAgent is how many files an agent has open, with some to spare.
const filesOfAgent = 6

// agents is a process that runs some of the agents: as many as there may be files open in one.
type agents struct {
	cmd     *exec.Cmd
	orders  io.WriteCloser // lines; its end ends the process
	answers *bufio.Reader  // a line for each order
	exited  chan error

	profiled bool
}

// agentsPerProcess is how many agents one process can run.
func agentsPerProcess() (int, error) {
	var limit syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit); err != nil {
		return 0, err
	}
	return int(min(limit.Max, 1<<20)) / filesOfAgent, nil // Go itself raises the limit to its maximum
}

// startAgents runs the agents of nodes from first on.
func startAgents(nodes string, first, count int) (*agents, error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	a := &agents{cmd: exec.Command(self, agentsCommand, nodes, strconv.Itoa(first), strconv.Itoa(count)), exited: make(chan error, 1)}
	a.cmd.Stderr = os.Stderr
	a.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true} // Ctrl-C is for the parent, which ends this one
	if a.orders, err = a.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := a.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	a.answers = bufio.NewReader(out)
	if err := a.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		a.exited <- a.cmd.Wait()
		close(a.exited)
	}()
	return a, nil
}

// order has the process do something and gives its answer.
func (a *agents) order(words ...string) (string, error) {
	if _, err := fmt.Fprintln(a.orders, strings.Join(words, " ")); err != nil {
		return "", fmt.Errorf("the agents' process ended: %w", err)
	}
	line, err := a.answers.ReadString('\n')
	if err != nil {
		return "", fmt.Errorf("the agents' process ended: %w", err)
	}
	return strings.TrimSpace(line), nil
}

// memory is what the agents of the process need at the moment, in bytes.
func (a *agents) memory() (int64, error) {
	line, err := a.order("memory")
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(line, 10, 64)
}

// profile has the newest of the agents' processes write their CPU profiles, until they end: to the file, and to FILE.1 and so on.
func (f *fleet) profile(file string) error {
	for i, a := range f.agents {
		if file == "" || a.profiled {
			continue
		}
		name := file
		if i > 0 {
			name = fmt.Sprintf("%s.%d", file, i)
		}
		path, err := filepath.Abs(name)
		if err != nil {
			return err
		}
		if _, err := a.order("profile", path); err != nil {
			return err
		}
		a.profiled = true
	}
	return nil
}

func (a *agents) close() {
	a.orders.Close()
	<-a.exited // the measurements are over, whatever an agent says
}

// runAgents is that process.
func runAgents(args []string) error {
	if len(args) != 3 {
		return errors.New("agents: expected a folder and two numbers")
	}
	first, err := strconv.Atoi(args[1])
	if err != nil {
		return err
	}
	count, err := strconv.Atoi(args[2])
	if err != nil {
		return err
	}
	// One heap for thousands of agents: real ones have one each, which is small and hardly ever collected.
	debug.SetGCPercent(400)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all, ctx := errgroup.WithContext(ctx)
	started := make(chan struct{})
	all.Go(func() error {
		defer close(started)
		for i := first; i < first+count; i++ {
			all.Go(func() error { return newNode(filepath.Join(args[0], nameOf(i)), nameOf(i)).run(ctx) })
			if sleep(ctx, startEvery) != nil {
				return nil // it is over
			}
		}
		return nil
	})
	all.Go(func() error {
		defer cancel()
		return obey(os.Stdin, os.Stdout, started)
	})
	return all.Wait()
}

// startEvery is the time between the starts of two agents: each costs some milliseconds of CPU on both sides for TLS and
// login, and those who wait for too long come back as one more.
const startEvery = 5 * time.Millisecond

// obey carries out orders until there are no more.
func obey(orders io.Reader, answers io.Writer, started <-chan struct{}) error {
	lines := bufio.NewScanner(orders)
	for lines.Scan() {
		answer := "ok"
		switch words := strings.Fields(lines.Text()); {
		case len(words) == 1 && words[0] == "started":
			<-started
		case len(words) == 1 && words[0] == "memory":
			runtime.GC()
			var m runtime.MemStats
			runtime.ReadMemStats(&m)
			answer = strconv.FormatUint(m.HeapAlloc+m.StackInuse, 10)
		case len(words) == 2 && words[0] == "profile": // until the process ends
			file, err := os.Create(words[1])
			if err != nil {
				return err
			}
			defer file.Close()
			if err := pprof.StartCPUProfile(file); err != nil {
				return err
			}
			defer pprof.StopCPUProfile()
		default:
			return fmt.Errorf("agents: unknown order %q", lines.Text())
		}
		if _, err := fmt.Fprintln(answers, answer); err != nil {
			return err
		}
	}
	return lines.Err()
}

// nameOf is the name of the i-th node.
func nameOf(i int) string { return fmt.Sprintf("n%05d", i) }
