// Package run runs programs for those who asked for it, apart from the agent: each in a systemd unit of its own, with
// limits, and with an output that is given out while it comes.
//
// Start with Run. output.go carries the output, environ.go makes the environment, program.go finds programs, private.go
// keeps what nobody else may read. Systemd is the Host that runs them: systemd.go follows a unit, bus.go speaks to
// systemd, settings.go has what a unit is like, ending.go how it ended.
package run

import (
	"context"
	"errors"
	"os"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// Spec is what to run, and how.
type Spec struct {
	ID      string            // names the unit; no two runs have the same, ever
	What    string            // for people, in systemd's log
	Argv    []string          // the program, by its absolute path, and its arguments
	Script  []byte            // not nil: what is in a file that only root can read, whose path becomes the first argument
	Dir     string            // working folder; "", or where it does not exist: /
	Env     []string          // NAME=value, which anybody on the node may see
	Private map[string]string // environment that nobody else gets to see; see CheckPrivate

	User   string   // "": nobody. All but root are in a sandbox
	Groups []string // more groups of the user

	Timeout time.Duration
	Memory  int64 // bytes
	Tasks   int   // processes and threads
	Output  int64 // bytes of stdout and stderr together that are given out

	// Seal, where it is not nil, encrypts all of stdout, which is given out only so, and only of a success.
	Seal func(stdout []byte) ([]byte, error)
}

// Host runs what a Spec says.
type Host interface {
	// Run returns when what it ran has ended and nothing of it is left. ctx ends it early. What can't be started is an
	// error that a person understands.
	Run(ctx context.Context, s Spec, stdout, stderr *os.File) (protocol.Ending, error)
}

// Run runs s on h and gives its output to send, in parts, the last of which has Ended. An error, of send too, ends what
// runs; where ctx ends it, that is in Ended, and no error.
func Run(ctx context.Context, h Host, s Spec, send func(protocol.Output) error) error {
	if err := ctx.Err(); err != nil {
		return err // it was ended before it began
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	stdout, stdoutEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stdout.Close()
	defer stdoutEnd.Close()
	stderr, stderrEnd, err := os.Pipe()
	if err != nil {
		return err
	}
	defer stderr.Close()
	defer stderrEnd.Close()

	o := newOutput(s.Output, s.Seal != nil)
	var reading, sending sync.WaitGroup
	reading.Go(func() { o.read(stdout, o.stdout) })
	reading.Go(func() { o.read(stderr, o.stderr) })
	var sendErr error
	sending.Go(func() {
		if sendErr = o.deliver(send); sendErr != nil {
			cancel(sendErr)
		}
	})
	ending, err := h.Run(ctx, s, stdoutEnd, stderrEnd)
	stdoutEnd.Close()
	stderrEnd.Close()
	// What is in the pipes is read still. Their end may never come: a process that is not its own may hold them.
	for _, r := range []*os.File{stdout, stderr} {
		err = errors.Join(err, r.SetReadDeadline(time.Unix(1, 0)))
	}
	reading.Wait()
	o.close()
	sending.Wait()
	if err := errors.Join(err, sendErr); err != nil {
		return err
	}
	if ending.Result == protocol.ResultEnded {
		ending.Reason = because(context.Cause(ctx))
	}
	last := o.take()
	last.Ended = &ending
	if s.Seal != nil && ending.Result == protocol.ResultSuccess {
		if last.Sealed, err = o.seal(s.Seal); err != nil {
			return err
		}
	}
	return send(last)
}

// because says why ctx ended a run.
func because(cause error) string {
	if cause == nil || errors.Is(cause, context.Canceled) {
		return "the agent came to its end"
	}
	return cause.Error()
}
