//go:build linux

// Command crashagent is the agent, but it kills itself with SIGKILL at the journalled step that
// /run/crash-at names, once. While /run/crash-stay exists it does not come up again after that.
package main

import (
	"context"
	"log/slog"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	"github.com/coreos/go-systemd/v22/daemon"

	"github.com/nix-infra/nix-infra/agent"
)

func main() {
	if exists("/run/crashed") && exists("/run/crash-stay") {
		os.Exit(1)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	err := agent.Run(ctx, agent.Options{
		Dir:  "/var/lib/nix-infra-agent",
		Log:  slog.New(slog.NewTextHandler(os.Stderr, nil)),
		Step: crash,
		Notify: func(line string) {
			if _, err := daemon.SdNotify(false, line); err != nil {
				slog.Warn(err.Error())
			}
		},
		Watchdog: time.Minute, // as in the unit
	})
	if err != nil {
		slog.Error(err.Error())
		os.Exit(1)
	}
}

func crash(step string) {
	at, err := os.ReadFile("/run/crash-at")
	if err != nil || strings.TrimSpace(string(at)) != step || exists("/run/crashed") {
		return
	}
	if err := os.WriteFile("/run/crashed", []byte(step), 0o644); err != nil {
		panic(err)
	}
	if err := syscall.Kill(os.Getpid(), syscall.SIGKILL); err != nil {
		panic(err)
	}
	select {} // the signal is on its way
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
