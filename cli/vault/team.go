package vault

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"filippo.io/age"
	"filippo.io/age/agessh"
	"golang.org/x/crypto/ssh"
)

// IdentityVariable names the file with somebody's own key, for a project that is encrypted to a team.
const IdentityVariable = "NIX_INFRA_IDENTITY"

// team is who opens the project where a file names its recipients: people, each with a key of their own, and no
// password.
type team struct {
	file   string // "": there is no team
	env    func(string) string
	prompt func(label string) (string, error) // for the passphrase of a key; nil: nobody may be asked

	read  bool
	keys  []age.Identity
	wrong error
}

// Team has a vault encrypted to the recipients that file lists, once there is such a file: age's public keys (age1…) and
// SSH's (ssh-ed25519 and ssh-rsa), a line each, # before comments. Who opens it is found by NIX_INFRA_IDENTITY, which
// names a file of age identities or an SSH private key, or else by ~/.ssh/id_ed25519 and id_rsa.
func Team(file string, env func(string) string, prompt func(label string) (string, error)) Option {
	return func(k *keyring) { k.team = team{file: file, env: env, prompt: prompt} }
}

func (t *team) name() string { return filepath.Base(t.file) }

// recipients are the lines of the file without comments; none where there is no file.
func (t *team) recipients() ([]string, error) {
	if t.file == "" {
		return nil, nil
	}
	text, err := os.ReadFile(t.file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var lines []string
	for n, line := range strings.Split(string(text), "\n") {
		line = strings.TrimSpace(line)
		if line == "" || line[0] == '#' {
			continue
		}
		if _, err := parseRecipient(line); err != nil {
			return nil, fmt.Errorf("%s:%d: %w", t.file, n+1, err)
		}
		lines = append(lines, line)
	}
	if len(lines) == 0 {
		return nil, fmt.Errorf("%s names nobody: remove it to have a password, or list public keys, such as age1… or ssh-ed25519 …", t.file)
	}
	return lines, nil
}

func parseRecipients(lines []string) ([]age.Recipient, error) {
	var to []age.Recipient
	for _, line := range lines {
		r, err := parseRecipient(line)
		if err != nil {
			return nil, err
		}
		to = append(to, r)
	}
	return to, nil
}

func parseRecipient(line string) (age.Recipient, error) {
	switch {
	case strings.HasPrefix(line, "AGE-SECRET-KEY-"), strings.HasPrefix(line, "-----BEGIN"):
		return nil, errors.New("this is a private key, and whoever saw the file has it: list the public one, and make a new one")
	case strings.HasPrefix(line, "ssh-"):
		r, err := agessh.ParseRecipient(line)
		if err != nil {
			return nil, fmt.Errorf("no public key of SSH that can be encrypted to (ssh-ed25519 and ssh-rsa can): %v", err)
		}
		return r, nil
	}
	key, _, _ := strings.Cut(line, " ")
	rs, err := age.ParseRecipients(strings.NewReader(key))
	if err != nil || len(rs) != 1 {
		return nil, fmt.Errorf("%.20q… is no public key: expected age1…, ssh-ed25519 … or ssh-rsa …", line)
	}
	return rs[0], nil
}

// Unwrap makes a team an identity of age's: somebody's own keys are read for what is encrypted to keys.
func (t *team) Unwrap(stanzas []*age.Stanza) ([]byte, error) {
	if len(stanzas) == 1 && stanzas[0].Type == "scrypt" || t.file == "" {
		return nil, age.ErrIncorrectIdentity
	}
	if !t.read {
		t.keys, t.wrong = t.identities()
		t.read = true
	}
	if t.wrong != nil {
		return nil, &askError{t.wrong}
	}
	for _, key := range t.keys {
		if fileKey, err := key.Unwrap(stanzas); err == nil {
			return fileKey, nil
		} else if !errors.Is(err, age.ErrIncorrectIdentity) {
			return nil, &askError{err}
		}
	}
	return nil, age.ErrIncorrectIdentity
}

// usual is where SSH keeps somebody's keys.
func (t *team) usual() (files []string) {
	for _, name := range []string{"id_ed25519", "id_rsa"} {
		files = append(files, filepath.Join(t.env("HOME"), ".ssh", name))
	}
	return files
}

// uses tells whether a file is one with somebody's own keys, which may be what opens the project.
func (t *team) uses(file fs.FileInfo) bool {
	if t.env == nil {
		return false
	}
	for _, own := range append(t.usual(), t.env(IdentityVariable)) {
		if info, err := os.Stat(own); err == nil && os.SameFile(info, file) {
			return true
		}
	}
	return false
}

// identities reads somebody's own keys. Those at their usual places need not be there.
func (t *team) identities() ([]age.Identity, error) {
	if file := t.env(IdentityVariable); file != "" {
		keys, err := t.identity(file)
		if errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("%s: there is no file %s", IdentityVariable, file)
		} else if err != nil {
			return nil, fmt.Errorf("%s: %w", IdentityVariable, err)
		}
		return keys, nil
	}
	var all []age.Identity
	for _, file := range t.usual() {
		keys, err := t.identity(file)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		} else if err != nil {
			return nil, err
		}
		all = append(all, keys...)
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("the project is encrypted to keys: name the file with yours in %s (there is none in ~/.ssh)", IdentityVariable)
	}
	return all, nil
}

// identity reads a file of age identities, also one with a passphrase, or an SSH private key.
func (t *team) identity(file string) ([]age.Identity, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	if isOfPassword(data) {
		passphrase := passwordIdentity{func() (string, error) { return t.ask(file) }}
		if data, err = decrypt(data, passphrase); err != nil {
			return nil, fmt.Errorf("%s: wrong passphrase, or it is damaged", file)
		}
	}
	if bytes.HasPrefix(bytes.TrimSpace(data), []byte("-----BEGIN")) {
		return t.sshIdentity(file, data)
	}
	keys, err := age.ParseIdentities(bytes.NewReader(data))
	if err != nil { // its text might show a key
		return nil, fmt.Errorf("%s is neither a file of age identities nor an SSH private key (ed25519 or RSA)", file)
	}
	return keys, nil
}

func (t *team) sshIdentity(file string, pem []byte) ([]age.Identity, error) {
	key, err := agessh.ParseIdentity(pem)
	var locked *ssh.PassphraseMissingError
	switch {
	case err == nil:
		return []age.Identity{key}, nil
	case !errors.As(err, &locked):
		return nil, fmt.Errorf("%s is no SSH private key that age can use: %w", file, err)
	}
	public := locked.PublicKey
	if public == nil { // older formats keep it apart
		line, err := os.ReadFile(file + ".pub")
		if err == nil {
			public, _, _, _, err = ssh.ParseAuthorizedKey(line)
		}
		if err != nil {
			return nil, fmt.Errorf("%s has a passphrase, and its public half is needed too: %w", file, err)
		}
	}
	key, err = agessh.NewEncryptedSSHIdentity(public, pem, func() ([]byte, error) {
		passphrase, err := t.ask(file)
		return []byte(passphrase), err
	})
	return []age.Identity{key}, err
}

func (t *team) ask(file string) (string, error) {
	if t.prompt == nil {
		return "", fmt.Errorf("%w: %s has a passphrase, and nobody may be asked for it", ErrNoPassword, file)
	}
	return t.prompt("Passphrase of " + file + ": ")
}
