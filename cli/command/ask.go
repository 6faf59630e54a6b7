package command

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/protocol"
)

// asked is who did not answer a question to some nodes, or not as hoped.
type asked struct {
	silent []string
	failed []error // a line for each node that refused, or whose answer can't be read
}

// ask asks nodes and hands each good answer on, as they come.
func ask[T any](ctx context.Context, s *session, names []string, action protocol.Action, payload any, patience time.Duration, each func(node string, answer T)) (asked, error) {
	var r asked
	waiting, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	silent, err := client.AskEach(waiting, s.Client, names, action, payload, func(node string, answer T, err error) {
		if err != nil {
			r.failed = append(r.failed, fmt.Errorf("%s: %w", node, err))
			return
		}
		each(node, answer)
	})
	if err == nil {
		err = ctx.Err()
	}
	r.silent = silent
	return r, err
}

// outcome is how a command ends that needed the answers of all.
func (r asked) outcome() error {
	errs := r.failed
	if len(r.silent) > 0 {
		errs = append(errs, errors.New("no answer from "+some(r.silent)))
	}
	switch {
	case len(errs) == 0:
		return nil
	case len(r.failed) == 0:
		return &outcome{Unanswered, errs[0]}
	case len(errs) == 1:
		return &outcome{SomeFailed, errs[0]}
	}
	return &outcome{SomeFailed, &errorList{"not all nodes did it:", errs}}
}

// namesOf are the names of nodes, in their order.
func namesOf(chosen []protocol.NodeState) []string {
	names := make([]string, len(chosen))
	for i := range chosen {
		names[i] = chosen[i].Name
	}
	return names
}

// someNodes wants selectors of a command that should not mean all nodes by saying nothing.
func someNodes(question, example string) cobra.PositionalArgs {
	return func(_ *cobra.Command, args []string) error {
		if strings.TrimSpace(strings.Join(args, "")) == "" {
			return fmt.Errorf("%s Name them (nix-infra %s web1 @db), or say all", question, example)
		}
		return nil
	}
}
