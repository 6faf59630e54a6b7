package run

import (
	"os"
	"path/filepath"
	"strings"

	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// Program finds a program by its bare name along the search path of every run, or checks the absolute path of one. Links
// are not followed: many a program looks at the name that it was called by.
func Program(name string) (string, error) {
	if filepath.IsAbs(name) {
		if !executable(name) {
			return "", protocol.Refuse(protocol.Unknown, "%.200s is not on this node, or no program", name)
		}
		return name, nil
	}
	if name == "" || strings.ContainsRune(name, '/') {
		return "", protocol.Refuse(protocol.Invalid, "%.200q is neither a program's name nor its absolute path", name)
	}
	for _, dir := range filepath.SplitList(nix.SearchPath()) {
		if file := filepath.Join(dir, name); filepath.IsAbs(dir) && executable(file) {
			return file, nil
		}
	}
	return "", protocol.Refuse(protocol.Unknown, "%.200s is not installed on this node: looked in %s", name, nix.SearchPath())
}

func executable(file string) bool {
	info, err := os.Stat(file)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}
