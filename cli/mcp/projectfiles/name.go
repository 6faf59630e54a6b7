package projectfiles

import (
	"path"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"golang.org/x/text/unicode/norm"
)

const (
	maxName  = 1024 // bytes of a path
	maxDepth = 32   // folders in it
)

// clean judges a path by its letters alone, and gives it in its shortest form; "." is the project itself.
func clean(name string) (string, error) {
	switch {
	case name == "":
		return "", refuse(name, `no path was given; give one below the project, such as nodes/web1.nix, or "."`)
	case len(name) > maxName:
		return "", refuse(name, "a path may have %d bytes, this one has %d", maxName, len(name))
	case !utf8.ValidString(name):
		return "", refuse(name, "a path has to be UTF-8")
	case strings.HasPrefix(name, "/"):
		return "", refuse(name, "only paths below the project are taken, such as nodes/web1.nix")
	case strings.ContainsRune(name, '\\'):
		return "", refuse(name, "folders are separated by /, and no name here has a backslash")
	case strings.ContainsFunc(name, func(r rune) bool {
		return r == utf8.RuneError || unicode.In(r, unicode.Cc, unicode.Cf, unicode.Zl, unicode.Zp, unicode.Co)
	}):
		return "", refuse(name, "the path has a character that can't be seen, or that stands for one that was none")
	}
	var parts []string
	for part := range strings.SplitSeq(name, "/") {
		if part == "" || part == "." {
			continue
		}
		if err := cleanPart(name, part); err != nil {
			return "", err
		}
		parts = append(parts, part)
	}
	switch {
	case len(parts) > maxDepth:
		return "", refuse(name, "%d folders deep is more than the %d that are looked at", len(parts), maxDepth)
	case len(parts) == 0:
		return ".", nil
	}
	return strings.Join(parts, "/"), nil
}

// cleanPart judges the name of one file or folder. A file system, or who reads the name, may take other letters for
// the same: full-width dots and slashes, for one. They count as what they look like.
func cleanPart(name, part string) error {
	looks := norm.NFKC.String(part)
	switch {
	case looks == "..":
		return refuse(name, "a path can't go up by .. ; give it from the project's root on")
	case strings.HasPrefix(looks, "."):
		return refuse(name, "%s is hidden, and hidden files are not for assistants", quote(part))
	case strings.ContainsAny(looks, `/\`) || looks != part && isASCII(looks):
		return refuse(name, "%s only looks like another name", quote(part))
	case isPrivate(looks):
		return refuse(name, "%s holds secrets or keys", quote(part))
	case strings.HasPrefix(part, " ") || strings.HasSuffix(part, " "):
		return refuse(name, "%s begins or ends with a space", quote(part))
	case len(part) > 255:
		return refuse(name, "a name may have 255 bytes, %s has %d", quote(part), len(part))
	}
	return nil
}

func isASCII(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r >= utf8.RuneSelf })
}

// isPrivate tells of a name whether a file or folder called so holds secrets, wherever it lies. Some file systems
// know no difference of case.
func isPrivate(part string) bool {
	part = strings.ToLower(part)
	switch part {
	case "secrets", "id_rsa", "id_ed25519", "id_ecdsa":
		return true
	}
	return slices.Contains([]string{".creds", ".age", ".pem", ".key", ".p12", ".pfx", ".nk", ".seed"}, path.Ext(part))
}

// isPrivateHere tells of a path below the root of a project, or of a test's copy of one, whether it leads to keys.
func isPrivateHere(clean string) bool {
	parts := strings.Split(clean, "/")
	if parts[0] == "__test__" {
		parts = parts[1:]
	} else {
		parts = parts[:1]
	}
	return slices.ContainsFunc(parts, func(p string) bool {
		return slices.Contains([]string{"ssh", "ca", "nix-infra"}, strings.ToLower(norm.NFKC.String(p)))
	})
}

// allow judges a path, and gives its shortest form: it has to be one of the roots or lie in one.
func allow(name string, roots []string) (string, error) {
	clean, err := clean(name)
	if err != nil {
		return "", err
	}
	if clean == "." {
		return clean, nil
	}
	first, _, _ := strings.Cut(clean, "/")
	switch {
	case isPrivateHere(clean):
		return "", refuse(name, "there are keys in there")
	case !slices.Contains(roots, first):
		return "", refuse(name, "not among what is open here: %s", strings.Join(roots, ", "))
	}
	return clean, nil
}
