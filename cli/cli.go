// Package cli is the program nix-infra, startable from a test.
package cli

import (
	"context"
	"io"
	"path/filepath"
	"strings"

	"github.com/nix-infra/nix-infra/cli/command"
)

// Args are the arguments of a command line with the program's name in front. The MCP servers have a name each: as
// nix-infra-cluster-mcp, the program is nix-infra mcp cluster.
func Args(argv []string) []string {
	if len(argv) == 0 {
		return nil
	}
	name, args := filepath.Base(argv[0]), argv[1:]
	if server, ok := strings.CutSuffix(strings.TrimPrefix(name, "nix-infra-"), "-mcp"); ok && strings.HasPrefix(name, "nix-infra-") {
		return append([]string{"mcp", server}, args...)
	}
	return args
}

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
