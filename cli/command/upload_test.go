package command

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/transfer"
	"github.com/nix-infra/nix-infra/protocol/tunnel"
)

// taker is a node's end of uploads that keeps files in memory: the real one is the agent's, and tested there.
type taker struct {
	one   sync.Mutex // upload at a time
	mu    sync.Mutex
	files map[string]string // by path on the node
	modes map[string]uint32
	begun map[string][]byte // by digest: the beginning of a file
	cut   int64             // bytes of files after which the way breaks; 0: it does not
	at    func()            // called when cut bytes are there: who sends is to break it off
	taken int64             // bytes
}

func takes(n *fleettest.Node) *taker {
	k := &taker{files: map[string]string{}, modes: map[string]uint32{}, begun: map[string][]byte{}}
	n.Script(fleettest.Script{Tunnels: func(to string) (func(*tunnel.Conn), error) {
		if to != protocol.TunnelUpload {
			return nil, protocol.Refuse(protocol.Denied, "no tunnel to %s", to)
		}
		return func(c *tunnel.Conn) {
			k.serve(c)
			c.Close()
		}, nil
	}})
	return k
}

func (k *taker) serve(c *tunnel.Conn) {
	k.one.Lock()
	defer k.one.Unlock()
	hello, err := transfer.Read[transfer.Hello](c)
	if err != nil {
		return
	}
	var welcome transfer.Welcome
	if !strings.HasPrefix(hello.To, "/root/uploads") {
		welcome.Refused = protocol.Refuse(protocol.Denied, "the node's policy takes no uploads at %s", hello.To)
	}
	if transfer.Write(c, welcome) != nil || welcome.Refused != nil {
		return
	}
	for {
		offer, err := transfer.Read[transfer.Offer](c)
		if err != nil {
			return
		}
		var plan transfer.Plan
		for _, f := range offer.Files {
			k.mu.Lock()
			step := transfer.Step{Offset: int64(len(k.begun[f.SHA256]))}
			if old, there := k.files[hello.To+"/"+f.Path]; there && protocol.Digest([]byte(old)) == f.SHA256 {
				step = transfer.Step{Unchanged: true}
			} else if strings.Contains(f.Path, "forbidden") {
				step = transfer.Step{Refused: protocol.Refuse(protocol.Invalid, "%s is there, and is no regular file", f.Path)}
			}
			k.mu.Unlock()
			plan.Steps = append(plan.Steps, step)
		}
		if transfer.Write(c, plan) != nil {
			return
		}
		for i, f := range offer.Files {
			if s := plan.Steps[i]; s.Unchanged || s.Refused != nil {
				continue
			}
			if r, ok := k.take(c, hello.To, f); !ok || transfer.Write(c, r) != nil {
				return
			}
		}
	}
}

func (k *taker) take(c *tunnel.Conn, to string, f transfer.File) (transfer.Result, bool) {
	k.mu.Lock()
	begun := k.begun[f.SHA256]
	k.mu.Unlock()
	var data bytes.Buffer
	data.Write(begun)
	for left := f.Size - int64(len(begun)); left > 0; {
		n, err := io.CopyN(&data, c, min(left, 10_000))
		left -= n
		k.mu.Lock()
		k.taken += n
		cut, at := k.cut > 0 && k.taken >= k.cut, k.at
		if cut {
			k.cut = 0
		}
		k.begun[f.SHA256] = data.Bytes() // what is there of it does not change any more
		k.mu.Unlock()
		switch {
		case cut && at != nil:
			at()
			<-c.Done() // nothing more is taken, however much is on the way
			return transfer.Result{}, false
		case cut:
			c.Reset("the power went")
			return transfer.Result{}, false
		case err != nil:
			return transfer.Result{}, false
		}
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	delete(k.begun, f.SHA256)
	if protocol.Digest(data.Bytes()) != f.SHA256 {
		return transfer.Result{Mismatch: true}, true
	}
	k.files[to+"/"+f.Path], k.modes[to+"/"+f.Path] = data.String(), f.Mode
	return transfer.Result{}, true
}

// breaks has the way break, or at called, when so many bytes of files have come.
func (k *taker) breaks(cut int64, at func()) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.cut, k.at = cut, at
}

func (k *taker) paths() []string {
	k.mu.Lock()
	defer k.mu.Unlock()
	var all []string
	for p := range k.files {
		all = append(all, p)
	}
	slices.Sort(all)
	return all
}

// tree writes files below a folder.
func tree(t *testing.T, files map[string]string) string {
	t.Helper()
	dir := t.TempDir()
	for name, content := range files {
		at := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(at), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(at, []byte(content), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func TestUpload(t *testing.T) {
	s, f := newFleet(t)
	web1, web2 := takes(f.Add("web1")), takes(f.Add("web2"))
	dir := tree(t, map[string]string{"site/index.html": "hello", "site/a/b.css": "p{}", "run.sh": "#!/bin/sh\n"})
	if err := errors.Join(os.Chmod(filepath.Join(dir, "run.sh"), 0o755), os.Symlink("/etc/passwd", filepath.Join(dir, "site", "link")), syscall.Mkfifo(filepath.Join(dir, "site", "pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	args := []string{"upload", filepath.Join(dir, "site"), filepath.Join(dir, "run.sh"), "--target", "web1 web2"}
	r := s.run(args...)
	if r.status != OK || strings.Count(r.out, "3 files written, 0 unchanged") != 2 || !strings.Contains(r.stderr, "link is skipped: it is a link") || !strings.Contains(r.stderr, "pipe is skipped: it is no regular file") {
		t.Errorf("%+v", r)
	}
	for _, k := range []*taker{web1, web2} { // nobody uploads at the moment
		if got := k.paths(); !slices.Equal(got, []string{"/root/uploads/run.sh", "/root/uploads/site/a/b.css", "/root/uploads/site/index.html"}) {
			t.Errorf("on the node: %v", got)
		}
		if k.modes["/root/uploads/run.sh"] != 0o755 || k.files["/root/uploads/site/index.html"] != "hello" {
			t.Errorf("mode %o, content %q", k.modes["/root/uploads/run.sh"], k.files["/root/uploads/site/index.html"])
		}
	}
	if out := s.must(args...); strings.Count(out, "0 files written, 3 unchanged") != 2 {
		t.Errorf("printed %q", out)
	}
	// As the earlier tool had it.
	for _, group := range []string{"fleet", "cluster"} {
		s.must(group, "upload", "--target=web1", "--file="+filepath.Join(dir, "run.sh")+" "+filepath.Join(dir, "site/index.html"), "--remote-path=/root/uploads/"+group)
		if got := web1.paths(); !slices.Contains(got, "/root/uploads/"+group+"/run.sh") || !slices.Contains(got, "/root/uploads/"+group+"/index.html") {
			t.Errorf("on the node: %v", got)
		}
	}
}

// An upload that broke off goes on where it was.
func TestUploadGoesOn(t *testing.T) {
	s, f := newFleet(t)
	web1 := takes(f.Add("web1"))
	file := filepath.Join(tree(t, map[string]string{"big": strings.Repeat("0123456789", 500_000)}), "big")
	web1.breaks(1_000_000, nil)
	r := s.run("upload", file, "--target=web1", "--json")
	docs := documents(t, r.out)
	if r.status != SomeFailed || !strings.Contains(r.stderr, "the power went") || len(docs) != 1 || docs[0]["result"] != "failed" || len(web1.paths()) != 0 {
		t.Errorf("cut: %+v", r)
	}
	// Ctrl-C in the middle.
	ctx, interrupt := context.WithCancel(t.Context())
	web1.breaks(2_000_000, interrupt)
	if r := s.runContext(ctx, &bytes.Buffer{}, "upload", file, "--target=web1"); r.status != Interrupted || !strings.Contains(r.stderr, "goes on from here") || len(web1.paths()) != 0 {
		t.Errorf("interrupted: %+v", r)
	}
	docs = documents(t, s.must("upload", file, "--target=web1", "--json"))
	if len(docs) != 2 || docs[0]["event"] != "file" || docs[0]["state"] != "written" || docs[1]["event"] != "end" || docs[1]["result"] != "success" || docs[1]["written"] != 1.0 || docs[1]["bytes"] != 5e6 {
		t.Errorf("%v", docs)
	}
	web1.mu.Lock()
	defer web1.mu.Unlock()
	if len(web1.files["/root/uploads/big"]) != 5_000_000 || web1.taken != 5_000_000 {
		t.Errorf("%d bytes are there, %d went out", len(web1.files["/root/uploads/big"]), web1.taken)
	}
}

func TestUploadStatus(t *testing.T) {
	s, f := newFleet(t)
	takes(f.Add("web1"))
	takes(f.Add("web2"))
	f.Add("mute").Vanish()
	f.Add("old").Script(fleettest.Script{Tunnels: func(string) (func(*tunnel.Conn), error) {
		return nil, protocol.Refuse(protocol.Unknown, "old takes no files in")
	}})
	dir := tree(t, map[string]string{"a": "1", "forbidden": "2", "x/a": "3"})
	a, forbidden := filepath.Join(dir, "a"), filepath.Join(dir, "forbidden")
	for _, c := range []struct {
		status int
		says   string
		args   []string
	}{
		{SomeFailed, "web1: forbidden is there", []string{a, forbidden, "--target=web1"}},
		{Refused, "web1: the node's policy takes no uploads at /etc", []string{a, "--target=web1", "--remote-path=/etc"}},
		{Unanswered, "no answer from mute", []string{a, "--target=web1", "--target=mute"}},
		{SomeFailed, "old: old takes no files in", []string{a, "--target=web1", "--target=old"}},
		{Refused, "upload what?", []string{"--target=web1"}},
		{Refused, "upload to which nodes?", []string{a}},
		{Refused, "would both become a", []string{a, filepath.Join(dir, "x/a"), "--target=web1"}},
		{Refused, "no such file", []string{filepath.Join(dir, "nothing"), "--target=web1"}},
		{Refused, "--remote-path", []string{a, "--target=web1", "--remote-path=uploads"}},
		{Refused, "--concurrency", []string{a, "--target=web1", "--concurrency=0"}},
	} {
		if r := s.run(append([]string{"upload"}, c.args...)...); r.status != c.status || !strings.Contains(r.stderr, c.says) {
			t.Errorf("%v: status %d, want %d: %s", c.args, r.status, c.status, r.stderr)
		}
	}
}
