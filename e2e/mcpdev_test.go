//go:build linux

package e2e

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"crypto/tls"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/e2e/testos"
)

// TestMCPDev: the development server on a machine that has Nix. An assistant breaks a module and mends it, and Nix says so; its
// hashes are Nix's; it runs a test, which it cancels with all that came of it.
func TestMCPDev(t *testing.T) {
	f := shared(t)
	node := f.nodes["n1"]
	if err := node.CopyTo(filepath.Join(programs.dir, "nix-infra"), "/root/dev/nix-infra", 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.exec(node, "rm", "-rf", "/root/dev") })
	var project bytes.Buffer
	pack := exec.CommandContext(f.ctx, "tar", "-C", programs.project, "-c", ".")
	pack.Stdout = &project
	if err := pack.Run(); err != nil {
		t.Fatal(err)
	}
	unpack := node.Command(f.ctx, "sh", "-c", "mkdir /root/dev/project && tar -C /root/dev/project -x")
	unpack.Stdin = &project
	if out, err := unpack.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	lock, err := testos.FlakeLock(testos.DefaultVersion)
	if err != nil {
		t.Fatal(err)
	}
	flake, err := os.ReadFile(filepath.Join(programs.project, "flake.nix"))
	if err != nil {
		t.Fatal(err)
	}
	withInput := strings.Replace(string(flake), "outputs = { self }:", "inputs.nixpkgs.url = \"github:NixOS/nixpkgs/nixos-"+testos.DefaultVersion+"\";\n  outputs = { self, nixpkgs }: assert nixpkgs ? lib;", 1)
	for name, text := range map[string]string{
		"flake.nix":                withInput, // an input that its lock names is there for the code
		"flake.lock":               string(lock),
		"nodes/n1.nix":             service("hello", ""),
		"nodes/n2.nix":             service("hello", ""),
		"__test__/run-tests.sh":    "#!/bin/sh\necho \"$@\"\n(setsid sh -c 'trap \"\" TERM; echo $$ >/root/dev/pid; exec sleep 1000' &)\n[ $2 = good ] && exit 4\nsleep 1000\n",
		"__test__/good/test.sh":    "",
		"__test__/endless/test.sh": "",
	} {
		if err := node.WriteFile("/root/dev/project/"+name, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	a := stdioAssistant(t, f.ctx, node.Command(f.ctx, "/root/dev/nix-infra", "-d", "/root/dev/project", "mcp", "dev"), "")

	got := a.good("nix-check", in{}, "2 of 2 nodes are good")
	if len(got.rows) != 2 || !strings.HasSuffix(got.rows[0]["derivation"].(string), ".drv") {
		t.Errorf("%v", got.rows)
	}
	const edit = "edit-app-module-files"
	broken := func(content string, file string, line float64, says string) {
		t.Helper()
		seen := a.good(edit, in{"operation": "view", "path": file})
		a.good(edit, in{"operation": "replace", "path": file, "content": content, "sha256": seen.rows[0]["sha256"]}, "+++ b/"+file)
		got := a.call("nix-check", in{"path": file})
		problems, _ := got.rows[0]["problems"].([]any)
		if !got.failed || len(problems) == 0 {
			t.Fatalf("%s is good: %s", content, got.text)
		}
		p := problems[0].(map[string]any)
		if p["file"] != file || p["line"] != line || !strings.Contains(p["message"].(string), says) {
			t.Errorf("%s: %v, want %s:%v with %q\n%s", content, p, file, line, says, got.text)
		}
	}
	broken("{ ... }: {\n  infrastructure.hello = {\n    enable = ;\n  };\n}\n", "nodes/n1.nix", 3, "syntax error")
	broken("{ ... }: {\n\n  infrastructure.hello.message = nosuchthing;\n}\n", "nodes/n1.nix", 3, "undefined variable")
	if got := a.call("nix-check", in{"nodes": "n1,n2"}); !strings.Contains(got.text, "1 of 2 nodes are good") {
		t.Errorf("one is broken: %s", got.text)
	}
	// Code that Nix evaluates reads nothing of the machine, whatever it knows of it, and asks nobody.
	if err := node.WriteFile("/root/dev/private/key", []byte("TOP-SECRET"), 0o600); err != nil {
		t.Fatal(err)
	}
	hash := f.exec(node, "nix-hash", "--type", "sha256", "--sri", "/root/dev/private")
	for _, code := range []string{
		`builtins.readFile (builtins.fetchTree { type = "path"; path = "/root/dev/private"; narHash = "` + hash + `"; } + "/key")`,
		`builtins.readFile (builtins.fetchurl { url = "http://127.0.0.1:9/x"; sha256 = "` + hash + `"; })`,
		`builtins.readFile (builtins.fetchGit { url = "file:///root/dev/private"; rev = "0123456789012345678901234567890123456789"; } + "/key")`,
	} {
		a.good(edit, in{"operation": "replace", "path": "nodes/n1.nix", "content": "{ ... }: builtins.seq (" + code + ") { }\n"})
		if got := a.call("nix-check", in{"path": "nodes/n1.nix"}); !got.failed || strings.Contains(got.text, "TOP-SECRET") || !strings.Contains(got.text, "restricted mode") {
			t.Errorf("%s: %s", code, got.text)
		}
	}
	a.good(edit, in{"operation": "replace", "path": "nodes/n1.nix", "content": service("mended", "")})
	a.good("nix-check", in{"path": "nodes/n1.nix"}, "1 of 1 nodes are good")
	if left := f.exec(node, "find", "/tmp", "-maxdepth", "1", "-name", "nix-infra-*"); left != "" {
		t.Errorf("left: %s", left)
	}

	// A test that ends by itself, and one that does not.
	session := func(test string) string {
		t.Helper()
		f.exec(node, "rm", "-f", "/root/dev/pid")
		return a.good("test-runner", in{"operation": "run", "test-name": test}).rows[0]["session_id"].(string)
	}
	runaway := func() (pid string) {
		t.Helper()
		f.eventually(time.Minute, func() string {
			data, _ := node.ReadFile("/root/dev/pid")
			if pid = strings.TrimSpace(string(data)); pid == "" {
				return "the test's daemon did not begin"
			}
			return ""
		})
		return pid
	}
	gone := func(pid string) {
		t.Helper()
		if out, err := node.Exec(f.ctx, "test", "!", "-e", "/proc/"+pid); err != nil {
			t.Errorf("process %s is still there: %s", pid, out)
		}
	}
	id := session("good")
	var row map[string]any
	f.eventually(time.Minute, func() string {
		if row = a.good("test-runner", in{"operation": "get_output", "session_id": id}).rows[0]; row["is_complete"] != true {
			return "the test does not end"
		}
		return ""
	})
	if row["exit_code"] != 4.0 || row["output"] != "run good\n" || row["processes_left"] != 1.0 {
		t.Errorf("%v", row)
	}
	pid := runaway()
	a.good("test-runner", in{"operation": "cancel", "session_id": id})
	gone(pid)
	id = session("endless")
	pid = runaway()
	a.good("test-runner", in{"operation": "cancel", "session_id": id}, "cancelled")
	gone(pid)
	session("endless")
	pid = runaway()
	a.session.Close() // the server ends with its client
	f.eventually(time.Minute, func() string {
		if out, err := node.Exec(f.ctx, "test", "!", "-e", "/proc/"+pid); err != nil {
			return "the test goes on without its server: " + string(out)
		}
		return ""
	})
	f.prefetched()
}

// prefetched: the hashes are Nix's own, of a file and of what is in it.
func (f *fleet) prefetched() {
	t, node := f.t, f.nodes["n1"]
	var packed bytes.Buffer
	z := gzip.NewWriter(&packed)
	w := tar.NewWriter(z)
	for _, h := range []struct {
		tar.Header
		content string
	}{
		{tar.Header{Name: "top/", Typeflag: tar.TypeDir, Mode: 0o755}, ""}, {tar.Header{Name: "top/run", Mode: 0o755}, "#!/bin/sh\n"}, {tar.Header{Name: "top/a/b", Mode: 0o644}, "content"},
		{tar.Header{Name: "top/link", Typeflag: tar.TypeSymlink, Linkname: "a/b"}, ""}, {tar.Header{Name: "top/Ä", Mode: 0o644}, strings.Repeat("x", 70000)},
	} {
		h.Size = int64(len(h.content))
		if err := w.WriteHeader(&h.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write([]byte(h.content)); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	if err := node.WriteFile("/root/dev/x.tar.gz", packed.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	f.exec(node, "sh", "-c", "mkdir /root/dev/x && tar -C /root/dev/x -xzf /root/dev/x.tar.gz")
	flat := f.exec(node, "nix-hash", "--type", "sha256", "--base32", "--flat", "/root/dev/x.tar.gz")
	content := f.exec(node, "nix-hash", "--type", "sha256", "--base32", "/root/dev/x/top")

	s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(packed.Bytes()) }))
	listener, err := f.lab.Listen(f.ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	s.Listener.Close()
	s.Listener = listener
	s.TLS = &tls.Config{MinVersion: tls.VersionTLS12}
	s.StartTLS()
	t.Cleanup(s.Close)
	roots := filepath.Join(t.TempDir(), "roots.pem")
	if err := os.WriteFile(roots, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}), 0o600); err != nil {
		t.Fatal(err)
	}
	serve := func(more ...string) *assistant {
		cmd := f.command(append([]string{"mcp", "dev"}, more...)...)
		cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+roots)
		return stdioAssistant(t, f.ctx, cmd, "")
	}
	const tool = "nix-prefetch-url"
	url := "https://" + listener.Addr().String() + "/x.tar.gz"
	a := serve("--allow-private")
	a.good(tool, in{"url": url}, flat)
	a.good(tool, in{"url": url, "unpack": true}, content)
	if got := a.good(tool, in{"operation": "verify", "url": url, "unpack": true, "expected_hash": content}); got.rows[0]["matches"] != true {
		t.Errorf("%v", got.rows)
	}
	serve().refused(tool, in{"url": url}, "--allow-private")
}

// TestMCPLab: tests run in throw-away nodes of this machine: made, used, and removed by the development server.
func TestMCPLab(t *testing.T) {
	f := shared(t)
	program := filepath.Join(t.TempDir(), "nix-infra-lab")
	if out, err := exec.CommandContext(f.ctx, "go", "build", "-o", program, "./lab/cmd/lab").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	project := t.TempDir()
	for name, text := range map[string]string{"run-tests.sh": "#!/bin/bash\nexec 3<>/dev/tcp/10.77.0.11/22 && head -c 4 <&3 && echo \"is what $2 sees of n1\"\n", "t1/test.sh": ""} {
		file := filepath.Join(project, "__test__", name)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	serve := func() *assistant {
		return stdioAssistant(t, f.ctx, exec.CommandContext(f.ctx, filepath.Join(programs.dir, "nix-infra"), "-d", project, "mcp", "dev", "--lab", program), "")
	}
	a := serve()
	ended := func(tool string, inputs in) (row map[string]any) {
		t.Helper()
		started := a.good(tool, inputs)
		if started.failed {
			t.FailNow()
		}
		f.eventually(2*time.Minute, func() string {
			row = a.good(tool, in{"operation": "get_output", "session_id": started.rows[0]["session_id"]}).rows[0]
			if row["is_complete"] != true {
				return "it does not end"
			}
			return ""
		})
		if row["exit_code"] != 0.0 {
			t.Fatalf("%s %v: %v", tool, inputs, row)
		}
		return row
	}
	const environment = "test-environment"
	up := ended(environment, in{"operation": "create", "environment": "lab", "nodes": 1})
	name, _, _ := strings.Cut(up["output"].(string)[strings.LastIndex(up["output"].(string), "dev-"):], " ")
	t.Cleanup(func() { _ = exec.Command(program, "--name", name, "down").Run() }) // where the test failed
	if row := ended(environment, in{"operation": "status", "environment": "lab"}); !strings.Contains(row["output"].(string), name+"  n1") || !strings.Contains(row["output"].(string), "running") {
		t.Errorf("%v", row)
	}
	if row := ended("test-runner", in{"operation": "run", "test-name": "t1"}); row["output"] != "SSH-is what t1 sees of n1\n" {
		t.Errorf("%v", row)
	}
	// The nodes end with the server, and the next one makes them again.
	a.session.Close()
	f.eventually(2*time.Minute, func() string {
		out, err := exec.CommandContext(f.ctx, program, "list").Output()
		for line := range strings.Lines(string(out)) {
			if strings.HasPrefix(line, name) && strings.Contains(line, "running") {
				return "the lab goes on without its server: " + line
			}
		}
		if err != nil {
			return err.Error()
		}
		return ""
	})
	a = serve()
	ended(environment, in{"operation": "create", "environment": "lab", "nodes": 1})
	ended(environment, in{"operation": "teardown", "environment": "lab"})
	if out, err := exec.CommandContext(f.ctx, program, "list").Output(); err != nil || strings.Contains(string(out), name) {
		t.Errorf("the lab is still there: %s %v", out, err)
	}
}
