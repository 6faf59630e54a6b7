package command

import (
	"bytes"
	"context"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision/sshtest"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

// TestMain lets this test program play an agent or a controller that is installed over SSH, and this program itself as
// ssh's ProxyCommand and as what supervises the sessions of nix-infra mcp dev.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && (os.Args[1] == "tunnel" || os.Args[1] == "mcp") {
		os.Exit(Run(context.Background(), os.Args[1:], Environment{Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr, Getenv: os.Getenv}))
	}
	if len(os.Args) > 1 && os.Args[1] == "play" {
		if err := sshtest.Play(os.Args[2:], os.Stdin, os.Stdout); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	flag.Parse()
	remove, err := installFakeNix()
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	status := m.Run()
	remove()
	os.Exit(status)
}

var update = flag.Bool("update", false, "write the golden files")

// run is one command line in a project's folder.
type run struct {
	status      int
	out, stderr string
}

type shell struct {
	t     *testing.T
	dir   string
	env   map[string]string
	stdin string
}

func newShell(t *testing.T) *shell {
	return &shell{t: t, dir: t.TempDir(), env: map[string]string{"SECRETS_PASS": "correct horse", "USER": "alice"}}
}

func (s *shell) run(args ...string) run { return s.runContext(s.t.Context(), &bytes.Buffer{}, args...) }

func (s *shell) runContext(ctx context.Context, stdout interface {
	Write([]byte) (int, error)
	String() string
}, args ...string) run {
	s.t.Helper()
	var stderr syncBuffer // written to from anywhere, as a file can be
	code := Run(ctx, append([]string{"-d", s.dir}, args...), Environment{
		Stdin: strings.NewReader(s.stdin), Stdout: stdout, Stderr: &stderr,
		Getenv: func(name string) string { return s.env[name] }, VaultOptions: []vault.Option{vault.WorkFactor(2)},
	})
	return run{code, stdout.String(), stderr.String()}
}

// must runs what has to work.
func (s *shell) must(args ...string) string {
	s.t.Helper()
	r := s.run(args...)
	if r.status != 0 {
		s.t.Fatalf("%v: status %d\n%s%s", args, r.status, r.out, r.stderr)
	}
	return r.out
}

// expect runs what has to end with a status and say something in one line.
func (s *shell) expect(status int, says string, args ...string) {
	s.t.Helper()
	r := s.run(args...)
	if r.status != status || !strings.Contains(r.stderr, says) || strings.Count(r.stderr, "\n") != 1 || !strings.HasPrefix(r.stderr, "nix-infra: ") {
		s.t.Errorf("%v: status %d, want %d; stderr is not one line with %q:\n%s", args, r.status, status, says, r.stderr)
	}
}

func (s *shell) path(elements ...string) string {
	return filepath.Join(append([]string{s.dir}, elements...)...)
}

func (s *shell) write(path, text string) {
	s.t.Helper()
	if err := os.MkdirAll(filepath.Dir(s.path(path)), 0o755); err != nil {
		s.t.Fatal(err)
	}
	if err := os.WriteFile(s.path(path), []byte(text), 0o644); err != nil {
		s.t.Fatal(err)
	}
}

func (s *shell) read(path string) string {
	s.t.Helper()
	data, err := os.ReadFile(s.path(path))
	if err != nil {
		s.t.Fatal(err)
	}
	return string(data)
}

// newFleet is a project with a fleet that runs.
func newFleet(t *testing.T) (*shell, *fleettest.Fleet) {
	t.Parallel()
	return lonelyFleet(t)
}

// lonelyFleet is newFleet for a test that changes what all of them share.
func lonelyFleet(t *testing.T) (*shell, *fleettest.Fleet) {
	s := newShell(t)
	s.must("init", "--fleet", "testfleet", "--controller", "tls://127.0.0.1:1")
	s.write("flake.nix", "{ outputs = _: { }; }\n")
	s.write("configuration.nix", "{ }\n")
	s.write("modules/shared.nix", "{ }\n")
	for _, n := range []string{"web1", "web2", "db1"} {
		s.write("nodes/"+n+".nix", "{ networking.hostName = \""+n+"\"; }\n")
	}
	a := &app{Environment: Environment{Stdin: os.Stdin}, dir: s.dir}
	p, err := a.openProject()
	if err != nil {
		t.Fatal(err)
	}
	public, err := a.readFleet()
	if err != nil {
		t.Fatal(err)
	}
	a.vault(func(name string) string { return s.env[name] })
	authority, err := a.authority(p, public)
	if err != nil {
		t.Fatal(err)
	}
	f := fleettest.Start(t, *authority)
	s.write("nix-infra.yaml", strings.ReplaceAll(s.read("nix-infra.yaml"), "tls://127.0.0.1:1", f.URL))
	return s, f
}

func lines(s string) []string { return strings.Split(strings.TrimSpace(s), "\n") }

// documents reads JSON documents, one a line.
func documents(t *testing.T, out string) []map[string]any {
	t.Helper()
	var docs []map[string]any
	for _, l := range lines(out) {
		var d map[string]any
		if err := json.Unmarshal([]byte(l), &d); err != nil {
			t.Fatalf("%q is not a JSON document: %v", l, err)
		}
		docs = append(docs, d)
	}
	return docs
}

func golden(t *testing.T, file, got string) {
	t.Helper()
	path := filepath.Join("testdata", file)
	if *update {
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s is another one now; look at it and run go test -update:\n%s", path, got)
	}
}

func TestHelp(t *testing.T) {
	s := newShell(t)
	var all func(c *cobra.Command, path []string)
	all = func(c *cobra.Command, path []string) {
		if c.Hidden && c.DisableFlagParsing { // it is for this program alone, and --help is another program's
			return
		}
		name := strings.Join(append([]string{"nix-infra"}, path...), "-")
		t.Run(name, func(t *testing.T) {
			if c.Example == "" {
				t.Error("no examples")
			}
			golden(t, "help/"+name+".txt", s.must(append(path, "--help")...))
		})
		if c.Hidden && len(path) == 1 { // a group of commands that are shown outside of it
			return
		}
		for _, sub := range c.Commands() {
			all(sub, append(slices.Clone(path), sub.Name()))
		}
	}
	all((&app{}).root(), nil)
}

func TestInit(t *testing.T) {
	s := newShell(t)
	out := s.must("init", "--fleet", "shop", "--controller", "tls://ctl.example.org:4222", "--nixos-version", "25.11")
	if strings.Contains(out, "kept") {
		t.Errorf("a new folder had something already:\n%s", out)
	}
	for path, mode := range map[string]os.FileMode{
		"nix-infra.yaml": 0, "nix-infra/fleet.json": 0, ".gitignore": 0,
		"nix-infra/keys/fleet.age": 0o600, "nix-infra/keys/ca.age": 0o600, "nix-infra/keys/admin.age": 0o600,
		"ssh": 0o700, "ssh/nixinfra": 0o600, "ssh/nixinfra.pub": 0o644,
	} {
		if i, err := os.Stat(s.path(path)); err != nil || mode != 0 && i.Mode().Perm() != mode {
			t.Errorf("%s: %v, want mode %v, %v", path, i, mode, err)
		}
	}
	if !strings.HasPrefix(s.read("ssh/nixinfra"), "-----BEGIN OPENSSH PRIVATE KEY-----") || !strings.HasPrefix(s.read("ssh/nixinfra.pub"), "ssh-ed25519 ") {
		t.Error("the SSH key is not an ed25519 pair in OpenSSH's format")
	}
	s.write("the.env", "SECRETS_PASS='correct horse'\n")
	delete(s.env, "SECRETS_PASS")
	before := s.snapshot()
	out = s.must("init", "--batch", "--no-cert-auth", "--env", "the.env")
	if strings.Contains(out, "made") {
		t.Errorf("the second time it made something:\n%s", out)
	}
	if after := s.snapshot(); fmt.Sprint(before) != fmt.Sprint(after) {
		t.Error("the second time it changed files")
	}
	who := documents(t, s.must("whoami", "--json", "--env", "the.env"))[0]
	if who["name"] != "alice" || who["role"] != "admin" || who["fleet"] != "shop" {
		t.Errorf("whoami: %v", who)
	}
	p, err := project.Open(s.dir, "")
	if err != nil || p.Settings.Fleet != "shop" || p.Settings.Defaults.NixOSVersion != "25.11" || !slices.Equal(p.Settings.Controllers, []string{"tls://ctl.example.org:4222"}) {
		t.Errorf("settings %+v, %v", p, err)
	}
}

func (s *shell) snapshot() map[string]string {
	files := map[string]string{}
	err := filepath.Walk(s.dir, func(path string, i os.FileInfo, err error) error {
		if err == nil && !i.IsDir() {
			data, err := os.ReadFile(path)
			files[path] = protocol.Digest(data)
			return err
		}
		return err
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return files
}

// Without a password nothing is made, and nothing is left of what was begun.
func TestInitWithoutPassword(t *testing.T) {
	s := newShell(t)
	delete(s.env, "SECRETS_PASS")
	s.expect(Refused, "SECRETS_PASS", "init", "--batch")
	s.expect(Refused, "SECRETS_PASS", "init", "--batch", "-d", s.path("new", "shop"))
	if left, err := os.ReadDir(s.dir); err != nil || len(left) != 0 {
		t.Errorf("left behind: %v, %v", left, err)
	}
}

// However far an interrupted init came, the next one keeps what is there and makes the rest.
func TestInterruptedInit(t *testing.T) {
	order := []string{"nix-infra.yaml", ".gitignore", "ssh/nixinfra.pub", "ssh/nixinfra", "nix-infra/fleet.json", "nix-infra/access.json", "nix-infra/keys/admin.age", "nix-infra/keys/ca.age", "nix-infra/keys/fleet.age"}
	s := newShell(t)
	s.must("init", "--fleet", "shop", "--controller", "tls://ctl.example.org:4222")
	for i := range order {
		for _, gone := range order[:i+1] {
			if err := os.Remove(s.path(gone)); err != nil {
				t.Fatal(err)
			}
		}
		if r := s.run("status"); r.status != Refused || !strings.Contains(r.stderr, "init") {
			t.Errorf("without %s: status %d, %s", order[:i+1], r.status, r.stderr)
		}
		kept := s.snapshot()
		s.must("init", "--fleet", "shop", "--controller", "tls://ctl.example.org:4222")
		after := s.snapshot()
		for path, digest := range kept {
			if after[path] != digest {
				t.Errorf("after an interruption before %s, %s was changed", order[i], path)
			}
		}
		s.must("whoami")
	}
}

func TestBadInput(t *testing.T) {
	type change func(t *testing.T, s *shell)
	remove := func(path string) change { return func(_ *testing.T, s *shell) { os.Remove(s.path(path)) } }
	spoil := func(path, text string) change { return func(_ *testing.T, s *shell) { s.write(path, text) } }
	env := func(name, value string) change { return func(_ *testing.T, s *shell) { s.env[name] = value } }
	for _, c := range []struct {
		name   string
		change change
		args   []string
		says   string
	}{
		{"no project", remove("nix-infra.yaml"), []string{"status"}, "is not a project folder"},
		{"no fleet file", remove("nix-infra/fleet.json"), []string{"status"}, "there is no"},
		{"damaged fleet file", spoil("nix-infra/fleet.json", "{"), []string{"status"}, "fleet.json is damaged"},
		{"empty fleet file", spoil("nix-infra/fleet.json", `{"v":1}`), []string{"status"}, "fleet.json is damaged"},
		{"newer fleet file", spoil("nix-infra/fleet.json", `{"v":2}`), []string{"status"}, "version 2"},
		{"malformed settings", spoil("nix-infra.yaml", "fleet: [\n"), []string{"status"}, "nix-infra.yaml"},
		{"unknown setting", spoil("nix-infra.yaml", "fleat: x\n"), []string{"status"}, "nix-infra.yaml"},
		{"no controllers", spoil("nix-infra.yaml", "fleet: testfleet\n"), []string{"status"}, "the project has no controller yet: nix-infra provision (migrate,"},
		{"unreachable controller", nil, []string{"status"}, "can't reach the controller at tls://127.0.0.1:1"},
		{"wrong password", env("SECRETS_PASS", "wrong"), []string{"status"}, "password"},
		{"no password", env("SECRETS_PASS", ""), []string{"status", "--batch"}, "SECRETS_PASS"},
		{"no password and a pipe", env("SECRETS_PASS", ""), []string{"status"}, "SECRETS_PASS"},
		{"damaged keys", spoil("nix-infra/keys/admin.age", "rubbish"), []string{"status"}, "admin.age"},
		{"missing keys", remove("nix-infra/keys/fleet.age"), []string{"enroll", "x", "--ssh", "h"}, "fleet.age is missing"},
		{"no such credentials", env("NIX_INFRA_CREDS", "/nonexistent"), []string{"status"}, "/nonexistent"},
		{"malformed credentials", spoil("x.creds", "rubbish"), []string{"--creds", "CREDS", "status"}, "is no credentials file"},
		{"init with a wrong password", env("SECRETS_PASS", "wrong"), []string{"init"}, "password"},
		{"init with damaged credentials", spoil("nix-infra/keys/admin.age", "rubbish"), []string{"init"}, "which makes new credentials"},
		{"init with damaged settings", spoil("nix-infra.yaml", "fleet: [\n"), []string{"init"}, "nix-infra.yaml"},
		{"init with a bad name", remove("nix-infra.yaml"), []string{"init", "--fleet", "No_Name"}, "--fleet"},
		{"init with a bad URL", nil, []string{"init", "--controller", "http://x"}, "--controller"},
		{"init with another's fleet file", func(t *testing.T, s *shell) {
			other := newShell(t)
			other.must("init")
			s.write("nix-infra/fleet.json", other.read("nix-infra/fleet.json"))
		}, []string{"init"}, "does not belong to the keys"},
		{"deploy to nobody", nil, []string{"deploy"}, "or say all"},
		{"deploy with a bad mode", nil, []string{"deploy", "all", "--mode", "now"}, "--mode"},
		{"deploy with a bad timeout", nil, []string{"deploy", "all", "--timeout", "1ms"}, "--timeout"},
		{"deploy that never settles", nil, []string{"deploy", "all", "--timeout", "1m", "--settle", "1m"}, "--settle"},
		{"enroll nothing", nil, []string{"enroll"}, "--request"},
		{"enroll two ways", nil, []string{"enroll", "x", "--ssh", "h", "--request", "-"}, "give one"},
		{"enroll a bad name", nil, []string{"enroll", "No_Name", "--ssh", "h"}, "No_Name"},
		{"enroll with a bad tag", nil, []string{"enroll", "x", "--ssh", "h", "--tag", "A B"}, "--tag"},
		{"enroll at a bad address", nil, []string{"enroll", "x", "--ssh", "h:p"}, "--ssh"},
		{"enroll no file", nil, []string{"enroll", "--request", "/nonexistent"}, "/nonexistent"},
		{"enroll rubbish", nil, []string{"enroll", "--request", "-"}, "not the output of nix-infra-agent request"},
		{"bad colour", nil, []string{"version", "--color", "pink"}, "--color"},
		{"unknown flag", nil, []string{"status", "--nope"}, "unknown flag: --nope; see nix-infra status --help"},
		{"unknown command", nil, []string{"nope"}, "unknown command"},
		{"unknown subcommand", nil, []string{"node", "nope"}, "unknown command"},
		{"arguments missing", nil, []string{"node", "show"}, "what it takes is missing: nix-infra node show NAME; see nix-infra node show --help"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newShell(t)
			s.must("init", "--fleet", "testfleet", "--controller", "tls://127.0.0.1:1")
			if c.change != nil {
				c.change(t, s)
			}
			for i, arg := range c.args {
				if arg == "CREDS" {
					c.args[i] = s.path("x.creds")
				}
			}
			before := s.snapshot()
			s.expect(Refused, c.says, c.args...)
			if after := s.snapshot(); fmt.Sprint(after) != fmt.Sprint(before) {
				t.Error("it changed files all the same")
			}
		})
	}
}

func TestCredentials(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	creds := s.path("bob.creds")
	for _, c := range []struct {
		name string
		data []byte
		args []string
		code int
		says string
	}{
		{"viewer may look", f.Credentials("bob", protocol.Viewer, time.Time{}), []string{"status"}, OK, ""},
		{"viewer may not tag", f.Credentials("bob", protocol.Viewer, time.Time{}), []string{"node", "tag", "web1", "x"}, Refused, "over-role"},
		{"expired", f.Credentials("bob", protocol.Viewer, time.Now().Add(-time.Hour)), []string{"status"}, Refused, "expired"},
		{"another fleet's", fleettest.New(t).Credentials("bob", protocol.Admin, time.Time{}), []string{"status"}, Refused, "untrusted"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s.t = t
			if err := os.WriteFile(creds, c.data, 0o600); err != nil {
				t.Fatal(err)
			}
			args := append([]string{"--creds", creds}, c.args...)
			if c.code == OK {
				s.must(args...)
			} else {
				s.expect(c.code, c.says, args...)
			}
		})
	}
}

// Every field that a document has is in docs/json.md.
func TestDocumentsAreDocumented(t *testing.T) {
	docs, err := os.ReadFile(filepath.Join("..", "..", "docs", "json.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range []any{nodeDocument{}, recordDocument{}, deploymentStart{}, progressDocument{}, endDocument{}, resultDocument{}, deploymentDocument{},
		pingDocument{}, stepDocument{}, enrolledDocument{}, toldDocument{}, identityDocument{}, versionDocument{},
		grantDocument{}, auditDocument{}, findingDocument{}, chainDocument{}, verifiedDocument{}, outputDocument{}, exitDocument{}, savedDocument{}, bearerDocument{}, bearerAddedDocument{}, protocol.Vitals{}} {
		for _, f := range reflect.VisibleFields(reflect.TypeOf(d)) {
			name, _, _ := strings.Cut(f.Tag.Get("json"), ",")
			if name != "" && !strings.Contains(string(docs), "`"+name+"`") && !strings.Contains(string(docs), `"`+name+`"`) {
				t.Errorf("%T has a field %q that docs/json.md does not describe", d, name)
			}
		}
	}
}
