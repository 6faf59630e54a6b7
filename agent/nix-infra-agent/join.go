package main

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// exitUnanswered is join's status where nobody answered in time.
const exitUnanswered = 3

func joinCommand(dir *string) *cobra.Command {
	var timeout time.Duration
	var noStart bool
	c := &cobra.Command{
		Use:   "join TOKEN|FILE|-",
		Short: "Become the node that a token names, and start the agent; needs no SSH and no way in",
		Long: "Become the node that a token names, which the operator makes by `nix-infra enroll --token NAME`. This machine\n" +
			"makes its keys, which stay here, connects to the fleet by the token, and waits until the operator's side has signed\n" +
			"them. Then its agent is started, and its unit installed first where the machine's configuration has none.\n\n" +
			"A token is secret, and good for one machine: give it by standard input or in a file that only root can read, since\n" +
			"other users can see a command's words. Broken off, run it again: the keys stay.\n\n" +
			"The exit status is 0 once this machine is the node (also if it was before), 2 if the token was refused or is damaged,\n" +
			"3 if nobody answered in time.",
		Example: `  nix-infra enroll --token web-1 | ssh web-1 nix-infra-agent join -
  nix-infra-agent join /run/nix-infra/token
  nix-infra-agent join /run/nix-infra/token --timeout 1h --no-start`,
		Args: arguments(cobra.ExactArgs(1)),
		RunE: func(c *cobra.Command, args []string) error {
			if timeout < 0 {
				return exit(exitRefused, "--timeout %s: use such as 15m or 1h", timeout)
			}
			text, err := readToken(c.InOrStdin(), args[0])
			if err != nil {
				return exit(exitRefused, "%w", err)
			}
			token, err := protocol.ParseToken(text)
			if err != nil {
				return exit(exitRefused, "%w", err)
			}
			out := c.OutOrStdout()
			tell := func(what string) { fmt.Fprintln(out, printable(what)) }
			already, err := agent.Join(c.Context(), agent.JoinOptions{Dir: *dir, Token: token, Timeout: timeout, Tell: tell})
			var refusal *protocol.Refusal
			switch {
			case c.Context().Err() != nil:
				return exit(exitInterrupted, "interrupted; run it again to go on")
			case errors.Is(err, agent.ErrNotAnswered):
				return exit(exitUnanswered, "%w", err)
			case errors.As(err, &refusal):
				return exit(exitRefused, "refused: %w (%s)", err, refusal.Code)
			case err != nil:
				return exit(exitFailed, "%w", err)
			case already:
				tell("This machine is the node " + token.Node + " already.")
			default:
				tell("This machine is the node " + token.Node + " of operator " + token.Operator + ".")
			}
			if noStart || *dir != agent.DefaultDir {
				tell("Its agent was not started.")
				return nil
			}
			lasting, err := startService(c.Context())
			if err != nil {
				return exit(exitFailed, "this machine is the node %s, and its agent can't be started: %w", token.Node, err)
			}
			tell("Its agent runs.")
			if !lasting {
				tell("Its unit is gone after the next boot; a deployment brings it for good.")
			}
			return nil
		},
	}
	c.Flags().DurationVar(&timeout, "timeout", 0, "how long to wait for the operator (default: for as long as the token is good)")
	c.Flags().BoolVar(&noStart, "no-start", false, "don't start the agent")
	return c
}

// readToken gives the text of a token that was given as a word, in a file, or on the first line of standard input, which
// need not end after it.
func readToken(in io.Reader, from string) (string, error) {
	switch {
	case from == "-":
		line, err := bufio.NewReader(io.LimitReader(in, protocol.MaxToken+1)).ReadString('\n')
		if err != nil && !errors.Is(err, io.EOF) {
			return "", fmt.Errorf("can't read the token: %w", err)
		}
		if strings.TrimSpace(line) == "" {
			return "", errors.New("there is no token on standard input")
		}
		return line, nil
	case protocol.LooksLikeToken(from):
		return from, nil
	}
	data, err := atomicfile.Read(from, protocol.MaxToken)
	if errors.Is(err, os.ErrNotExist) {
		return "", fmt.Errorf("%.64q is neither a token nor a file that exists", from)
	} else if err != nil {
		return "", fmt.Errorf("can't read the token: %w", err)
	}
	return string(data), nil
}
