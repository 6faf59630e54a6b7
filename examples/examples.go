// Package examples has the project folders that `nix-infra init --template` writes: fleet/, machines that stand alone, and
// cluster/, with etcd, an overlay network and a service mesh, each with what both have in common, shared/. README.md tells of
// both.
package examples

import (
	"bytes"
	"embed"
	"fmt"
	"io/fs"
	"slices"
	"strings"
)

//go:embed all:shared all:fleet all:cluster
var files embed.FS

// Names are the templates.
var Names = []string{"fleet", "cluster"}

// File is one file of a template.
type File struct {
	Path string // slash-separated, below the project folder
	Mode fs.FileMode
	Data []byte
}

// Files are those of a template, by their paths. One that begins with #! may be run.
func Files(template string) ([]File, error) {
	if !slices.Contains(Names, template) {
		return nil, fmt.Errorf("there is no template %q; there are %s", template, strings.Join(Names, " and "))
	}
	var all []File
	for _, folder := range []string{"shared", template} {
		err := fs.WalkDir(files, folder, func(path string, d fs.DirEntry, err error) error {
			if err != nil || d.IsDir() {
				return err
			}
			data, err := files.ReadFile(path)
			f := File{Path: strings.TrimPrefix(path, folder+"/"), Mode: 0o644, Data: data}
			if bytes.HasPrefix(data, []byte("#!")) {
				f.Mode = 0o755
			}
			all = append(all, f)
			return err
		})
		if err != nil {
			return nil, fmt.Errorf("template %s: %w", template, err)
		}
	}
	slices.SortFunc(all, func(a, b File) int { return strings.Compare(a.Path, b.Path) })
	return all, nil
}
