package vault

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/rsa"
	"encoding/pem"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"filippo.io/age"
	"golang.org/x/crypto/ssh"
)

// person is somebody with a key.
type person struct{ public, file string }

func sshPerson(t *testing.T, dir, name string, private any, passphrase string) person {
	t.Helper()
	signer, err := ssh.NewSignerFromKey(private)
	if err != nil {
		t.Fatal(err)
	}
	block, err := ssh.MarshalPrivateKey(private, name)
	if passphrase != "" {
		block, err = ssh.MarshalPrivateKeyWithPassphrase(private, name, []byte(passphrase))
	}
	if err != nil {
		t.Fatal(err)
	}
	p := person{strings.TrimSpace(string(ssh.MarshalAuthorizedKey(signer.PublicKey()))) + " " + name, filepath.Join(dir, name)}
	write(t, p.file, pem.EncodeToMemory(block))
	return p
}

func agePerson(t *testing.T, dir, name string) person {
	t.Helper()
	key, err := age.GenerateX25519Identity()
	if err != nil {
		t.Fatal(err)
	}
	p := person{key.Recipient().String(), filepath.Join(dir, name)}
	write(t, p.file, []byte("# "+name+"\n"+key.String()+"\n"))
	return p
}

func newKey(t *testing.T) ed25519.PrivateKey {
	t.Helper()
	_, private, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return private
}

func noPassword() (string, error) { return "", errors.New("asked for a password") }

// as opens a team's vault as somebody.
func as(dir, identity string, passphrase string) *Vault {
	env := func(name string) string {
		return map[string]string{IdentityVariable: identity, "HOME": filepath.Join(dir, "home")}[name]
	}
	var prompt func(string) (string, error)
	if passphrase != "" {
		prompt = func(string) (string, error) { return passphrase, nil }
	}
	return New(filepath.Join(dir, "keys"), noPassword, Team(filepath.Join(dir, "recipients"), env, prompt), WorkFactor(1))
}

func TestTeam(t *testing.T) {
	dir := t.TempDir()
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	people := map[string]person{
		"age": agePerson(t, dir, "age"), "ed25519": sshPerson(t, dir, "ed25519", newKey(t), ""), "rsa": sshPerson(t, dir, "rsa", rsaKey, ""),
		"locked": sshPerson(t, dir, "locked", newKey(t), "open sesame"), "home": sshPerson(t, dir, "home/.ssh/id_ed25519", newKey(t), ""),
	}
	wrapped := agePerson(t, dir, "wrapped")
	write(t, wrapped.file, sealedWith(t, "open sesame", string(read(t, wrapped.file))))
	people["wrapped"] = wrapped
	stranger := agePerson(t, dir, "stranger")
	lines := "# the team\n\n"
	for _, p := range people {
		lines += p.public + "\n"
	}
	write(t, filepath.Join(dir, "recipients"), []byte(lines))
	if err := as(dir, stranger.file, "").Put("a", []byte("made by anybody")); err != nil {
		t.Fatal(err) // who makes the vault need not be able to open it
	}
	for name, p := range people {
		passphrase := ""
		if name == "locked" || name == "wrapped" {
			passphrase = "open sesame"
			for _, wrong := range []string{"wrong", ""} {
				if got, err := as(dir, p.file, wrong).Get("a"); err == nil || got != nil {
					t.Errorf("%s with passphrase %q: %q", name, wrong, got)
				}
			}
		}
		if name == "home" {
			p.file = ""
		}
		if got, err := as(dir, p.file, passphrase).Get("a"); err != nil || string(got) != "made by anybody" {
			t.Errorf("%s: %q, %v", name, got, err)
		}
		if err := as(dir, p.file, passphrase).Put(name, []byte("x")); err != nil {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := as(dir, stranger.file, "").Get("a"); !errors.Is(err, ErrNoKey) || !strings.Contains(err.Error(), IdentityVariable) {
		t.Errorf("a stranger: %v", err)
	}
	if err := as(dir, stranger.file, "").Put("b", []byte("x")); !errors.Is(err, ErrNoKey) {
		t.Errorf("a stranger puts: %v", err)
	}
	for what, file := range map[string]string{"no file": filepath.Join(dir, "none"), "no key": filepath.Join(dir, "recipients")} {
		if _, err := as(dir, file, "").Get("a"); err == nil || !strings.Contains(err.Error(), IdentityVariable) {
			t.Errorf("%s: %v", what, err)
		}
		if err := as(dir, file, "").Put("b", []byte("x")); err == nil || !strings.Contains(err.Error(), IdentityVariable) {
			t.Errorf("Put with %s: %v", what, err) // and above all, no new key in the place of the one that can't be opened
		}
	}
	os.RemoveAll(filepath.Join(dir, "home"))
	if _, err := as(dir, "", "").Get("a"); err == nil || !strings.Contains(err.Error(), "name the file with yours in "+IdentityVariable) {
		t.Errorf("no key at all: %v", err)
	}
}

func TestRecipientsFile(t *testing.T) {
	dir := t.TempDir()
	good := agePerson(t, dir, "good")
	file := filepath.Join(dir, "recipients")
	for text, says := range map[string]string{
		"":                              "names nobody",
		"# nobody\n":                    "names nobody",
		good.public + "\nrubbish here":  "recipients:2: \"rubbish here\"… is no public key",
		"ssh-dss AAAA x":                "recipients:1: no public key of SSH",
		string(read(t, good.file))[6:]:  "private key",
		"age1qqqqqqqqqqqqqqqqqqqqqqqqq": "is no public key",
	} {
		write(t, file, []byte(text))
		v := as(dir, good.file, "")
		if err := v.Put("a", []byte("x")); err == nil || !strings.Contains(err.Error(), says) || strings.Contains(err.Error(), "AGE-SECRET") {
			t.Errorf("%q: %v", text, err)
		}
	}
	onlyFiles(t, dir, "good", "recipients")
	write(t, file, []byte(" "+good.public+" \r\n# end"))
	v := as(dir, good.file, "")
	if err := v.Put("a", []byte("x")); err != nil {
		t.Fatal(err)
	}
	if readers, unfinished, err := as(dir, good.file, "").Readers(); err != nil || unfinished || !slices.Equal(readers, []string{good.public}) {
		t.Errorf("%q, %v, %v", readers, unfinished, err)
	}
}
