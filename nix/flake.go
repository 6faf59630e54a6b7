package nix

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// Lock writes flake.lock into the folder of a flake, which is asked for nothing but its inputs. What is locked already
// stays.
func Lock(ctx context.Context, dir string, log func(line string)) error {
	if !path.IsAbs(dir) || strings.ContainsAny(dir, "#?%") {
		return fmt.Errorf("folder %q can't be named in a flake reference: it has to be absolute, without #, ? and %%", dir)
	}
	return job{what: "locking the flake", program: "nix", args: []string{"--extra-experimental-features", features, "flake", "lock", "path:" + dir}, log: log}.run(ctx)
}

// maxLock bounds a flake.lock that is read, in bytes.
const maxLock = 4 << 20

// inputURIs are what the inputs of a locked flake are fetched from, as Nix's setting allowed-uris takes it: each an address, or what is
// below one. Where Nix itself writes an address in another way than we know, it refuses the input and names it.
func inputURIs(dir string) ([]string, error) {
	data, err := os.ReadFile(filepath.Join(dir, "flake.lock"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil // Nix writes none for a flake without inputs
	}
	if err != nil {
		return nil, err
	}
	var lock struct {
		Nodes map[string]struct {
			Locked map[string]any `json:"locked"`
		} `json:"nodes"`
	}
	if len(data) > maxLock {
		return nil, fmt.Errorf("flake.lock has %d MiB; at most %d are read", len(data)>>20, maxLock>>20)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.UseNumber()
	if err := d.Decode(&lock); err != nil {
		return nil, fmt.Errorf("flake.lock: %w", err)
	}
	var all []string
	for _, node := range lock.Nodes {
		if uri := inputURI(node.Locked); uri != "" && !strings.ContainsAny(uri, " \t\r\n") { // the setting is words
			all = append(all, uri)
		}
	}
	slices.Sort(all)
	return slices.Compact(all), nil
}

// inputURI is where a locked input comes from; "" where it has no address of its own, or of a kind that is not known here.
func inputURI(locked map[string]any) string {
	text := func(name string) string {
		s, _ := locked[name].(string)
		return s
	}
	where := text("url")
	switch kind := text("type"); kind {
	case "github", "gitlab", "sourcehut":
		if text("owner") != "" && text("repo") != "" {
			return kind + ":" + text("owner") + "/" + text("repo")
		}
	case "tarball", "file":
		scheme, rest, _ := strings.Cut(where, "://")
		if i := strings.LastIndexByte(rest, '/'); i > 0 && (scheme == "https" || scheme == "http") { // what is below a folder of this machine is not all an input
			return scheme + "://" + rest[:i+1] // what follows has a query, which differs between versions of Nix
		}
	case "git":
		if where != "" && !strings.Contains(where, "?") {
			if !strings.HasPrefix(where, "git:") {
				where = "git+" + where
			}
			return where + query(locked, "ref", "rev", "shallow", "submodules", "lfs", "exportIgnore")
		}
	case "path":
		if strings.HasPrefix(text("path"), "/") {
			return "path:" + percentEncode(text("path")) + query(locked, "lastModified", "narHash", "rev", "revCount")
		}
	}
	return ""
}

// query is the query of an address, of those attributes that there are, in the order and encoding of Nix.
func query(attrs map[string]any, names ...string) string {
	values := map[string]string{}
	for _, name := range names {
		switch v := attrs[name].(type) {
		case string:
			values[name] = percentEncode(v)
		case json.Number:
			values[name] = v.String()
		case bool:
			if v {
				values[name] = "1"
			}
		}
	}
	var parts []string
	for _, name := range slices.Sorted(maps.Keys(values)) {
		parts = append(parts, name+"="+values[name])
	}
	if parts == nil {
		return ""
	}
	return "?" + strings.Join(parts, "&")
}

// percentEncode writes a path, or a value of a query, as Nix does.
func percentEncode(s string) string {
	var b strings.Builder
	for _, c := range []byte(s) {
		if c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9' || strings.IndexByte("-._~:@/", c) >= 0 {
			b.WriteByte(c)
		} else {
			fmt.Fprintf(&b, "%%%02X", c)
		}
	}
	return b.String()
}
