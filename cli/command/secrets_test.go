package command

import (
	"encoding/base64"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"golang.org/x/crypto/ssh"

	"github.com/nix-infra/nix-infra/cli/vault"
)

// newProject is a project without a fleet that could be reached.
func newProject(t *testing.T) *shell {
	t.Parallel()
	s := newShell(t)
	s.must("init", "--fleet", "testfleet", "--controller", "tls://127.0.0.1:1")
	return s
}

func (s *shell) value(name string) string {
	s.t.Helper()
	return s.must("secrets", "show", name)
}

func (s *shell) pipe(text string, args ...string) string {
	s.t.Helper()
	s.stdin = text
	defer func() { s.stdin = "" }()
	return s.must(args...)
}

func TestSecretsStore(t *testing.T) {
	s := newProject(t)
	s.write("e", "SECRETS_PASS='correct horse'\n")
	s.write("file", "from a file\n")
	s.write("lines", "-----BEGIN KEY-----\nabc\n-----END KEY-----\n")
	// As the templates' scripts call it.
	r := s.run("secrets", "store", "--batch", "--env=e", "--secret=v", "--name=c19")
	if r.status != OK || !strings.Contains(r.out, "c19") || strings.Count(r.stderr, "\n") != 1 || !strings.Contains(r.stderr, "list of processes") {
		t.Errorf("C19: %+v", r)
	}
	s.must("secrets", "store", "file", "--secret-file", s.path("file"))
	s.must("secrets", "store", "lines", "--secret-file", s.path("lines"))
	s.pipe("piped\n", "secrets", "store", "piped")
	s.pipe("no newline", "secrets", "store", "bare")
	s.pipe("windows\r\n", "secrets", "store", "windows")
	s.must("store-secret", "--secret", "older", "--store-as-secret", "older")
	s.must("secrets", "store", "made", "--generate", "32")
	for name, want := range map[string]string{"c19": "v", "file": "from a file", "lines": "-----BEGIN KEY-----\nabc\n-----END KEY-----\n",
		"piped": "piped", "bare": "no newline", "windows": "windows", "older": "older"} {
		if got := s.value(name); got != want {
			t.Errorf("%s is %q, want %q", name, got, want)
		}
	}
	made := s.value("made")
	if !regexp.MustCompile(`^[A-Za-z0-9_-]{43}$`).MatchString(made) {
		t.Errorf("a generated one is %q", made)
	}
	s.must("secrets", "store", "made", "--generate", "32")
	if s.value("made") == made {
		t.Error("two generated ones are the same")
	}
	for _, c := range []struct{ says, args string }{
		{"what is the secret called", "secrets store"},
		{"can't be the name", "secrets store ../x --generate 32"},
		{"is it called a or b", "secrets store a --name b --generate 32"},
		{"use one of them", "secrets store a --generate 32 --secret x"},
		{"use 16 to 1024", "secrets store a --generate 8"},
		{"use 16 to 1024", "secrets store a --generate 0"},
		{"there is no file", "secrets store a --secret-file /nonexistent"},
		{"there is no value", "secrets store a"},
		{"there is no secret piped2; the project has bare c19", "secrets show piped2"},
	} {
		s.expect(Refused, c.says, strings.Fields(c.args)...)
	}
	if r := s.run("secrets", "store", "a", "--secret", ""); r.status != Refused || !strings.Contains(r.stderr, "an empty one is none") {
		t.Errorf("an empty one: %+v", r)
	}
	s.stdin = strings.Repeat("x", 64<<10+10)
	s.expect(Refused, "the limit is 65536", "secrets", "store", "large")
	s.stdin = ""
	s.env["SECRETS_PASS"] = "wrong"
	s.expect(Refused, "wrong password", "secrets", "store", "other", "--generate", "32")
	s.expect(Refused, "wrong password", "secrets", "show", "c19")
	s.env["SECRETS_PASS"] = ""
	s.expect(Refused, "SECRETS_PASS", "secrets", "show", "c19", "--batch")
}

func TestSecretsShow(t *testing.T) {
	s := newProject(t)
	s.pipe("\x00\xff", "secrets", "store", "binary")
	s.pipe("text", "secrets", "store", "text")
	for name, want := range map[string]shownDocument{"binary": {"binary", base64.StdEncoding.EncodeToString([]byte("\x00\xff")), "base64"}, "text": {"text", "text", "text"}} {
		var d shownDocument
		if err := json.Unmarshal([]byte(s.must("secrets", "show", name, "--json")), &d); err != nil || d != want {
			t.Errorf("%+v, %v", d, err)
		}
	}
	if got := s.value("binary"); got != "\x00\xff" {
		t.Errorf("%q", got)
	}
}

func TestSecretsListAndCheck(t *testing.T) {
	s := newProject(t)
	settings := s.read("nix-infra.yaml")
	s.write("nodes/web1.nix", "[%%secrets/db.password%%]\n# [%%pre-build-secrets/netrc%%]\n")
	s.write("nodes/web2.nix", "\n[%%secrets/app/db.password%%]\n")
	if out := s.must("secrets", "list"); strings.Count(out, "\n") != 1 {
		t.Errorf("an empty list:\n%s", out)
	}
	r := s.run("secrets", "check")
	if r.status != SomeFailed || !strings.Contains(r.out, "missing db.password: named by web1 web2, first in nodes/web1.nix:1") || !strings.Contains(r.out, "missing netrc: named by web1, first in nodes/web1.nix:2") {
		t.Errorf("missing: %+v", r)
	}
	for _, name := range []string{"db.password", "netrc", "stray", "nix-store.trusted-public-keys-a"} {
		s.must("secrets", "store", name, "--generate", "32")
	}
	r = s.run("secrets", "check")
	if r.status != OK || !strings.Contains(r.out, "unused stray") || !strings.Contains(r.out, "4 secrets, 0 wrong") || strings.Contains(r.out, "trusted") {
		t.Errorf("unused is no mistake: %+v", r)
	}
	// Old, and damaged, and of the earlier tool.
	s.write("nix-infra.yaml", settings+"secrets: {db.password: {max_age: 90d}}\n")
	s.write("secrets/.changed.json", `{"db.password": "2024-01-02T03:04:05Z"}`)
	s.write("secrets/netrc.age", "rubbish")
	s.write("secrets/older", "b2xkZXI=")
	r = s.run("secrets", "check")
	for _, want := range []string{"due db.password: since 2024-04-01", "damaged ", "netrc.age", "legacy older: ", "3 wrong"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("no %q in\n%s%s", want, r.out, r.stderr)
		}
	}
	if r.status != SomeFailed {
		t.Errorf("status %d", r.status)
	}
	found := map[string]string{}
	for line := range strings.Lines(s.run("secrets", "check", "--json").out) {
		var d problemDocument
		if err := json.Unmarshal([]byte(line), &d); err != nil {
			t.Fatal(err)
		}
		found[d.Name] += d.Problem
	}
	if found["db.password"] != "due" || found["netrc"] != "damaged" || found["older"] != "legacyunused" {
		t.Errorf("found %v", found)
	}
	var d secretDocument
	if err := json.Unmarshal([]byte(strings.SplitN(s.must("secrets", "list", "--json"), "\n", 2)[0]), &d); err != nil {
		t.Fatal(err)
	}
	if d.Name != "db.password" || d.Format != vault.Age || strings.Join(d.Nodes, " ") != "web1 web2" || !d.Changed.Equal(time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC)) || !d.Due.Equal(d.Changed.Add(90*24*time.Hour)) {
		t.Errorf("%+v", d)
	}
	s.write("nix-infra.yaml", settings+"secrets: {db.password: {max_age: soon, generate: 3}, bad name: {}}\n")
	if r := s.run("secrets", "list"); r.status != Refused || !strings.Contains(r.stderr, "secrets.db.password.max_age") || !strings.Contains(r.stderr, "16 to 1024") || !strings.Contains(r.stderr, "bad name") {
		t.Errorf("bad settings: %+v", r)
	}
}

func TestSecretsRemove(t *testing.T) {
	s := newProject(t)
	s.write("nodes/web1.nix", "[%%secrets/used%%]")
	for _, name := range []string{"used", "stray"} {
		s.must("secrets", "store", name, "--generate", "32")
	}
	s.expect(Refused, "there is no secret none", "secrets", "rm", "stray", "none")
	s.must("secrets", "rm", "stray")
	if r := s.run("secrets", "rm", "used"); r.status != Refused || !strings.Contains(r.stderr, "nodes/web1.nix:1 names secret used") {
		t.Errorf("%+v", r)
	}
	s.must("secrets", "rm", "used", "--batch")
	if out := s.must("secrets", "list"); strings.Count(out, "\n") != 1 {
		t.Errorf("left:\n%s", out)
	}
	s.write("nodes/web2.nix", "[%%secrets/other%%]")
	for _, name := range []string{"used", "other"} {
		s.must("secrets", "store", name, "--generate", "32")
	}
	if out := s.pipe("yes\nyes\n", "secrets", "rm", "used", "other"); strings.Count(out, "removed secret ") != 2 {
		t.Errorf("each is asked about, and both were answered for:\n%s", out)
	}
}

// TestSecretsEdit edits with real programs. The file is in memory, for its owner only, and gone afterwards.
func TestSecretsEdit(t *testing.T) {
	if _, err := memoryDir("/dev/shm"); err != nil {
		t.Skip(err)
	}
	s := newProject(t)
	s.pipe("before", "secrets", "store", "s")
	said := s.path("said")
	editor := func(do string) {
		s.write("editor", "stat -c '%a %n' \"$1\" >"+said+"\nstat -f -c %T \"$1\" >>"+said+"\n"+do+"\n")
		s.env["EDITOR"] = "sh " + s.path("editor") // a program that was just written may be busy still: another test's child has it open
	}
	editor(`printf '%s, after\n' "$(cat "$1")" >"$1.new" && mv "$1.new" "$1"; : >"$1~"`)
	s.must("secrets", "edit", "s")
	if got := s.value("s"); got != "before, after" {
		t.Errorf("it is %q", got)
	}
	words := strings.Fields(s.read("said"))
	if len(words) != 3 || words[0] != "600" || words[2] != "tmpfs" {
		t.Fatalf("while it was edited: %q", words)
	}
	if _, err := os.Stat(filepath.Dir(words[1])); !os.IsNotExist(err) {
		t.Errorf("it is still there: %v", err)
	}
	editor("exit 3")
	s.expect(Refused, "nothing was stored", "secrets", "edit", "s")
	editor("true")
	if out := s.must("secrets", "edit", "s"); !strings.Contains(out, "stays as it is") {
		t.Error(out)
	}
	editor(`printf new >"$1"`)
	s.must("secrets", "edit", "fresh")
	if got := s.value("fresh"); got != "new" {
		t.Errorf("it is %q", got)
	}
	editor(`: >"$1"`)
	s.expect(Refused, "an empty one is none", "secrets", "edit", "s")
	s.env["EDITOR"] = ""
	s.expect(Refused, "VISUAL or EDITOR", "secrets", "edit", "s")
	s.write(".env", "EDITOR=sh "+s.path("editor")+"\n") // a project can't say which programs run here
	s.expect(Refused, "VISUAL or EDITOR", "secrets", "edit", "s")
	if _, err := memoryDir("", "/proc", t.TempDir()+"/none"); err == nil {
		t.Error("/proc is no memory for files")
	}
}

func TestSecretsMigrate(t *testing.T) {
	s := newProject(t)
	if out := s.must("secrets", "migrate"); !strings.Contains(out, "nothing to migrate") {
		t.Error(out)
	}
	s.write("secrets/plain", "cGxhaW4gdmFsdWU=\n")
	s.write("secrets/broken", "no base64!")
	if r := s.run("secrets", "show", "plain"); r.status != OK || r.out != "plain value" || !strings.Contains(r.stderr, "WARNING: secret plain is stored as plain base64") {
		t.Errorf("%+v", r)
	}
	r := s.run("secrets", "migrate")
	if r.status != SomeFailed || !strings.Contains(r.out, "migrated secret plain") || !strings.Contains(r.stderr, "rotate them") || !strings.Contains(r.stderr, "broken: ") {
		t.Errorf("%+v", r)
	}
	if r := s.run("secrets", "show", "plain"); r.out != "plain value" || r.stderr != "" {
		t.Errorf("afterwards: %+v", r)
	}
	s.expect(Refused, `"plain" is no secret that the earlier tool left`, "secrets", "migrate", "plain")
	s.expect(Refused, "--cipher", "secrets", "migrate", "--cipher", "rot13")
	os.Remove(s.path("secrets/broken"))
	openssl, err := exec.LookPath("openssl")
	if err != nil {
		without(t, "openssl")
	}
	cmd := exec.Command(openssl, "enc", "-pbkdf2", "-pass", "pass:legacy", "-a", "-aes-256-cbc", "-out", s.path("secrets/sealed"))
	cmd.Stdin = strings.NewReader("sealed value\n")
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	if r := s.run("secrets", "migrate"); r.status != SomeFailed || !strings.Contains(r.stderr, "SECRETS_LEGACY_PASS") {
		t.Errorf("%+v", r)
	}
	s.env["SECRETS_LEGACY_PASS"] = "legacy"
	var d migratedDocument
	if err := json.Unmarshal([]byte(s.must("secrets", "migrate", "--json")), &d); err != nil || d != (migratedDocument{"sealed", vault.OpenSSL, true, ""}) {
		t.Errorf("%+v, %v", d, err)
	}
	if got := s.value("sealed"); got != "sealed value" {
		t.Errorf("%q", got)
	}
}

func TestSecretsRekey(t *testing.T) {
	s := newProject(t)
	s.pipe("value", "secrets", "store", "s")
	s.expect(Refused, "SECRETS_NEW_PASS", "secrets", "rekey", "--batch")
	s.env["SECRETS_NEW_PASS"] = "new"
	if out := s.must("secrets", "rekey"); !strings.Contains(out, "new password") {
		t.Error(out)
	}
	s.expect(Refused, "wrong password", "secrets", "show", "s")
	s.env["SECRETS_PASS"] = "new"
	if s.value("s") != "value" {
		t.Error("it is lost")
	}
	s.must("init")
	// To a team.
	public := s.read("ssh/nixinfra.pub")
	key, _, _, _, err := ssh.ParseAuthorizedKey([]byte(public))
	if err != nil {
		t.Fatal(err)
	}
	s.write("nix-infra/recipients", strings.TrimSpace(string(ssh.MarshalAuthorizedKey(key)))+" alice@desk\n")
	if r := s.run("secrets", "check"); r.status != SomeFailed || !strings.Contains(r.out, "readers ") {
		t.Errorf("before: %+v", r)
	}
	if r := s.run("secrets", "rekey"); r.status != Refused || !strings.Contains(r.stderr, "alice@desk") {
		t.Errorf("unasked: %+v", r)
	}
	if out := s.must("secrets", "rekey", "--batch"); !strings.Contains(out, "encrypted to alice@desk") {
		t.Error(out)
	}
	s.env["SECRETS_PASS"] = ""
	s.env["NIX_INFRA_IDENTITY"] = s.path("ssh/nixinfra")
	if s.value("s") != "value" {
		t.Error("it is lost")
	}
	s.must("secrets", "check")
	s.must("init", "--batch")
	s.env["NIX_INFRA_IDENTITY"] = ""
	s.env["HOME"] = t.TempDir()
	s.expect(Refused, "NIX_INFRA_IDENTITY", "secrets", "show", "s")
}
