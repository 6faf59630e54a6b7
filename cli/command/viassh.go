package command

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/protocol"
)

// sshAtOnce bounds how many ssh run on this machine at the same time.
const sshAtOnce = 32

// remoteShell runs its first argument, and ends it with all its children when its stdin ends: sshd leaves alone what runs
// when the connection is gone. cat outlives it only until sshd closes its stdin.
const remoteShell = `exec 3<&0
setsid bash -c "$1" </dev/null 3<&- & run=$!
{ cat <&3; kill -- -$run; } >/dev/null 2>&1 & watch=$!
exec 3<&-
wait $run; status=$?
kill $watch 2>/dev/null
exit $status`

// runSSH is run for a text that root's shell runs, by SSH through the agents.
func (q *question) runSSH(ctx context.Context, text string, w work, o sshOptions) (*running, error) {
	r, err := q.running(w)
	if err != nil {
		return nil, err
	}
	limit := errgroup.Group{}
	limit.SetLimit(min(q.o.concurrency, sshAtOnce))
	for i := range q.nodes {
		node := &q.nodes[i]
		n := r.runs[node.Name]
		limit.Go(func() error {
			if n.cut = ctx.Err() != nil; !n.cut {
				r.ssh(ctx, node, n, text, o)
			}
			n.silent = n.silent || n.cut
			r.end(ctx, n)
			return nil
		})
	}
	_ = limit.Wait() // how each went is in its nodeRun
	r.ending.Wait()
	return r, r.outcome(ctx)
}

func (r *running) ssh(ctx context.Context, node *protocol.NodeState, n *nodeRun, text string, o sshOptions) {
	began := time.Now()
	held, release := context.WithCancel(context.WithoutCancel(ctx))
	defer release()
	opening := context.AfterFunc(ctx, release)
	way, err := r.sshTo(held, r.session, node, o)
	opening()
	if err != nil {
		n.silent, n.err = errors.Is(err, client.ErrNoAnswer), err
		return
	}
	defer way.Close()
	cmd := way.command(held, "exec "+quoteWords([]string{"bash", "-c", remoteShell, "bash", text}))
	cmd.Stdout, cmd.Stderr = n.stdout, n.stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		n.err = err
		return
	}
	defer context.AfterFunc(ctx, func() {
		stdin.Close() // which ends what runs there; what it says yet is heard
		time.AfterFunc(endTime, release)
	})()
	err = cmd.Run()
	n.parts = 1
	exited := &exec.ExitError{}
	switch status := 0; {
	case errors.As(err, &exited) && exited.ExitCode() != 255 && exited.ExitCode() > 0:
		status = exited.ExitCode()
		fallthrough
	case err == nil:
		n.ended = &protocol.Ending{Exit: status, Result: protocol.ResultExit, Millis: time.Since(began).Milliseconds()}
		if status == 0 {
			n.ended.Result = protocol.ResultSuccess
		}
	case ctx.Err() != nil:
		n.silent, n.cut = true, true
	default:
		n.err = fmt.Errorf("ssh: %w", err)
	}
}
