package nix

import (
	"bytes"
	"context"
	"fmt"
	"maps"
	"path"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// PathInfo is one store path of a closure.
type PathInfo struct {
	Path string
	Size int64 // bytes, of its NAR
}

// maxClosure bounds what Nix may print of a closure, in bytes: some 50,000 paths.
const maxClosure = 8 << 20

// ClosureInfo lists all store paths of a closure, itself included. It asks for text, whose form has stayed the same,
// where that of Nix's JSON has not.
func ClosureInfo(ctx context.Context, storePath string) ([]PathInfo, error) {
	if err := CheckStorePath(storePath); err != nil {
		return nil, err
	}
	out := &bounded{limit: maxClosure}
	err := job{what: "listing the closure", program: "nix", out: out,
		args: []string{"--extra-experimental-features", features, "path-info", "--recursive", "--size", storePath}}.run(ctx)
	if err != nil {
		return nil, err
	}
	return parsePathInfo(out.data)
}

func parsePathInfo(printed []byte) ([]PathInfo, error) {
	var all []PathInfo
	for line := range bytes.Lines(printed) {
		fields := strings.Fields(string(line))
		if len(fields) != 2 {
			return nil, fmt.Errorf("nix path-info printed %.200q, not a path and a size", line)
		}
		size, err := strconv.ParseInt(fields[1], 10, 64)
		if err == nil {
			err = CheckStorePath(fields[0])
		}
		if err != nil || size < 0 {
			return nil, fmt.Errorf("nix path-info printed %.200q, not a path and a size", line)
		}
		all = append(all, PathInfo{fields[0], size})
	}
	if len(all) == 0 {
		return nil, fmt.Errorf("nix path-info printed nothing")
	}
	return all, nil
}

// PackageChange is what becomes of a package: added without Before, removed without After.
type PackageChange struct {
	Name          string
	Before, After []string // versions; "" is one without
	Growth        int64    // bytes
}

// sizeMatters is the change of a package's size from which it is listed although its versions stay, in bytes.
const sizeMatters = 8 << 10

// DiffClosures tells what becomes of each package, by name, with the rules of `nix store diff-closures`: one whose
// versions stay the same is listed only where its size changes by 8 KiB or more.
func DiffClosures(before, after []PathInfo) []PackageChange {
	old, fresh := packages(before), packages(after)
	names := maps.Clone(old)
	maps.Copy(names, fresh)
	var changes []PackageChange
	for _, name := range slices.Sorted(maps.Keys(names)) {
		c := PackageChange{Name: name, Before: old[name].sorted(), After: fresh[name].sorted(), Growth: fresh[name].size - old[name].size}
		if !slices.Equal(c.Before, c.After) || c.Growth >= sizeMatters || c.Growth <= -sizeMatters {
			changes = append(changes, c)
		}
	}
	return changes
}

// ClosureSize is the sum of a closure's sizes, in bytes.
func ClosureSize(closure []PathInfo) int64 {
	var total int64
	for _, p := range closure {
		total += p.Size
	}
	return total
}

// pack is all that a closure has of a package.
type pack struct {
	versions map[string]bool
	size     int64
}

func (p pack) sorted() []string { return slices.Sorted(maps.Keys(p.versions)) }

func packages(closure []PathInfo) map[string]pack {
	all := map[string]pack{}
	for _, info := range closure {
		name, version := splitName(path.Base(info.Path)[33:])
		p, ok := all[name]
		if !ok {
			p.versions = map[string]bool{}
		}
		p.versions[version] = true
		p.size += info.Size
		all[name] = p
	}
	return all
}

// output is the name of an output at the end of a store path's name. Nix can't tell it from a version such as
// "unstable", either.
var output = regexp.MustCompile(`^(.*)-(?:[a-z]+|lib32|lib64)$`)

// splitName splits the name of a store path, without its hash, as diff-closures does: without the output's name, at
// the first dash that no letter follows.
func splitName(name string) (pname, version string) {
	if m := output.FindStringSubmatch(name); m != nil {
		name = m[1]
	}
	for i := 0; i+1 < len(name); i++ {
		c := name[i+1] | 0x20 // in lower case, where it is a letter
		if name[i] == '-' && (c < 'a' || c > 'z') {
			return name[:i], name[i+1:]
		}
	}
	return name, ""
}
