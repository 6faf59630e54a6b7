//go:build linux

package main

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"runtime"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/bbolt"
)

// measurement is what one command cost.
type measurement struct {
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

// measure runs a command of the CLI, which must succeed.
func (f *fleet) measure(ctx context.Context, args ...string) (*measurement, error) {
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
	cmd := f.cli(ctx, args...)
	controller, agents, began := cpu(pid), cpu(os.Getpid()), time.Now()
	if _, err := f.run(cmd); err != nil {
		return nil, err
	}
	m := &measurement{took: time.Since(began), controller: cpu(pid) - controller, agents: cpu(os.Getpid()) - agents,
		cli: cmd.ProcessState.UserTime() + cmd.ProcessState.SystemTime(), peak: field(pid, "VmHWM")}
	time.Sleep(etcdFlush)
	after, err := f.revision()
	m.revisions = after - before
	return m, err
}

// cpu is the time that a process has used so far.
func cpu(pid int) time.Duration {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The second field is the program's name in parentheses; utime and stime are the 14th and 15th (proc(5)).
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, _ := strconv.ParseInt(fields[11], 10, 64)
	system, _ := strconv.ParseInt(fields[12], 10, 64)
	const tick = time.Second / 100 // USER_HZ, the same on all of Linux
	return time.Duration(user+system) * tick
}

// memory is what this process needs at the moment, in bytes.
func memory() uint64 {
	runtime.GC()
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.HeapAlloc + m.StackInuse
}

// field is a size in /proc/PID/status, in bytes.
func field(pid int, name string) int64 {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return 0
	}
	_, rest, _ := strings.Cut(string(data), name+":")
	kib, _ := strconv.ParseInt(strings.Fields(rest + " 0")[0], 10, 64)
	return kib << 10
}

// revision is that of the controller's embedded etcd, which listens nowhere: the last key of a copy of its database.
func (f *fleet) revision() (int64, error) {
	const live = "controller/etcd/member/snap/db"
	data, err := os.ReadFile(f.path(live))
	if err != nil {
		return 0, err
	}
	copied := f.path("etcd.copy")
	if err := os.WriteFile(copied, data, 0o600); err != nil {
		return 0, err
	}
	db, err := bbolt.Open(copied, 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return 0, fmt.Errorf("%s: %w", live, err)
	}
	defer db.Close()
	var revision int64
	err = db.View(func(tx *bbolt.Tx) error {
		bucket := tx.Bucket([]byte("key"))
		if bucket == nil {
			return errors.New("etcd's database has no bucket of keys")
		}
		if last, _ := bucket.Cursor().Last(); len(last) >= 8 {
			revision = int64(binary.BigEndian.Uint64(last))
		}
		return nil
	})
	return revision, err
}
