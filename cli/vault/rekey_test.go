package vault

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"filippo.io/age"
)

func password(text string) func() (string, error) { return func() (string, error) { return text, nil } }

// vaults are the keys and the secrets of a project.
func vaults(dir, pass string) (keys, secrets *Vault) {
	keys = open(filepath.Join(dir, "keys"), pass)
	return keys, keys.Beside(filepath.Join(dir, "secrets"))
}

// olderProject has keys of before there was a key for all, and secrets.
func olderProject(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	write(t, filepath.Join(dir, "keys", "fleet.age"), sealedWith(t, "old", "fleet"))
	write(t, filepath.Join(dir, "keys", "ca.age"), sealedWith(t, "old", "ca"))
	_, secrets := vaults(dir, "old")
	for _, name := range []string{"a", "b", "c"} {
		if err := secrets.Put(name, []byte(name)); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

// opens tells how many of the five files a password opens.
func opens(dir, pass string) (n int) {
	keys, secrets := vaults(dir, pass)
	for _, name := range []string{"fleet", "ca"} {
		if got, err := keys.Get(name); err == nil && string(got) == name {
			n++
		}
	}
	for _, name := range []string{"a", "b", "c"} {
		if got, err := secrets.Get(name); err == nil && string(got) == name {
			n++
		}
	}
	return n
}

func TestRekey(t *testing.T) {
	dir := olderProject(t)
	keys, _ := vaults(dir, "old")
	kept := read(t, filepath.Join(dir, "keys", "identity.age"))
	if finished, err := keys.Rekey(password("new")); err != nil || finished {
		t.Fatal(finished, err)
	}
	if opens(dir, "new") != 5 || opens(dir, "old") != 0 {
		t.Errorf("the new password opens %d, the old one %d", opens(dir, "new"), opens(dir, "old"))
	}
	// Who kept the old key and password reads nothing that is there now.
	after := read(t, filepath.Join(dir, "keys", "identity.age"))
	write(t, filepath.Join(dir, "keys", "identity.age"), kept)
	if n := opens(dir, "old"); n != 0 {
		t.Errorf("the old key opens %d", n)
	}
	write(t, filepath.Join(dir, "keys", "identity.age"), after)
	// The vault that did it goes on.
	if err := keys.Put("more", []byte("x")); err != nil {
		t.Error(err)
	}
	if _, err := open(filepath.Join(dir, "keys"), "new").Get("more"); err != nil {
		t.Error(err)
	}
}

// TestRekeyInterrupted ends a rekey after each of its steps: everything opens with one of the passwords, and it goes on.
func TestRekeyInterrupted(t *testing.T) {
	for stop := 0; ; stop++ {
		dir := olderProject(t)
		keys, _ := vaults(dir, "old")
		steps := 0
		keys.ring.step = func(string) error {
			if steps++; steps > stop {
				return errors.New("killed")
			}
			return nil
		}
		_, err := keys.Rekey(password("new"))
		if err == nil {
			if stop < 6 {
				t.Errorf("there were only %d steps", stop)
			}
			return
		}
		was, now := opens(dir, "old"), opens(dir, "new")
		if was != 5 && now != 5 {
			t.Errorf("after %d steps the old password opens %d, the new one %d", stop, was, now)
		}
		// As it is run again: with the password that is set still, or with the new one.
		for _, pass := range []string{"old", "new"} {
			copied := filepath.Join(t.TempDir(), "copy")
			if err := os.CopyFS(copied, os.DirFS(dir)); err != nil {
				t.Fatal(err)
			}
			keys, secrets := vaults(copied, pass)
			if pass == "new" && now != 5 {
				continue
			}
			if now == 5 { // what is stored meanwhile is not lost
				_, s := vaults(copied, "new")
				if err := s.Put("meanwhile", []byte("x")); err != nil {
					t.Fatal(err)
				}
			}
			finished, err := keys.Rekey(password("new"))
			if err != nil || finished != (now == 5) {
				t.Errorf("after %d steps, again with %s: %v, %v", stop, pass, finished, err)
			}
			if n := opens(copied, "new"); n != 5 {
				t.Errorf("after %d steps, again with %s: the new password opens %d", stop, pass, n)
			}
			if _, unfinished, err := secrets.Readers(); unfinished || err != nil {
				t.Errorf("after %d steps, again with %s: unfinished %v, %v", stop, pass, unfinished, err)
			}
			if _, s := vaults(copied, "new"); now == 5 {
				if _, err := s.Get("meanwhile"); err != nil {
					t.Error(err)
				}
			}
		}
	}
}

func TestRekeyRefused(t *testing.T) {
	dir := olderProject(t)
	keys, _ := vaults(dir, "wrong")
	if _, err := keys.Rekey(password("new")); !errors.Is(err, ErrWrongPassword) {
		t.Errorf("wrong password: %v", err)
	}
	write(t, filepath.Join(dir, "secrets", "b.age"), []byte("rubbish"))
	before := read(t, filepath.Join(dir, "keys", "identity.age"))
	keys, _ = vaults(dir, "old")
	if _, err := keys.Rekey(password("new")); !errors.Is(err, ErrDamaged) {
		t.Errorf("a damaged file: %v", err)
	}
	if !bytes.Equal(before, read(t, filepath.Join(dir, "keys", "identity.age"))) || opens(dir, "old") != 4 {
		t.Error("it changed the password although not everything opens")
	}
}

// TestRekeyToTeamAndBack: a password becomes a team, the team another one, and that a password again.
func TestRekeyToTeamAndBack(t *testing.T) {
	dir := t.TempDir()
	alice, bob := agePerson(t, dir, "alice"), sshPerson(t, dir, "bob", newKey(t), "")
	file := filepath.Join(dir, "recipients")
	if err := open(filepath.Join(dir, "keys"), "p").Put("a", []byte("one")); err != nil {
		t.Fatal(err)
	}
	reads := func(who person) bool {
		got, err := as(dir, who.file, "").Get("a")
		return err == nil && string(got) == "one"
	}
	write(t, file, []byte(alice.public+"\n"+bob.public+"\n"))
	v := New(filepath.Join(dir, "keys"), password("p"), Team(file, func(string) string { return "" }, nil), WorkFactor(1))
	if _, err := v.Rekey(noPassword); err != nil || !reads(alice) || !reads(bob) {
		t.Fatal(err, reads(alice), reads(bob))
	}
	if _, err := open(filepath.Join(dir, "keys"), "p").Get("a"); err == nil {
		t.Error("the password opens it still")
	}
	write(t, file, []byte(alice.public))
	if _, err := as(dir, bob.file, "").Rekey(noPassword); err != nil || !reads(alice) || reads(bob) {
		t.Error("bob takes himself off:", err, reads(alice), reads(bob))
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if _, err := as(dir, alice.file, "").Rekey(password("back")); err != nil {
		t.Error(err)
	}
	if got, err := open(filepath.Join(dir, "keys"), "back").Get("a"); err != nil || string(got) != "one" {
		t.Errorf("%q, %v", got, err)
	}
}

// TestStaleKey: a process that opened the vault before a rekey does not encrypt to the key that is gone.
func TestStaleKey(t *testing.T) {
	dir := olderProject(t)
	_, slow := vaults(dir, "old")
	if _, err := slow.Get("a"); err != nil {
		t.Fatal(err)
	}
	keys, _ := vaults(dir, "old")
	if _, err := keys.Rekey(password("new")); err != nil {
		t.Fatal(err)
	}
	if err := slow.Put("a", []byte("lost")); !errors.Is(err, ErrWrongPassword) {
		t.Errorf("it was stored: %v", err)
	}
	if opens(dir, "new") != 5 {
		t.Error("something does not open any more")
	}
}

func FuzzKeys(f *testing.F) {
	key, err := age.GenerateX25519Identity()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(string(formatKeys([]*age.X25519Identity{key, key}, []string{"age1x", "ssh-ed25519 A b"})))
	f.Add("# for: x\nAGE-SECRET-KEY-1")
	f.Fuzz(func(t *testing.T, text string) {
		keys, recipients, err := parseKeys([]byte(text))
		if err != nil {
			return
		}
		again, same, err := parseKeys(formatKeys(keys, recipients))
		if err != nil || len(again) != len(keys) || fmt.Sprint(same) != fmt.Sprint(recipients) {
			t.Errorf("%q: %v, %q and %q", text, err, recipients, same)
		}
	})
}
