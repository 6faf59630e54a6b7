package projectfiles

import (
	"errors"
	"io/fs"
	"os"
	"path"
	"strings"
	"syscall"
)

// maxLinks is how many links in a row are followed.
const maxLinks = 8

// errMoved is about something that was replaced while it was opened.
var errMoved = errors.New("it was replaced while it was opened; try again")

// place is a name in a folder that was opened.
type place struct {
	dir  *os.Root
	base string // "." for the folder itself
	name string // the path from the project's root, in its shortest form
	info fs.FileInfo
}

// find goes to a path name by name. What is there is neither opened yet nor a link; nothing may be there (fs.ErrNotExist)
// but its folder, and then the place is given together with the error. The caller closes the place's folder.
func (f *Folder) find(name string, roots []string) (*place, error) {
	return f.follow(name, name, roots, 0)
}

func (f *Folder) follow(asked, name string, roots []string, links int) (*place, error) {
	clean, err := allow(name, roots)
	if links > 0 && (err != nil || clean == ".") {
		return nil, refuse(asked, "it is a link, or lies behind one, that leads to what is not open here")
	} else if err != nil {
		return nil, err
	}
	dir, err := f.open()
	if err != nil {
		return nil, err
	}
	p := &place{dir: dir, base: ".", name: clean}
	parts := strings.Split(clean, "/")
	for i, part := range parts {
		info, err := p.dir.Lstat(part)
		switch {
		case errors.Is(err, fs.ErrNotExist) && i == len(parts)-1:
			p.base = part
			return p, failed(asked, "%w", fs.ErrNotExist)
		case err != nil:
			p.close()
			return nil, failed(asked, "%w", reason(err))
		case info.Mode()&fs.ModeSymlink != 0:
			target, err := p.dir.Readlink(part)
			p.close()
			switch {
			case err != nil:
				return nil, failed(asked, "%w", reason(err))
			case links == maxLinks:
				return nil, refuse(asked, "more than %d links in a row", maxLinks)
			case path.IsAbs(target):
				return nil, refuse(asked, "it is a link, or lies behind one, that leads out of the project")
			}
			// The folders up to here are no links, so that .. is the folder before.
			next := path.Join(append([]string{path.Join(parts[:i]...), target}, parts[i+1:]...)...)
			return f.follow(asked, next, roots, links+1)
		case i == len(parts)-1:
			p.base, p.info = part, info
		case !info.IsDir():
			p.close()
			return nil, failed(asked, "%s is no folder", quote(part))
		default:
			if err := p.enter(part, info); err != nil {
				p.close()
				return nil, failed(asked, "%w", err)
			}
		}
	}
	return p, nil
}

// enter goes into a folder that was seen and was no link.
func (p *place) enter(part string, seen fs.FileInfo) error {
	below, err := p.dir.OpenRoot(part)
	if err != nil {
		return reason(err)
	}
	p.close()
	p.dir = below
	is, err := below.Stat(".")
	if err != nil {
		return reason(err)
	}
	if !os.SameFile(is, seen) {
		return errMoved
	}
	return nil
}

func (p *place) close() { p.dir.Close() }

// open opens the file or folder that was found, and nothing else that is there by now.
func (p *place) open(asked string) (*os.File, error) {
	if !p.info.IsDir() && !p.info.Mode().IsRegular() {
		return nil, refuse(asked, "neither a file nor a folder")
	}
	file, err := p.dir.OpenFile(p.base, os.O_RDONLY|syscall.O_NONBLOCK, 0) // a pipe that took the file's place is not waited for
	if err != nil {
		return nil, failed(asked, "%w", reason(err))
	}
	is, err := file.Stat()
	switch {
	case err != nil:
		err = reason(err)
	case !os.SameFile(is, p.info):
		err = errMoved
	case is.Mode().IsRegular() && names(is) > 1:
		file.Close()
		return nil, refuse(asked, "the file has a second name (a hard link), which may be that of a secret; make it a copy")
	}
	if err != nil {
		file.Close()
		return nil, failed(asked, "%w", err)
	}
	return file, nil
}

// names is how many a file has.
func names(info fs.FileInfo) uint64 {
	if s, ok := info.Sys().(*syscall.Stat_t); ok {
		return uint64(s.Nlink)
	}
	return 1
}
