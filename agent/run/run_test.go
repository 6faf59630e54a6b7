package run

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
)

// children runs programs as children of the test: what Systemd does, without its limits, for tests of all the rest.
type children struct{}

func (children) Run(ctx context.Context, s Spec, stdout, stderr *os.File) (protocol.Ending, error) {
	c := exec.CommandContext(ctx, s.Argv[0], s.Argv[1:]...)
	c.Env, c.Stdout, c.Stderr = environ(s.Env), stdout, stderr
	c.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	c.Cancel = func() error { return syscall.Kill(-c.Process.Pid, syscall.SIGKILL) }
	if err := c.Start(); err != nil {
		return protocol.Ending{}, err
	}
	_ = c.Wait() // the state says it
	_ = syscall.Kill(-c.Process.Pid, syscall.SIGKILL)
	switch code := c.ProcessState.ExitCode(); {
	case ctx.Err() != nil:
		return protocol.Ending{Exit: -1, Result: protocol.ResultEnded}, nil
	case code != 0:
		return protocol.Ending{Exit: code, Result: protocol.ResultExit}, nil
	}
	return protocol.Ending{Result: protocol.ResultSuccess}, nil
}

func TestOutputAndStatus(t *testing.T) {
	d := perform(t.Context(), children{}, shell("echo out; echo err >&2; exit 4"))
	if d.err != nil || d.stdout != "out\n" || d.stderr != "err\n" || d.ending.Exit != 4 {
		t.Errorf("%v", d)
	}
}

// TestShortOutputIsOnePart: what ends soon is told of with its end, and not before.
func TestShortOutputIsOnePart(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput(1<<20, false)
		go func() {
			_ = o.deliver(func(p protocol.Output) error { t.Errorf("%+v", p); return nil })
		}()
		o.stdout([]byte("out\n"))
		o.stderr([]byte("err\n"))
		time.Sleep(gatherTime / 2)
		o.close()
		synctest.Wait()
		if last := o.take(); string(last.Stdout) != "out\n" || string(last.Stderr) != "err\n" {
			t.Errorf("%+v", last)
		}
	})
}

// TestOutputIsGathered: many small writes make few parts, which come while it runs, in their order.
func TestOutputIsGathered(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		o := newOutput(1<<20, false)
		var parts []string
		go func() {
			_ = o.deliver(func(p protocol.Output) error { parts = append(parts, string(p.Stdout)); return nil })
		}()
		want := ""
		for i := range 300 {
			line := fmt.Sprintf("line %d\n", i)
			o.stdout([]byte(line))
			want += line
			time.Sleep(time.Millisecond)
		}
		time.Sleep(gatherTime)
		o.close()
		synctest.Wait()
		if most := int(300*time.Millisecond/gatherTime) + 1; strings.Join(parts, "") != want || len(parts) < most/2 || len(parts) > most {
			t.Errorf("%d parts: %q", len(parts), parts)
		}
	})
}

// TestOutputComesWhileItRuns: what was written is given out although nothing follows, and a silent run says that it runs.
func TestOutputComesWhileItRuns(t *testing.T) {
	for name, c := range map[string]struct{ text, want string }{
		"written": {"echo here; exec sleep 1000", "here\n"},
		"silent":  {"exec sleep 1000", ""},
	} {
		ctx, end := context.WithCancelCause(t.Context())
		var first *protocol.Output
		err := Run(ctx, children{}, Spec{Argv: []string{"/bin/sh", "-c", c.text}, Output: 1000}, func(o protocol.Output) error {
			if first == nil {
				first = &o
				end(errors.New("enough"))
			}
			if o.Ended != nil && (o.Ended.Result != protocol.ResultEnded || o.Ended.Reason != "enough") {
				t.Errorf("%s: %+v", name, o.Ended)
			}
			return nil
		})
		if err != nil || first == nil || string(first.Stdout) != c.want || first.Ended != nil {
			t.Errorf("%s: %v %+v", name, err, first)
		}
	}
}

func TestOutputLimit(t *testing.T) {
	s := shell("head -c 300000 /dev/zero | tr '\\0' o; head -c 100000 /dev/zero | tr '\\0' e >&2; echo the end")
	s.Output = 350_000
	d := perform(t.Context(), children{}, s)
	given := len(d.stdout) + len(d.stderr)
	if d.err != nil || given != 350_000 || d.dropped != 300_000+100_000+8-350_000 || d.ending.Exit != 0 {
		t.Errorf("%d bytes given out, %d dropped: %+v %v", given, d.dropped, d.ending, d.err)
	}
}

// TestPartsAreBounded: however fast it writes, and however slowly that is taken, nothing is lost, no part is larger than
// it may be, and what runs waits.
func TestPartsAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const size = 1 << 20
		o := newOutput(1<<30, false)
		gate := make(chan struct{})
		got, largest := 0, 0
		go func() {
			_ = o.deliver(func(p protocol.Output) error {
				<-gate
				got += len(p.Stdout)
				largest = max(largest, len(p.Stdout))
				return nil
			})
		}()
		written := 0
		go func() {
			for range size / readSize {
				o.stdout(make([]byte, readSize))
				written += readSize
			}
		}()
		time.Sleep(time.Hour)
		synctest.Wait()
		if got != 0 || written > 2*protocol.OutputChunk { // a part that is under way, and the next one
			t.Errorf("%d bytes were taken, and %d written", got, written)
		}
		close(gate)
		time.Sleep(time.Hour)
		o.close()
		synctest.Wait()
		if got != size || largest > protocol.OutputChunk || largest < protocol.OutputChunk/2 {
			t.Errorf("%d bytes, the largest part %d", got, largest)
		}
	})
}

// TestSlowlyTaken: what a program has written when it ends is given out, whenever that is taken.
func TestSlowlyTaken(t *testing.T) {
	const size = protocol.OutputChunk + 2*readSize // more than one part, the rest of which finds room in the pipe
	ended := make(chan struct{})
	got := 0
	err := Run(t.Context(), told{children{}, ended}, Spec{Argv: []string{"/bin/sh", "-c", fmt.Sprintf("head -c %d /dev/zero", size)}, Output: 1 << 30}, func(o protocol.Output) error {
		<-ended
		time.Sleep(50 * time.Millisecond)
		got += len(o.Stdout)
		return nil
	})
	if err != nil || got != size {
		t.Errorf("%v: %d bytes of %d", err, got, size)
	}
}

// told closes a channel when what it ran has ended.
type told struct {
	Host
	ended chan struct{}
}

func (h told) Run(ctx context.Context, s Spec, stdout, stderr *os.File) (protocol.Ending, error) {
	defer close(h.ended)
	return h.Host.Run(ctx, s, stdout, stderr)
}

// TestUnsentOutputEndsTheRun: where parts can't be sent any more, nothing goes on for nobody.
func TestUnsentOutputEndsTheRun(t *testing.T) {
	lost := errors.New("the connection is gone")
	begun := time.Now()
	err := Run(t.Context(), children{}, Spec{Argv: []string{"/bin/sh", "-c", "yes; sleep 1000"}, Output: 1 << 30}, func(protocol.Output) error { return lost })
	if !errors.Is(err, lost) || time.Since(begun) > 30*time.Second {
		t.Errorf("after %v: %v", time.Since(begun), err)
	}
}

// TestHeldPipe: a process that got away holds the pipe, and is not waited for.
func TestHeldPipe(t *testing.T) {
	d := perform(t.Context(), children{}, shell("exec 4>&1; read pid < <(setsid sh -c 'echo $$; exec sleep 1000'); echo $pid"))
	pid, err := strconv.Atoi(strings.TrimSpace(d.stdout))
	if d.err != nil || err != nil {
		t.Fatalf("%v: %v", err, d)
	}
	if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
		t.Errorf("it was waited for: %v", err)
	}
}

func TestStartError(t *testing.T) {
	parts := 0
	err := Run(t.Context(), children{}, Spec{Argv: []string{"/nowhere/at/all"}}, func(protocol.Output) error { parts++; return nil })
	if !errors.Is(err, os.ErrNotExist) || parts != 0 {
		t.Errorf("%v, %d parts", err, parts)
	}
}

// TestSealed: stdout of a success is given out sealed, and in no other way; of a failure it is not given out at all.
func TestSealed(t *testing.T) {
	own, err := nkeys.CreateCurveKeys()
	if err != nil {
		t.Fatal(err)
	}
	once, err := nkeys.CreateCurveKeys()
	if err != nil {
		t.Fatal(err)
	}
	to, from := public(t, once), public(t, own)
	seal := func(output []byte) ([]byte, error) { return own.Seal(output, to) }
	run := func(text string) (parts []protocol.Output, err error) {
		err = Run(t.Context(), children{}, Spec{Argv: []string{"/bin/bash", "-c", text}, Output: 1000, Seal: seal}, func(o protocol.Output) error {
			parts = append(parts, o)
			return nil
		})
		return parts, err
	}
	clear := func(parts []protocol.Output) (stderr string) {
		for _, p := range parts {
			if len(p.Stdout) > 0 {
				t.Errorf("stdout is given out: %q", p.Stdout)
			}
			stderr += string(p.Stderr)
		}
		return stderr
	}
	parts, err := run("echo hush; echo log >&2")
	if err != nil || clear(parts) != "log\n" {
		t.Fatalf("%v %+v", err, parts)
	}
	last := parts[len(parts)-1]
	if opened, err := once.Open(last.Sealed, from); err != nil || string(opened) != "hush\n" || last.Ended.Exit != 0 {
		t.Errorf("%q %v", opened, err)
	}
	if bytes.Contains(last.Sealed, []byte("hush")) {
		t.Error("it is not sealed")
	}
	parts, err = run("echo hush; exit 1")
	if last := parts[len(parts)-1]; err != nil || clear(parts) != "" || last.Sealed != nil || last.Ended.Exit != 1 {
		t.Errorf("of a failure: %v %+v", err, parts)
	}
	parts, err = run("head -c 300000 /dev/zero")
	if err == nil || !strings.Contains(err.Error(), "more than 262144 bytes") || clear(parts) != "" {
		t.Errorf("of too much: %v %+v", err, parts)
	}
	for _, p := range parts {
		if p.Ended != nil || p.Sealed != nil {
			t.Errorf("of too much: %+v", p)
		}
	}
}

func public(t *testing.T, key nkeys.KeyPair) string {
	t.Helper()
	p, err := key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func TestProgram(t *testing.T) {
	dir := t.TempDir()
	t.Setenv("PATH", "relative:"+dir)
	for name, mode := range map[string]os.FileMode{"tool": 0o755, "text": 0o644} {
		if err := os.WriteFile(dir+"/"+name, nil, mode); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("tool", dir+"/other-name"); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{"tool": dir + "/tool", "other-name": dir + "/other-name", dir + "/tool": dir + "/tool"} {
		if got, err := Program(name); err != nil || got != want {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
	for _, name := range []string{"", "text", "missing", "./tool", "../tool", dir, dir + "/text", dir + "/missing"} {
		var refusal *protocol.Refusal
		if got, err := Program(name); !errors.As(err, &refusal) {
			t.Errorf("%s: %q %v", name, got, err)
		}
	}
}
