package projectfiles

import (
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"strings"
	"sync"
	"syscall"
	"unicode/utf8"
)

// ErrChanged is about a file that is not what the caller has seen.
var ErrChanged = errors.New("the file has changed since it was viewed; view it again")

// changes come one after the other, so that none is lost between its read and its write.
var changes sync.Mutex

// Create writes a file that must not be there yet, with the folders that it needs.
func (f *Folder) Create(name, content string) (*Text, error) {
	changes.Lock()
	defer changes.Unlock()
	if err := check(name, content); err != nil {
		return nil, err
	}
	clean, err := allow(name, writable)
	if err != nil {
		return nil, err
	}
	if !strings.Contains(clean, "/") {
		return nil, refuse(name, "files are made in folders: %s", strings.Join(writable, ", "))
	}
	if err := f.makeFolders(name, path.Dir(clean)); err != nil {
		return nil, err
	}
	p, err := f.find(name, writable)
	if p != nil {
		defer p.close()
	}
	switch {
	case err == nil:
		return nil, failed(name, "it exists already; use replace or insert to change it")
	case !errors.Is(err, fs.ErrNotExist) || p == nil:
		return nil, err
	case p.name != clean:
		return nil, refuse(name, "it lies behind a link; name %s instead", quote(p.name))
	}
	folder, err := p.dir.Stat(".")
	if err != nil {
		return nil, failed(name, "%w", reason(err))
	}
	err = p.put(content, 0o644, folder, func(temporary string) error {
		if err := p.dir.Link(temporary, p.base); err != nil { // fails where there is something by now
			return err
		}
		return p.dir.Remove(temporary)
	})
	if err != nil {
		return nil, failed(name, "it can't be written: %w", reason(err))
	}
	return f.Read(name)
}

// Change has a file's text replaced by what edit makes of it: atomically, with the line ends, permissions and owner that it
// has. Where seen is not "", it must be the SHA-256 that the file still has, else ErrChanged.
func (f *Folder) Change(name, seen string, edit func(content string) (string, error)) (before, after *Text, err error) {
	changes.Lock()
	defer changes.Unlock()
	p, err := f.find(name, writable)
	if p != nil {
		defer p.close()
	}
	if err != nil {
		return nil, nil, err
	}
	if clean, _ := clean(name); p.name != clean {
		return nil, nil, refuse(name, "it is a link, or lies behind one; name %s instead", quote(p.name))
	}
	if before, err = p.read(name); err != nil {
		return nil, nil, err
	}
	if seen != "" && seen != before.SHA256 {
		return nil, nil, failed(name, "%w", ErrChanged)
	}
	content, err := edit(before.Content)
	if err != nil {
		return nil, nil, failed(name, "%w", err)
	}
	content = normal(content)
	if content == before.Content {
		return before, before, nil
	}
	if before.crlf {
		content = strings.ReplaceAll(content, "\n", "\r\n")
	}
	if err := check(name, content); err != nil {
		return nil, nil, err
	}
	err = p.put(content, p.info.Mode().Perm(), p.info, func(temporary string) error {
		// Somebody else may have written meanwhile. What is left between this look and the rename is a moment.
		if now, err := p.read(name); err != nil {
			return err
		} else if now.SHA256 != before.SHA256 {
			return ErrChanged
		}
		return p.dir.Rename(temporary, p.base)
	})
	if err != nil {
		return nil, nil, failed(name, "it can't be written: %w", reason(err))
	}
	after, err = f.Read(name)
	return before, after, err
}

func check(name, content string) error {
	switch {
	case len(content) > MaxFile:
		return refuse(name, "a file may have %d KiB, this would be %d", MaxFile>>10, len(content)>>10)
	case !utf8.ValidString(content) || strings.ContainsRune(content, 0):
		return refuse(name, "only texts in UTF-8 are written")
	case keyMaterial.MatchString(content):
		return refuse(name, "the text has a private key or credentials in it; `nix-infra secrets store` is the place for them")
	}
	return nil
}

// makeFolders makes what is missing of a folder's path.
func (f *Folder) makeFolders(asked, dir string) error {
	parts := strings.Split(dir, "/")
	for i := range parts {
		p, err := f.find(path.Join(parts[:i+1]...), writable)
		if err != nil && (p == nil || !errors.Is(err, fs.ErrNotExist)) {
			return err
		}
		if err != nil {
			err = p.makeFolder()
		} else if !p.info.IsDir() {
			err = errors.New("a file stands where a folder is needed")
		}
		p.close()
		if err != nil && !errors.Is(err, fs.ErrExist) {
			return failed(asked, "%w", reason(err))
		}
	}
	return nil
}

// makeFolder makes a folder at a place where nothing is.
func (p *place) makeFolder() error {
	if err := p.dir.Mkdir(p.base, 0o755); err != nil {
		return err
	}
	above, err := p.dir.Stat(".")
	if err != nil {
		return err
	}
	made, err := p.dir.OpenFile(p.base, os.O_RDONLY|syscall.O_DIRECTORY|syscall.O_NOFOLLOW, 0)
	if err != nil {
		return err
	}
	defer made.Close()
	return giveTo(made, above)
}

// giveTo gives what root made to the owner of something else: a lab needs root, and whose project it is goes on editing.
func giveTo(file *os.File, like fs.FileInfo) error {
	of, ok := like.Sys().(*syscall.Stat_t)
	if os.Geteuid() != 0 || !ok {
		return nil
	}
	return file.Chown(int(of.Uid), int(of.Gid))
}

// put writes a file beside its place, with the owner of like, and has place bring it there. On error nothing of it is left.
func (p *place) put(content string, mode fs.FileMode, like fs.FileInfo, place func(temporary string) error) (err error) {
	temporary := fmt.Sprintf(".%s.tmp-%s", short255(p.base), rand.Text()[:10])
	file, err := p.dir.OpenFile(temporary, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			file.Close()
			_ = p.dir.Remove(temporary)
		}
	}()
	if err = giveTo(file, like); err != nil {
		return err
	}
	if err = file.Chmod(mode); err != nil {
		return err
	}
	if _, err = file.WriteString(content); err != nil {
		return err
	}
	if err = file.Sync(); err != nil {
		return err
	}
	if err = file.Close(); err != nil {
		return err
	}
	if err = place(temporary); err != nil {
		return err
	}
	dir, err := p.dir.Open(".")
	if err != nil {
		return nil // it is written; only that it survives a loss of power is not certain
	}
	defer dir.Close()
	_ = dir.Sync()
	return nil
}

// short255 leaves room for what is put around a name.
func short255(base string) string { return strings.ToValidUTF8(base[:min(len(base), 200)], "") }
