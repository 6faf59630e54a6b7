package prefetch

import (
	"fmt"
	"io"
	"os"
	"path"
	"strings"
)

// tree is what an archive has in it. Nothing of it is ever a file of that name: contents are pieces of one scratch file, so
// that no name can lead anywhere.
type tree struct {
	root    *entry
	content *os.File
	size    int64
	entries int
	names   int // bytes of the entries' names and targets
}

// entry is a folder (below is not nil), a link (target is not "") or a file.
type entry struct {
	below      map[string]*entry
	target     string
	executable bool
	at, size   int64
}

func (t *tree) close() { t.content.Close() }

const maxTarget = 4096 // bytes of a link's target

// file adds a file, whose content comes after the others' in the scratch file.
func (t *tree) file(name string, executable bool, from io.Reader) error {
	n, err := io.Copy(io.NewOffsetWriter(t.content, t.size), io.LimitReader(from, MaxUnpacked-t.size+1))
	if err != nil {
		return err
	}
	e := &entry{executable: executable, at: t.size, size: n}
	if t.size += n; t.size > MaxUnpacked {
		return fmt.Errorf("it unpacks to more than the %d MiB that are looked at here", MaxUnpacked>>20)
	}
	return t.put(name, e)
}

// link adds a symbolic link, which is never followed.
func (t *tree) link(name, target string) error {
	if target == "" || len(target) > maxTarget || strings.ContainsRune(target, 0) {
		return fmt.Errorf("%.100q is a link to nothing that makes sense", name)
	}
	return t.put(name, &entry{target: target})
}

func (t *tree) hardLink(name, target string) error {
	parts, err := split(target)
	if err != nil {
		return err
	}
	e := t.root
	for _, p := range parts {
		if e = e.below[p]; e == nil {
			return fmt.Errorf("%.100q is a link to %.100q, which is not there", name, target)
		}
	}
	if e.below != nil {
		return fmt.Errorf("%.100q is a link to a folder", name)
	}
	return t.put(name, e)
}

// put adds an entry, in place of one that was there.
func (t *tree) put(name string, e *entry) error {
	dir, base := path.Split(strings.TrimRight(name, "/"))
	parent, err := t.folder(dir)
	if err != nil {
		return err
	}
	parts, err := split(base)
	if err != nil || len(parts) != 1 {
		return fmt.Errorf("%.100q is no name of a file", name)
	}
	if old := parent.below[base]; old != nil && old.below != nil {
		return fmt.Errorf("%.100q is a folder, and then something else", name)
	}
	parent.below[base] = e
	return t.count(len(name) + len(e.target))
}

// count takes note of an entry, whose name and target have so many bytes.
func (t *tree) count(names int) error {
	if t.entries++; t.entries > maxEntries {
		return fmt.Errorf("it has more than %d entries", maxEntries)
	}
	if t.names += names; t.names > maxNames {
		return fmt.Errorf("the names in it have more than %d MiB", maxNames>>20)
	}
	return nil
}

// folder finds a folder, and makes what is missing on the way.
func (t *tree) folder(name string) (*entry, error) {
	parts, err := split(name)
	if err != nil {
		return nil, err
	}
	e := t.root
	for _, p := range parts {
		next := e.below[p]
		if next == nil {
			next = &entry{below: map[string]*entry{}}
			e.below[p] = next
			if err := t.count(len(name)); err != nil {
				return nil, err
			}
		}
		if next.below == nil {
			return nil, fmt.Errorf("%.100q goes through a file or a link", name)
		}
		e = next
	}
	return e, nil
}

// split takes the path of an entry apart. Whoever unpacked it for real would have it lead nowhere else, either.
func split(name string) ([]string, error) {
	if strings.HasPrefix(name, "/") || strings.ContainsAny(name, "\x00\\") || len(name) > 4096 {
		return nil, fmt.Errorf("%.100q is no path of an archive", name)
	}
	var parts []string
	for p := range strings.SplitSeq(name, "/") {
		switch p {
		case "", ".":
		case "..":
			return nil, fmt.Errorf("%.100q leads out of the archive", name)
		default:
			parts = append(parts, p)
		}
	}
	return parts, nil
}
