//go:build linux

package e2e

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// TestUploadResumes: a file that breaks off on its way goes on where it was, and is not there before it is whole.
func TestUploadResumes(t *testing.T) {
	f := shared(t)
	node := f.nodes["n1"]
	const size, staged, target = 64 << 20, "/root/uploads/.nix-infra-upload", "/root/uploads/big"
	dir := t.TempDir()
	sum := sha256.New()
	big, err := os.Create(filepath.Join(dir, "big"))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := io.Copy(io.MultiWriter(big, sum), io.LimitReader(newKeystream(), size)); err != nil {
		t.Fatal(err)
	}
	if err := big.Close(); err != nil {
		t.Fatal(err)
	}
	f.exec(node, "rm", "-rf", "/root/uploads")
	t.Cleanup(func() { f.exec(node, "rm", "-rf", "/root/uploads") })
	received := func() int {
		t.Helper()
		n, err := strconv.Atoi(f.exec(node, "cat", "/sys/class/net/eth0/statistics/rx_bytes"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	inKiB := func() int {
		t.Helper()
		n, err := strconv.Atoi(f.exec(node, "sh", "-c", "du -sk --apparent-size "+staged+" | cut -f1"))
		if err != nil {
			t.Fatal(err)
		}
		return n
	}

	cmd, said := f.command("upload", big.Name(), "--target", "n1"), &output{}
	cmd.Stdout, cmd.Stderr = said, said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	// Until an eighth of it is there. Then the node's end stands still, so that the rest can't come before this end is killed.
	agent := f.property(node, "nix-infra-agent.service", "MainPID")
	f.exec(node, "timeout", "120", "sh", "-c", `until [ "$(du -sk --apparent-size `+staged+` 2>/dev/null | cut -f1)" -gt 8192 ] 2>/dev/null; do [ ! -e `+target+` ] || exit 1; done; kill -STOP `+agent)
	if err := cmd.Process.Signal(syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); cmd.ProcessState.ExitCode() != -1 {
		t.Fatalf("it was over before it was killed: %v: %s", err, said)
	}
	f.exec(node, "kill", "-CONT", agent)
	if out, err := node.Exec(f.ctx, "ls", "-l", target); err == nil {
		t.Fatalf("a part of the file is there: %s", out)
	}
	had, before := inKiB()<<10, received()
	r := f.cli("upload", big.Name(), "--target", "n1", "--json")
	docs := readDocuments(t, r.out)
	if end := docs[len(docs)-1]; r.code != 0 || end["event"] != "end" || end["result"] != "success" || end["written"] != 1.0 {
		t.Errorf("%v", r)
	}
	if got := f.exec(node, "sha256sum", target); got != fmt.Sprintf("%x  %s", sum.Sum(nil), target) {
		t.Errorf("the node has %s, want %x", got, sum.Sum(nil))
	}
	// What travels has a little around it.
	if n, most := received()-before, (size-had)*11/10; n > most || had < 8<<20 {
		t.Errorf("%d of %d bytes were there, and %d more came, want at most %d", had, size, n, most)
	}
	if r := f.cli("upload", big.Name(), "--target", "n1", "--json"); r.code != 0 || !strings.Contains(r.out, `"state":"unchanged"`) {
		t.Errorf("what is there already: %v", r)
	}

	for name, mode := range map[string]os.FileMode{"tree/plain": 0o640, "tree/below/program": 0o755} {
		if err := os.MkdirAll(filepath.Dir(filepath.Join(dir, name)), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(dir, name), []byte(name+"\n"), mode); err != nil {
			t.Fatal(err)
		}
	}
	f.must("upload", filepath.Join(dir, "tree"), "--target", "n1")
	if got := f.exec(node, "sh", "-c", "cd /root/uploads/tree; cat plain below/program; stat -c '%a %U' plain below/program"); got != "tree/plain\ntree/below/program\n640 root\n755 root" {
		t.Errorf("the folder is %q", got)
	}

	for _, to := range []string{"/etc", "/root", "/root/uploads/../x", "/var/lib/nix-infra-agent"} {
		r := f.cli("upload", big.Name(), "--target", "n1", "--remote-path", to)
		if r.code != 2 {
			t.Errorf("to %s: %v", to, r)
		}
		if out, err := node.Exec(f.ctx, "ls", to+"/big"); err == nil {
			t.Errorf("it is in %s: %s", to, out)
		}
	}
}
