package nix

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/url"
	"os"
	"strings"
)

// SubstituteRequest says what to bring from binary caches.
type SubstituteRequest struct {
	Path    string            // store path of the closure
	Caches  []string          // URLs; none: it has to be in the store already
	Keys    []string          // public keys, "name:base64": what none of them signed is not taken
	OutLink string            // symbolic link to leave as a gc root; "": none
	Netrc   string            // file by which Nix logs in to the caches; "": as it is configured
	Log     func(line string) // told each line of the log as it comes; may be nil
}

// Substitute brings a closure into the store without evaluating or building anything. What the machine's own
// configuration says of caches, keys and signatures does not count. What is in the store already is taken as it is
// and needs no cache and no signature: whoever could put it there wrongly needs no help of ours. It ends with ctx;
// what Nix itself gave up is a *RunError.
func Substitute(ctx context.Context, r SubstituteRequest) error {
	if err := CheckStorePath(r.Path); err != nil {
		return err
	}
	if strings.HasSuffix(r.Path, ".drv") { // realised, it would be built
		return fmt.Errorf("%s is the recipe of a closure, not one", r.Path)
	}
	for _, cache := range r.Caches {
		if err := checkSigned(cache); err != nil {
			return err
		}
	}
	var unsigned, missing bool
	log := func(line string) {
		unsigned = unsigned || saysUnsigned(line)
		missing = missing || saysMissing(line)
		if r.Log != nil {
			r.Log(line)
		}
	}
	err := job{what: "fetching the closure", program: "nix-store", args: substituteArgs(r), log: log, out: io.Discard}.run(ctx)
	var failed *RunError
	switch {
	case !errors.As(err, &failed):
		return err
	case unsigned:
		return fmt.Errorf("a binary cache has the closure, or a part of it, without a signature of the deployment's keys (%s): %w",
			strings.Join(keyNames(r.Keys), ", "), err)
	case missing && len(r.Caches) == 0:
		return fmt.Errorf("the closure is not in the store, and the deployment names no binary cache: %w", err)
	case missing:
		return fmt.Errorf("no binary cache that can be reached has the closure, or a part of it: %w", err)
	}
	return err
}

// saysUnsigned knows libstore's words for a path whose signatures are missing or wrong, saysMissing those for one that
// no cache has: the errors that it ends with say neither.
func saysUnsigned(line string) bool {
	return strings.Contains(line, "not signed by any of the keys") || strings.Contains(line, "lacks a signature by a trusted key")
}

func saysMissing(line string) bool {
	return strings.Contains(line, "don't know how to build these paths") || strings.Contains(line, "no substituter that can build it")
}

func substituteArgs(r SubstituteRequest) []string {
	args := []string{
		// Root's own way into the store. A daemon would judge signatures by its configuration, not by ours.
		"--store", "local",
		"--realise", r.Path,
		"--option", "substitute", "true",
		"--option", "substituters", strings.Join(r.Caches, " "),
		"--option", "trusted-public-keys", strings.Join(r.Keys, " "),
		"--option", "require-sigs", "true",
		// A cache that can't be reached is passed over for the next one; nothing is built, having no recipe.
		"--option", "fallback", "true",
		"--option", "max-jobs", "0",
		"--option", "builders", "",
		// What was not there, or not signed, a minute ago may be by now.
		"--option", "narinfo-cache-negative-ttl", "0",
		"--option", "narinfo-cache-positive-ttl", "0",
		"--option", "connect-timeout", "15",
	}
	if r.OutLink != "" {
		args = append(args, "--add-root", r.OutLink)
	}
	return append(args, netrcArgs(r.Netrc)...)
}

// checkSigned refuses a cache whose URL asks Nix to take what it has without signatures, and what Nix would take
// for several.
func checkSigned(cache string) error {
	u, err := url.Parse(cache)
	if err != nil || u.Scheme == "" || strings.ContainsAny(cache, " \t\r\n") {
		return fmt.Errorf("%.200q is not the URL of a binary cache", cache)
	}
	if u.Query().Has("trusted") {
		return fmt.Errorf("binary cache %s asks to be trusted without signatures; leave \"trusted\" out of its URL", u.Redacted())
	}
	return nil
}

// keyNames are the names of public keys, which are what Nix's users know them by.
func keyNames(keys []string) []string {
	var names []string
	for _, k := range keys {
		name, _, _ := strings.Cut(k, ":")
		names = append(names, name)
	}
	return names
}

// Copy pushes a closure to a binary cache, whose URL is as Nix takes it (file, http, s3, ssh, …). Paths that the
// cache has already are left as they are there, with their signatures.
func Copy(ctx context.Context, storePath, cache string, log func(line string)) error {
	if err := CheckStorePath(storePath); err != nil {
		return err
	}
	return job{what: "copying the closure to " + redacted(cache), program: "nix", log: log,
		args: []string{"--extra-experimental-features", features, "copy", "--to", cache, storePath}}.run(ctx)
}

func redacted(cache string) string {
	if u, err := url.Parse(cache); err == nil {
		return u.Redacted()
	}
	return "the cache"
}

// SignRequest says what to sign.
type SignRequest struct {
	Store string            // URL of the store or cache where the signatures are kept; "": this machine's
	Path  string            // store path of the closure: all of it is signed
	Key   []byte            // a secret key as `nix key generate-secret` prints it
	Log   func(line string) // may be nil
}

// maxKey is far above the size of a key, 100 bytes and its name, and below what a pipe takes without a reader.
const maxKey = 4 << 10

// Sign signs a closure where one of its paths is not signed with the key yet. Signing in this machine's store needs
// root, or a user whom its Nix trusts.
func Sign(ctx context.Context, r SignRequest) error {
	if err := CheckStorePath(r.Path); err != nil {
		return err
	}
	if len(r.Key) == 0 || len(r.Key) > maxKey {
		return fmt.Errorf("a secret key of %d bytes; it should be as `nix key generate-secret` prints it", len(r.Key))
	}
	// A pipe: it is in no argument, in no environment and on no disk.
	key, w, err := os.Pipe()
	if err != nil {
		return fmt.Errorf("can't hand over the secret key: %w", err)
	}
	defer key.Close()
	_, err = w.Write(r.Key)
	if err = errors.Join(err, w.Close()); err != nil {
		return fmt.Errorf("can't hand over the secret key: %w", err)
	}
	args := []string{"--extra-experimental-features", features, "store", "sign", "--key-file", "/dev/fd/3", "--recursive"}
	if r.Store != "" {
		args = append(args, "--store", r.Store)
	}
	return job{what: "signing the closure", program: "nix", args: append(args, r.Path), log: r.Log, files: []*os.File{key}}.run(ctx)
}
