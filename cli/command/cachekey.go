package command

import (
	"bytes"
	"crypto/ed25519"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// cacheKeyEntry is in the vault: the secret key that systems are signed with which are built here, in Nix's form,
// "name:base64" of an ed25519 key (its seed, and its public half after it).
const cacheKeyEntry = "cache-key"

// cacheKey is a secret key of a binary cache.
type cacheKey struct {
	secret []byte
	public string // as a node is told it
}

// cacheKey reads the key in a file or, with file "", that of the vault. The vault's is made when it is first needed,
// and nix-infra.yaml lists its public half from then on.
func (a *app) cacheKey(p *project.Project, file string) (cacheKey, error) {
	if file != "" {
		secret, err := os.ReadFile(file)
		if errors.Is(err, fs.ErrNotExist) {
			return cacheKey{}, fmt.Errorf("there is no file %s; check --cache-key", file)
		} else if err != nil {
			return cacheKey{}, err
		}
		return parseCacheKey(secret, file)
	}
	v := a.vault(p.Env.Get)
	if !v.Has(cacheKeyEntry) {
		secret, err := newCacheKey(p.Settings.Fleet + "-1")
		if err != nil {
			return cacheKey{}, err
		}
		if err := v.Put(cacheKeyEntry, secret); err != nil {
			return cacheKey{}, err
		}
		a.note("made the key that systems are signed with: %s", a.own(keysDir, cacheKeyEntry+".age"))
	}
	secret, err := a.secret(v, cacheKeyEntry)
	if err != nil {
		return cacheKey{}, err
	}
	key, err := parseCacheKey(secret, a.own(keysDir, cacheKeyEntry+".age"))
	if err != nil || slices.Contains(p.Settings.Cache.Keys, key.public) {
		return key, err
	}
	p.Settings.Cache.Keys = append(p.Settings.Cache.Keys, key.public)
	if _, err := a.changeSettings(func(now *project.Project) (project.Settings, error) {
		after := now.Settings
		if !slices.Contains(after.Cache.Keys, key.public) {
			after.Cache.Keys = append(slices.Clone(after.Cache.Keys), key.public)
		}
		return after, nil
	}); err != nil {
		return cacheKey{}, err
	}
	a.note("cache.keys in %s lists its public half: %s", project.SettingsFile, key.public)
	return key, nil
}

func newCacheKey(name string) ([]byte, error) {
	_, private, err := ed25519.GenerateKey(nil)
	if err != nil {
		return nil, err
	}
	return []byte(name + ":" + base64.StdEncoding.EncodeToString(private)), nil
}

// parseCacheKey checks a secret key, of which from tells where it is from. What it says of a damaged one has nothing
// of the key in it.
func parseCacheKey(secret []byte, from string) (cacheKey, error) {
	secret = bytes.TrimSpace(secret)
	name, encoded, _ := strings.Cut(string(secret), ":")
	raw, err := base64.StdEncoding.DecodeString(encoded)
	if err != nil || len(raw) != ed25519.PrivateKeySize || !bytes.Equal(raw, ed25519.NewKeyFromSeed(raw[:ed25519.SeedSize])) {
		return cacheKey{}, fmt.Errorf("%s is no secret key of a binary cache: expected name:base64, as nix key generate-secret prints it", from)
	}
	public := name + ":" + base64.StdEncoding.EncodeToString(raw[ed25519.SeedSize:])
	if protocol.CheckCacheKey(public) != nil {
		return cacheKey{}, fmt.Errorf("%s: the key's name may have letters, digits and . _ - only", from)
	}
	return cacheKey{secret, public}, nil
}

// with lists a key with others.
func (k cacheKey) with(others []string) []string {
	keys := map[string]bool{k.public: true}
	for _, o := range others {
		keys[o] = true
	}
	return slices.Sorted(maps.Keys(keys))
}
