package agent_test

import (
	"bytes"
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/policy"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/transfer"
)

// inMemory is a file that is sent.
type inMemory struct {
	path string
	data []byte
}

func (f inMemory) File() transfer.File {
	return transfer.File{Path: f.path, Size: int64(len(f.data)), Mode: 0o644, SHA256: protocol.Digest(f.data)}
}
func (f inMemory) Refresh() error                   { return nil }
func (f inMemory) Open() (io.ReadSeekCloser, error) { return nopCloser{bytes.NewReader(f.data)}, nil }

type nopCloser struct{ *bytes.Reader }

func (nopCloser) Close() error { return nil }

// Files go in through a tunnel, where the node's policy takes them from somebody of that role, and are on record.
func TestUploadThroughTunnel(t *testing.T) {
	// Not t.TempDir, which may be below /dev/shm: no policy lets anybody write below /dev.
	dir, err := os.MkdirTemp("/var/tmp", "nix-infra-uploads-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	system, root := t.TempDir(), filepath.Join(dir, "import")
	u := withTunnels(t, func(o *agent.Options) { o.System = system })
	file := filepath.Join(system, policy.File)
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(`{"v":1,"uploads":{"roots":[{"path":"`+root+`","role":"deployer"}]}}`), 0o644)); err != nil {
		t.Fatal(err)
	}
	data := bytes.Repeat([]byte("0123456789abcdef"), 200_000)
	send := func(user string, role protocol.Role, to string) error {
		c, _ := u.mustOpen(u.fleet.User(user, role), user, protocol.TunnelUpload)
		defer c.Close()
		return transfer.Send(t.Context(), c, to, []transfer.Source{inMemory{"a/b", data}},
			transfer.Watcher{Has: func(int64) {}, Again: func(int64) {}, Done: func(transfer.File, transfer.State, error) {}})
	}
	if err := send("dora", protocol.Deployer, root+"/x"); err != nil {
		t.Fatal(err)
	}
	if got, err := os.ReadFile(root + "/x/a/b"); err != nil || !bytes.Equal(got, data) {
		t.Errorf("%v, %d bytes", err, len(got))
	}
	testfleet.Eventually(t, "a record", func() bool {
		for _, r := range u.side.audited(t) {
			if r.User == "dora" && r.Detail == "upload to "+root+"/x" && r.Outcome == "ok" && strings.Contains(r.Reason, "a/b") {
				return true
			}
		}
		return false
	})
	if err := send("oscar", protocol.Operator, root); !errors.Is(err, &protocol.Refusal{Code: protocol.OverRole}) {
		t.Errorf("of an operator: %v", err)
	}
	if err := send("eve", protocol.Admin, "/etc"); !errors.Is(err, &protocol.Refusal{Code: protocol.Denied}) {
		t.Errorf("elsewhere: %v", err)
	}
}
