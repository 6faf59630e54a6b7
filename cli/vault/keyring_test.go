package vault

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"filippo.io/age"
)

// sealedWith encrypts a file with a password itself, as vaults did before they had a key.
func sealedWith(t *testing.T, password, plaintext string) []byte {
	t.Helper()
	r, err := age.NewScryptRecipient(password)
	if err != nil {
		t.Fatal(err)
	}
	r.SetWorkFactor(1)
	sealed, err := encrypt([]byte(plaintext), r)
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

func write(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600)); err != nil {
		t.Fatal(err)
	}
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	data, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// TestOlderVault: files of before there was a key open as ever, and keep a second password away.
func TestOlderVault(t *testing.T) {
	dir := t.TempDir()
	write(t, filepath.Join(dir, "fleet.age"), sealedWith(t, "p", "keys"))
	if got, err := open(dir, "p").Get("fleet"); err != nil || string(got) != "keys" {
		t.Fatalf("%q, %v", got, err)
	}
	if _, err := open(dir, "wrong").Get("fleet"); !errors.Is(err, ErrWrongPassword) {
		t.Errorf("wrong password: %v", err)
	}
	if err := open(dir, "wrong").Put("new", []byte("x")); !errors.Is(err, ErrWrongPassword) {
		t.Errorf("a key for a second password: %v", err)
	}
	onlyFiles(t, dir, "fleet.age")
	if err := open(dir, "p").Put("new", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if got, err := open(dir, "p").Get("fleet"); err != nil || string(got) != "keys" {
		t.Errorf("afterwards: %q, %v", got, err)
	}
}

// TestOneScrypt: twenty files of two folders ask for the password, and pay for it, once.
func TestOneScrypt(t *testing.T) {
	dir := t.TempDir()
	setUp := open(filepath.Join(dir, "keys"), "p")
	names := strings.Split("abcdefghijklmnopqrst", "")
	for _, name := range names {
		if err := errors.Join(setUp.Put(name, []byte(name)), setUp.Beside(filepath.Join(dir, "secrets")).Put(name, []byte(name))); err != nil {
			t.Fatal(err)
		}
	}
	asked := 0
	v := New(filepath.Join(dir, "keys"), func() (string, error) { asked++; return "p", nil })
	for _, name := range names {
		for _, folder := range []*Vault{v, v.Beside(filepath.Join(dir, "secrets"))} {
			if got, err := folder.Get(name); err != nil || string(got) != name {
				t.Fatalf("%q, %v", got, err)
			}
		}
	}
	if asked != 1 {
		t.Errorf("the password was used %d times", asked)
	}
}

// TestKeyIsNeverReplaced: what is in the place of the key, and does not open, is not overwritten.
func TestKeyIsNeverReplaced(t *testing.T) {
	for name, spoil := range map[string]func([]byte) []byte{
		"empty":   func([]byte) []byte { return nil },
		"cut":     func(b []byte) []byte { return b[:len(b)-1] },
		"changed": func(b []byte) []byte { b[len(b)-1] ^= 1; return b },
		"rubbish": func([]byte) []byte { return []byte("rubbish") },
		"no key":  func([]byte) []byte { return sealedWith(t, "p", "# nothing\n") },
		"garbage": func([]byte) []byte { return sealedWith(t, "p", "AGE-SECRET-KEY-1XXX\n") },
		"costly":  func(b []byte) []byte { return bytes.Replace(b, []byte(" 1\n"), []byte(" 21\n"), 1) },
	} {
		dir := t.TempDir()
		if err := open(dir, "p").Put("a", []byte("one")); err != nil {
			t.Fatal(err)
		}
		path := filepath.Join(dir, "identity.age")
		spoiled := spoil(read(t, path))
		write(t, path, spoiled)
		if _, err := open(dir, "p").Get("a"); !errors.Is(err, ErrDamaged) || strings.Contains(err.Error(), "AGE-SECRET") {
			t.Errorf("%s: Get: %v", name, err)
		}
		if err := open(dir, "p").Put("b", []byte("two")); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: Put: %v", name, err)
		}
		if !bytes.Equal(read(t, path), spoiled) {
			t.Errorf("%s: the key was replaced", name)
		}
	}
	dir := t.TempDir()
	if err := open(dir, "p").Put("a", []byte("one")); err != nil {
		t.Fatal(err)
	}
	os.Remove(filepath.Join(dir, "identity.age"))
	if _, err := open(dir, "p").Get("a"); !errors.Is(err, ErrDamaged) || !strings.Contains(err.Error(), "identity.age is missing") {
		t.Errorf("without the key: %v", err)
	}
}

// TestTwoAtOnce: two processes that make the key at the same time end with one.
func TestTwoAtOnce(t *testing.T) {
	dir := t.TempDir()
	var wg sync.WaitGroup
	for _, name := range []string{"a", "b", "c", "d"} {
		v := open(dir, "p")
		wg.Go(func() {
			if err := v.Put(name, []byte(name)); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	for _, name := range []string{"a", "b", "c", "d"} {
		if got, err := open(dir, "p").Get(name); err != nil || string(got) != name {
			t.Errorf("%q, %v", got, err)
		}
	}
}

func TestRemove(t *testing.T) {
	v := open(t.TempDir(), "p")
	if err := errors.Join(v.Put("a", []byte("x")), v.Remove("a")); err != nil || v.Has("a") {
		t.Error(err)
	}
	if err := v.Remove("a"); !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	if v.Put("identity", nil) == nil || v.Remove("identity") == nil || v.Has("identity") {
		t.Error("the key counts as an entry")
	}
}

// TestAgeTool: the age tool opens the files, where it is installed.
func TestAgeTool(t *testing.T) {
	tool, err := exec.LookPath("age")
	if err != nil {
		without(t, "age")
	}
	dir := t.TempDir()
	bob, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "recipients"), []byte(bob.Recipient().String()))
	write(t, filepath.Join(dir, "bob"), []byte(bob.String()))
	v := New(filepath.Join(dir, "keys"), nil, Team(filepath.Join(dir, "recipients"), os.Getenv, nil))
	if err := v.Put("a", []byte("one")); err != nil {
		t.Fatal(err)
	}
	key, err := exec.Command(tool, "-d", "-i", filepath.Join(dir, "bob"), filepath.Join(dir, "keys", "identity.age")).Output()
	if err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(dir, "key"), key)
	if got, err := exec.Command(tool, "-d", "-i", filepath.Join(dir, "key"), filepath.Join(dir, "keys", "a.age")).Output(); err != nil || string(got) != "one" {
		t.Errorf("%q, %v", got, err)
	}
}

// without ends a test that needs a program of this machine which is not there; in CI it has to be.
func without(t *testing.T, program string) {
	t.Helper()
	if os.Getenv("CI") != "" {
		t.Fatalf("there is no %s, and CI needs it", program)
	}
	t.Skipf("left out: there is no %s on this machine", program)
}
