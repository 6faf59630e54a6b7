//go:build linux

// Command swarm is thousands of real agents against a real controller in a process of its own, with TLS, JWTs and
// signatures. Only the machines are stand-ins: a build takes no time, and an activation changes a word in memory. It
// measures what it takes to ask all of them, beside what SSH takes on the same machine, and through an MCP server, and what
// a deploy to all of them takes by the real command line, and prints tables. It never fails on a time.
//
//	go run ./e2e/swarm
//	go run ./e2e/swarm -ssh 0 -queries 1000 -mcp 0 -deploys 0
//
// Start here; queries.go, ssh.go, assistant.go and deploys.go are what is measured, measure.go reads the clocks, fleet.go makes the
// fleet, agents.go runs the processes of its agents, agent.go is one of its nodes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// plan is what is measured.
type plan struct {
	ssh     int   // execs at each concurrency; 0: none
	queries []int // sizes of the fleet; none: no queries
	mcp     int   // nodes that an assistant asks about; 0: none
	deploys int   // nodes; 0: no deploys
	dir     string
	profile string
}

func main() {
	if len(os.Args) > 1 && os.Args[1] == agentsCommand {
		end(runAgents(os.Args[2:]))
	}
	p := plan{queries: []int{100, 1000, 10_000}}
	flag.IntVar(&p.ssh, "ssh", 200, "run so many `execs` by SSH, at each concurrency; 0: none")
	flag.Func("queries", "ask fleets of so many `nodes`, such as 100,1000 (default 100,1000,10000); 0: don't", p.setQueries)
	flag.IntVar(&p.mcp, "mcp", 1000, "have an assistant ask about so many `nodes`; 0: none")
	flag.IntVar(&p.deploys, "deploys", 1000, "deploy to so many `nodes`; 0: don't")
	flag.StringVar(&p.dir, "dir", "", "where to put the fleet's files, some 100 KiB a node (default: /dev/shm, else the folder for temporary files)")
	flag.StringVar(&p.profile, "cpuprofile", "", "write the CPU profiles of the agents' processes to this file, and FILE.1 and so on")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	end(p.run(ctx))
}

func end(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, "swarm:", err)
		os.Exit(1)
	}
	os.Exit(0)
}

// setQueries reads sizes, which grow.
func (p *plan) setQueries(s string) error {
	p.queries = nil
	for _, word := range strings.Split(s, ",") {
		n, err := strconv.Atoi(word)
		if err != nil || n < 0 {
			return errors.New("expected numbers with commas between them")
		}
		if n > 0 {
			p.queries = append(p.queries, n)
		}
	}
	slices.Sort(p.queries)
	return nil
}

func (p *plan) run(ctx context.Context) error {
	if p.dir == "" {
		p.dir = os.TempDir()
		if _, err := os.Stat("/dev/shm"); err == nil {
			p.dir = "/dev/shm"
		}
	}
	dir, err := os.MkdirTemp(p.dir, "nix-infra-swarm-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	fmt.Printf("%s, %d cores, %s\n", time.Now().UTC().Format(time.DateOnly), runtime.NumCPU(), runtime.Version())
	exec := time.Duration(0)
	if p.ssh > 0 {
		fmt.Println()
		if exec, err = measureSSH(ctx, os.Stdout, dir, p.ssh); errors.Is(err, errNoSSHD) {
			fmt.Println(err)
		} else if err != nil {
			return err
		}
	}
	if len(p.queries) > 0 {
		if err := p.measure(ctx, dir+"/queries", p.queries, func(f *fleet) error { return f.measureQueries(ctx, os.Stdout, exec) }); err != nil {
			return err
		}
	}
	if p.mcp > 0 {
		if err := p.measure(ctx, dir+"/mcp", []int{p.mcp}, func(f *fleet) error { return f.measureAssistant(ctx, os.Stdout) }); err != nil {
			return err
		}
	}
	if p.deploys > 0 {
		return p.measure(ctx, dir+"/deploys", []int{p.deploys}, func(f *fleet) error { return f.measureDeploys(ctx, os.Stdout) })
	}
	return nil
}

// measure makes a fleet and has it measured at each of its sizes.
func (p *plan) measure(ctx context.Context, dir string, sizes []int, measure func(*fleet) error) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	f, err := newFleet(ctx, dir)
	if err != nil {
		return err
	}
	defer f.close()
	for _, n := range sizes {
		more := n - len(f.nodes)
		enrolled, online, err := f.grow(ctx, n)
		if err != nil {
			return err
		}
		fmt.Printf("\n%d agents in %d processes; %d more were enrolled in %s and all online %s after their start\n", n, len(f.agents), more,
			enrolled.Round(100*time.Millisecond), online.Round(100*time.Millisecond))
		if err := f.profile(p.profile); err != nil {
			return err
		}
		if err := measure(f); err != nil {
			return err
		}
	}
	return nil
}
