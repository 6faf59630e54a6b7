package nix

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

var hash = strings.Repeat("0", 31) + "z"

func TestCheckStorePath(t *testing.T) {
	for _, good := range []string{StoreDir + "/" + hash + "-nixos-system-n1-25.11", StoreDir + "/" + hash + "-a", StoreDir + "/" + hash + "-a+b_c?d=e.f"} {
		if err := CheckStorePath(good); err != nil {
			t.Error(err)
		}
	}
	for _, bad := range []string{"", "/", StoreDir, StoreDir + "/", StoreDir + "/" + hash, StoreDir + "/" + hash + "-", StoreDir + "/" + hash + "_a",
		StoreDir + "/" + hash + "-a/bin", StoreDir + "/" + hash + "-a/../b", StoreDir + "/../" + hash + "-a", StoreDir + "/" + strings.Repeat("e", 32) + "-a",
		StoreDir + "/" + strings.Repeat("A", 32) + "-a", StoreDir + "/" + hash + "-a\n", StoreDir + "/" + hash + "-a b", "nix/store/" + hash + "-a",
		StoreDir + "/" + hash + "-" + strings.Repeat("a", 300)} {
		if err := CheckStorePath(bad); !errors.Is(err, ErrNotStorePath) {
			t.Errorf("%q was taken for a store path: %v", bad, err)
		}
	}
}

// fakeNix puts a program called nix in front of everything else.
func fakeNix(t *testing.T, script string) {
	t.Helper()
	fake(t, "nix", script)
}

func fake(t *testing.T, program, script string) {
	t.Helper()
	if _, err := os.Stat("/run/current-system/sw/bin/nix"); err == nil {
		t.Skip("a real nix comes first here")
	}
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, program), []byte("#!/bin/sh\n"+script), 0o755); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PATH", dir+":"+os.Getenv("PATH"))
}

func TestBuild(t *testing.T) {
	t.Setenv("HOME", "") // as a service has it
	fakeNix(t, `echo "args: $*" >&2; echo "home: $HOME" >&2; printf 'no newline' >&2; echo /nix/store/`+hash+`-sys`)
	var log []string
	path, err := Build(t.Context(), BuildRequest{Dir: "/tmp/x", Attr: `a."b".c`, OutLink: "/tmp/out", Impure: true, Log: func(l string) { log = append(log, l) }})
	if err != nil || path != StoreDir+"/"+hash+"-sys" {
		t.Fatalf("%q, %v", path, err)
	}
	want := []string{`args: --extra-experimental-features nix-command flakes build path:/tmp/x#a."b".c --print-out-paths --print-build-logs --log-format raw --out-link /tmp/out --impure`,
		"home: /root", "no newline"}
	if fmt.Sprint(log) != fmt.Sprint(want) {
		t.Errorf("log %q", log)
	}
}

// The agent's protection from the kernel's memory killer is not that of what it builds.
func TestBuildIsNotProtected(t *testing.T) {
	const own = "/proc/self/oom_score_adj"
	before, err := os.ReadFile(own)
	if err != nil {
		t.Skip("not on Linux: ", err)
	}
	if err := os.WriteFile(own, []byte("-7"), 0); err != nil {
		t.Skip("only a privileged process can protect itself: ", err)
	}
	defer func() {
		if err := os.WriteFile(own, before, 0); err != nil {
			t.Error(err)
		}
	}()
	fakeNix(t, `i=0; while [ $i -lt 600 ]; do read -r adj </proc/self/oom_score_adj; [ "$adj" = 0 ] && break; sleep 0.1; i=$((i+1)); done; echo "adj $adj" >&2; echo /nix/store/`+hash+`-sys`)
	var log []string
	if _, err := Build(t.Context(), BuildRequest{Dir: "/tmp/x", Attr: "a", Log: func(l string) { log = append(log, l) }}); err != nil {
		t.Fatal(err)
	}
	if fmt.Sprint(log) != "[adj 0]" {
		t.Errorf("log %q", log)
	}
}

func TestBuildFails(t *testing.T) {
	for name, c := range map[string]struct{ script, want string }{
		"evaluation": {`echo "error: first" >&2; echo "  error:   undefined   variable 'x'" >&2; echo "at line 3" >&2; exit 1`, "the build failed: undefined variable 'x'"},
		"silent":     {`exit 3`, "the build failed: exit status 3"},
		"disk full":  {`echo "error: writing to file: No space left on device" >&2; exit 1`, "disk is full"},
		"no path":    {`echo /etc/passwd`, "not a store path"},
		"two paths":  {`echo /nix/store/` + hash + `-a; echo /nix/store/` + hash + `-b`, "not a store path"},
		"flood":      {`yes | head -c 1000000; exit 0`, "nix"},
	} {
		t.Run(name, func(t *testing.T) {
			fakeNix(t, c.script)
			_, err := Build(t.Context(), BuildRequest{Dir: "/tmp/x", Attr: "a"})
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("got %v, want one line with %q", err, c.want)
			}
		})
	}
	if _, err := Build(t.Context(), BuildRequest{Dir: "/tmp/a#b", Attr: "a"}); err == nil {
		t.Error("a folder with a # was taken")
	}
}

func TestBuildKeepsTheEndOfTheLog(t *testing.T) {
	fakeNix(t, `i=0; while [ $i -lt 250 ]; do echo "line $i" >&2; i=$((i+1)); done; exit 1`)
	_, err := Build(t.Context(), BuildRequest{Dir: "/tmp/x", Attr: "a"})
	var be *RunError
	if !errors.As(err, &be) || len(be.Tail) != tailLines || be.Tail[tailLines-1] != "line 249" || be.Tail[0] != "line 150" {
		t.Fatalf("%v", err)
	}
}

// A build that is given up leaves no process behind, not even a builder that Nix had started.
func TestBuildIsStoppedWithItsChildren(t *testing.T) {
	mark := filepath.Join(t.TempDir(), "child")
	fakeNix(t, `sleep 1000 & echo $! >`+mark+`.new; mv `+mark+`.new `+mark+`; wait`)
	ctx, cancel := context.WithCancelCause(t.Context())
	defer cancel(nil)
	why := errors.New("superseded")
	go func() {
		for ctx.Err() == nil {
			if _, err := os.Stat(mark); err == nil {
				cancel(why)
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	_, err := Build(ctx, BuildRequest{Dir: "/tmp/x", Attr: "a"})
	if !errors.Is(err, why) {
		t.Fatalf("got %v", err)
	}
	pid, err := os.ReadFile(mark)
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile("/proc/" + strings.TrimSpace(string(pid)) + "/stat")
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal("the builder still runs")
		}
	}
}

func TestSetRoot(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "roots")
	for _, p := range []string{StoreDir + "/" + hash + "-a", StoreDir + "/" + hash + "-b"} {
		if err := SetRoot(dir, "new", p); err != nil {
			t.Fatal(err)
		}
		if got, err := os.Readlink(filepath.Join(dir, "new")); err != nil || got != p {
			t.Errorf("%q, %v", got, err)
		}
	}
	if err := SetRoot(dir, "new", ""); err != nil {
		t.Error(err)
	}
	if err := SetRoot(dir, "new", ""); err != nil {
		t.Errorf("a second time: %v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	for _, name := range []string{"", "..", "a/b", ".hidden"} {
		if SetRoot(dir, name, StoreDir+"/"+hash+"-a") == nil {
			t.Errorf("name %q was taken", name)
		}
	}
	if SetRoot(dir, "new", "/etc") == nil {
		t.Error("a root on /etc")
	}
}

func TestRebootNeeded(t *testing.T) {
	system := func(kernel string) string {
		dir := t.TempDir()
		for _, part := range []string{"initrd", "kernel-modules"} {
			if err := os.Symlink("/", filepath.Join(dir, part)); err != nil {
				t.Fatal(err)
			}
		}
		if kernel != "" {
			if err := os.Symlink(kernel, filepath.Join(dir, "kernel")); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	for _, c := range []struct {
		before, after string
		want          bool
	}{{"/etc", "/etc", false}, {"/etc", "/usr", true}, {"/etc", "", true}, {"", "", false}} {
		if got := RebootNeeded(system(c.before), system(c.after)); got != c.want {
			t.Errorf("%+v: %v", c, got)
		}
	}
}
