package projectfiles

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"path"
	"slices"
	"strings"
)

// Entry is a file or folder.
type Entry struct {
	Path string `json:"path"`
	Size int64  `json:"size"`
	Type string `json:"type"` // file, directory or link
}

// List gives what is in a folder and in all below it that is open, the near ones first; more says that there is more than
// MaxEntries. Links are listed, and not followed. "." lists all that is open.
func (f *Folder) List(ctx context.Context, name string) (entries []Entry, more bool, err error) {
	p, err := f.find(name, readable)
	if err != nil {
		if p != nil {
			p.close()
		}
		return nil, false, err
	}
	defer p.close()
	file, err := p.open(name)
	if err != nil {
		return nil, false, err
	}
	defer file.Close()
	if !p.info.IsDir() {
		return []Entry{{p.name, p.info.Size(), "file"}}, false, nil
	}
	err = f.walk(ctx, p, func(e Entry, _ *place) error {
		if len(entries) == MaxEntries {
			more = true
			return fs.SkipAll
		}
		entries = append(entries, e)
		return nil
	})
	return entries, more, err
}

// walk visits what is open below a folder, breadth first and in order. A file's place has its folder open during the visit.
func (f *Folder) walk(ctx context.Context, from *place, visit func(Entry, *place) error) error {
	queue := []string{from.name}
	for len(queue) > 0 {
		at := queue[0]
		queue = queue[1:]
		below, err := f.visitFolder(ctx, at, visit)
		switch {
		case errors.Is(err, fs.SkipAll):
			return nil
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil && at == from.name:
			return err
		}
		queue = append(queue, below...) // a folder that went, or can't be read, is not the end
	}
	return nil
}

func (f *Folder) visitFolder(ctx context.Context, at string, visit func(Entry, *place) error) (below []string, err error) {
	p, err := f.find(at, readable)
	if err != nil {
		if p != nil {
			p.close()
		}
		return nil, err
	}
	defer p.close()
	if at != "." {
		if !p.info.IsDir() {
			return nil, failed(at, "no folder")
		}
		if err := p.enter(p.base, p.info); err != nil {
			return nil, failed(at, "%w", err)
		}
	}
	dir, err := p.dir.Open(".")
	if err != nil {
		return nil, failed(at, "%w", reason(err))
	}
	defer dir.Close()
	entries, err := dir.ReadDir(MaxEntries + 1)
	if err != nil && len(entries) == 0 {
		return nil, nil // empty
	}
	slices.SortFunc(entries, func(a, b os.DirEntry) int { return strings.Compare(a.Name(), b.Name()) })
	for _, e := range entries {
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		name := path.Join(at, e.Name())
		if _, err := allow(name, readable); err != nil {
			continue
		}
		info, err := p.dir.Lstat(e.Name())
		if err != nil {
			continue
		}
		entry := Entry{name, info.Size(), "file"}
		switch mode := info.Mode(); {
		case mode.IsDir():
			entry.Type, entry.Size = "directory", 0
			below = append(below, name)
		case mode&fs.ModeSymlink != 0:
			entry.Type = "link"
		case !mode.IsRegular():
			continue
		}
		if err := visit(entry, &place{p.dir, e.Name(), name, info}); err != nil {
			return nil, err
		}
	}
	return below, nil
}
