package command

import (
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/mcp/dev"
	mcpsession "github.com/nix-infra/nix-infra/cli/mcp/session"
)

// devFlags are what the development server alone takes.
type devFlags struct {
	lab          string
	allowPrivate bool
}

func (d *devFlags) register(f *pflag.FlagSet) {
	f.StringVar(&d.lab, "lab", "", "the lab's `program`, which boots throw-away nodes on this machine (nix-infra-lab, where that is on PATH)")
	f.BoolVar(&d.allowPrivate, "allow-private", false, "let nix-prefetch-url ask machines of private networks, and this one")
}

const superviseCommand = "supervise"

// addDev gives a server the tools of development. The caller ends with what it gives back, which ends what they began.
func (a *app) addDev(s *mcp.Server, flags devFlags) (end func(), err error) {
	if flags.lab != "" {
		file, err := filepath.Abs(flags.lab)
		if err != nil {
			return nil, err
		}
		if info, err := os.Stat(file); err != nil || !info.Mode().IsRegular() || info.Mode()&0o111 == 0 {
			return nil, fmt.Errorf("--lab %s: that is no program", flags.lab)
		}
		flags.lab = file
	}
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	d := dev.Add(s, dev.Options{
		Dir: a.dir, Open: a.open, Lab: flags.lab, AllowPrivate: flags.allowPrivate,
		Supervisor: []string{self, "mcp", superviseCommand},
	})
	return d.Close, nil
}

// superviseSession is the process above a session of the development server.
func superviseSession() *cobra.Command {
	return &cobra.Command{
		Use:                superviseCommand + " PROGRAM [ARGUMENT…]",
		Short:              "Run a program for nix-infra mcp dev, which ends all that comes of it",
		Hidden:             true,
		DisableFlagParsing: true,
		PersistentPreRunE:  func(*cobra.Command, []string) error { return nil },
		RunE: func(_ *cobra.Command, argv []string) error {
			if status := mcpsession.Supervise(argv); status != 0 {
				return &outcome{status: status}
			}
			return nil
		},
	}
}
