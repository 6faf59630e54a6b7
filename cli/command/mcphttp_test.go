package command

import (
	"bytes"
	"context"
	"encoding/json"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"testing"

	"github.com/mark3labs/mcp-go/client"
	"github.com/mark3labs/mcp-go/client/transport"
	mcpgo "github.com/mark3labs/mcp-go/mcp"

	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

func TestInitMakesAViewerForMCP(t *testing.T) {
	s := newShell(t)
	s.must("init", "--fleet", "shop")
	info, err := os.Stat(s.path("nix-infra/mcp.creds"))
	if err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("%v, %v", info, err)
	}
	_, claims, err := protocol.ParseCredentials([]byte(s.read("nix-infra/mcp.creds")))
	if err != nil || claims.Name != "mcp" {
		t.Fatalf("%+v, %v", claims, err)
	}
	if out := s.must("--creds", s.path("nix-infra/mcp.creds"), "whoami"); !strings.HasPrefix(out, "mcp, viewer of fleet shop, without end") {
		t.Error(out)
	}
	if out := s.must("access", "list"); !strings.Contains(out, claims.Subject) {
		t.Errorf("they are not on record:\n%s", out)
	}
	before := s.read("nix-infra/mcp.creds")
	if s.must("init"); s.read("nix-infra/mcp.creds") != before {
		t.Error("they were made anew")
	}
	// Whoever has a copy of it has the access; so one that is lost is not made anew in silence.
	if err := os.Remove(s.path("nix-infra/mcp.creds")); err != nil {
		t.Fatal(err)
	}
	if r := s.run("init"); r.status != OK || !strings.Contains(r.stderr, "access revoke mcp") {
		t.Errorf("%+v", r)
	}
	s.expect(Refused, "there is no credentials file", "mcp", "cluster")
}

func TestMCPCommandLine(t *testing.T) {
	s, _ := newFleet(t)
	for _, c := range []struct {
		says string
		args []string
	}{
		{"contradict", []string{"machine", "--read-only", "--allow", "deploy"}},
		{`--allow "everything": use some of deploy, rollback`, []string{"machine", "--allow", "everything"}},
		{`no toolset "nonsense"`, []string{"machine", "--toolsets", "nonsense"}},
		{`no toolset "cluster"`, []string{"machine", "--toolsets", "cluster"}},
		{"nobody has a token", []string{"machine", "--http", ":0"}},
		{"is not a project folder", []string{"machine", "--project-dir", t.TempDir()}},
		{"unknown command", []string{"everything"}},
		{`--client "ed"`, []string{"config", "--client", "ed"}},
		{`--server "x"`, []string{"config", "--server", "x"}},
	} {
		s.expect(Refused, c.says, append([]string{"mcp"}, c.args...)...)
	}
	s.must("mcp", "token", "add", "alice")
	s.expect(Refused, "other machines could reach it", "mcp", "machine", "--http", "0.0.0.0:0")
	s.expect(Refused, "use HOST:PORT", "mcp", "machine", "--http", "8080")
	s.expect(Refused, `--allow-origin "*"`, "mcp", "machine", "--http", ":0", "--allow-origin", "*")
	s.expect(Refused, "go together", "mcp", "machine", "--http", ":0", "--tls-cert", "x")
}

func TestMCPConfig(t *testing.T) {
	s := newShell(t)
	var d map[string]map[string]struct {
		Type, Command string
		Args          []string
	}
	r := s.run("mcp", "config", "--client", "vscode", "--server", "cluster,dev")
	if err := json.Unmarshal([]byte(r.out), &d); err != nil || r.status != OK || !strings.Contains(r.stderr, ".vscode/mcp.json") {
		t.Fatalf("%v, %+v", err, r)
	}
	if e := d["servers"]["nix-infra-cluster"]; e.Type != "stdio" || !filepath.IsAbs(e.Command) || strings.Join(e.Args, " ") != "mcp cluster --project-dir "+s.dir {
		t.Errorf("%+v", d)
	}
	if out := s.must("mcp", "config", "--env", ".env.eu", "--creds", "/x/ops.creds"); !strings.Contains(out, "\"--env\",\n        \".env.eu\",\n        \"--creds\",\n        \"/x/ops.creds\"\n") {
		t.Errorf("options are left out:\n%s", out)
	}
	for _, c := range mcpClients {
		if r := s.run("mcp", "config", "--client", c.name); r.status != OK || !strings.Contains(r.out, "nix-infra-machine") || !strings.Contains(r.out, "nix-infra-dev") {
			t.Errorf("%s: %+v", c.name, r)
		}
	}
	if files := s.snapshot(); len(files) > 0 {
		t.Errorf("it wrote %v", files)
	}
}

func TestMCPTokens(t *testing.T) {
	s, _ := newFleet(t)
	token := strings.TrimSpace(s.must("mcp", "token", "add", "alice"))
	other := strings.TrimSpace(s.must("mcp", "token", "add", "bob", "--role", "deployer", "--expires", "90d"))
	if !regexp.MustCompile(`^nixinfra_mcp_[A-Za-z0-9_-]{43}$`).MatchString(token) || token == other {
		t.Fatalf("the tokens are %q and %q", token, other)
	}
	record := s.read("nix-infra/mcp-tokens.json")
	if strings.Contains(record, strings.TrimPrefix(token, "nixinfra_mcp_")) {
		t.Error("the token is in the record")
	}
	if info, err := os.Stat(s.path("nix-infra/mcp-tokens.json")); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	docs := documents(t, s.must("mcp", "token", "list", "--json"))
	if len(docs) != 2 || docs[0]["user"] != "mcp" || docs[0]["role"] != "viewer" || docs[1]["user"] != "bob" || docs[1]["role"] != "deployer" || docs[1]["problem"] != "" {
		t.Errorf("%v", docs)
	}
	s.expect(Refused, "there is a token alice already", "mcp", "token", "add", "alice")
	s.expect(Refused, "leave one out", "mcp", "token", "add", "eve", "--role", "viewer", "--creds-file", "x")
	s.expect(Refused, "no credentials file", "mcp", "token", "add", "eve", "--creds-file", "nowhere")
	s.expect(Refused, `no token "eve"`, "mcp", "token", "remove", "eve")
	if r := s.run("mcp", "token", "remove", "bob"); r.status != OK || !strings.Contains(r.stderr, "access revoke bob") {
		t.Errorf("%+v", r)
	}
	if _, err := os.Stat(s.path("nix-infra/mcp-bob.creds")); err == nil {
		t.Error("credentials of a token are left")
	}
}

// listened is stderr of a server, which says where it listens.
type listened struct {
	mu      sync.Mutex
	all     bytes.Buffer
	address chan string
}

var listensAt = regexp.MustCompile(`msg=listening address=(\S+)`)

func (l *listened) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.all.Write(p)
	if m := listensAt.FindSubmatch(p); m != nil {
		l.address <- string(m[1])
	}
	return len(p), nil
}

func (l *listened) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.all.String()
}

func TestMCPOverHTTP(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	viewer, deployer := strings.TrimSpace(s.must("mcp", "token", "add", "alice")), strings.TrimSpace(s.must("mcp", "token", "add", "dora", "--role", "deployer"))
	ctx, stop := context.WithCancel(t.Context())
	log := &listened{address: make(chan string, 1)}
	ended := make(chan int, 1)
	go func() {
		ended <- Run(ctx, []string{"-d", s.dir, "mcp", "machine", "--http", "127.0.0.1:0", "--allow", "deploy", "--allow-origin", "https://chat.example.org"}, Environment{
			Stdin: strings.NewReader(""), Stdout: io.Discard, Stderr: log, Getenv: func(name string) string { return s.env[name] }, VaultOptions: []vault.Option{vault.WorkFactor(2)}})
	}()
	var address string
	select {
	case address = <-log.address:
	case status := <-ended:
		t.Fatalf("it ended with %d: %s", status, log)
	}
	var clients []*client.Client
	connect := func(version, token string, p *person) (*client.Client, error) {
		var options []client.ClientOption
		if p != nil {
			options = append(options, client.WithElicitationHandler(p))
		}
		way, err := transport.NewStreamableHTTP("http://"+address+"/mcp", transport.WithHTTPHeaders(map[string]string{"Authorization": "Bearer " + token}))
		if err != nil {
			t.Fatal(err)
		}
		c := client.NewClient(way, options...)
		clients = append(clients, c)
		if err := c.Start(t.Context()); err != nil {
			return nil, err
		}
		_, err = c.Initialize(t.Context(), mcpgo.InitializeRequest{Params: mcpgo.InitializeParams{ProtocolVersion: version, ClientInfo: mcpgo.Implementation{Name: "test", Version: "1"}}})
		return c, err
	}
	for _, version := range mcpgo.ValidProtocolVersions[:3] {
		c, err := connect(version, viewer, nil)
		if err != nil || c.ProtocolVersion() != version {
			t.Fatalf("%s: %v", version, err)
		}
		a := &assistant{t: t, client: c, log: &bytes.Buffer{}}
		a.must("server-info", nil, "as mcp, whose role is viewer")
		a.must("list-available-nodes", nil, "name: web1")
		if _, err := c.CallTool(t.Context(), mcpgo.CallToolRequest{Params: mcpgo.CallToolParams{Name: "deploy", Arguments: in{"target": "web1"}}}); err == nil {
			t.Errorf("%s: a viewer's token deploys", version)
		}
		yes := &person{says: mcpgo.ElicitationResponseActionAccept}
		if c, err = connect(version, deployer, yes); err != nil {
			t.Fatalf("%s: %v", version, err)
		}
		before := len(f.Deployments())
		(&assistant{t: t, client: c, log: &bytes.Buffer{}}).must("deploy", in{"target": "web1"}, `"event":"deployment"`)
		if d := f.Deployments(); len(d) != before+1 || d[0].By != "dora" || !strings.Contains(yes.asked, "1 node (web1)") {
			t.Errorf("%s: %d deployments, asked %q", version, len(d), yes.asked)
		}
	}
	for origin, want := range map[string]string{"https://chat.example.org": "https://chat.example.org", "https://evil.example.org": ""} {
		r, err := http.NewRequest(http.MethodOptions, "http://"+address+"/mcp", nil)
		if err != nil {
			t.Fatal(err)
		}
		r.Header.Set("Origin", origin)
		r.Header.Set("Access-Control-Request-Method", "POST")
		got, err := http.DefaultClient.Do(r)
		if err != nil {
			t.Fatal(err)
		}
		got.Body.Close()
		if allowed := got.Header.Get("Access-Control-Allow-Origin"); allowed != want || (want == "") != (got.StatusCode == http.StatusForbidden) {
			t.Errorf("%s: %d, allowed is %q", origin, got.StatusCode, allowed)
		}
	}
	s.must("mcp", "token", "remove", "dora")
	for _, token := range []string{"", "nonsense", viewer + "x", deployer} {
		if _, err := connect(mcpgo.ProtocolVersion20251125, token, nil); err == nil {
			t.Errorf("the token %q was taken", token)
		}
	}
	if !strings.Contains(log.String(), "caller=dora role=deployer") || strings.Contains(log.String(), viewer) {
		t.Errorf("the log:\n%s", log)
	}
	for _, c := range clients {
		c.Close()
	}
	stop()
	if status := <-ended; status != OK && status != Interrupted {
		t.Errorf("it ended with %d: %s", status, log)
	}
}
