package controller

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"
	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

const (
	maxAnswer   = 1 << 20
	stopWithin  = 10 * time.Second
	probeWithin = 5 * time.Second
)

// Command is the program nix-infra-controller.
func Command() *cobra.Command {
	dir := os.Getenv("STATE_DIRECTORY")
	if dir == "" {
		dir = DefaultDir
	}
	var config string
	start := func(cmd *cobra.Command, _ []string) error {
		cfg, err := LoadConfig(config, dir)
		if err != nil {
			return err
		}
		return serve(cmd.Context(), cfg, slog.New(slog.NewTextHandler(cmd.ErrOrStderr(), nil)))
	}
	root := &cobra.Command{
		Use:   "nix-infra-controller",
		Short: "Carries the messages of a fleet and keeps its desired state",
		Long: `Carries the messages of a fleet and keeps its desired state.

A controller is enrolled once: it makes a request, the operator answers it, it loads the answer.`,
		Example: `  nix-infra-controller request --name ctl1 > request.json
  nix-infra-controller load answer.json
  nix-infra-controller run`,
		Args: cobra.NoArgs, RunE: start, SilenceUsage: true, SilenceErrors: true,
	}
	flags := root.PersistentFlags()
	flags.StringVar(&dir, "dir", dir, "where the controller keeps its state (also $STATE_DIRECTORY)")
	flags.StringVar(&config, "config", "", "configuration file (default DIR/controller.yaml)")
	root.AddCommand(
		&cobra.Command{
			Use: "run", Short: "Run the controller (the default)", Args: cobra.NoArgs, RunE: start,
			Example: "  nix-infra-controller run --dir /var/lib/nix-infra-controller",
		},
		requestCommand(&dir), loadCommand(&dir),
		&cobra.Command{
			Use: "check-config", Short: "Check the configuration and the enrolment, and start nothing", Args: cobra.NoArgs,
			Example: "  nix-infra-controller check-config --config ./controller.yaml",
			RunE: func(cmd *cobra.Command, _ []string) error {
				if _, err := LoadConfig(config, dir); err != nil {
					return err
				}
				m, err := (machine.Home{Dir: dir, Role: protocol.Controller}).Open()
				if err != nil {
					return err
				}
				_, err = fmt.Fprintf(cmd.OutOrStdout(), "ok: controller %s\n", m.Name)
				return err
			},
		},
		&cobra.Command{
			Use: "version", Short: "Print the version", Args: cobra.NoArgs, Example: "  nix-infra-controller version",
			RunE: func(cmd *cobra.Command, _ []string) error {
				_, err := fmt.Fprintf(cmd.OutOrStdout(), "nix-infra-controller %s (protocol %d)\n", protocol.Build(), protocol.Version)
				return err
			},
		},
	)
	return root
}

func requestCommand(dir *string) *cobra.Command {
	var name string
	cmd := &cobra.Command{
		Use: "request", Short: "Make this controller's keys and print its enrolment request", Args: cobra.NoArgs,
		Example: "  nix-infra-controller request --name ctl1 > request.json",
		RunE: func(cmd *cobra.Command, _ []string) error {
			r, err := (machine.Home{Dir: *dir, Role: protocol.Controller}).Request(name)
			if err != nil {
				return fmt.Errorf("can't make a request in %s: %w", *dir, err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "%s\n", protocol.Encode(r))
			return err
		},
	}
	cmd.Flags().StringVar(&name, "name", "", "the controller's name, one DNS label")
	if err := cmd.MarkFlagRequired("name"); err != nil {
		panic(err) // the flag is defined on the line before
	}
	return cmd
}

func loadCommand(dir *string) *cobra.Command {
	return &cobra.Command{
		Use: "load [FILE|-]", Short: "Load the operator's answer to the enrolment request", Args: cobra.MaximumNArgs(1),
		Example: "  nix-infra-controller load answer.json\n  ssh operator cat answer.json | nix-infra-controller load -",
		RunE: func(cmd *cobra.Command, args []string) error {
			in := cmd.InOrStdin()
			if len(args) == 1 && args[0] != "-" {
				f, err := os.Open(args[0])
				if err != nil {
					return fmt.Errorf("can't read the answer: %w", err)
				}
				defer f.Close()
				in = f
			}
			answer, err := io.ReadAll(io.LimitReader(in, maxAnswer))
			if err != nil {
				return fmt.Errorf("can't read the answer: %w", err)
			}
			a, err := (machine.Home{Dir: *dir, Role: protocol.Controller}).Load(answer)
			if err != nil {
				return fmt.Errorf("can't load the answer into %s: %w", filepath.Clean(*dir), err)
			}
			_, err = fmt.Fprintf(cmd.OutOrStdout(), "enrolled as controller %s; restart it if it runs\n", a.Name)
			return err
		},
	}
}

// serve runs the controller until a signal, and tells systemd how it stands.
func serve(ctx context.Context, cfg Config, log *slog.Logger) error {
	ctx, stop := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer stop()
	c, err := Start(ctx, cfg, log)
	if err != nil {
		return err
	}
	tell(log, daemon.SdNotifyReady)
	watchdog, err := daemon.SdWatchdogEnabled(false)
	if err != nil {
		log.Warn("systemd's watchdog is not understood", "error", err)
	}
	if watchdog > 0 {
		go c.feed(watchdog / 2)
	}
	select {
	case <-c.Done():
		return c.Wait()
	case <-ctx.Done():
	}
	stop() // a second signal ends it at once
	tell(log, daemon.SdNotifyStopping)
	stopped := make(chan error, 1)
	go func() { stopped <- c.Stop() }()
	select {
	case err := <-stopped:
		return err
	case <-time.After(stopWithin):
		return fmt.Errorf("not stopped after %s; what was acknowledged is safe", stopWithin)
	}
}

func tell(log *slog.Logger, state string) {
	if _, err := daemon.SdNotify(false, state); err != nil {
		log.Warn("can't notify systemd", "error", err)
	}
}

// feed keeps systemd's watchdog quiet for as long as broker and etcd answer.
func (c *Controller) feed(every time.Duration) {
	tick := time.NewTicker(every)
	defer tick.Stop()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), min(every, probeWithin))
		err := c.Healthy(ctx)
		cancel()
		if err != nil {
			c.log.Error("not healthy; systemd will restart this controller", "error", err)
		} else {
			tell(c.log, daemon.SdNotifyWatchdog)
		}
		select {
		case <-c.done:
			return
		case <-tick.C:
		}
	}
}
