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
	way, err := r.sshTo(ctx, r.session, node, o)
	if errors.Is(err, client.ErrNoAnswer) {
		n.silent = true
		return
	} else if err != nil {
		n.err = err
		return
	}
	defer way.Close()
	cmd := way.command(ctx, "exec "+quoteWords([]string{"bash", "-c", remoteShell, "bash", text}))
	cmd.Stdout, cmd.Stderr = n.stdout, n.stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		n.err = err
		return
	}
	cmd.Cancel, cmd.WaitDelay = stdin.Close, endTime
	err = cmd.Run()
	n.parts = 1
	var exited *exec.ExitError
	switch {
	case err == nil:
		n.ended = &protocol.Ending{Result: protocol.ResultSuccess}
	case errors.As(err, &exited) && exited.ExitCode() == 255:
		n.err = fmt.Errorf("ssh exited with 255")
		return
	case errors.As(err, &exited) && exited.ExitCode() > 0:
		n.ended = &protocol.Ending{Exit: exited.ExitCode(), Result: protocol.ResultExit}
	default:
		n.err = err
		return
	}
	n.ended.Millis = time.Since(began).Milliseconds()
}
