package lab

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// Available says why a lab can't run on this machine, or nil.
func Available() error {
	if runtime.GOOS != "linux" {
		return fmt.Errorf("lab: nodes are Linux namespaces and this is %s; run it on a Linux machine", runtime.GOOS)
	}
	if os.Geteuid() != 0 {
		return errors.New("lab: it makes namespaces, mounts and cgroups, which only root may; run it with sudo or as root")
	}
	if _, err := cgroupMount(); err != nil {
		return err
	}
	if overlaid(stateDir()) {
		return fmt.Errorf("lab: %s lies on an overlay, which can't hold the nodes' disks; set LAB_DIR to a folder on ext4, xfs, btrfs or tmpfs", stateDir())
	}
	if overlaid(cacheDir()) {
		return fmt.Errorf("lab: %s lies on an overlay, on which nodes can't be built; set LAB_CACHE to a folder on ext4, xfs, btrfs or tmpfs", cacheDir())
	}
	if _, err := exec.LookPath("apt-get"); err != nil && len(missingPrograms()) > 0 {
		return fmt.Errorf("lab: %s not found, and without apt-get it can't install them", strings.Join(missingPrograms(), ", "))
	}
	return nil
}

// hostPrograms maps what the lab calls to the Debian package that has it.
var hostPrograms = []struct{ program, pkg string }{
	{"systemd-nspawn", "systemd-container"},
	{"mmdebstrap", "mmdebstrap"},
	{"ip", "iproute2"},
	{"nft", "nftables"},
	{"ssh-keygen", "openssh-client"},
	{"nsenter", "util-linux"},
	{"mkfs.ext4", "e2fsprogs"},
}

func missingPrograms() []string {
	var missing []string
	for _, p := range hostPrograms {
		if _, err := exec.LookPath(p.program); err != nil {
			missing = append(missing, p.program)
		}
	}
	return missing
}

func installHostPackages(ctx context.Context, log io.Writer) error {
	if len(missingPrograms()) == 0 {
		return nil
	}
	unlock, err := lock(ctx, filepath.Join(cacheDir(), "packages.lock"))
	if err != nil {
		return err
	}
	defer unlock()
	missing := missingPrograms()
	if len(missing) == 0 {
		return nil // another lab has just done it
	}
	packages := []string{"debian-archive-keyring"}
	for _, p := range hostPrograms {
		if _, err := exec.LookPath(p.program); err != nil {
			packages = append(packages, p.pkg)
		}
	}
	fmt.Fprintf(log, "installing %s\n", strings.Join(packages, " "))
	apt := []string{"env", "DEBIAN_FRONTEND=noninteractive", "apt-get", "-qq", "-o", "DPkg::Lock::Timeout=120", "-o", aptRetries}
	if _, err := run(ctx, append(apt, "update")...); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	if _, err := run(ctx, append(append(apt, "install", "-y", "--no-install-recommends"), packages...)...); err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	return nil
}

// aptRetries has apt ask again where a mirror does not answer once.
const aptRetries = "Acquire::Retries=5"

// run runs a host command; its error holds what the command said.
func run(ctx context.Context, argv ...string) ([]byte, error) {
	return output(command(ctx, argv...))
}

func output(cmd *exec.Cmd) ([]byte, error) {
	out, err := cmd.CombinedOutput()
	if err != nil {
		return out, fmt.Errorf("%s: %w: %s", strings.Join(cmd.Args, " "), err, bytes.TrimSpace(out))
	}
	return out, nil
}

// outputTime is how long a process that left its group may keep the output open of one that has ended.
const outputTime = 30 * time.Second

// command is exec.CommandContext that takes the whole process group down with ctx: nsenter and sh fork.
func command(ctx context.Context, argv ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error {
		err := syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL)
		if errors.Is(err, syscall.ESRCH) {
			return os.ErrProcessDone
		}
		return err
	}
	cmd.WaitDelay = outputTime
	return cmd
}

// grouped is nsenter with these arguments, started in that cgroup: outside the caller's, so that it belongs
// to the lab and dies with it. When the lab or the node is gone there is no group to join, and nothing runs.
func grouped(ctx context.Context, cgroup string, nsenterArgs []string) *exec.Cmd {
	const script = `[ -d "$0" ] || mkdir "$0" 2>/dev/null || [ -d "$0" ]; echo $$ >"$0/cgroup.procs" && exec nsenter "$@"`
	return command(ctx, append([]string{"/bin/sh", "-c", script, cgroup}, nsenterArgs...)...)
}

// Root's processes of all nodes share one limit of the kernel's on watches of files, and each systemd has several: with
// the usual 128, units of the twentieth node fail with "too many open files".
const (
	watchLimit = "/proc/sys/fs/inotify/max_user_instances"
	watches    = 8192
)

// allowWatches raises that limit where it is lower, and says so: it stays so until this machine boots.
func allowWatches(log io.Writer) error {
	text, err := os.ReadFile(watchLimit)
	if err != nil {
		return fmt.Errorf("lab: %w", err)
	}
	n, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err == nil && n >= watches {
		return nil
	}
	fmt.Fprintf(log, "raising this machine's fs.inotify.max_user_instances from %d to %d, until it boots\n", n, watches)
	if err := os.WriteFile(watchLimit, []byte(strconv.Itoa(watches)), 0o644); err != nil {
		return fmt.Errorf("lab: the limit of file watches: %w", err)
	}
	return nil
}
