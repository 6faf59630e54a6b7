package mcp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/mcp"
)

const (
	hello  = `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"2025-06-18","capabilities":{},"clientInfo":{"name":"x","version":"1"}}}`
	secret = "the-token"
)

func TestGuard(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	o := HTTPOptions{Addr: ":0", Origins: []string{"https://chat.example.org"}, Authenticate: func(token string) (Caller, error) {
		if token != secret {
			return Caller{}, errors.New("nobody knows this token")
		}
		return Caller{Name: "alice"}, nil
	}}
	if err := o.Check(); err != nil || o.Addr != "127.0.0.1:0" {
		t.Fatalf("%s, %v", o.Addr, err)
	}
	server := httptest.NewServer(s.guard(o, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if _, err := io.ReadAll(r.Body); err != nil {
			w.WriteHeader(http.StatusRequestEntityTooLarge)
			return
		}
		io.WriteString(w, s.callerOf(r.Context()).Name)
	})))
	defer server.Close()
	for name, c := range map[string]struct {
		path, auth string
		origin     []string
		body       string
		want       int
	}{
		"all is well":       {"/mcp", "Bearer " + secret, nil, hello, 200},
		"a page":            {"/mcp", "Bearer " + secret, []string{"https://chat.example.org"}, hello, 200},
		"another page":      {"/mcp", "Bearer " + secret, []string{"https://evil.example.org"}, hello, 403},
		"this machine's":    {"/mcp", "Bearer " + secret, []string{"http://localhost:1"}, hello, 403},
		"a page's file":     {"/mcp", "Bearer " + secret, []string{"null"}, hello, 403},
		"two origins":       {"/mcp", "Bearer " + secret, []string{"https://chat.example.org", "https://evil.example.org"}, hello, 403},
		"no token":          {"/mcp", "", nil, hello, 401},
		"another token":     {"/mcp", "Bearer other", nil, hello, 401},
		"another scheme":    {"/mcp", "Basic " + secret, nil, hello, 401},
		"the token, longer": {"/mcp", "Bearer " + secret + " ", nil, hello, 200}, // a header's value has no space at its end
		"another path":      {"/", "Bearer " + secret, nil, hello, 404},
		"too much":          {"/mcp", "Bearer " + secret, nil, strings.Repeat("x", maxMessage+1), 413},
	} {
		r, err := http.NewRequest(http.MethodPost, server.URL+c.path, strings.NewReader(c.body))
		if err != nil {
			t.Fatal(err)
		}
		if c.auth != "" {
			r.Header.Set("Authorization", c.auth)
		}
		r.Header["Origin"] = c.origin
		got, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		body, _ := io.ReadAll(got.Body)
		got.Body.Close()
		if got.StatusCode != c.want || c.want == 200 && string(body) != "alice" {
			t.Errorf("%s: %d, %s", name, got.StatusCode, body)
		}
	}
}

func TestTooManyAtOnce(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	hold, working := make(chan struct{}), make(chan struct{}, maxAtOnce)
	server := httptest.NewServer(s.guard(HTTPOptions{Authenticate: func(string) (Caller, error) { return Caller{}, nil }}, http.HandlerFunc(func(http.ResponseWriter, *http.Request) {
		working <- struct{}{}
		<-hold
	})))
	defer server.Close()
	defer close(hold)
	post := func() (*http.Response, error) {
		r, err := http.NewRequest(http.MethodPost, server.URL+Path, strings.NewReader(hello))
		if err != nil {
			return nil, err
		}
		r.Header.Set("Authorization", "Bearer x")
		return http.DefaultClient.Do(r)
	}
	for range maxAtOnce {
		go post()
	}
	for range maxAtOnce {
		<-working
	}
	r, err := post()
	if err != nil || r.StatusCode != http.StatusServiceUnavailable || r.Header.Get("Retry-After") == "" {
		t.Errorf("%v, %v", r, err)
	}
}

func TestTokensEnd(t *testing.T) {
	tokens, now := Tokens{Path: t.TempDir() + "/tokens.json"}, time.Now()
	soon := now.Add(time.Hour)
	token, err := tokens.Add("alice", "mcp.creds", &soon, now)
	if err != nil {
		t.Fatal(err)
	}
	if found, err := tokens.Find(token, now); err != nil || found.Name != "alice" {
		t.Errorf("%v, %v", found, err)
	}
	if _, err := tokens.Find(token, soon.Add(time.Second)); err == nil || !strings.Contains(err.Error(), "expired") {
		t.Errorf("after its end: %v", err)
	}
	for _, other := range []string{"", token[:len(token)-1], token + "a", strings.ToUpper(token)} {
		if _, err := tokens.Find(other, now); err == nil {
			t.Errorf("%q was taken", other)
		}
	}
}

// Over stdio, what is no message is answered, whatever it is, and the next one is served.
func TestStdioSurvives(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	in, client := io.Pipe()
	answers, out := io.Pipe()
	ended := make(chan error, 1)
	go func() { ended <- s.ServeStdio(context.Background(), in, out) }()
	lines := bufio.NewScanner(answers)
	lines.Buffer(nil, 1<<20)
	ask := func(message string) string {
		t.Helper()
		if _, err := io.WriteString(client, message+"\n"); err != nil || !lines.Scan() {
			t.Fatalf("no answer to %.80q: %v", message, err)
		}
		return lines.Text()
	}
	if got := ask(hello); !strings.Contains(got, `"protocolVersion":"2025-06-18"`) {
		t.Fatal(got)
	}
	call := `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"server-info","arguments":{}}}`
	for _, message := range []string{"{", "\x00\xff", strings.Repeat("x", maxMessage+10), strings.Repeat("[", 100_000), `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"` + strings.Repeat("n", 1000) + `"}}`,
		`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"server-info","arguments":[1]}}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call"}`, `{"jsonrpc":"2.0","id":1,"method":"nonsense"}`} {
		if got := ask(message); !strings.Contains(got, `"error"`) && !strings.Contains(got, `"isError":true`) {
			t.Errorf("%.60q got %.200s", message, got)
		}
		if got := ask(call); !strings.Contains(got, "server_info") && !strings.Contains(got, `"isError"`) && !strings.Contains(got, "with the tools of") {
			t.Errorf("after %.60q: %.200s", message, got)
		}
	}
	client.Close()
	if err := <-ended; err != nil {
		t.Errorf("it ended with %v", err)
	}
}

func FuzzLines(f *testing.F) {
	f.Add([]byte("a\n\n  \nb\nc"))
	f.Fuzz(func(t *testing.T, data []byte) {
		got, err := io.ReadAll(&lines{in: bufio.NewReaderSize(bytes.NewReader(data), 16)})
		if err != nil {
			t.Fatal(err)
		}
		var want []byte
		for l := range bytes.Lines(data) {
			if bytes.HasSuffix(l, []byte("\n")) && len(bytes.TrimSpace(l)) == 0 {
				continue
			}
			want = append(want, l...)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%q became %q", data, got)
		}
	})
}

// A call ends when its client says so, and one that takes too long ends by itself.
func TestCallsEnd(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	began := make(chan struct{}, 1)
	Add(s, Tool{Name: "slow", Timeout: time.Hour}, func(ctx context.Context, _ *Call, _ struct{}) (*Answer[line], error) {
		began <- struct{}{}
		<-ctx.Done()
		return nil, ctx.Err()
	})
	Add(s, Tool{Name: "short", Timeout: time.Millisecond}, func(ctx context.Context, _ *Call, _ struct{}) (*Answer[line], error) {
		<-ctx.Done()
		return nil, ctx.Err()
	})
	Add(s, Tool{Name: "broken"}, func(context.Context, *Call, struct{}) (*Answer[line], error) { panic("a secret") })
	c := connected(t, s, mcp.ProtocolVersion20251125)
	if text, _, failed := call(t, c, "short", nil); !failed || text != "it took longer than 1ms" {
		t.Errorf("%q", text)
	}
	if text, _, failed := call(t, c, "broken", nil); !failed || strings.Contains(text, "a secret") {
		t.Errorf("%q", text)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() {
		_, err := c.CallTool(ctx, mcp.CallToolRequest{Params: mcp.CallToolParams{Name: "slow"}})
		ended <- err
	}()
	<-began
	cancel()
	select {
	case <-ended:
	case <-time.After(10 * time.Second):
		t.Error("it goes on")
	}
}
