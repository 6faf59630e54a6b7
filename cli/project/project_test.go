package project

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestOpen(t *testing.T) {
	dir := t.TempDir()
	p, err := Open(dir, "")
	if !errors.Is(err, ErrNotInitialised) || !strings.Contains(err.Error(), "nix-infra init") {
		t.Errorf("no settings: %v", err)
	}
	if p == nil || p.Dir != dir || p.Settings.Defaults.Arch != DefaultArch || p.Settings.SSHKey != DefaultSSHKey {
		t.Fatalf("init can't go on with %+v", p)
	}
	if servers, err := p.Servers(); servers != nil || err != nil {
		t.Errorf("no servers.yaml: %v, %v", servers, err)
	}
	if err := WriteSettings(dir, Settings{Fleet: "home"}); err != nil {
		t.Fatal(err)
	}
	t.Chdir(filepath.Dir(dir))
	if p, err := Open(filepath.Base(dir), ""); err != nil || p.Dir != dir {
		t.Errorf("relative: %v", err)
	}
	if _, err := Open(dir+"/no", ""); err == nil || !strings.Contains(err.Error(), "does not exist") {
		t.Errorf("no folder: %v", err)
	}
	if _, err := Open(dir+"/"+SettingsFile, ""); err == nil || !strings.Contains(err.Error(), "not a folder") {
		t.Errorf("a file: %v", err)
	}
}

// TestEnvFile: an absolute path, then below the project, then here; only a named file has to exist.
func TestEnvFile(t *testing.T) {
	root := t.TempDir()
	dir, here := filepath.Join(root, "project"), filepath.Join(root, "here")
	write := func(name, text string) {
		file := filepath.Join(root, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, []byte(text), 0o644)); err != nil {
			t.Fatal(err)
		}
	}
	write("project/"+SettingsFile, "fleet: f")
	write("project/both.env", "A=project")
	write("here/both.env", "A=here")
	write("here/own.env", "A=own")
	write("elsewhere.env", "A=elsewhere")
	write("project/bad.env", "A=1\nB C=2\n")
	t.Chdir(here)
	t.Setenv("A", "process")
	t.Setenv("B", "process")
	for name, want := range map[string]string{
		"": "process", "both.env": "project", "own.env": "own", "../elsewhere.env": "elsewhere", filepath.Join(root, "elsewhere.env"): "elsewhere",
	} {
		p, err := Open(dir, name)
		if err != nil {
			t.Errorf("%q: %v", name, err)
			continue
		}
		if p.Env.Get("A") != want || p.Env.Get("B") != "process" || p.Env.Get("NO_SUCH_VARIABLE") != "" {
			t.Errorf("%q: A is %q, want %q", name, p.Env.Get("A"), want)
		}
	}
	write("project/.env", "A=default\nB=\nSSH_KEY=mine\nCTRL_NODES='etcd001  etcd002'")
	p, err := Open(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if p.Env.Get("A") != "default" || p.Env.Get("B") != "" || p.SSHKeyName() != "mine" || strings.Join(p.ControlNodes(), "+") != "etcd001+etcd002" {
		t.Errorf(".env is not over the environment: %+v", p.Env)
	}
	_, err = Open(dir, "no.env")
	failsWith(t, err, "no.env exists neither below")
	_, err = Open(dir, "bad.env")
	failsWith(t, err, "bad.env:2: expected NAME=value")
}

func TestParseEnv(t *testing.T) {
	process := func(name string) string { return map[string]string{"HOME": "/home/me"}[name] }
	for text, want := range map[string]string{
		"A=1":                          "1",
		"\ufeffA=1\r\n":                "1",
		"  export A=1  ":               "1",
		"export\tA=1":                  "1",
		"A = 1":                        "1",
		"A=":                           "",
		"A=''":                         "",
		"#A=1\n\nA=2 # two":            "2",
		"A=#1":                         "",
		"A=a#b":                        "a#b",
		"A='#' # x":                    "#",
		"A=My Company":                 "My Company",
		`A="a b  "`:                    "a b  ",
		`A='a "b" $HOME \n'`:           `a "b" $HOME \n`,
		`A="a 'b' \"c\" \$d \\ \n"`:    `a 'b' "c" $d \ \n`,
		`A=a"b c"'d e'f`:               "ab cd ef",
		`A=a\ \ `:                      "a  ",
		`A=a\'b`:                       "a'b",
		"A=$HOME/x":                    "/home/me/x",
		`A="${HOME}x"`:                 "/home/mex",
		"B=1\nA=$B$B$NONE":             "11",
		"A=100$":                       "100$",
		"A=1\nA=2":                     "2",
		"export A B_2\nA=1":            "1",
		"A=tls://host:4222?x=y==":      "tls://host:4222?x=y==",
		"A='unbalanced \" is fine' #'": "unbalanced \" is fine",
	} {
		e, err := parseEnv(".env", text, process)
		if err != nil || e.file["A"] != want {
			t.Errorf("%q: %q, %v; want %q", text, e.file["A"], err, want)
		}
	}
	for text, want := range map[string]string{
		"x":              ".env:1: expected NAME=value",
		"A=1\n\n1A=2":    ".env:3: expected NAME=value",
		"A-B=1":          ".env:1: expected NAME=value",
		`A="x`:           ".env:1: A: the quote \" is not closed",
		"A='x\ny'":       ".env:1: A: the quote ' is not closed",
		"A=$(id)":        ".env:1: A: only $NAME and ${NAME}",
		"A=pa$$word":     ".env:1: A: only $NAME and ${NAME}",
		"A=`id`":         ".env:1: A: a backquote",
		`A=x\`:           ".env:1: A: a backslash at the end",
		"A=\xff":         ".env:1: not text",
		"A=a\x00b":       ".env:1: not text",
		"unset SECRET":   ".env:1: expected NAME=value",
		"if [ x ]; then": ".env:1: expected NAME=value",
	} {
		_, err := parseEnv(".env", text, process)
		if err == nil || !strings.HasPrefix(err.Error(), want) {
			t.Errorf("%q: %v; want %s", text, err, want)
		}
	}
}

func TestValidNodeName(t *testing.T) {
	for _, name := range []string{"n1", "worker001", "a", "a-b", strings.Repeat("a", 63)} {
		if err := ValidNodeName(name); err != nil {
			t.Error(err)
		}
	}
	for _, name := range []string{"", "N1", "-a", "a-", "a.b", "a_b", "ä", "a\n", strings.Repeat("a", 64), "all", "not", "localhost", "flake", "configuration", "networking", "hardware-configuration"} {
		if ValidNodeName(name) == nil {
			t.Errorf("%q is allowed", name)
		}
	}
}

func FuzzEnv(f *testing.F) {
	for _, s := range []string{"A=1", "export A=\"$B\" # c", "A='x", "A=\\", "A=$", "A=${B", "\xff=\x00"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		e, err := parseEnv(".env", text, func(string) string { return "" })
		for name, value := range e.file {
			if err == nil && (strings.ContainsAny(value, "\n\x00") || !assignment.MatchString(name+"=")) {
				t.Errorf("%q gave %q=%q", text, name, value)
			}
		}
		// What is in single quotes comes out as it went in.
		if !strings.ContainsAny(text, "'\n\x00") && text == strings.ToValidUTF8(text, "") {
			e, err := parseEnv(".env", "A='"+text+"'", os.Getenv)
			if err != nil || e.file["A"] != text {
				t.Errorf("quoted %q gave %q, %v", text, e.file["A"], err)
			}
		}
	})
}

// FuzzPlaceholders: text without placeholders stays as it is, and nothing but placeholders changes.
func FuzzPlaceholders(f *testing.F) {
	for _, s := range []string{"", "a [%%b%%] c", "[%%a [%%b%%]%%]", "[%%\n%%]", "[%%%%]", "[%%a%%][%%b%%]\n[%%\xff%%]"} {
		f.Add([]byte(s))
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		same := string(fill(text, func(int, []byte, string) (string, bool) { return "", false }))
		if same != string(text) {
			t.Errorf("%q became %q", text, same)
		}
		again := string(fill(text, func(line int, _ []byte, key string) (string, bool) {
			if strings.Contains(key, "\n") || line < 1 || line > 1+strings.Count(string(text), "\n") {
				t.Errorf("%q: key %q in line %d", text, key, line)
			}
			return "[%%" + key + "%%]", true
		}))
		if again != string(text) {
			t.Errorf("%q came back as %q", text, again)
		}
		if !strings.Contains(string(text), "[%%") && string(fill(text, func(int, []byte, string) (string, bool) { return "x", true })) != string(text) {
			t.Errorf("%q has no placeholder", text)
		}
		c := composer{TreeRequest: TreeRequest{Node: "n1", AllowUnknownPlaceholders: true}, project: &Project{}}
		for s := range slotNames {
			c.render(File{Data: text}, "f", "f", s)
		}
		for _, err := range c.errs {
			if strings.ContainsAny(err.Error(), "\n\x1b\x00") {
				t.Errorf("a message with control characters: %q", err)
			}
		}
	})
}
