package lab

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const stateFile = "lab.json"

// state is lab.json.
type state struct {
	Owner        int         `json:"owner,omitempty"`
	OwnerStarted string      `json:"owner_started,omitempty"` // a pid comes back, a pid and its start time don't
	Layers       []string    `json:"layers"`                  // of the root file system, the top one first
	PlainLayers  []string    `json:"plain_layers"`            // the same of plain nodes
	NextIndex    int         `json:"next_index"`
	Nodes        []nodeState `json:"nodes"`
}

type nodeState struct {
	Name    string `json:"name"`
	Index   int    `json:"index"`
	DiskMiB int    `json:"disk_mib,omitempty"`
	Plain   bool   `json:"plain,omitempty"`
}

// stateDir holds a folder per lab, disks included.
func stateDir() string {
	if dir := os.Getenv("LAB_DIR"); dir != "" {
		return dir
	}
	return "/var/lib/nix-infra-lab"
}

// lockFile is beside the lab's folder, which comes and goes while the lock is held.
func lockFile(lab string) string { return filepath.Join(stateDir(), lab+".lock") }

func (l *Lab) load() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.loadLocked()
}

func (l *Lab) loadLocked() error {
	data, err := os.ReadFile(filepath.Join(l.dir, stateFile))
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("lab %s: %w; `lab --name %s up 3` makes it, `lab list` shows those that there are", l.name, ErrNoLab, l.name)
	}
	if err != nil {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	var s state
	if err := json.Unmarshal(data, &s); err != nil {
		return fmt.Errorf("lab %s: %s: %w; `lab --name %s down` clears it away", l.name, filepath.Join(l.dir, stateFile), err, l.name)
	}
	l.state = s
	for _, n := range s.Nodes {
		if l.nodes[n.Name] == nil {
			l.nodes[n.Name] = newNode(l, n)
		}
	}
	return nil
}

func (l *Lab) save() error {
	data, err := json.MarshalIndent(l.state, "", "  ")
	if err != nil {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	name := filepath.Join(l.dir, stateFile)
	if err := os.WriteFile(name+".new", append(data, '\n'), 0o644); err != nil {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	if err := os.Rename(name+".new", name); err != nil {
		return fmt.Errorf("lab %s: %w", l.name, err)
	}
	return nil
}

// List names the labs that there are.
func List() ([]string, error) {
	files, err := filepath.Glob(filepath.Join(stateDir(), "*", stateFile))
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	var names []string
	for _, f := range files {
		names = append(names, filepath.Base(filepath.Dir(f)))
	}
	return names, nil
}

// Reap removes the labs whose owner is gone, and returns their names.
func Reap(ctx context.Context, log io.Writer) ([]string, error) {
	names, err := List()
	if err != nil {
		return nil, err
	}
	var reaped []string
	var errs []error
	for _, name := range names {
		// A lab that is locked is being worked on, so somebody cares for it.
		unlock, err := tryLock(lockFile(name))
		if err != nil {
			continue
		}
		l, err := attach(name, log)
		if err == nil && l.state.Owner != 0 && processStarted(l.state.Owner) != l.state.OwnerStarted {
			fmt.Fprintf(log, "removing lab %s: its owner, process %d, is gone\n", name, l.state.Owner)
			if err := l.remove(ctx); err != nil {
				errs = append(errs, err)
			} else {
				reaped = append(reaped, name)
			}
		}
		unlock()
	}
	return reaped, errors.Join(errs...)
}

// processStarted is a process's start time in clock ticks since boot, or "" when there is no such process.
func processStarted(pid int) string {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return ""
	}
	// The second field is the program's name in parentheses and may hold anything; start time is field 22.
	fields := strings.Fields(string(data[strings.LastIndexByte(string(data), ')')+1:]))
	if len(fields) < 20 || fields[0] == "Z" {
		return ""
	}
	return fields[19]
}

var errLocked = errors.New("locked")

// tryLock takes the lock file, or fails with errLocked when somebody has it. The holder may remove the file, so
// whoever gets the lock has it only if the file is still there under its name.
func tryLock(name string) (unlock func(), err error) {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o644)
	if err != nil {
		return nil, fmt.Errorf("lab: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		_ = f.Close()
		if errors.Is(err, unix.EWOULDBLOCK) {
			return nil, errLocked
		}
		return nil, fmt.Errorf("lab: lock %s: %w", name, err)
	}
	mine, err := f.Stat()
	there, err2 := os.Stat(name)
	if err != nil || err2 != nil || !os.SameFile(mine, there) {
		_ = f.Close()
		return nil, errLocked
	}
	return func() { _ = f.Close() }, nil
}

// lock waits for the lock file as long as ctx allows. It polls, because a blocked flock can't be given up.
func lock(ctx context.Context, name string) (unlock func(), err error) {
	for {
		unlock, err := tryLock(name)
		if !errors.Is(err, errLocked) {
			return unlock, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("lab: waiting for %s, which another process holds: %w", name, ctx.Err())
		case <-time.After(20 * time.Millisecond):
		}
	}
}
