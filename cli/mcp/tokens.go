package mcp

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// Token is a bearer token of a server over HTTP, as its record has it: nothing of it can be used to come in.
type Token struct {
	Name    string     `json:"name"`
	SHA256  string     `json:"sha256"` // of the token; it is 32 random bytes, so that nobody finds it by trying
	Creds   string     `json:"creds"`  // credentials file as whose user it asks, relative to the record's folder or absolute
	Created time.Time  `json:"created"`
	Expires *time.Time `json:"expires,omitempty"` // nil: never
}

// Tokens are those of a project, in a file. Who changes them sees to it that nobody else does at that moment.
type Tokens struct{ Path string }

type tokenRecord struct {
	Version int     `json:"v"`
	Tokens  []Token `json:"tokens"`
}

// tokenPrefix tells people, and those who look for leaked secrets, what a token is.
const tokenPrefix = "nixinfra_mcp_"

// List lists the tokens.
func (t Tokens) List() ([]Token, error) {
	data, err := os.ReadFile(t.Path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	} else if err != nil {
		return nil, err
	}
	var r tokenRecord
	if err := json.Unmarshal(data, &r); err != nil {
		return nil, fmt.Errorf("%s is damaged (%v); remove it and make the tokens anew", t.Path, err)
	}
	if r.Version != protocol.Version {
		return nil, fmt.Errorf("%s is of version %d, this program knows version %d", t.Path, r.Version, protocol.Version)
	}
	return r.Tokens, nil
}

func (t Tokens) write(all []Token) error {
	data, err := json.MarshalIndent(tokenRecord{protocol.Version, all}, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(t.Path, append(data, '\n'), 0o600)
}

// Add makes a token that asks as the user of a credentials file. It is returned this once, and kept nowhere.
func (t Tokens) Add(name, creds string, expires *time.Time, now time.Time) (secret string, err error) {
	if err := t.Free(name); err != nil {
		return "", err
	}
	all, err := t.List()
	if err != nil {
		return "", err
	}
	random := make([]byte, 32)
	rand.Read(random)
	secret = tokenPrefix + base64.RawURLEncoding.EncodeToString(random)
	sum := sha256.Sum256([]byte(secret))
	return secret, t.write(append(all, Token{Name: name, SHA256: hex.EncodeToString(sum[:]), Creds: creds, Created: now, Expires: expires}))
}

// Free is an error where a name is none for a token, or one has it.
func (t Tokens) Free(name string) error {
	if err := protocol.CheckName(name); err != nil {
		return err
	}
	all, err := t.List()
	if err != nil {
		return err
	}
	if slices.ContainsFunc(all, func(k Token) bool { return k.Name == name }) {
		return fmt.Errorf("there is a token %s already; nix-infra mcp token remove %s takes it away", name, name)
	}
	return nil
}

// Remove takes a token away. A server that runs refuses it from the next request on.
func (t Tokens) Remove(name string) error {
	all, err := t.List()
	if err != nil {
		return err
	}
	left := slices.DeleteFunc(slices.Clone(all), func(k Token) bool { return k.Name == name })
	if len(left) == len(all) {
		return fmt.Errorf("there is no token %q; nix-infra mcp token list lists them", name)
	}
	return t.write(left)
}

// Find is the token that a secret is of. All are compared, each in the same time.
func (t Tokens) Find(secret string, now time.Time) (*Token, error) {
	all, err := t.List()
	if err != nil {
		return nil, err
	}
	sum := sha256.Sum256([]byte(secret))
	var found *Token
	for i := range all {
		want, err := hex.DecodeString(all[i].SHA256)
		if err == nil && subtle.ConstantTimeCompare(want, sum[:]) == 1 {
			found = &all[i]
		}
	}
	switch {
	case found == nil:
		return nil, errors.New("nobody knows this token")
	case found.Expires != nil && now.After(*found.Expires):
		return nil, fmt.Errorf("the token %s expired at %s", found.Name, found.Expires.Format(time.RFC3339))
	}
	return found, nil
}
