//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"text/tabwriter"
	"time"
)

// deploys are the deploys that are measured, one after the other.
var deploys = []struct {
	name string
	args []string
}{
	{"deploy, the first one", nil},
	{"deploy that changes nothing", nil},
	{"the same in waves of 10%", []string{"--batch=10%"}},
	{"the same, one canary, then 25%", []string{"--canary=1", "--batch=25%"}},
}

// deployment is what one command cost.
type deployment struct {
	took       time.Duration // from the command's start to its end
	controller time.Duration // CPU
	cli        time.Duration // CPU
	agents     time.Duration // CPU of all of them
	peak       int64         // bytes that the controller had resident at most
	revisions  int64         // of etcd
}

const (
	quiet     = 3 * time.Second        // after which nobody works on the last deploy any more: the agents' audit records are the last
	etcdFlush = 500 * time.Millisecond // more than etcd takes to commit what was written to its file (embed's BatchInterval)
)

// measureDeploys prints a table of them.
func (f *fleet) measureDeploys(ctx context.Context, out io.Writer) error {
	table := tabwriter.NewWriter(out, 0, 0, 2, ' ', 0)
	fmt.Fprintln(table, "\tTIME\tCPU: CONTROLLER\tCLI\tAGENTS\tCONTROLLER PEAK\tETCD REVISIONS")
	for _, d := range deploys {
		m, err := f.deploy(ctx, d.args...)
		if err != nil {
			return errors.Join(fmt.Errorf("%s: %w", d.name, err), table.Flush())
		}
		fmt.Fprintf(table, "%s\t%.2f s\t%.2f s\t%.2f s\t%.2f s\t%d MiB\t%d\n", d.name, m.took.Seconds(),
			m.controller.Seconds(), m.cli.Seconds(), m.agents.Seconds(), m.peak>>20, m.revisions)
	}
	return table.Flush()
}

// deploy deploys to all nodes, which must succeed.
func (f *fleet) deploy(ctx context.Context, args ...string) (*deployment, error) {
	pid := f.controller.Process.Pid
	time.Sleep(quiet)
	before, err := f.revision()
	if err != nil {
		return nil, err
	}
	// 5 resets the peak (proc(5)).
	if err := os.WriteFile(fmt.Sprintf("/proc/%d/clear_refs", pid), []byte("5"), 0); err != nil {
		return nil, err
	}
	cmd := f.cli(ctx, append([]string{"deploy", "all", "--settle", "1s"}, args...)...)
	used, began := f.used(), time.Now()
	if _, err := f.run(cmd); err != nil {
		return nil, err
	}
	took := time.Since(began)
	used = f.used().since(used)
	m := &deployment{took: took, controller: used.controller, agents: used.agents,
		cli: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), peak: field(pid, "VmHWM")}
	time.Sleep(etcdFlush)
	after, err := f.revision()
	m.revisions = after - before
	return m, err
}
