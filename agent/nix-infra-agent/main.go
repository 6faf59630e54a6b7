// Command nix-infra-agent is the agent of package agent, as a service and for the person at the
// machine.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := command(os.Stdin, os.Stdout, os.Stderr).ExecuteContext(ctx); err != nil {
		fmt.Fprintf(os.Stderr, "nix-infra-agent: %s\n", strings.ReplaceAll(err.Error(), "\n", "; "))
		var e *exitError
		if errors.As(err, &e) {
			os.Exit(e.status)
		}
		os.Exit(1)
	}
}
