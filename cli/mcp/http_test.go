package mcp

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/mcp"

	"github.com/nix-infra/nix-infra/protocol"
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
	server := httptest.NewServer(s.guard(o, newSessions(), http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
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

// Requests that are worked on are bounded in number, all of them and those of one caller: nobody can keep the others out.
func TestTooManyAtOnce(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	hold, working := make(chan struct{}), make(chan struct{}, maxAtOnce)
	server := httptest.NewServer(s.guard(HTTPOptions{Authenticate: func(token string) (Caller, error) { return Caller{Name: token}, nil }}, newSessions(),
		http.HandlerFunc(func(_ http.ResponseWriter, r *http.Request) {
			if r.Header.Get("Hold") != "" {
				working <- struct{}{}
				<-hold
			}
		})))
	defer server.Close()
	request := func(token, held string) (*http.Response, error) {
		r, err := http.NewRequest(http.MethodPost, server.URL+Path, strings.NewReader(hello))
		if err != nil {
			return nil, err
		}
		r.Header.Set("Authorization", "Bearer "+token)
		r.Header.Set("Hold", held)
		got, err := http.DefaultClient.Do(r)
		if err == nil {
			got.Body.Close()
		}
		return got, err
	}
	status := func(token string) int {
		t.Helper()
		r, err := request(token, "")
		if err != nil {
			t.Fatal(err)
		}
		if r.StatusCode == http.StatusServiceUnavailable && r.Header.Get("Retry-After") == "" {
			t.Error("it does not say when to come again")
		}
		return r.StatusCode
	}
	var wait sync.WaitGroup
	for n := range maxAtOnce {
		if n == maxOfCaller {
			if greedy, other := status("caller-0"), status("caller-1"); greedy != 503 || other != 200 {
				t.Errorf("who has all its places gets %d, and somebody else %d", greedy, other)
			}
		}
		wait.Go(func() { _, _ = request(fmt.Sprintf("caller-%d", n/maxOfCaller), "yes") })
		<-working
	}
	if got := status("somebody"); got != 503 {
		t.Errorf("where all places are taken, one gets %d", got)
	}
	close(hold)
	wait.Wait()
	if got := status("caller-0"); got != 200 {
		t.Errorf("where all places are free, one gets %d", got)
	}
}

// served serves over HTTP as itself, to callers by the words that authenticate says; it ends with the test.
func served(t *testing.T, s *Server, authenticate func(token string) (Caller, error)) (url string) {
	t.Helper()
	ctx, stop := context.WithCancel(t.Context())
	at, ended := make(chan net.Addr, 1), make(chan error, 1)
	go func() {
		ended <- s.ServeHTTP(ctx, HTTPOptions{Addr: ":0", Authenticate: authenticate, listening: func(a net.Addr) { at <- a }})
	}()
	t.Cleanup(func() {
		stop()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	select {
	case a := <-at:
		return "http://" + a.String() + Path
	case err := <-ended:
		t.Fatal(err)
		return ""
	}
}

// post sends a message as somebody, in a session.
func post(t *testing.T, url, token, session, message string, headers ...string) (status int, got http.Header, body string) {
	t.Helper()
	return send(t, http.MethodPost, url, token, session, message, headers...)
}

func send(t *testing.T, method, url, token, session, message string, headers ...string) (status int, got http.Header, body string) {
	t.Helper()
	if session != "" {
		headers = append(headers, "Mcp-Session-Id", session)
	}
	answer := request(t, method, url, token, message, headers...)
	defer answer.Body.Close()
	data, err := io.ReadAll(answer.Body)
	if err != nil {
		t.Fatal(err)
	}
	return answer.StatusCode, answer.Header, string(data)
}

// request sends a message with headers, and gives the answer as it begins.
func request(t *testing.T, method, url, token, message string, headers ...string) *http.Response {
	t.Helper()
	r, err := http.NewRequestWithContext(t.Context(), method, url, strings.NewReader(message))
	if err != nil {
		t.Fatal(err)
	}
	r.Header.Set("Authorization", "Bearer "+token)
	r.Header.Set("Content-Type", "application/json")
	r.Header.Set("Accept", "application/json, text/event-stream")
	for i := 0; i < len(headers); i += 2 {
		if headers[i] == "Host" {
			r.Host = headers[i+1]
		}
		r.Header.Set(headers[i], headers[i+1])
	}
	answer, err := http.DefaultClient.Do(r)
	if err != nil {
		t.Fatal(err)
	}
	return answer
}

// A session is its caller's: nobody else can speak, listen or end it, and who has another role meanwhile begins anew.
func TestSessionsAreTheirCallers(t *testing.T) {
	s := New(Options{Name: "test", Version: "1", Allow: []string{"act"}})
	Add(s, Tool{Name: "act", Toolset: "test", Effect: Destroys, Allow: "act", Role: protocol.Deployer}, func(context.Context, *Call, struct{}) (*Answer[line], error) {
		return &Answer[line]{Summary: "done"}, nil
	})
	var role atomic.Value
	role.Store(protocol.Deployer)
	url := served(t, s, func(token string) (Caller, error) {
		if token == "alice" {
			return Caller{Name: token, Role: role.Load().(protocol.Role)}, nil
		}
		return Caller{Name: token, Role: protocol.Viewer}, nil
	})
	const list = `{"jsonrpc":"2.0","id":2,"method":"tools/list"}`
	status, header, _ := post(t, url, "alice", "", hello)
	session := header.Get("Mcp-Session-Id")
	if status != 200 || session == "" {
		t.Fatalf("%d, %v", status, header)
	}
	if status, _, body := post(t, url, "alice", session, list); status != 200 || !strings.Contains(body, `"act"`) {
		t.Errorf("its own: %d, %s", status, body)
	}
	for _, method := range []string{http.MethodPost, http.MethodGet, http.MethodDelete} {
		if status, _, body := send(t, method, url, "bob", session, list); status != 404 {
			t.Errorf("%s of somebody else: %d, %s", method, status, body)
		}
		if status, _, body := send(t, method, url, "alice", "made-up", list); status != 404 {
			t.Errorf("%s of no session: %d, %s", method, status, body)
		}
		if status, _, body := send(t, method, url, "alice", "", list); status < 400 || status >= 500 {
			t.Errorf("%s without a session: %d, %s", method, status, body)
		}
	}
	// A session of 2026-07-28 is none: its header means nothing, and gives nothing.
	modern := []string{"Mcp-Protocol-Version", mcp.ProtocolVersion20260728, "Mcp-Method", "tools/list"}
	const meta = `{"jsonrpc":"2.0","id":2,"method":"tools/list","params":{"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"x","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}}}`
	if status, header, body := post(t, url, "bob", session, meta, modern...); status != 200 || strings.Contains(body, `"act"`) || header.Get("Mcp-Session-Id") != "" || !strings.Contains(body, `"cacheScope":"private"`) {
		t.Errorf("without sessions: %d, %v, %s", status, header, body)
	}
	if status, _, _ := send(t, http.MethodGet, url, "bob", session, "", modern...); status != 405 {
		t.Errorf("listening without sessions: %d", status)
	}
	role.Store(protocol.Viewer)
	if status, _, body := post(t, url, "alice", session, list); status != 404 {
		t.Errorf("with a lower role meanwhile: %d, %s", status, body)
	}
	status, header, _ = post(t, url, "alice", "", hello)
	session = header.Get("Mcp-Session-Id")
	if _, _, body := post(t, url, "alice", session, list); status != 200 || strings.Contains(body, `"act"`) {
		t.Errorf("a viewer sees what only a deployer may: %s", body)
	}
	if status, _, body := send(t, http.MethodDelete, url, "alice", session, ""); status != 200 {
		t.Errorf("it can't be ended: %d, %s", status, body)
	}
	if status, _, _ := post(t, url, "alice", session, list); status != 404 {
		t.Errorf("after its end: %d", status)
	}
}

// A name that a web page has lead to this machine (DNS rebinding) is no way in, with a token neither.
func TestHostHasToBeThisMachine(t *testing.T) {
	url := served(t, New(Options{Name: "test", Version: "1"}), func(token string) (Caller, error) { return Caller{Name: token}, nil })
	for host, want := range map[string]int{"localhost": 200, "127.0.0.1:1": 200, "[::1]": 200, "evil.example.org": 403, "127.0.0.1.evil.example.org": 403, "localhost.evil.example.org:80": 403} {
		if status, _, body := post(t, url, "alice", "", hello, "Host", host); status != want {
			t.Errorf("%s: %d, %s", host, status, body)
		}
	}
}

func TestRefusalsAreLoggedWithABound(t *testing.T) {
	var log bytes.Buffer
	var r refusals
	now := time.Unix(6000, 0)
	for n := range 10 * maxRefusals {
		r.log(slog.New(slog.NewTextHandler(&log, nil)), now, "refused: token", "why", n)
	}
	r.log(slog.New(slog.NewTextHandler(&log, nil)), now.Add(time.Minute), "refused: token")
	if got := strings.Count(log.String(), "refused: token"); got != maxRefusals+1 || !strings.Contains(log.String(), fmt.Sprintf("more=%d", 9*maxRefusals)) {
		t.Errorf("%d lines:\n%s", got, log.String())
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
	began, over := make(chan struct{}, 1), make(chan struct{}, 1)
	Add(s, Tool{Name: "slow", Timeout: time.Hour}, func(ctx context.Context, _ *Call, _ struct{}) (*Answer[line], error) {
		began <- struct{}{}
		<-ctx.Done()
		over <- struct{}{}
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
	go func() {
		<-began
		cancel()
	}()
	_, _ = c.CallTool(ctx, mcp.CallToolRequest{Params: mcp.CallToolParams{Name: "slow"}})
	// That the client goes on proves nothing: the work has to end.
	ended(t, over, "in this process")

	in, client := io.Pipe()
	answers, out := io.Pipe()
	go func() { _, _ = io.Copy(io.Discard, answers) }()
	go func() { _ = s.ServeStdio(t.Context(), in, out) }()
	defer client.Close()
	for _, message := range []string{hello, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"slow","arguments":{}}}`} {
		if _, err := io.WriteString(client, message+"\n"); err != nil {
			t.Fatal(err)
		}
	}
	<-began
	if _, err := io.WriteString(client, `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}`+"\n"); err != nil {
		t.Fatal(err)
	}
	ended(t, over, "over stdio")

	url := served(t, s, func(token string) (Caller, error) { return Caller{Name: token}, nil })
	ctx, cancel = context.WithCancel(t.Context())
	go func() {
		<-began
		cancel()
	}()
	const call = `{"jsonrpc":"2.0","id":2,"method":"tools/call","params":{"name":"slow","arguments":{},"_meta":{"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"x","version":"1"},"io.modelcontextprotocol/clientCapabilities":{}}}}`
	r, err := http.NewRequestWithContext(ctx, http.MethodPost, url, strings.NewReader(call))
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range map[string]string{"Authorization": "Bearer x", "Content-Type": "application/json", "Accept": "application/json, text/event-stream", "Mcp-Protocol-Version": "2026-07-28", "Mcp-Method": "tools/call", "Mcp-Name": "slow"} {
		r.Header.Set(name, value)
	}
	if answer, err := http.DefaultClient.Do(r); err == nil {
		answer.Body.Close()
		t.Errorf("it was answered with %s", answer.Status)
	}
	ended(t, over, "over HTTP")

	_, header, _ := post(t, url, "x", "", hello)
	session := header.Get("Mcp-Session-Id")
	answered := make(chan string, 1)
	go func() {
		defer close(answered)
		_, _, body := post(t, url, "x", session, `{"jsonrpc":"2.0","id":7,"method":"tools/call","params":{"name":"slow","arguments":{}}}`)
		answered <- body
	}()
	<-began
	if status, _, body := post(t, url, "x", session, `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":7}}`); status != http.StatusAccepted {
		t.Errorf("a cancellation is answered with %d: %s", status, body)
	}
	ended(t, over, "in a session over HTTP")
	<-answered
}

func ended(t *testing.T, over <-chan struct{}, where string) {
	t.Helper()
	select {
	case <-over:
	case <-time.After(2 * time.Minute):
		t.Fatal(where + " it goes on")
	}
}

// A client that wants to know how far a call is is told so, by the name that it gave and not too often, and others are not.
func TestProgress(t *testing.T) {
	s := New(Options{Name: "test", Version: "1"})
	seen := make(chan struct{}, 1)
	Add(s, Tool{Name: "long"}, func(ctx context.Context, _ *Call, in lineIn) (*Answer[line], error) {
		for done := 1; ; done++ { // until the client was told: what is told at the very end may be lost, or come after the answer
			Progress(ctx, done, in.Lines)
			select {
			case <-seen:
				return &Answer[line]{Summary: "done"}, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			case <-time.After(time.Millisecond):
			}
		}
	})
	const modern = `"io.modelcontextprotocol/protocolVersion":"2026-07-28","io.modelcontextprotocol/clientInfo":{"name":"x","version":"1"},"io.modelcontextprotocol/clientCapabilities":{},`
	call := func(id int, meta string) string {
		return fmt.Sprintf(`{"jsonrpc":"2.0","id":%d,"method":"tools/call","params":{"name":"long","arguments":{"lines":100},"_meta":{%s}}}`, id, meta)
	}
	// check calls without a name for progress and with one. ask sends a message, and gives the lines that come.
	check := func(t *testing.T, meta string, ask func(message string) *bufio.Scanner) {
		t.Helper()
		seen <- struct{}{} // who does not want to be told: the answer is all that comes
		for lines := ask(call(7, strings.TrimSuffix(meta, ","))); lines.Scan() && !strings.Contains(lines.Text(), `"id":7`); {
			if strings.Contains(lines.Text(), "progress") {
				t.Errorf("nobody asked for %s", lines.Text())
			}
		}
		began, told, answered := time.Now(), 0, false
		for lines := ask(call(8, meta+`"progressToken":"mine"`)); !answered && lines.Scan(); {
			if answered = strings.Contains(lines.Text(), `"id":8`); !strings.Contains(lines.Text(), "notifications/progress") {
				continue
			}
			if told++; told == 2 {
				seen <- struct{}{}
			}
			if !strings.Contains(lines.Text(), `"progressToken":"mine"`) || !strings.Contains(lines.Text(), `"total":100`) {
				t.Errorf("told: %s", lines.Text())
			}
		}
		if most := 1 + int(time.Since(began)/progressEvery); !answered || told < 2 || told > most {
			t.Errorf("answered: %t, told %d times, and %d times is often enough", answered, told, most)
		}
	}
	t.Run("over stdio", func(t *testing.T) {
		in, client := io.Pipe()
		answers, out := io.Pipe()
		go func() { _ = s.ServeStdio(t.Context(), in, out) }()
		defer client.Close()
		lines := bufio.NewScanner(answers)
		ask := func(message string) *bufio.Scanner {
			t.Helper()
			if _, err := io.WriteString(client, message+"\n"); err != nil {
				t.Fatal(err)
			}
			return lines
		}
		ask(hello).Scan()
		ask(`{"jsonrpc":"2.0","method":"notifications/initialized"}`)
		check(t, "", ask)
	})
	url := served(t, s, func(token string) (Caller, error) { return Caller{Name: token}, nil })
	_, header, _ := post(t, url, "alice", "", hello)
	for name, over := range map[string]struct {
		meta    string
		headers []string
	}{
		"over HTTP in a session":      {"", []string{"Mcp-Session-Id", header.Get("Mcp-Session-Id")}},
		"over HTTP without a session": {modern, []string{"Mcp-Protocol-Version", mcp.ProtocolVersion20260728, "Mcp-Method", "tools/call", "Mcp-Name", "long"}},
	} {
		t.Run(name, func(t *testing.T) {
			check(t, over.meta, func(message string) *bufio.Scanner {
				t.Helper()
				answer := request(t, http.MethodPost, url, "alice", message, over.headers...)
				t.Cleanup(func() { answer.Body.Close() })
				if answer.StatusCode != 200 {
					t.Fatal(answer.Status)
				}
				return bufio.NewScanner(answer.Body)
			})
		})
	}
}
