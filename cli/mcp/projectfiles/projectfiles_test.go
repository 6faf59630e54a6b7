package projectfiles_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/mcp/projectfiles"
)

// secret is in every file that must not be read.
const secret = "TOP-SECRET"

// project makes a project, and beside it what is not for reading.
func project(t *testing.T) (dir string, f *projectfiles.Folder) {
	t.Helper()
	dir = filepath.Join(t.TempDir(), "project")
	for name, content := range map[string]string{
		"configuration.nix":            "{ }\n",
		"flake.nix":                    "{ outputs = _: { }; }\n",
		"nodes/web1.nix":               "{\n  services.nginx.enable = true;\n}\n",
		"nodes/deep/er/x.nix":          "nginx\n",
		"nodes/crlf.nix":               "one\r\ntwo\r\n",
		"nodes/mixed.nix":              "one\r\ntwo\nthree\r",
		"nodes/.hidden.nix":            secret,
		"nodes/.git/config":            secret,
		"nodes/secrets/a":              secret,
		"nodes/a.creds":                secret,
		"nodes/A.CREDS":                secret,
		"nodes/tls.key":                secret,
		"nodes/empty.nix":              "",
		"nodes/binary.nix":             "\x00" + secret,
		"nodes/latin.nix":              "\xe9 " + secret,
		"nodes/pem.nix":                "''\n-----BEGIN OPENSSH PRIVATE KEY-----\n" + secret,
		"nodes/pgp.nix":                "-----BEGIN PGP PRIVATE KEY BLOCK-----\n" + secret,
		"nodes/sign.nix":               "cache.example.org-1:" + strings.Repeat("a+/B", 21) + "aa== " + secret,
		"nodes/public.nix":             "cache.example.org-1:" + strings.Repeat("a+/B", 10) + "aaa=\n",
		"nodes/age.nix":                "AGE-SECRET-KEY-1QQQQQQQQQQQQQQQQQQQQQQQQ " + secret,
		"nodes/large.nix":              strings.Repeat(secret+"\n", 200_000),
		"nodes-x/a.nix":                secret,
		"modules/a.nix":                "nginx\n",
		"app_modules/ssh/default.nix":  "nginx\n",
		"__test__/t/test.sh":           "echo nginx\n",
		"__test__/t/ssh/id_rsa":        secret,
		"__test__/t/nix-infra/keys/ca": secret,
		"secrets/a":                    secret,
		"ssh/nixinfra":                 secret,
		"ca/private/key":               secret,
		"nix-infra/access.json":        secret,
		".env":                         secret,
		"mcp.creds":                    secret,
		"../outside":                   secret,
	} {
		write(t, filepath.Join(dir, name), content)
	}
	for link, target := range map[string]string{
		"nodes/out":            "../../outside",
		"nodes/abs":            filepath.Join(dir, "nodes/web1.nix"),
		"nodes/etc":            "/etc",
		"nodes/tosecret":       "../secrets/a",
		"nodes/tosecrets":      "../secrets",
		"nodes/todots":         "..",
		"nodes/toenv":          "../.env",
		"nodes/tohidden":       ".hidden.nix",
		"nodes/twice":          "out",
		"nodes/loop":           "loop",
		"nodes/inside":         "../modules/a.nix",
		"nodes/insidefolder":   "../modules",
		"nodes/nowhere":        "../modules/none.nix",
		"nodes/deep/up":        "../../../outside",
		"modules/self":         "../modules",
		"nodes/throughfolders": "insidefolder/a.nix",
	} {
		if err := os.Symlink(target, filepath.Join(dir, link)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Link(filepath.Join(dir, "secrets/a"), filepath.Join(dir, "nodes/hard.nix")); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Mkfifo(filepath.Join(dir, "nodes/pipe"), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir, projectfiles.New(dir)
}

func write(t *testing.T, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// escapes are paths that must not be read, written, listed or searched: the lines of testdata/hostile.txt, each quoted as
// in Go.
var escapes = func() (all []string) {
	data, err := os.ReadFile("testdata/hostile.txt")
	if err != nil {
		panic(err)
	}
	for line := range strings.Lines(string(data)) {
		name, err := strconv.Unquote(strings.TrimSpace(line))
		if err != nil {
			panic(err)
		}
		all = append(all, name)
	}
	return all
}()

func TestNothingElseIsOpen(t *testing.T) {
	dir, f := project(t)
	before := snapshot(t, filepath.Dir(dir))
	for _, name := range escapes {
		if text, err := f.Read(name); err == nil {
			t.Errorf("Read(%q) gave %.40q", name, text.Content)
		} else if !errors.Is(err, projectfiles.ErrRefused) {
			t.Errorf("Read(%q): %v, and that is no refusal", name, err)
		} else if strings.ContainsFunc(err.Error(), func(r rune) bool { return r < ' ' || r == 0x7f || r == 0x202e }) {
			t.Errorf("Read(%q): the reason %q repeats what is not to be seen", name, err)
		}
		if entries, _, err := f.List(t.Context(), name); err == nil {
			t.Errorf("List(%q) gave %v", name, entries)
		}
		if found, _, err := f.Search(t.Context(), projectfiles.Search{Path: name, Pattern: "."}); err == nil {
			t.Errorf("Search(%q) gave %v", name, found)
		}
		if _, err := f.Create(name, "x"); err == nil {
			t.Errorf("Create(%q) did", name)
		}
		if _, _, err := f.Change(name, "", func(string) (string, error) { return "x", nil }); err == nil {
			t.Errorf("Change(%q) did", name)
		}
	}
	for _, name := range []string{"configuration.nix", "flake.nix", "cli", "cli/x"} {
		if _, err := f.Create(name, "x"); !errors.Is(err, projectfiles.ErrRefused) {
			t.Errorf("Create(%q): %v", name, err)
		}
		if _, _, err := f.Change(name, "", func(string) (string, error) { return "x", nil }); !errors.Is(err, projectfiles.ErrRefused) {
			t.Errorf("Change(%q): %v", name, err)
		}
	}
	for _, name := range []string{"nodes", "nodes/pipe", "nodes/hard.nix", "nodes/binary.nix", "nodes/latin.nix", "nodes/pem.nix", "nodes/pgp.nix", "nodes/sign.nix", "nodes/age.nix", "nodes/large.nix", "nodes/none.nix", "nodes/nowhere", "none/x", "nodes/web1.nix/x", "."} {
		if _, err := f.Read(name); err == nil {
			t.Errorf("Read(%q) did", name)
		}
		if _, _, err := f.Change(name, "", func(string) (string, error) { return "x", nil }); err == nil {
			t.Errorf("Change(%q) did", name)
		}
	}
	if after := snapshot(t, filepath.Dir(dir)); after != before {
		t.Errorf("something was written:\n%s\nwas\n%s", after, before)
	}
}

// snapshot is all that is below a folder, with sizes.
func snapshot(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	err := filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		b.WriteString(name + " " + info.Mode().String())
		if info.Mode().IsRegular() {
			data, _ := os.ReadFile(name)
			b.Write(data[:min(len(data), 100)])
		}
		b.WriteByte('\n')
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestRead(t *testing.T) {
	_, f := project(t)
	for name, want := range map[string]string{
		"nodes/web1.nix":              "{\n  services.nginx.enable = true;\n}\n",
		"./nodes//web1.nix":           "{\n  services.nginx.enable = true;\n}\n",
		"nodes/crlf.nix":              "one\ntwo\n",
		"nodes/mixed.nix":             "one\ntwo\nthree\n",
		"nodes/empty.nix":             "",
		"nodes/public.nix":            "cache.example.org-1:" + strings.Repeat("a+/B", 10) + "aaa=\n",
		"nodes/inside":                "nginx\n", // links that stay where all is open
		"nodes/insidefolder/a.nix":    "nginx\n",
		"nodes/throughfolders":        "nginx\n",
		"app_modules/ssh/default.nix": "nginx\n",
	} {
		text, err := f.Read(name)
		if err != nil {
			t.Errorf("%s: %v", name, err)
		} else if text.Content != want {
			t.Errorf("%s: %q, want %q", name, text.Content, want)
		}
	}
	text, err := f.Read("nodes/web1.nix")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := projectfiles.Numbered(text.Lines()[1:], 2), "L2:   services.nginx.enable = true;\nL3: }\n"; got != want {
		t.Errorf("numbered %q, want %q", got, want)
	}
	results, err := f.ReadMany([]string{"nodes/empty.nix", "secrets/a", "modules/a.nix"})
	if err != nil || results[0].Err != nil || !errors.Is(results[1].Err, projectfiles.ErrRefused) || results[2].Text.Content != "nginx\n" {
		t.Errorf("%+v %v", results, err)
	}
	if _, err := f.ReadMany(make([]string, projectfiles.MaxFiles+1)); !errors.Is(err, projectfiles.ErrRefused) {
		t.Errorf("too many files: %v", err)
	}
}

func TestList(t *testing.T) {
	_, f := project(t)
	entries, more, err := f.List(t.Context(), ".")
	if err != nil || more {
		t.Fatal(more, err)
	}
	var paths []string
	for _, e := range entries {
		paths = append(paths, e.Path)
		if e.Path == "modules/a.nix" && (e.Size != 6 || e.Type != "file") || e.Path == "nodes/out" && e.Type != "link" || e.Path == "nodes" && e.Type != "directory" {
			t.Errorf("%+v", e)
		}
	}
	for _, want := range []string{"__test__", "app_modules", "configuration.nix", "flake.nix", "nodes", "nodes/deep/er/x.nix", "app_modules/ssh/default.nix", "__test__/t/test.sh", "nodes/out"} {
		if !slices.Contains(paths, want) {
			t.Errorf("%s is missing", want)
		}
	}
	for _, p := range paths {
		for _, not := range []string{"secret", "/.", ".creds", "nodes-x", "nix-infra", "id_rsa", "pipe", ".key", ".env"} {
			if strings.Contains(p, not) && !strings.HasPrefix(p, "nodes/tosecret") {
				t.Errorf("%s is listed", p)
			}
		}
	}
	if slices.Index(paths, "nodes/web1.nix") > slices.Index(paths, "nodes/deep/er/x.nix") {
		t.Error("what is near does not come first")
	}
	one, _, err := f.List(t.Context(), "nodes/insidefolder")
	if err != nil || len(one) != 2 || one[0].Path != "modules/a.nix" {
		t.Errorf("a folder behind a link: %v %v", one, err)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := f.List(gone, "."); !errors.Is(err, context.Canceled) {
		t.Errorf("after the caller went: %v", err)
	}
}

func TestSearch(t *testing.T) {
	dir, f := project(t)
	search := func(s projectfiles.Search) []string {
		t.Helper()
		found, _, err := f.Search(t.Context(), s)
		if err != nil {
			t.Fatalf("%+v: %v", s, err)
		}
		var lines []string
		for _, m := range found {
			if strings.Contains(m.Content, secret) && m.File != "nodes/large.nix" {
				t.Errorf("%+v", m)
			}
			lines = append(lines, m.File+":"+string(rune('0'+m.Line))+":"+m.Content)
		}
		return lines
	}
	for _, c := range []struct {
		s    projectfiles.Search
		want []string
	}{
		{projectfiles.Search{Path: "nodes", Pattern: "nginx"}, []string{"nodes/web1.nix:2:services.nginx.enable = true;", "nodes/deep/er/x.nix:1:nginx"}},
		{projectfiles.Search{Path: ".", Pattern: "NGINX", NoCase: true, Glob: "*.sh"}, []string{"__test__/t/test.sh:1:echo nginx"}},
		{projectfiles.Search{Path: ".", Pattern: "NGINX"}, nil},
		{projectfiles.Search{Path: ".", Pattern: "^nginx$", Glob: "nodes/deep/*/*.nix"}, []string{"nodes/deep/er/x.nix:1:nginx"}},
		{projectfiles.Search{Path: "modules/a.nix", Pattern: "ngi[n]x"}, []string{"modules/a.nix:1:nginx"}},
		{projectfiles.Search{Path: "nodes", Pattern: "-r/etc/passwd"}, nil}, // no option of anything
		{projectfiles.Search{Path: "nodes", Pattern: "--include=*"}, nil},
		{projectfiles.Search{Path: "nodes", Pattern: "$(touch x)"}, nil},
		{projectfiles.Search{Path: ".", Pattern: secret, Glob: "[!l]*"}, nil},
	} {
		if got := search(c.s); !slices.Equal(got, c.want) {
			t.Errorf("%+v: %q, want %q", c.s, got, c.want)
		}
	}
	for _, s := range []projectfiles.Search{
		{Path: ".", Pattern: ""}, {Path: ".", Pattern: "("}, {Path: ".", Pattern: "a{1,9999}"}, {Path: ".", Pattern: `(a)\1`}, {Path: ".", Pattern: "(?=x)"}, {Path: ".", Pattern: strings.Repeat("x", 2000)},
		{Path: ".", Pattern: "x", Glob: "["}, {Path: ".", Pattern: "\xff"}, {Path: "nodes/binary.nix", Pattern: "x"}, {Path: "nodes/hard.nix", Pattern: "x"},
	} {
		if found, _, err := f.Search(t.Context(), s); err == nil {
			t.Errorf("%.80q: %v", s.Pattern, found)
		}
	}
	if _, more, err := f.Search(t.Context(), projectfiles.Search{Path: "nodes", Pattern: "nginx"}); err != nil || !strings.Contains(more, "8 files were not looked through") {
		t.Errorf("that files were passed by: %q %v", more, err)
	}
	write(t, filepath.Join(dir, "modules/many.nix"), strings.Repeat("needle "+strings.Repeat("y", 1000)+"\n", projectfiles.MaxMatches+1))
	found, more, err := f.Search(t.Context(), projectfiles.Search{Path: "modules", Pattern: "needle"})
	if err != nil || len(found) != projectfiles.MaxMatches || more == "" || len(found[0].Content) > 500 {
		t.Errorf("%d, %q, %v", len(found), more, err)
	}
}

// TestSearchEnds: an expression that takes long for each byte, in a file that is one line, ends with its caller.
func TestSearchEnds(t *testing.T) {
	dir, f := project(t)
	write(t, filepath.Join(dir, "modules/line.json"), strings.Repeat("x", 1_000_000))
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	done := make(chan error, 1)
	go func() {
		_, _, err := f.Search(ctx, projectfiles.Search{Path: "modules", Pattern: strings.Repeat("x{0,1000}", 100) + "y"})
		done <- err
	}()
	select {
	case err := <-done:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("it ended by itself: %v", err)
		}
	case <-time.After(time.Minute):
		t.Fatal("it does not end")
	}
}

func TestCreate(t *testing.T) {
	dir, f := project(t)
	text, err := f.Create("app_modules/new/deep/default.nix", "a\nb\n")
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(filepath.Join(dir, "app_modules/new/deep/default.nix"))
	if err != nil || string(data) != "a\nb\n" || text.Content != "a\nb\n" {
		t.Errorf("%q %+v %v", data, text, err)
	}
	if _, err := f.Create("app_modules/new/deep/default.nix", "other"); err == nil || !strings.Contains(err.Error(), "exists already") {
		t.Errorf("a second time: %v", err)
	}
	for _, name := range []string{"nodes/insidefolder/x.nix", "nodes/nowhere", "nodes/web1.nix/x.nix", "nodes/etc/x.nix", "nodes/todots/modules/x.nix", "nodes", "."} {
		if _, err := f.Create(name, "x"); err == nil {
			t.Errorf("%s was made", name)
		}
	}
	for what, content := range map[string]string{"NUL": "a\x00b", "Latin-1": "\xe9", "a key": "-----BEGIN PRIVATE KEY-----", "much": strings.Repeat("x", projectfiles.MaxFile+1)} {
		if _, err := f.Create("nodes/bad.nix", content); !errors.Is(err, projectfiles.ErrRefused) {
			t.Errorf("%s: %v", what, err)
		}
	}
	left(t, dir)
}

// left finds temporary files.
func left(t *testing.T, dir string) {
	t.Helper()
	if s := snapshot(t, dir); strings.Contains(s, ".tmp-") {
		t.Errorf("something is left:\n%s", s)
	}
}

func TestChange(t *testing.T) {
	dir, f := project(t)
	file := filepath.Join(dir, "nodes/crlf.nix")
	if err := os.Chmod(file, 0o755); err != nil {
		t.Fatal(err)
	}
	seen, err := f.Read("nodes/crlf.nix")
	if err != nil {
		t.Fatal(err)
	}
	before, after, err := f.Change("nodes/crlf.nix", seen.SHA256, func(s string) (string, error) { return s + "three\n", nil })
	if err != nil || before.Content != "one\ntwo\n" || after.Content != "one\ntwo\nthree\n" {
		t.Fatal(before, after, err)
	}
	data, _ := os.ReadFile(file)
	info, _ := os.Stat(file)
	if string(data) != "one\r\ntwo\r\nthree\r\n" || info.Mode().Perm() != 0o755 {
		t.Errorf("%q %v", data, info.Mode())
	}
	if _, _, err := f.Change("nodes/crlf.nix", seen.SHA256, func(string) (string, error) { return "x", nil }); !errors.Is(err, projectfiles.ErrChanged) {
		t.Errorf("with the hash of before: %v", err)
	}
	if _, _, err := f.Change("nodes/web1.nix", "", func(string) (string, error) { // somebody else is faster
		write(t, filepath.Join(dir, "nodes/web1.nix"), "theirs\n")
		return "ours\n", nil
	}); !errors.Is(err, projectfiles.ErrChanged) {
		t.Errorf("beside somebody else: %v", err)
	}
	if data, _ := os.ReadFile(filepath.Join(dir, "nodes/web1.nix")); string(data) != "theirs\n" {
		t.Errorf("%q", data)
	}
	if _, _, err := f.Change("nodes/mixed.nix", "", func(s string) (string, error) { return s + "four\n", nil }); err != nil {
		t.Error(err)
	}
	if data, _ := os.ReadFile(filepath.Join(dir, "nodes/mixed.nix")); string(data) != "one\ntwo\nthree\nfour\n" {
		t.Errorf("mixed line ends became %q", data)
	}
	if mixed, err := f.Read("nodes/mixed.nix"); err != nil || mixed.Mixed {
		t.Errorf("%+v %v", mixed, err)
	}
	if err := os.Chmod(filepath.Join(dir, "modules/a.nix"), 0o664); err != nil {
		t.Fatal(err)
	}
	if _, _, err := f.Change("modules/a.nix", "", func(string) (string, error) { return "x", nil }); err != nil {
		t.Error(err)
	}
	if info, _ := os.Stat(filepath.Join(dir, "modules/a.nix")); info.Mode().Perm() != 0o664 {
		t.Errorf("the permissions are %v now", info.Mode())
	}
	failure := errors.New("no such line")
	if _, _, err := f.Change("nodes/mixed.nix", "", func(string) (string, error) { return "", failure }); !errors.Is(err, failure) {
		t.Error(err)
	}
	left(t, dir)
}

// TestOwner: what root edits for somebody stays theirs.
func TestOwner(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("LEFT OUT: only root can give files away")
	}
	dir, f := project(t)
	for _, name := range []string{"nodes", "nodes/web1.nix"} {
		if err := os.Chown(filepath.Join(dir, name), 4711, 4712); err != nil {
			t.Fatal(err)
		}
	}
	if _, _, err := f.Change("nodes/web1.nix", "", func(string) (string, error) { return "x", nil }); err != nil {
		t.Fatal(err)
	}
	if _, err := f.Create("nodes/new/deep/a.nix", "x"); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"nodes/web1.nix", "nodes/new", "nodes/new/deep", "nodes/new/deep/a.nix"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		if of := info.Sys().(*syscall.Stat_t); of.Uid != 4711 || of.Gid != 4712 {
			t.Errorf("%s is of %d:%d", name, of.Uid, of.Gid)
		}
	}
}
