//go:build linux

package e2e

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// accounting is the kernel's own list of all processes of a node that have ended (acct(5)): whatever ran is on it, by
// whatever way it came to run, and however short.
type accounting struct {
	t    *testing.T
	node *lab.Node
}

// ended is a process on it.
type ended struct {
	pid, parent uint32
	comm        string // its program's name, at most 15 bytes
}

const accountingFile = "/root/process-accounting"

// account begins a node's accounting, which ends with the test. The kernel keeps one for each pid namespace, and only
// somebody in there can ask it to.
func (f *fleet) account(node *lab.Node) *accounting {
	f.t.Helper()
	call := func(file string) {
		f.t.Helper()
		f.exec(node, "perl", "-e", `syscall($ARGV[0] + 0, $ARGV[1] eq "" ? 0 : $ARGV[1]) == 0 or die "acct: $!"`, fmt.Sprint(unix.SYS_ACCT), file)
	}
	if err := node.WriteFile(accountingFile, nil, 0o600); err != nil {
		f.t.Fatal(err)
	}
	call(accountingFile)
	f.t.Cleanup(func() { call("") })
	return &accounting{f.t, node}
}

// all are the processes that ended since it began. Reading it runs nothing on the node.
func (a *accounting) all() []ended {
	a.t.Helper()
	data, err := a.node.ReadFile(accountingFile)
	if err != nil {
		a.t.Fatal(err)
	}
	const size, version = 64, 3 // struct acct_v3
	var all []ended
	for ; len(data) >= size; data = data[size:] {
		if data[1]&0x7f != version {
			a.t.Fatalf("a record of process accounting has version %d, this test knows %d", data[1]&0x7f, version)
		}
		comm, _, _ := bytes.Cut(data[48:size], []byte{0})
		all = append(all, ended{binary.NativeEndian.Uint32(data[16:]), binary.NativeEndian.Uint32(data[20:]), string(comm)})
	}
	return all
}
