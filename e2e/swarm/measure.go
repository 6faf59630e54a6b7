//go:build linux

package main

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/bbolt"
)

// usage is CPU time.
type usage struct {
	controller time.Duration
	agents     time.Duration // all of them
	asker      time.Duration // this process
}

func (u usage) all() time.Duration { return u.controller + u.agents + u.asker }

func (u usage) since(before usage) usage {
	return usage{u.controller - before.controller, u.agents - before.agents, u.asker - before.asker}
}

func (u usage) times(factor float64) usage {
	scale := func(d time.Duration) time.Duration { return time.Duration(float64(d) * factor) }
	return usage{scale(u.controller), scale(u.agents), scale(u.asker)}
}

// used is what all have used so far.
func (f *fleet) used() usage {
	u := usage{controller: cpu(f.controller.Process.Pid), asker: cpu(os.Getpid())}
	for _, a := range f.agents {
		u.agents += cpu(a.cmd.Process.Pid)
	}
	return u
}

// cpu is the time that a process has used so far.
func cpu(pid int) time.Duration { return times(pid, 0) }

// cpuWithChildren has what its children used that have ended, too, and theirs.
func cpuWithChildren(pid int) time.Duration { return times(pid, 0) + times(pid, 2) }

// times is the sum of user and system time in /proc/PID/stat: of the process (from 0), or of its children (from 2).
func times(pid, from int) time.Duration {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0
	}
	// The second field is the program's name in parentheses; utime, stime, cutime and cstime are the 14th to the 17th (proc(5)).
	fields := strings.Fields(string(data[bytes.LastIndexByte(data, ')')+1:]))
	user, _ := strconv.ParseInt(fields[11+from], 10, 64)
	system, _ := strconv.ParseInt(fields[12+from], 10, 64)
	const tick = time.Second / 100 // USER_HZ, the same on all of Linux
	return time.Duration(user+system) * tick
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
