//go:build linux

// Command swarm is thousands of real agents in one process, against a real controller in a process of its own, with
// TLS, JWTs and signatures. Only the machines are stand-ins: a build takes no time, and an activation changes a word in
// memory. It measures what a deploy to all of them takes, by the real command line, and prints a table.
//
//	go run ./e2e/swarm -n 1000
//
// Start here; fleet.go makes the fleet, agent.go is one of its nodes, measure.go reads the clocks.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"runtime/pprof"
	"syscall"
	"text/tabwriter"
	"time"
)

// scenarios are the deploys that are measured, one after the other.
var scenarios = []struct {
	name string
	args []string
}{
	{"deploy, the first one", nil},
	{"deploy that changes nothing", nil},
	{"the same in waves of 10%", []string{"--batch=10%"}},
	{"the same, one canary, then 25%", []string{"--canary=1", "--batch=25%"}},
}

func main() {
	n := flag.Int("n", 1000, "nodes")
	dir := flag.String("dir", "", "where to put the fleet's files, some 100 KiB a node (default: /dev/shm, else the folder for temporary files)")
	profile := flag.String("cpuprofile", "", "write the CPU profile of the agents' process to this file")
	flag.Parse()
	// One heap for thousands of agents: real ones have one each, which is small and hardly ever collected.
	debug.SetGCPercent(400)
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, *n, *dir, *profile); err != nil {
		fmt.Fprintln(os.Stderr, "swarm:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, n int, dir, profile string) error {
	if dir == "" {
		dir = os.TempDir()
		if _, err := os.Stat("/dev/shm"); err == nil {
			dir = "/dev/shm"
		}
	}
	dir, err := os.MkdirTemp(dir, "nix-infra-swarm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	began := time.Now()
	f, err := newFleet(ctx, dir)
	if err != nil {
		return err
	}
	defer f.close()
	if err := f.populate(ctx, n); err != nil {
		return err
	}
	enrolled := time.Since(began)
	if err := f.start(ctx); err != nil {
		return err
	}
	fmt.Printf("%d agents on %d cores: enrolled in %s, all online %s after their start, %d KiB each\n\n", n, runtime.NumCPU(),
		enrolled.Round(100*time.Millisecond), f.online.Round(100*time.Millisecond), memory()>>10/uint64(n))
	if profile != "" {
		file, err := os.Create(profile)
		if err != nil {
			return err
		}
		defer file.Close()
		if err := pprof.StartCPUProfile(file); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	table := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', 0)
	defer table.Flush()
	fmt.Fprintln(table, "\tTIME\tCPU: CONTROLLER\tCLI\tAGENTS\tCONTROLLER PEAK\tETCD REVISIONS")
	for _, s := range scenarios {
		m, err := f.measure(ctx, append([]string{"deploy", "all", "--settle", "1s"}, s.args...)...)
		if err != nil {
			return errors.Join(fmt.Errorf("%s: %w", s.name, err), table.Flush())
		}
		fmt.Fprintf(table, "%s\t%.2f s\t%.2f s\t%.2f s\t%.2f s\t%d MiB\t%d\n", s.name, m.took.Seconds(),
			m.controller.Seconds(), m.cli.Seconds(), m.agents.Seconds(), m.peak>>20, m.revisions)
	}
	return nil
}
