package upload

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/transfer"
)

// Whatever is offered, nothing outside of the root is touched, and nothing that is no file is replaced.
func TestNothingOutside(t *testing.T) {
	n := newNode(t)
	outside := filepath.Join(filepath.Dir(n.root), "outside")
	must(t, os.MkdirAll(filepath.Join(n.root, "folder"), 0o755), os.Mkdir(outside, 0o755), os.WriteFile(filepath.Join(outside, "file"), []byte("old"), 0o644),
		os.Symlink(outside, filepath.Join(n.root, "link")), os.Symlink(filepath.Join(outside, "file"), filepath.Join(n.root, "linked")),
		os.Symlink("..", filepath.Join(n.root, "up")), unix.Mkfifo(filepath.Join(n.root, "pipe"), 0o600), os.WriteFile(filepath.Join(n.root, "plain"), nil, 0o644))
	good := &source{path: "good", data: []byte("good")}
	for _, path := range []string{"link/file", "link/new", "linked", "up/outside/file", "folder", "pipe", "plain/below"} {
		s := n.upload(n.root, &source{path: path, data: []byte("new")}, good)
		if s.err != nil || s.states[path] != transfer.Refused || s.errs[path] == nil || strings.Contains(s.errs[path].Error(), "\n") {
			t.Errorf("%s: %v, %v, %v", path, s.err, s.states, s.errs)
		}
		if s.states["good"] == transfer.Refused {
			t.Errorf("%s: the other file was refused, too", path)
		}
	}
	if got, _ := os.ReadFile(filepath.Join(outside, "file")); string(got) != "old" {
		t.Errorf("a file outside has %q", got)
	}
	if entries, _ := os.ReadDir(outside); len(entries) != 1 {
		t.Errorf("outside: %v", entries)
	}
	// Names that can't lie below the folder end the upload: they are no mistake.
	for _, path := range []string{"", "/etc/passwd", "../x", "a/../../x", "a//b", "a/", ".", "a/./b", transfer.Staging + "/x", "a/" + transfer.Staging, "a\nb", "a\x00b",
		strings.Repeat("n", 256), strings.Repeat("a/", 64) + "a", strings.Repeat("nnnnnnn/", 200) + "x"} {
		c, ended := n.serve("ann")
		n.hello(c)
		_ = transfer.Write(c, transfer.Offer{Files: []transfer.File{{Path: path, Mode: 0o644, SHA256: protocol.Digest(nil)}}})
		if err := <-ended; !errors.Is(err, transfer.ErrMalformed) && !strings.Contains(err.Error(), "malformed") {
			t.Errorf("%.40q: %v", path, err)
		}
	}
}

func must(t *testing.T, errs ...error) {
	t.Helper()
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
}

func (n *node) hello(c *stream) {
	n.t.Helper()
	must(n.t, transfer.Write(c, transfer.Hello{Version: transfer.Version, To: n.root}))
	if w, err := transfer.Read[transfer.Welcome](c); err != nil || w.Refused != nil {
		n.t.Fatal(w.Refused, err)
	}
}

// A link that takes a folder's place while the upload goes on leads nowhere.
func TestLinkRace(t *testing.T) {
	n := newNode(t)
	outside := filepath.Join(filepath.Dir(n.root), "outside")
	must(t, os.MkdirAll(filepath.Join(n.root, "d"), 0o755), os.Mkdir(outside, 0o755))
	c, ended := n.serve("ann")
	n.hello(c)
	f := &source{path: "d/a", data: []byte("data")}
	must(t, transfer.Write(c, transfer.Offer{Files: []transfer.File{f.File()}}))
	if p, err := transfer.Read[transfer.Plan](c); err != nil || p.Steps[0].Refused != nil {
		t.Fatal(p, err)
	}
	must(t, os.Remove(filepath.Join(n.root, "d")), os.Symlink(outside, filepath.Join(n.root, "d")))
	if _, err := c.Write(f.data); err != nil {
		t.Fatal(err)
	}
	if r, err := transfer.Read[transfer.Result](c); err != nil || r.Refused == nil || !strings.Contains(r.Refused.Reason, "link") {
		t.Errorf("%+v, %v", r, err)
	}
	<-ended
	if entries, _ := os.ReadDir(outside); len(entries) > 0 {
		t.Errorf("outside: %v", entries)
	}
}

func TestHostileMessages(t *testing.T) {
	n := newNode(t)
	offer := func(files ...transfer.File) []byte {
		var b bytes.Buffer
		must(t, transfer.Write(&b, transfer.Offer{Files: files}))
		return b.Bytes()
	}
	file := transfer.File{Path: "a", Mode: 0o644, SHA256: protocol.Digest(nil)}
	with := func(change func(*transfer.File)) []byte { f := file; change(&f); return offer(f) }
	for name, data := range map[string][]byte{
		"a huge length":       {0xff, 0xff, 0xff, 0xff},
		"a length that lies":  append(binary.BigEndian.AppendUint32(nil, 1000), "{}"...),
		"no JSON":             append(binary.BigEndian.AppendUint32(nil, 4), "...."...),
		"an unknown field":    append(binary.BigEndian.AppendUint32(nil, 9), `{"own":1}`...),
		"nothing in it":       offer(),
		"too many files":      offer(make([]transfer.File, transfer.MaxFiles+1)...),
		"a negative size":     with(func(f *transfer.File) { f.Size = -1 }),
		"too large":           with(func(f *transfer.File) { f.Size = transfer.MaxSize + 1 }),
		"setuid":              with(func(f *transfer.File) { f.Mode = 0o4755 }),
		"a digest of no kind": with(func(f *transfer.File) { f.SHA256 = "../../x" }),
	} {
		c, ended := n.serve("ann")
		n.hello(c)
		if _, err := c.Write(data); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		c.CloseWrite()
		if err := <-ended; err == nil {
			t.Errorf("%s: taken", name)
		}
	}
	if entries, _ := os.ReadDir(n.root); len(entries) != 1 { // the staging folder
		t.Errorf("in the root: %v", entries)
	}
}

// What is refused is told, and leaves nothing behind.
func TestRefusals(t *testing.T) {
	n := newNode(t)
	if s := n.upload("/etc", &source{path: "a"}); !errors.Is(s.err, &protocol.Refusal{Code: protocol.Denied}) {
		t.Errorf("another folder: %v", s.err)
	}
	if s := n.upload("../etc", &source{path: "a"}); !errors.Is(s.err, &protocol.Refusal{Code: protocol.Malformed}) {
		t.Errorf("no absolute path: %v", s.err)
	}
	huge := &source{path: "huge", said: &transfer.File{Path: "huge", Size: transfer.MaxSize, Mode: 0o644, SHA256: protocol.Digest(nil)}}
	if room := free(t, n.root); room < transfer.MaxSize {
		if s := n.upload(n.root, huge, &source{path: "small"}); s.err != nil || s.states["huge"] != transfer.Refused || s.states["small"] != transfer.Written || !strings.Contains(s.errs["huge"].Error(), "no room") {
			t.Errorf("%v, %v, %v", s.err, s.states, s.errs)
		}
	}
	must(t, os.MkdirAll(n.root, 0o755), os.Chmod(n.root, 0o777))
	if s := n.upload(n.root, &source{path: "a"}); !errors.Is(s.err, &protocol.Refusal{Code: protocol.Failed}) || !strings.Contains(s.err.Error(), "chmod go-w") {
		t.Errorf("a folder that anybody may write into: %v", s.err)
	}
	must(t, os.RemoveAll(n.root), os.Symlink(t.TempDir(), n.root))
	if s := n.upload(n.root, &source{path: "a"}); !errors.Is(s.err, &protocol.Refusal{Code: protocol.Invalid}) {
		t.Errorf("a root that is a link: %v", s.err)
	}
}

func free(t *testing.T, dir string) uint64 {
	var s unix.Statfs_t
	must(t, unix.Statfs(filepath.Dir(dir), &s))
	return s.Bavail * uint64(s.Bsize)
}

// What nobody comes back for within a day is removed, and of the rest what is too much, the oldest first.
func TestStagingIsBounded(t *testing.T) {
	n := newNode(t)
	staging := filepath.Join(n.root, transfer.Staging)
	must(t, os.MkdirAll(staging, 0o700))
	now := time.Now()
	put := func(name string, age time.Duration) {
		path := filepath.Join(staging, name)
		must(t, os.WriteFile(path, []byte("x"), 0o600), os.Chtimes(path, now, now.Add(-age)))
	}
	put("old", keptFor+time.Minute)
	for i := range keptMost + 10 {
		put(fmt.Sprint("rest-", i), time.Duration(i)*time.Minute)
	}
	before := len(n.staged())
	if s := n.upload(n.root, &source{path: "a"}); s.err != nil {
		t.Fatal(s.err)
	}
	if _, err := os.Lstat(filepath.Join(staging, "old")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the old one: %v", err)
	}
	if left := n.staged(); before <= keptMost || len(left) != keptMost {
		t.Errorf("%d of %d are left", len(left), before)
	}
}
