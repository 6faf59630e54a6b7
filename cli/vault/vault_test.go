package vault

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"

	"filippo.io/age"
)

// open gives a vault whose guesses cost next to nothing.
func open(dir, password string) *Vault {
	return New(dir, func() (string, error) { return password, nil }, WorkFactor(1))
}

func TestRoundTrip(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	for name, value := range map[string][]byte{
		"operator": []byte("SOAA…"), "empty": {}, "with.dots_and-more@1": []byte("\x00\xff\n"), "large": bytes.Repeat([]byte("x"), 200_000),
	} {
		if err := open(dir, "p").Put(name, value); err != nil {
			t.Fatal(err)
		}
		got, err := open(dir, "p").Get(name)
		if err != nil || !bytes.Equal(got, value) {
			t.Errorf("%s: %d bytes, %v", name, len(got), err)
		}
	}
	v := open(dir, "p")
	names, err := v.Names()
	if want := []string{"empty", "large", "operator", "with.dots_and-more@1"}; err != nil || !reflect.DeepEqual(names, want) {
		t.Errorf("names %q, %v", names, err)
	}
	if !v.Has("operator") || v.Has("nobody") || v.Has("../keys/operator") {
		t.Error("Has is wrong")
	}
	if names, err := open(dir+"-not", "p").Names(); err != nil || names != nil {
		t.Errorf("a vault that isn't there: %q, %v", names, err)
	}
}

func TestModesAndLeftovers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "keys")
	if err := os.Mkdir(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := open(dir, "p").Put("a", []byte("PLAINTEXT")); err != nil {
		t.Fatal(err)
	}
	if info, _ := os.Stat(dir); info.Mode().Perm() != 0o700 {
		t.Errorf("folder is %o", info.Mode().Perm())
	}
	if info, _ := os.Stat(filepath.Join(dir, "a.age")); info.Mode().Perm() != 0o600 {
		t.Errorf("file is %o", info.Mode().Perm())
	}
	sealed, _ := os.ReadFile(filepath.Join(dir, "a.age"))
	if bytes.Contains(sealed, []byte("PLAINTEXT")) || !bytes.HasPrefix(sealed, []byte("age-encryption.org/v1\n-> X25519 ")) {
		t.Errorf("sealed as %q", sealed)
	}
	key, _ := os.ReadFile(filepath.Join(dir, "identity.age"))
	if !bytes.HasPrefix(key, []byte("age-encryption.org/v1\n-> scrypt ")) {
		t.Errorf("the key is sealed as %q", key)
	}
	onlyFiles(t, dir, "a.age", "identity.age")
}

func onlyFiles(t *testing.T, dir string, want ...string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, e := range entries {
		got = append(got, e.Name())
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("files %q, want %q", got, want)
	}
}

func TestWrongPassword(t *testing.T) {
	dir := t.TempDir()
	if err := open(dir, "right").Put("a", []byte("one")); err != nil {
		t.Fatal(err)
	}
	_, err := open(dir, "wrong").Get("a")
	if !errors.Is(err, ErrWrongPassword) || !strings.Contains(err.Error(), "identity.age") || !strings.Contains(err.Error(), "SECRETS_PASS") {
		t.Errorf("Get: %v", err)
	}
	for _, name := range []string{"a", "b"} {
		if err := open(dir, "wrong").Put(name, []byte("two")); !errors.Is(err, ErrWrongPassword) {
			t.Errorf("Put %s with a second password: %v", name, err)
		}
	}
	onlyFiles(t, dir, "a.age", "identity.age")
	if got, err := open(dir, "right").Get("a"); err != nil || string(got) != "one" {
		t.Errorf("afterwards: %q, %v", got, err)
	}
}

func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	path := filepath.Join(dir, "a.age")
	if err := open(dir, "p").Put("a", []byte("a private key")); err != nil {
		t.Fatal(err)
	}
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	try := func(what string, content []byte, allowed ...error) {
		t.Helper()
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := open(dir, "p").Get("a")
		for _, want := range allowed {
			if errors.Is(err, want) && got == nil {
				if strings.Contains(err.Error(), "\n") {
					t.Errorf("%s: more than a line: %q", what, err)
				}
				return
			}
		}
		t.Errorf("%s: %q, %v", what, got, err)
	}
	for n := range whole {
		try(fmt.Sprintf("cut to %d bytes", n), whole[:n], ErrDamaged)
	}
	for n := range whole {
		changed := bytes.Clone(whole)
		changed[n] ^= 1
		try(fmt.Sprintf("byte %d changed", n), changed, ErrDamaged, ErrWrongPassword)
	}
	try("appended to", append(bytes.Clone(whole), 'x'), ErrDamaged)

	other, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	var sealed bytes.Buffer
	w, _ := age.Encrypt(&sealed, other.Recipient())
	w.Close()
	try("of another kind", sealed.Bytes(), ErrDamaged)

	// A damaged file must not keep a vault from being repaired.
	if err := open(dir, "p").Put("a", []byte("again")); err != nil {
		t.Errorf("repair: %v", err)
	}
}

func TestMissingAndNames(t *testing.T) {
	v := open(t.TempDir(), "p")
	if _, err := v.Get("a"); !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), "a.age") {
		t.Errorf("missing: %v", err)
	}
	for _, name := range []string{"", ".", "..", ".hidden", "-rf", "a/b", `a\b`, "../a", "a\x00", "a b", "ä", strings.Repeat("a", 129)} {
		if err := v.Put(name, nil); err == nil {
			t.Errorf("Put accepts %q", name)
		}
		if _, err := v.Get(name); err == nil || errors.Is(err, fs.ErrNotExist) {
			t.Errorf("Get of %q: %v", name, err)
		}
	}
	if err := New(t.TempDir(), v.ring.password, WorkFactor(21)).Put("a", nil); err == nil {
		t.Error("a work factor that Get refuses was accepted")
	}
}

func TestConcurrentPut(t *testing.T) {
	dir := t.TempDir()
	v := open(dir, "p")
	var wg sync.WaitGroup
	for n := range 8 {
		wg.Go(func() {
			if err := v.Put("a", bytes.Repeat([]byte{byte('0' + n)}, 100_000)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	got, err := v.Get("a")
	if err != nil || len(got) != 100_000 || !bytes.Equal(got, bytes.Repeat(got[:1], 100_000)) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	onlyFiles(t, dir, "a.age", "identity.age")
}

func TestPassword(t *testing.T) {
	asked := 0
	ask := func(string) (string, error) { asked++; return "typed", nil }
	env := func(kv map[string]string) func(string) string { return func(k string) string { return kv[k] } }
	for name, c := range map[string]struct {
		env     map[string]string
		prompt  func(string) (string, error)
		want    string
		warning bool
		asked   int
		fails   bool
	}{
		"variable":       {env: map[string]string{"SECRETS_PASS": "a", "SECRETS_PWD": "b"}, prompt: ask, want: "a"},
		"older variable": {env: map[string]string{"SECRETS_PASS": "", "SECRETS_PWD": "b"}, prompt: ask, want: "b", warning: true},
		"asked":          {prompt: ask, want: "typed", asked: 1},
		"typed twice":    {prompt: Twice(ask), want: "typed", asked: 2},
		"batch":          {fails: true},
		"empty answer":   {prompt: func(string) (string, error) { return "", nil }, fails: true},
	} {
		t.Run(name, func(t *testing.T) {
			asked = 0
			var warnings bytes.Buffer
			password := passwordFrom(env(c.env), c.prompt, &warnings)
			if asked != 0 {
				t.Error("asked before it was needed")
			}
			for range 2 {
				got, err := password()
				if got != c.want || (err != nil) != c.fails || c.fails && !errors.Is(err, ErrNoPassword) {
					t.Errorf("%q, %v", got, err)
				}
			}
			if asked != c.asked || strings.Count(warnings.String(), "\n") > 1 || (warnings.Len() > 0) != c.warning {
				t.Errorf("asked %d times, warned %q", asked, warnings.String())
			}
		})
	}
	answers := []string{"one", "two"}
	differ := Twice(func(string) (string, error) { a := answers[0]; answers = answers[1:]; return a, nil })
	if _, err := differ(""); !errors.Is(err, ErrNoPassword) {
		t.Errorf("two different ones: %v", err)
	}
	if _, err := Prompt(""); !errors.Is(err, ErrNoPassword) { // go test has no terminal on stdin
		t.Errorf("no terminal: %v", err)
	}
}
