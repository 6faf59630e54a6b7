package lab

import (
	"bytes"
	"context"
	_ "embed"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

//go:embed node.sh
var nodeScript string

// bootTimeout bounds a boot when the caller's context doesn't: it takes 2 s, or 10 when twenty start at once, and several times
// that on a machine that has other things to do.
const bootTimeout = 3 * time.Minute

// What systemd as PID 1 of a container takes as a press of the button (SIGRTMIN+4, +5 in systemd(1)).
const (
	signalPowerOff = syscall.Signal(34 + 4)
	signalReboot   = syscall.Signal(34 + 5)
)

// Boot starts the node with the disk that it has, and returns when it is up. It does nothing to a node that runs,
// apart from waiting.
func (n *Node) Boot(ctx context.Context) error {
	// Two who boot it at once must not both start it: the second one finds it running.
	unlock, err := lock(ctx, filepath.Join(n.dir(), "boot.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	if n.Running() {
		return n.Ready(ctx)
	}
	if err := n.ensureCable(ctx); err != nil {
		return err
	}
	removeCgroup(n.cgroup())
	if err := os.MkdirAll(n.cgroup(), 0o755); err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	delegate(n.lab.cgroup())
	console, err := os.OpenFile(filepath.Join(n.dir(), "console.log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC, 0o644)
	if err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	defer console.Close()
	mount, err := cgroupMount()
	if err != nil {
		return err
	}
	relative, err := filepath.Rel(mount, n.cgroup())
	if err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	// Not CommandContext: the node outlives this call and, if the lab does, this process.
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "/bin/sh", "-euc", nodeScript, "lab-node")
	cmd.Stdout, cmd.Stderr = console, console
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = []string{
		"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"NODE=" + n.Name, "DIR=" + n.dir(), "CGROUP=" + relative,
		"LOWER=" + lowerdirs(n.lab.state.Layers), "PLAIN=" + n.plainLayers(), "INSTALL=" + installScript,
		"NETNS=" + n.netns(), "ADDRESS=" + n.IP + "/24", "GATEWAY=" + n.lab.HostIP(),
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("node %s: %w", n.Name, err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // only so that it leaves no zombie; the console has its words
		close(exited)
	}()
	return n.ready(ctx, 0, exited)
}

// plainLayers are what the node boots from until it was made a NixOS, or nothing for one that always was.
func (n *Node) plainLayers() string {
	if !n.plain {
		return ""
	}
	return lowerdirs(n.lab.state.PlainLayers)
}

// Ready returns when the node has finished booting and its sshd answers: for a reboot that something else began.
func (n *Node) Ready(ctx context.Context) error {
	return n.ready(ctx, 0, nil)
}

// ready waits for a boot that is not the one of the process `not`.
func (n *Node) ready(ctx context.Context, not int, exited <-chan struct{}) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	state := "no systemd yet"
	for {
		if leader := n.leader(); leader != 0 && leader != not {
			if s := n.systemState(ctx); s != "" {
				state = s
			}
			if state == "running" || state == "degraded" {
				break
			}
		}
		if exited == nil && !n.Running() {
			return fmt.Errorf("node %s is not running; start it first", n.Name)
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("node %s: waiting for it to boot (%s): %w\n%s", n.Name, state, ctx.Err(), n.Trouble())
		case <-exited:
			return fmt.Errorf("node %s: it did not boot:\n%s", n.Name, n.consoleTail())
		case <-time.After(20 * time.Millisecond):
		}
	}
	return n.awaitSSH(ctx)
}

// systemState is what `systemctl is-system-running` says, once the boot is over or a second has passed; empty before
// systemd listens. The bound is for a system that goes down: a client that comes when its PID 1 has already told
// everybody to end gets neither that signal nor an answer, and the shutdown waits a minute and a half for it.
func (n *Node) systemState(ctx context.Context) string {
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	out, _ := n.Command(ctx, "systemctl", "is-system-running", "--wait").Output()
	return strings.TrimSpace(string(out))
}

// awaitSSH returns when sshd greets. It asks from within the node, so that it works on one that is cut off.
func (n *Node) awaitSSH(ctx context.Context) error {
	for {
		var greeting []byte
		err := inNetwork(n.netns(), func() error {
			conn, err := dialTimeout(ctx, n.IP+":22")
			if err != nil {
				return err
			}
			defer conn.Close()
			greeting = make([]byte, 4)
			_, err = conn.Read(greeting)
			return err
		})
		if err == nil && bytes.HasPrefix(greeting, []byte("SSH-")) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("node %s: waiting for sshd: %w (last: %v)\n%s", n.Name, ctx.Err(), err, n.Trouble())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// Stop shuts the node down in good order.
func (n *Node) Stop(ctx context.Context) error {
	if !n.Running() {
		return nil
	}
	if err := n.signal(signalPowerOff); err != nil {
		return err
	}
	if err := awaitEmpty(ctx, n.cgroup(), nil); err != nil {
		return fmt.Errorf("node %s: shutting down: %w", n.Name, err)
	}
	return nil
}

// Kill cuts the power: every process is gone at once and nothing is told. The disk stays as it is.
func (n *Node) Kill(ctx context.Context) error {
	if err := killCgroup(ctx, n.cgroup()); err != nil {
		return fmt.Errorf("node %s: power cut: %w", n.Name, err)
	}
	return nil
}

// Reboot reboots the node in good order and returns when it is up again.
func (n *Node) Reboot(ctx context.Context) error {
	before := n.leader()
	if err := n.signal(signalReboot); err != nil {
		return err
	}
	return n.ready(ctx, before, nil)
}

func (n *Node) signal(s syscall.Signal) error {
	leader := n.leader()
	if leader == 0 {
		return fmt.Errorf("node %s is not running; start it first", n.Name)
	}
	if err := syscall.Kill(leader, s); err != nil && !errors.Is(err, syscall.ESRCH) {
		return fmt.Errorf("node %s: signal %d: %w", n.Name, s, err)
	}
	return nil
}

// Trouble is what there is to be seen of a node that does not do what it should: what its systemd waits for, which of its units
// failed, the end of its console, and how busy this machine is.
func (n *Node) Trouble() string {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	var all strings.Builder
	for _, list := range [][]string{{"list-jobs"}, {"list-units", "--failed"}} {
		out, err := n.Command(ctx, append([]string{"systemctl", "--no-pager", "--no-legend"}, list...)...).CombinedOutput()
		fmt.Fprintf(&all, "systemctl %s: %s", strings.Join(list, " "), bytes.TrimSpace(out))
		if err != nil {
			fmt.Fprintf(&all, " (%v)", err)
		}
		all.WriteByte('\n')
	}
	load, _ := os.ReadFile("/proc/loadavg")
	fmt.Fprintf(&all, "this machine's load: %sconsole:\n%s", load, n.consoleTail())
	return all.String()
}

func (n *Node) consoleTail() string {
	data, err := os.ReadFile(filepath.Join(n.dir(), "console.log"))
	if err != nil {
		return err.Error()
	}
	const tail = 4000
	return string(bytes.TrimSpace(data[max(0, len(data)-tail):]))
}
