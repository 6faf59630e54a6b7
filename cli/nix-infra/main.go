// Command nix-infra deploys to and runs a fleet of NixOS machines.
package main

import (
	"context"
	"os"
	"os/signal"
	"syscall"

	"github.com/nix-infra/nix-infra/cli"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	// A second Ctrl-C ends the program even where something does not listen to the first.
	context.AfterFunc(ctx, stop)
	os.Exit(cli.Main(ctx, cli.Args(os.Args), os.Stdin, os.Stdout, os.Stderr, os.Environ()))
}
