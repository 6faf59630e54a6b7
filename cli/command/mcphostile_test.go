package command

import (
	"bufio"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/mark3labs/mcp-go/client"
	"github.com/mark3labs/mcp-go/client/transport"
	mcpgo "github.com/mark3labs/mcp-go/mcp"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/rule"
)

// serveMCP runs `nix-infra mcp …` as an assistant's client would, and gives what it reads and writes. It ends with the test.
func (s *shell) serveMCP(args ...string) (in io.WriteCloser, out io.Reader) {
	s.t.Helper()
	inR, inW := io.Pipe()
	outR, outW := io.Pipe()
	done := make(chan run, 1)
	go func() {
		var stderr bytes.Buffer
		code := Run(s.t.Context(), append([]string{"-d", s.dir, "mcp"}, args...), Environment{Stdin: inR, Stdout: outW, Stderr: &stderr,
			Getenv: func(name string) string { return s.env[name] }, VaultOptions: []vault.Option{vault.WorkFactor(2)}})
		outW.Close()
		done <- run{code, "", stderr.String()}
	}()
	s.t.Cleanup(func() {
		inW.Close()
		go func() { _, _ = io.Copy(io.Discard, outR) }()
		if r := <-done; r.status != OK && r.status != Interrupted {
			s.t.Errorf("mcp %v: %+v", args, r)
		}
	})
	return inW, outR
}

// mcpClient is a client of `nix-infra mcp …`.
func (s *shell) mcpClient(args ...string) *assistant {
	s.t.Helper()
	in, out := s.serveMCP(args...)
	a := &assistant{t: s.t, client: client.NewClient(transport.NewIO(out, in, io.NopCloser(strings.NewReader(""))))}
	if err := a.client.Start(s.t.Context()); err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { a.client.Close() })
	hello := mcpgo.InitializeRequest{Params: mcpgo.InitializeParams{ProtocolVersion: mcpgo.ProtocolVersion20251125, ClientInfo: mcpgo.Implementation{Name: "test", Version: "1"}}}
	if _, err := a.client.Initialize(s.t.Context(), hello); err != nil {
		s.t.Fatal(err)
	}
	return a
}

func (a *assistant) tools() []mcpgo.Tool {
	a.t.Helper()
	list, err := a.client.ListTools(a.t.Context(), mcpgo.ListToolsRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	slices.SortFunc(list.Tools, func(x, y mcpgo.Tool) int { return strings.Compare(x.Name, y.Name) })
	return list.Tools
}

// TestMCPSchemas: what assistants are told of each tool changes on purpose only (go test . -run MCPSchemas -update).
func TestMCPSchemas(t *testing.T) {
	s, f, _ := mcpFleet(t)
	s.write("admin.creds", string(f.Credentials("root", protocol.Admin, time.Time{})))
	for server, args := range map[string][]string{
		"cluster": {"cluster", "--creds", s.path("admin.creds"), "--allow", "deploy,rollback,reboot,action,restart-unit"},
		"machine": {"machine"},
		"dev":     {"dev"},
	} {
		var got bytes.Buffer
		for _, tool := range s.mcpClient(args...).tools() {
			data, err := json.Marshal(tool)
			if err != nil {
				t.Fatal(err)
			}
			if err := json.Indent(&got, data, "", "  "); err != nil {
				t.Fatal(err)
			}
			got.WriteByte('\n')
			hints := tool.Annotations
			if hints.ReadOnlyHint == nil || hints.DestructiveHint == nil || hints.IdempotentHint == nil || hints.OpenWorldHint == nil || hints.Title == "" || tool.Description == "" {
				t.Errorf("%s: %s leaves something unsaid", server, tool.Name)
			}
		}
		golden := filepath.Join("testdata", "mcp", server+".json")
		if *update {
			if err := os.MkdirAll(filepath.Dir(golden), 0o755); err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(golden, got.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(golden)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got.Bytes(), want) {
			t.Errorf("the tools of %s are not as in %s any more; see what changed with git diff after go test ./cli/command -run '^TestMCPSchemas$' -update", server, golden)
		}
	}
}

// hostileCall is what an assistant was talked into.
type hostileCall struct {
	tool   string
	inputs any
}

func (h hostileCall) String() string {
	data, _ := json.Marshal(h.inputs)
	return fmt.Sprintf("%s %.300s", h.tool, data)
}

func quotedLines(t *testing.T, file string) (all []string) {
	t.Helper()
	for line := range strings.Lines(readTestdata(t, file)) {
		s, err := strconv.Unquote(strings.TrimSpace(line))
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, s)
	}
	return all
}

func readTestdata(t *testing.T, file string) string {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// hostileCalls is the table for a server with some tools.
func hostileCalls(t *testing.T, node string, tools []mcpgo.Tool) (all []hostileCall) {
	t.Helper()
	has := func(name string) bool {
		return slices.ContainsFunc(tools, func(tool mcpgo.Tool) bool { return tool.Name == name })
	}
	known := strings.Fields("remote-command systemctl journalctl etcd configuration-files list-available-nodes fleet-status system-stats deployments deployment deployment-diff generations drift explain-failure server-info " +
		"read-project-files search edit-app-module-files nix-check nix-prefetch-url test-runner test-environment")
	for line := range strings.Lines(readTestdata(t, "../mcp/testdata/hostile.txt")) {
		tool, inputs, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok || tool == "#" {
			continue
		}
		if slices.Contains(known, tool) && !has(tool) {
			continue // another server's
		}
		all = append(all, hostileCall{tool, json.RawMessage(strings.ReplaceAll(inputs, "{NODE}", node))})
	}
	add := func(tool string, inputs map[string]any) {
		if has(tool) {
			all = append(all, hostileCall{tool, inputs})
		}
	}
	for line := range strings.Lines(readTestdata(t, "../../protocol/rule/testdata/hostile.txt")) {
		if line = strings.TrimSuffix(line, "\n"); line == "" || line[0] == '#' || strings.HasPrefix(line, `["`) {
			continue
		}
		if words, err := rule.SplitPipes(line); err == nil && len(words) > 1 {
			if _, err := rule.Match(rule.Default(), words[0], protocol.Viewer); err == nil {
				continue // what is behind the pipe is this server's to judge, which cli/mcp/fleet tests
			}
		}
		add("remote-command", map[string]any{"target": node, "command": line})
	}
	for _, path := range quotedLines(t, "../mcp/projectfiles/testdata/hostile.txt") {
		for _, operation := range []string{"list-content", "read-file"} {
			if path != "" && path == strings.TrimSpace(path) { // it takes spaces off, as the earlier tool did
				add("configuration-files", map[string]any{"operation": operation, "path": path})
			}
			if path != "" { // "" is all that is open
				add("read-project-files", map[string]any{"operation": operation, "path": path})
			}
		}
		if path != "" {
			add("search", map[string]any{"pattern": ".", "path": path})
		}
		add("edit-app-module-files", map[string]any{"operation": "view", "path": path})
		add("edit-app-module-files", map[string]any{"operation": "create", "path": path, "content": "x"})
		add("edit-app-module-files", map[string]any{"operation": "replace", "path": path, "content": "x"})
	}
	for _, url := range quotedLines(t, "../mcp/prefetch/testdata/hostile.txt") {
		add("nix-prefetch-url", map[string]any{"url": url})
	}
	return all
}

// hostileProject puts into a project what must not be seen, changed or run.
func hostileProject(s *shell) {
	s.t.Helper()
	for _, name := range []string{"secrets/a", "ssh/nixinfra", "ca/private/key", "nodes/.hidden.nix", "nodes/.git/config", "nodes/secrets/a", "nodes/a.creds", "nodes/A.CREDS", "nodes/tls.key", "__test__/t1/ssh/id_rsa", "../outside", "nodes-x/a.nix"} {
		s.write(name, "TOP-SECRET")
	}
	s.write("__test__/t1/test.sh", "")
	s.write("__test__/run-tests.sh", "#!/bin/sh\necho ran >>"+s.path("ran")+"\n")
	s.write("modules/a.nix", "{ }\n")
	for link, target := range map[string]string{
		"nodes/out": "../../outside", "nodes/abs": s.path("nodes/web1.nix"), "nodes/etc": "/etc", "nodes/tosecret": "../secrets/a", "nodes/tosecrets": "../secrets", "nodes/todots": "..", "nodes/toenv": "../.env",
		"nodes/tohidden": ".hidden.nix", "nodes/twice": "out", "nodes/loop": "loop", "nodes/insidefolder": "../modules", "modules/self": "../modules", "__test__/link": "t1",
	} {
		if err := os.Symlink(target, s.path(link)); err != nil {
			s.t.Fatal(err)
		}
	}
	s.write("nodes/deep/x.nix", "")
	if err := os.Symlink("../../../outside", s.path("nodes/deep/up")); err != nil {
		s.t.Fatal(err)
	}
}

// contents is all that is below a folder.
func contents(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		fmt.Fprintf(&b, "%s %v %d %v\n", name, info.Mode(), info.Size(), info.ModTime())
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestMCPHostile: whatever an assistant was talked into is refused with a reason. A node runs nothing, and the project is as it
// was. The node goes by its default policy, as an agent does (e2e asks real ones).
func TestMCPHostile(t *testing.T) {
	s, f, creds := mcpFleet(t)
	hostileProject(s)
	var mu sync.Mutex
	var ran []string
	n := f.Add("web1")
	n.Script(fleettest.Script{
		Answers: func(o *protocol.Verified) (any, error) {
			return nil, protocol.Refuse(protocol.Invalid, "nothing of this kind is here")
		},
		Streams: map[protocol.Action]fleettest.Streams{protocol.RunCommand: policed(func(argv []string) {
			mu.Lock()
			defer mu.Unlock()
			ran = append(ran, strings.Join(argv, " "))
		})},
	})
	before := contents(t, s.dir)
	for _, server := range []string{"cluster", "machine", "dev"} {
		args := []string{server}
		if server != "dev" {
			args = append(args, "--creds", creds)
		}
		a := s.mcpClient(args...)
		calls := hostileCalls(t, "web1", a.tools())
		if len(calls) < 300 {
			t.Errorf("%s: only %d hostile calls", server, len(calls))
		}
		t.Logf("%s: %d hostile calls", server, len(calls))
		for _, h := range calls {
			a.hostile(server, h)
		}
		if server != "dev" {
			continue
		}
		if got := a.call("test-runner", in{"operation": "list_sessions"}); len(got.Results) != 0 {
			t.Errorf("sessions were begun: %v", got.Results)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	if len(ran) > 0 {
		t.Errorf("%d commands ran, such as %q", len(ran), ran[:min(5, len(ran))])
	}
	for line := range strings.Lines(contents(t, s.dir)) {
		if !strings.Contains(before, line) {
			t.Errorf("the project changed: %s", line)
		}
	}
	if _, err := os.Stat("/tmp/x"); err == nil {
		t.Error("/tmp/x was made")
	}
}

// hostile makes a call that must be refused.
func (a *assistant) hostile(server string, h hostileCall) {
	a.t.Helper()
	r, err := a.client.CallTool(a.t.Context(), mcpgo.CallToolRequest{Params: mcpgo.CallToolParams{Name: h.tool, Arguments: h.inputs}})
	text := ""
	switch {
	case err != nil:
		text = err.Error() // no such tool
	case !r.IsError:
		a.t.Errorf("%s: %s was done: %.300v", server, h, r.Content)
		return
	default:
		for _, c := range r.Content {
			text += c.(mcpgo.TextContent).Text
		}
		data, _ := json.Marshal(r.StructuredContent)
		if strings.Contains(string(data), "TOP-SECRET") {
			a.t.Errorf("%s: %s: the structured half has a secret", server, h)
		}
	}
	if strings.TrimSpace(text) == "" || len(text) > 64<<10 || strings.Contains(text, "TOP-SECRET") || strings.Contains(text, "root:x:0") || strings.ContainsFunc(text, func(r rune) bool { return r < ' ' && r != '\n' && r != '\t' || r == 0x7f || r == 0x202e }) {
		a.t.Errorf("%s: %s: the reason is %.300q", server, h, text)
	}
}

// TestMCPMalformed: what is no request, or too large for one, is answered or passed by, and the server goes on.
func TestMCPMalformed(t *testing.T) {
	s, _, _ := mcpFleet(t)
	for _, server := range []string{"cluster", "machine", "dev"} {
		in, out := s.serveMCP(server)
		lines := make(chan string, 1000)
		go func() {
			defer close(lines)
			r := bufio.NewScanner(out)
			r.Buffer(nil, 8<<20)
			for r.Scan() {
				lines <- r.Text()
			}
		}()
		send := func(line string) {
			t.Helper()
			if _, err := io.WriteString(in, line+"\n"); err != nil {
				t.Fatal(err)
			}
		}
		alive := 0
		// ping finds out that the server still answers, with whatever it says before.
		ping := func(after string) {
			t.Helper()
			alive++
			id := fmt.Sprintf("alive-%d", alive)
			send(`{"jsonrpc":"2.0","id":"` + id + `","method":"ping"}`)
			deadline := time.After(2 * time.Minute)
			for {
				select {
				case line, ok := <-lines:
					if !ok {
						t.Fatalf("%s ended after %.100q", server, after)
					}
					if !json.Valid([]byte(line)) || len(line) > 1<<20 {
						t.Errorf("%s said %.200q, which is no message", server, line)
					}
					if strings.Contains(line, `"`+id+`"`) {
						return
					}
				case <-deadline:
					t.Fatalf("%s does not answer any more after %.100q", server, after)
				}
			}
		}
		send(`{"jsonrpc":"2.0","id":0,"method":"initialize","params":{"protocolVersion":"2025-11-25","capabilities":{},"clientInfo":{"name":"t","version":"1"}}}`)
		ping("initialize")
		deep := strings.Repeat("[", 100_000)
		for _, line := range []string{
			"", " ", "x", "{", "}", "[]", "{}", "null", "true", "0", `""`, "\x00", "\xff\xfe", "\ufeff{}", "\x1b[2J", `{"jsonrpc":"2.0"}`, `{"jsonrpc":"1.0","id":1,"method":"ping"}`, `{"jsonrpc":2,"id":1,"method":"ping"}`,
			`{"jsonrpc":"2.0","id":{},"method":"ping"}`, `{"jsonrpc":"2.0","id":[1],"method":"ping"}`, `{"jsonrpc":"2.0","id":null,"method":"ping"}`, `{"jsonrpc":"2.0","id":1e400,"method":"ping"}`, `{"jsonrpc":"2.0","id":1,"method":""}`, `{"jsonrpc":"2.0","id":1,"method":7}`,
			`{"jsonrpc":"2.0","id":1,"method":"tools/call"}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":[]}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":"x"}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":7}}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"server-info","arguments":[]}}`,
			`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"server-info","arguments":"x"}}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"server-info","arguments":7}}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"search","arguments":{"pattern":` + deep + `}}}`,
			`{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":"file:///etc/passwd"}}`, `{"jsonrpc":"2.0","id":1,"method":"resources/read","params":{"uri":"nix-infra://node/../../etc/passwd"}}`, `{"jsonrpc":"2.0","id":1,"method":"prompts/get","params":{"name":"../x"}}`,
			`{"jsonrpc":"2.0","id":1,"method":"completion/complete","params":{}}`, `{"jsonrpc":"2.0","id":1,"method":"logging/setLevel","params":{"level":"$(id)"}}`, `{"jsonrpc":"2.0","id":1,"method":"sampling/createMessage","params":{}}`, `{"jsonrpc":"2.0","id":1,"method":"initialize","params":{"protocolVersion":"9999-99-99"}}`,
			`{"jsonrpc":"2.0","id":1,"result":{}}`, `{"jsonrpc":"2.0","id":1,"error":{"code":1,"message":"x"}}`, `{"jsonrpc":"2.0","method":"notifications/cancelled","params":{"requestId":"../x"}}`, `{"jsonrpc":"2.0","method":"notifications/progress","params":7}`,
			`[{"jsonrpc":"2.0","id":1,"method":"ping"},{"jsonrpc":"2.0","id":2,"method":"ping"}]`, deep, strings.Repeat(`{"a":`, 50_000), `{"jsonrpc":"2.0","id":"` + strings.Repeat("i", 5<<20) + `","method":"ping"}`, strings.Repeat("x", 9<<20),
			`{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"` + strings.Repeat("n", 3<<20) + `"}}`, `{"jsonrpc":"2.0","id":1,"id":2,"method":"ping","method":"tools/list"}`, `{"jsonrpc":"2.0","id":1,"method":"tools/call","params":{"name":"server-info","arguments":{"__proto__":{"x":1}}}}`,
		} {
			send(line)
			ping(line)
		}
	}
}

// policed streams commands as an agent does that goes by its default policy, for viewers.
func policed(ran func(argv []string)) fleettest.Streams {
	return func(o *protocol.Verified, send func(any), _ <-chan struct{}) error {
		order, err := protocol.Decode[protocol.CommandOrder](o.Payload)
		if err != nil {
			return err
		}
		if _, err := rule.Match(rule.Default(), order.Argv, protocol.Viewer); err != nil {
			return err
		}
		ran(order.Argv)
		send(protocol.Output{Ended: &protocol.Ending{Result: protocol.ResultSuccess}})
		return nil
	}
}
