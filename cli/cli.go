// Package cli is the program nix-infra, startable from a test.
package cli

import (
	"context"
	"io"
	"strings"

	"github.com/nix-infra/nix-infra/cli/command"
)

// Main runs one command line. args come without the program's name, env is in the form of os.Environ,
// and cancelling ctx is Ctrl-C. It returns the exit status: 0 all succeeded, 1 some failed, 2 refused
// or bad input, 3 some did not answer or are offline, 130 interrupted.
func Main(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer, env []string) int {
	vars := make(map[string]string, len(env))
	for _, e := range env {
		if name, value, ok := strings.Cut(e, "="); ok {
			vars[name] = value
		}
	}
	return command.Run(ctx, args, command.Environment{
		Stdin: stdin, Stdout: stdout, Stderr: stderr,
		Getenv: func(name string) string { return vars[name] },
	})
}
