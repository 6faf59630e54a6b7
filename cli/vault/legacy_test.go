package vault

import (
	"bytes"
	"encoding/base64"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// store is a project's secrets; what it warns of goes to warnings.
func store(dir, pass string, warnings *[]string) *Secrets {
	return open(filepath.Join(dir, "keys"), "p").Secrets(filepath.Join(dir, "secrets"), password(pass), func(text string) {
		if warnings != nil {
			*warnings = append(*warnings, text)
		}
	})
}

// openssl encrypts as people and the earlier tool do.
func openssl(t *testing.T, pass string, value []byte, args ...string) []byte {
	t.Helper()
	tool, err := exec.LookPath("openssl")
	if err != nil {
		without(t, "openssl")
	}
	cmd := exec.Command(tool, append([]string{"enc", "-pbkdf2", "-pass", "env:PASS"}, args...)...)
	cmd.Env, cmd.Stdin = append(os.Environ(), "PASS="+pass), bytes.NewReader(value)
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("openssl %q: %v", args, err)
	}
	return out
}

// TestLegacyVaults reads what the real openssl made, for each way in which the earlier tool can have stored a secret.
func TestLegacyVaults(t *testing.T) {
	long := strings.Repeat("a line of a key with ümläuts\n", 100)
	for what, c := range map[string]struct {
		args   []string
		value  string
		cipher string // that has to be named
		format Format
	}{
		"no cipher":           {[]string{"-a"}, "correct horse", "", Base64},
		"no cipher, newline":  {[]string{"-a"}, "correct horse\n", "", Base64},
		"no cipher, long":     {[]string{"-a"}, long, "", Base64},
		"no cipher, binary":   {[]string{"-a"}, "\x00\xff\x01", "", Base64},
		"aes-256-cbc":         {[]string{"-a", "-aes-256-cbc"}, "correct horse", "", OpenSSL},
		"aes-256-cbc, long":   {[]string{"-a", "-aes-256-cbc"}, long, "", OpenSSL},
		"aes-256-cbc, short":  {[]string{"-a", "-aes-256-cbc"}, "x", "", OpenSSL},
		"aes-256-cbc, block":  {[]string{"-a", "-aes-256-cbc"}, "0123456789abcdef", "", OpenSSL},
		"aes-256-cbc, not -a": {[]string{"-aes-256-cbc"}, "correct horse", "", OpenSSL},
		"aes-192-cbc":         {[]string{"-a", "-aes-192-cbc"}, "correct horse", "", OpenSSL},
		"aes-128-cbc":         {[]string{"-a", "-aes-128-cbc"}, "correct horse", "", OpenSSL},
		"des-ede3-cbc":        {[]string{"-a", "-des-ede3-cbc"}, "correct horse", "", OpenSSL},
		"aes-256-ctr":         {[]string{"-a", "-aes-256-ctr"}, "correct horse", "aes-256-ctr", OpenSSL},
		"aes-128-ctr":         {[]string{"-a", "-aes-128-ctr"}, "correct horse", "aes-128-ctr", OpenSSL},
		"binary, named":       {[]string{"-a", "-aes-256-cbc"}, "\x00\xff\x01", "aes-256-cbc", OpenSSL},
	} {
		t.Run(what, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, "secrets", "s")
			write(t, file, openssl(t, "horse", []byte(c.value), c.args...))
			var warnings []string
			s := store(dir, "horse", &warnings)
			if c.cipher != "" {
				if got, err := s.Get("s"); err == nil {
					t.Errorf("read without the cipher's name: %q", got)
				}
				if err := s.Legacy(c.cipher); err != nil {
					t.Fatal(err)
				}
			}
			want := strings.TrimSuffix(c.value, "\n")
			if got, err := s.Get("s"); err != nil || string(got) != want {
				t.Fatalf("%q, %v", got, err)
			}
			if len(warnings) != 1 || !strings.Contains(warnings[0], "secrets migrate") || c.format == Base64 && !strings.Contains(warnings[0], "anybody can read") {
				t.Errorf("it warns %q", warnings)
			}
			if format, err := s.Format("s"); err != nil || format != c.format {
				t.Errorf("format %s, %v", format, err)
			}
			old := time.Date(2024, 1, 2, 3, 4, 5, 0, time.UTC)
			os.Chtimes(file, old, old)
			if format, err := s.Migrate("s"); err != nil || format != c.format {
				t.Fatal(format, err)
			}
			onlyFiles(t, filepath.Join(dir, "secrets"), ".changed.json", "s.age")
			after := store(dir, "none", &warnings)
			if got, err := after.Get("s"); err != nil || string(got) != want || len(warnings) != 1 {
				t.Errorf("migrated: %q, %v, %q", got, err, warnings)
			}
			if changed := after.Changed("s"); !changed.Equal(old) {
				t.Errorf("it is from %s", changed)
			}
		})
	}
}

// TestLegacyWrongPassword: a wrong password gives nothing. (Where the padding comes out right by chance, what is there is no
// text: that is what TestLegacyVaults shows of a binary secret whose cipher is not named.)
func TestLegacyWrongPassword(t *testing.T) {
	dir := t.TempDir()
	ciphers := []string{"aes-256-cbc", "aes-128-cbc", "des-ede3-cbc"}
	for _, c := range ciphers {
		write(t, filepath.Join(dir, "secrets", c), openssl(t, "horse", []byte("secret"), "-a", "-"+c))
	}
	for _, c := range ciphers {
		for n := range 6 {
			s := store(dir, strings.Repeat("w", n+1), nil)
			if got, err := s.Get(c); !errors.Is(err, ErrWrongPassword) || got != nil {
				t.Errorf("%s: %q, %v", c, got, err)
			}
			if _, err := s.Migrate(c); !errors.Is(err, ErrWrongPassword) {
				t.Errorf("%s: migrated: %v", c, err)
			}
		}
	}
	onlyFiles(t, filepath.Join(dir, "secrets"), "aes-128-cbc", "aes-256-cbc", "des-ede3-cbc")
	s := store(dir, "horse", nil)
	s.legacy = func() (string, error) { return "", ErrNoPassword }
	if _, err := s.Get("aes-256-cbc"); !errors.Is(err, ErrNoPassword) {
		t.Error(err)
	}
	if err := s.Legacy("rot13"); err == nil || !strings.Contains(err.Error(), "aes-256-cbc") {
		t.Error(err)
	}
}

func TestLegacyDamaged(t *testing.T) {
	sealed := openssl(t, "horse", []byte("a secret of more than one block"), "-a", "-aes-256-cbc")
	raw, err := base64.StdEncoding.DecodeString(strings.ReplaceAll(string(sealed), "\n", ""))
	if err != nil {
		t.Fatal(err)
	}
	encoded := func(b []byte) string { return base64.StdEncoding.EncodeToString(b) }
	for what, c := range map[string]struct {
		content string
		want    error
	}{
		"empty":                {"", ErrDamaged},
		"a newline":            {"\n", ErrDamaged},
		"only a newline in it": {encoded([]byte("\n")), ErrDamaged},
		"no base64":            {"correct horse battery staple!", ErrDamaged},
		"base64 cut":           {"Y29ycmVjdCBob3JzZ", ErrDamaged},
		"salted cut short":     {encoded(raw[:8]), ErrDamaged},
		"salt cut short":       {encoded(raw[:12]), ErrDamaged},
		"nothing after salt":   {encoded(raw[:16]), ErrDamaged},
		"cut in a block":       {encoded(raw[:len(raw)-1]), ErrDamaged},
		"cut after a block":    {encoded(raw[:len(raw)-16]), ErrWrongPassword},
		"changed at the end":   {encoded(append(bytes.Clone(raw[:len(raw)-1]), raw[len(raw)-1]^1)), ErrWrongPassword},
		"too large":            {strings.Repeat("A", maxLegacy+4), ErrDamaged},
	} {
		dir := t.TempDir()
		write(t, filepath.Join(dir, "secrets", "s"), []byte(c.content))
		got, err := store(dir, "horse", nil).Get("s")
		if !errors.Is(err, c.want) || got != nil || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %q, %v", what, got, err)
		}
		if _, err := store(dir, "horse", nil).Migrate("s"); !errors.Is(err, c.want) {
			t.Errorf("%s: migrated: %v", what, err)
		}
		onlyFiles(t, filepath.Join(dir, "secrets"), "s")
	}
}

// TestLegacyBesideNew: of two files of one secret the newer form counts, and migrate decides nothing where they differ.
func TestLegacyBesideNew(t *testing.T) {
	dir := t.TempDir()
	s := store(dir, "p", nil)
	if err := s.Put("s", []byte("new")); err != nil {
		t.Fatal(err)
	}
	legacy := filepath.Join(dir, "secrets", "s")
	write(t, legacy, []byte(base64.StdEncoding.EncodeToString([]byte("older"))))
	if got, err := s.Get("s"); err != nil || string(got) != "new" {
		t.Errorf("%q, %v", got, err)
	}
	if _, err := s.Migrate("s"); err == nil || !strings.Contains(err.Error(), "another value") {
		t.Errorf("migrate: %v", err)
	}
	if names, err := s.LegacyNames(); err != nil || !slices.Equal(names, []string{"s"}) {
		t.Errorf("%q, %v", names, err)
	}
	write(t, legacy, []byte(base64.StdEncoding.EncodeToString([]byte("new"))))
	if _, err := s.Migrate("s"); err != nil {
		t.Errorf("migrate of the same value, as after a crash: %v", err)
	}
	onlyFiles(t, filepath.Join(dir, "secrets"), ".changed.json", "s.age")
	// Storing again takes the old file away: mode 0400, as the earlier tool made it.
	write(t, legacy, []byte("b2xk"))
	os.Chmod(legacy, 0o400)
	if err := s.Put("s", []byte("newer")); err != nil {
		t.Error(err)
	}
	onlyFiles(t, filepath.Join(dir, "secrets"), ".changed.json", "s.age")
}

func TestSecrets(t *testing.T) {
	dir := t.TempDir()
	s := store(dir, "p", nil)
	if names, err := s.Names(); err != nil || len(names) != 0 {
		t.Errorf("%q, %v", names, err)
	}
	if _, err := s.Get("none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	if err := s.Remove("none"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("missing: %v", err)
	}
	for what, value := range map[string][]byte{"empty": nil, "too large": bytes.Repeat([]byte("x"), 64<<10+1)} {
		if err := s.Put("s", value); err == nil {
			t.Errorf("%s was stored", what)
		}
	}
	before := time.Now().Add(-time.Second)
	if err := s.Put("s", []byte("old")); err != nil {
		t.Fatal(err)
	}
	if changed := s.Changed("s"); changed.Before(before.Truncate(time.Second)) || changed.After(time.Now()) {
		t.Errorf("changed %s", changed)
	}
	if err := s.PutPending("s", []byte("new")); err != nil {
		t.Fatal(err)
	}
	again := store(dir, "p", nil) // as after a crash
	if got, err := again.Get("s"); err != nil || string(got) != "old" || !again.HasPending("s") {
		t.Errorf("%q, %v", got, err)
	}
	if got, err := again.Pending("s"); err != nil || string(got) != "new" {
		t.Errorf("pending %q, %v", got, err)
	}
	if err := again.ConfirmPending("s"); err != nil || again.HasPending("s") {
		t.Error(err)
	}
	if got, err := s.Get("s"); err != nil || string(got) != "new" {
		t.Errorf("%q, %v", got, err)
	}
	if err := errors.Join(s.PutPending("s", []byte("x")), s.Put("s", []byte("stored"))); err != nil || s.HasPending("s") {
		t.Errorf("a value that is stored leaves one on its way: %v", err)
	}
	if err := errors.Join(s.PutPending("s", []byte("x")), s.Remove("s")); err != nil || s.HasPending("s") || s.Has("s") {
		t.Error(err)
	}
	if s.record(func(all map[string]time.Time) {
		if len(all) != 0 {
			t.Errorf("on record is %v", all)
		}
	}) != nil {
		t.Error("the record can't be read")
	}
	filepath.WalkDir(dir, func(path string, e fs.DirEntry, _ error) error {
		if info, _ := e.Info(); info.Mode().Perm()&0o077 != 0 && path != dir {
			t.Errorf("%s is open to others: %s", path, info.Mode())
		}
		return nil
	})
}

func FuzzLegacy(f *testing.F) {
	f.Add([]byte("Y29ycmVjdA==\n"), "")
	f.Add([]byte("U2FsdGVkX18AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA="), "aes-256-cbc")
	f.Add([]byte("Salted__12345678x"), "aes-128-ctr")
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, content []byte, cipher string) {
		write(t, filepath.Join(dir, "secrets", "s"), content)
		s := store(dir, "p", nil)
		if cipher != "" && s.Legacy(cipher) != nil {
			return
		}
		if value, err := s.Get("s"); (err == nil) != (len(value) > 0) {
			t.Errorf("%q, %v", value, err)
		}
	})
}
