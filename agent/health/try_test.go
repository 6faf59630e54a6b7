package health

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// once tries one check, whose fields beside its name are given, with its own timeout: one that no busy machine misses, where none is given.
func once(t *testing.T, state UnitState, fields map[string]any) error {
	t.Helper()
	fields["name"] = "it"
	if fields["timeout"] == nil {
		fields["timeout"] = 60
	}
	document, err := json.Marshal(map[string]any{"v": 1, "checks": []any{fields}})
	if err != nil {
		t.Fatal(err)
	}
	all, err := Parse(document)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), all[0].Timeout)
	defer cancel()
	return all[0].probe(ctx, state)
}

// says checks why a try failed; "": it passed.
func says(t *testing.T, err error, want string) {
	t.Helper()
	if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
		t.Errorf("got %v, want %q", err, want)
	}
}

func TestUnit(t *testing.T) {
	for state, want := range map[string]string{"active": "", "failed": "a.service is failed", "activating": "a.service is activating", "inactive": "a.service is inactive",
		"not-found": "there is no unit a.service"} {
		says(t, once(t, func(_ context.Context, unit string) (string, error) {
			if unit != "a.service" {
				t.Errorf("asked for %s", unit)
			}
			return state, nil
		}, map[string]any{"kind": "unit", "unit": "a.service"}), want)
	}
	says(t, once(t, func(context.Context, string) (string, error) { return "active", errors.New("no bus") }, map[string]any{"kind": "unit", "unit": "a.service"}), "no bus")
}

func TestTCP(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	check := func() error {
		return once(t, nil, map[string]any{"kind": "tcp", "address": l.Addr().String()})
	}
	says(t, check(), "")
	l.Close()
	says(t, check(), "connection refused")
}

func TestHTTP(t *testing.T) {
	mux := http.NewServeMux()
	mux.HandleFunc("/ping", func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || r.Header.Get("User-Agent") != "nix-infra-agent" {
			w.WriteHeader(http.StatusTeapot)
		}
		fmt.Fprint(w, "ping, pong\n")
	})
	mux.HandleFunc("/created", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusCreated) })
	mux.HandleFunc("/down", func(w http.ResponseWriter, _ *http.Request) { http.Error(w, "pong", http.StatusServiceUnavailable) })
	mux.HandleFunc("/moved", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/ping", http.StatusFound) })
	mux.HandleFunc("/early", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusEarlyHints)
		w.WriteHeader(http.StatusOK)
	})
	mux.HandleFunc("/flood", func(w http.ResponseWriter, _ *http.Request) {
		for range 4096 {
			if _, err := w.Write([]byte(strings.Repeat("x", 1024))); err != nil {
				return
			}
		}
		fmt.Fprint(w, "pong")
	})
	mux.HandleFunc("/hangs", func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() })
	server := httptest.NewServer(mux)
	defer server.Close()
	for _, c := range []struct {
		path   string
		fields map[string]any
		want   string
	}{
		{"/ping", nil, ""},
		{"/ping?query=1", nil, ""},
		{"/ping", map[string]any{"status": 200, "body": "pong"}, ""},
		{"/ping", map[string]any{"body_regex": `(?m)^ping.*pong$`}, ""},
		{"/ping", map[string]any{"body": "ping", "body_regex": "^pong"}, `without what matches "^pong": "ping, pong\n"`},
		{"/ping", map[string]any{"body": "PONG"}, `without "PONG"`},
		{"/ping", map[string]any{"status": 204}, "answered 200 OK"},
		{"/created", nil, ""},
		{"/created", map[string]any{"status": 200}, "answered 201 Created"},
		{"/down", map[string]any{"body": "pong"}, "answered 503 Service Unavailable"},
		{"/down", map[string]any{"status": 503, "body": "pong"}, ""},
		{"/missing", nil, "answered 404 Not Found"},
		{"/moved", nil, `answered 302 Found, to "/ping"`},
		{"/moved", map[string]any{"status": 200}, "answered 302 Found"},
		{"/moved", map[string]any{"status": 302}, ""},
		{"/early", nil, ""},
		{"/flood", nil, ""},
		{"/flood", map[string]any{"body": "pong"}, `without "pong"`}, // it is beyond what is looked at
		{"/hangs", map[string]any{"timeout": 0.2}, "i/o timeout"},
	} {
		fields := map[string]any{"kind": "http", "url": server.URL + c.path}
		for name, value := range c.fields {
			fields[name] = value
		}
		t.Run(fmt.Sprint(c.path, c.fields), func(t *testing.T) { says(t, once(t, nil, fields), c.want) })
	}
	secure := httptest.NewUnstartedServer(mux)
	secure.Config.ErrorLog = log.New(io.Discard, "", 0)
	secure.StartTLS()
	defer secure.Close()
	says(t, once(t, nil, map[string]any{"kind": "http", "url": secure.URL + "/ping"}), "certificate") // of nobody that is trusted
}

// An answer whose header has no end does not fill the memory.
func TestHTTPHeaderWithoutEnd(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	sent := make(chan int, 1)
	go func() {
		conn, err := l.Accept()
		if err != nil {
			return
		}
		defer conn.Close()
		n, _ := fmt.Fprint(conn, "HTTP/1.1 200 OK\r\n")
		for err == nil && n < 1<<30 {
			var more int
			more, err = fmt.Fprintf(conn, "X-%d: %s\r\n", n, strings.Repeat("x", 1000))
			n += more
		}
		sent <- n
	}()
	says(t, once(t, nil, map[string]any{"kind": "http", "url": "http://" + l.Addr().String()}), "EOF")
	if n := <-sent; n >= 1<<30 {
		t.Errorf("%d bytes of header were read", n)
	}
}

func TestCommand(t *testing.T) {
	for _, c := range []struct {
		argv []string
		want string
	}{
		{[]string{"/bin/sh", "-c", "exit 0"}, ""},
		{[]string{"/bin/sh", "-c", "echo first; echo 'all  broken' >&2; echo; exit 3"}, "exit status 3: all  broken"},
		{[]string{"/bin/sh", "-c", "yes | head -n 100000; echo last; exit 1"}, "exit status 1: last"},
		{[]string{"/bin/sh", "-c", `[ "$HOME" = /root ] && [ -n "$PATH" ] && [ -z "$NOTIFY_SOCKET" ] && [ "$PWD" = / ]`}, ""},
		{[]string{"/bin/sh", "-c", `[ "$0" = '$HOME;ls' ]`, "$HOME;ls"}, ""}, // no shell of ours looks at it
		{[]string{"/nowhere/check"}, "no such file"},
	} {
		t.Setenv("NOTIFY_SOCKET", "/run/ours")
		says(t, once(t, nil, map[string]any{"kind": "command", "command": c.argv}), c.want)
	}
}

// A command that does not end in time is killed with all that it started.
func TestCommandIsKilled(t *testing.T) {
	child := filepath.Join(t.TempDir(), "child")
	ctx, late := context.WithCancel(t.Context())
	defer late()
	go func() {
		for ctx.Err() == nil {
			if data, err := os.ReadFile(child); err == nil && strings.HasSuffix(string(data), "\n") {
				late()
			}
			time.Sleep(time.Millisecond)
		}
	}()
	says(t, tryCommand(ctx, []string{"/bin/sh", "-c", `sleep 1000 & echo waiting; echo $! >` + child + `; wait`}), "waiting")
	gone(t, child)

	// One that ends and leaves something behind can't pass: what it left would gather with each try.
	says(t, once(t, nil, map[string]any{"kind": "command", "command": []string{"/bin/sh", "-c", `sleep 1000 & echo $! >` + child}}), "left a process behind")
	gone(t, child)
}

func gone(t *testing.T, pidFile string) {
	t.Helper()
	data, err := os.ReadFile(pidFile)
	if err != nil {
		t.Fatal(err)
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(data)))
	if err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(stat), ") Z ") {
			return
		}
		if time.Now().After(deadline) {
			_ = syscall.Kill(pid, syscall.SIGKILL)
			t.Fatal("what the command started still runs")
		}
	}
}

func TestFile(t *testing.T) {
	dir := t.TempDir()
	file, pipe := filepath.Join(dir, "ready"), filepath.Join(dir, "pipe")
	says(t, once(t, nil, map[string]any{"kind": "file", "path": file}), "is not there")
	if err := os.WriteFile(file, []byte("state: ok\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(pipe, 0o600); err != nil {
		t.Fatal(err)
	}
	says(t, once(t, nil, map[string]any{"kind": "file", "path": file}), "")
	says(t, once(t, nil, map[string]any{"kind": "file", "path": file, "contains": "ok"}), "")
	says(t, once(t, nil, map[string]any{"kind": "file", "path": file, "contains": "done"}), `does not contain "done"`)
	says(t, once(t, nil, map[string]any{"kind": "file", "path": dir}), "")
	says(t, once(t, nil, map[string]any{"kind": "file", "path": dir, "contains": "x"}), "no regular file")
	says(t, once(t, nil, map[string]any{"kind": "file", "path": pipe, "contains": "x"}), "no regular file") // which nobody writes to
	says(t, once(t, nil, map[string]any{"kind": "file", "path": file + "/below"}), "not a directory")
}
