package command

import (
	"context"
	"fmt"
	"io"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

// maxQueued is how much output waits for programs that run here, in bytes, of all nodes together.
const maxQueued = 64 << 20

// killTime is how long programs that were killed are waited for.
const killTime = time.Second

// pipeline is programs that run here over the output of one node, each over the output of the one before.
type pipeline struct {
	programs []*exec.Cmd
	queued   *atomic.Int64 // bytes, in all pipelines of a command
	full     func()        // they take no more
	ended    chan struct{}

	mu     sync.Mutex
	more   *sync.Cond
	queue  [][]byte
	closed bool // nothing comes any more
	over   bool // more came than could wait
}

// checkPrograms looks for the programs of a pipeline before anything is run anywhere.
func checkPrograms(programs [][]string) error {
	for _, p := range programs {
		if _, err := exec.LookPath(p[0]); err != nil {
			return fmt.Errorf("%.80q: what stands behind a | runs on this machine, and there is no such program here", p[0])
		}
	}
	return nil
}

// startPipeline starts the programs. Each has a process group of its own, so that nothing of it is left when ctx ends.
// full is told once, when they take no more.
func startPipeline(ctx context.Context, programs [][]string, stdout, stderr io.Writer, queued *atomic.Int64, full func()) (*pipeline, error) {
	p := &pipeline{queued: queued, full: sync.OnceFunc(full), ended: make(chan struct{})}
	p.more = sync.NewCond(&p.mu)
	inputs := make([]io.WriteCloser, len(programs))
	for i, argv := range programs {
		cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
		cmd.Stdout, cmd.Stderr = stdout, stderr
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
		in, err := cmd.StdinPipe()
		if err != nil {
			return nil, err
		}
		if inputs[i] = in; i > 0 {
			p.programs[i-1].Stdout = in
		}
		p.programs = append(p.programs, cmd)
	}
	for i, cmd := range p.programs {
		if err := cmd.Start(); err != nil {
			for _, begun := range p.programs[:i] {
				_ = begun.Cancel()
				_ = begun.Wait()
			}
			return nil, err
		}
		if i > 0 {
			inputs[i].Close() // the one before has it
		}
	}
	go p.feed(inputs[0])
	go func() {
		defer close(p.ended)
		for _, cmd := range p.programs {
			_ = cmd.Wait() // status tells how the last one ended
		}
	}()
	return p, nil
}

// Write hands output to the programs, and never waits for them: others' output comes the same way.
func (p *pipeline) Write(data []byte) (int, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.closed {
		return len(data), nil
	}
	if p.queued.Add(int64(len(data))) > maxQueued {
		p.queued.Add(-int64(len(data)))
		p.over, p.closed = true, true
		p.full()
	} else {
		p.queue = append(p.queue, data)
	}
	p.more.Signal()
	return len(data), nil
}

// close says that nothing more comes.
func (p *pipeline) close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.closed = true
	p.more.Signal()
}

// feed gives the first program what came, until that is all or it takes no more.
func (p *pipeline) feed(in io.WriteCloser) {
	defer in.Close()
	for {
		p.mu.Lock()
		for len(p.queue) == 0 && !p.closed {
			p.more.Wait()
		}
		queue := p.queue
		p.queue = nil
		p.mu.Unlock()
		if len(queue) == 0 {
			return
		}
		for _, data := range queue {
			if _, err := in.Write(data); err != nil { // what comes on is dropped
				p.full()
			}
			p.queued.Add(-int64(len(data)))
		}
	}
}

// wait waits for the programs' end, and not much longer than for ctx's. It gives the exit status of the last one, as a shell
// has it.
func (p *pipeline) wait(ctx context.Context) (status int, err error) {
	select {
	case <-p.ended:
	case <-ctx.Done():
		select {
		case <-p.ended:
		case <-time.After(killTime):
			return 0, ctx.Err()
		}
	}
	last := p.programs[len(p.programs)-1]
	switch state := last.ProcessState; {
	case p.over:
		return 0, fmt.Errorf("%s on this machine takes the output more slowly than it comes, and %s wait already", p.programs[0].Args[0], size(maxQueued))
	case state == nil: // it could not be waited for
		return 0, fmt.Errorf("how %s ended is not known", last.Args[0])
	case state.ExitCode() < 0:
		return 128 + int(state.Sys().(syscall.WaitStatus).Signal()), nil
	default:
		return state.ExitCode(), nil
	}
}
