package command

import (
	"context"
	"errors"
	"os/exec"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/protocol"
)

// sshOptions are how the system's ssh is run.
type sshOptions struct {
	target string
	user   string
	sshKey string
	tty    bool
	pin    bool
}

func (a *app) sshCommand() *cobra.Command {
	var o sshOptions
	c := &cobra.Command{
		Use:   "ssh NODE [-- COMMAND...]",
		Short: "Open a shell on a node, by SSH through its agent",
		Example: `  nix-infra ssh web1
  nix-infra ssh web1 -- journalctl -n 20`,
		RunE: func(*cobra.Command, []string) error { return errors.New("not there yet") },
	}
	f := c.Flags()
	f.StringVar(&o.target, "target", "", "the node, in place of NODE")
	f.StringVar(&o.user, "user", "root", "user on the node")
	return c
}

// sshWay is the system's ssh to one node, through a tunnel of this process.
type sshWay struct{}

// sshTo opens the way; it is to be closed when no ssh runs any more.
func (a *app) sshTo(ctx context.Context, s *session, node *protocol.NodeState, o sshOptions) (*sshWay, error) {
	return nil, errors.New("not there yet")
}

// command is ssh on that way, with what the user's shell on the node shall run; none: an interactive shell. Its stdin,
// stdout and stderr are the caller's to set.
func (w *sshWay) command(ctx context.Context, words ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "ssh", words...)
}

// Close ends what still runs on it.
func (w *sshWay) Close() {}
