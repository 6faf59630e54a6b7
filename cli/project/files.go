package project

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode"
	"unicode/utf8"

	"github.com/nix-infra/nix-infra/protocol"
)

// source is a folder that files are taken from: the project, or a test's folder outside of it. No symlink
// leads out of it, nor to what must stay private: what a node gets lands in its world-readable store.
type source struct {
	root string // without symlinks
	name string // before the paths in messages; "" for the project
}

func newSource(dir, name string) (source, error) {
	root, err := filepath.EvalSymlinks(dir)
	return source{root, name}, err
}

// read gives the file at a slash-separated path; fs.ErrNotExist when nothing is there.
func (s source) read(name string) (File, error) {
	real, info, err := s.resolve(name)
	if err != nil {
		return File{}, err
	}
	switch {
	case info.IsDir():
		return File{}, s.errorf(name, "a folder stands where a file is expected")
	case !info.Mode().IsRegular():
		return File{}, s.errorf(name, "a %s can't be deployed; move it out of the project", describe(info.Mode()))
	case info.Size() > protocol.MaxFileSize:
		return File{}, s.errorf(name, "%d MiB are too many; the limit for a file is %d MiB", info.Size()>>20, protocol.MaxFileSize>>20)
	}
	data, err := os.ReadFile(real)
	if err != nil {
		return File{}, s.errorf(name, "%v", errors.Unwrap(err))
	}
	f := File{Path: name, Mode: 0o644, Data: data}
	if info.Mode()&0o111 != 0 {
		f.Mode = 0o755
	}
	return f, nil
}

// Action gives the action.sh of an app module, as it is deployed.
func (p *Project) Action(module string) ([]byte, error) {
	if module == "" || module[0] == '.' || strings.ContainsAny(module, `/\`) {
		return nil, fmt.Errorf("%s is no app module; expected the name of a folder in app_modules/", show(module))
	}
	src, err := newSource(p.Dir, "")
	if err != nil {
		return nil, err
	}
	name := protocol.ModuleAction(module)
	f, err := src.read(name)
	if !errors.Is(err, fs.ErrNotExist) {
		return f.Data, err
	}
	var have []string
	found, _ := filepath.Glob(filepath.Join(src.root, "app_modules", "*", "action.sh"))
	for _, f := range found {
		have = append(have, filepath.Base(filepath.Dir(f)))
	}
	return nil, fmt.Errorf("there is no %s in the project%s", show(name), hint(module, "modules with an action", have))
}

// walk gives all files below a folder, whatever they are, except for leftovers of other tools;
// fs.ErrNotExist when nothing is there.
func (s source) walk(name string) ([]File, error) {
	if _, info, err := s.resolve(name); err != nil {
		return nil, err
	} else if !info.IsDir() {
		return nil, s.errorf(name, "a file stands where a folder is expected")
	}
	w := walker{source: s}
	w.walk(name)
	return w.files, errors.Join(w.errs...)
}

type walker struct {
	source
	files  []File
	errs   []error
	size   int64
	inside []string // the folders that are being walked, without symlinks
}

func (w *walker) walk(name string) {
	real, info, err := w.resolve(name)
	switch {
	case err != nil:
		w.errs = append(w.errs, err)
		return
	case !info.IsDir():
		f, err := w.read(name)
		if err != nil {
			w.errs = append(w.errs, err)
			return
		}
		w.size += int64(len(f.Data))
		w.files = append(w.files, f)
		return
	case slices.Contains(w.inside, real):
		w.errs = append(w.errs, w.errorf(name, "this link leads back to a folder that it is in"))
		return
	}
	entries, err := os.ReadDir(real)
	if err != nil {
		w.errs = append(w.errs, w.errorf(name, "%v", errors.Unwrap(err)))
		return
	}
	w.inside = append(w.inside, real)
	for _, e := range entries {
		below := path.Join(name, e.Name())
		switch err := w.deployable(below, e.Name()); {
		case isLeftover(e.Name()):
		case err != nil:
			w.errs = append(w.errs, err)
		case w.size > protocol.MaxTreeSize || len(w.files) > protocol.MaxFiles:
			w.errs = append(w.errs, w.errorf(name, "more than a node can be sent; the limits are %d files and %d MiB", protocol.MaxFiles, protocol.MaxTreeSize>>20))
			w.inside = w.inside[:len(w.inside)-1]
			return
		default:
			w.walk(below)
		}
	}
	w.inside = w.inside[:len(w.inside)-1]
}

// deployable refuses names that a manifest can't carry.
func (w *walker) deployable(name, base string) error {
	if !utf8.ValidString(base) || strings.ContainsRune(base, '\\') || strings.ContainsFunc(base, unicode.IsControl) || len(name) > 1024 {
		return w.errorf(name, "a file can't be deployed under this name; rename it")
	}
	return nil
}

// resolve follows symlinks as far as they are allowed to lead.
func (s source) resolve(name string) (string, fs.FileInfo, error) {
	file := filepath.Join(s.root, filepath.FromSlash(name))
	real, err := filepath.EvalSymlinks(file)
	if err != nil {
		if _, lerr := os.Lstat(file); errors.Is(err, fs.ErrNotExist) && errors.Is(lerr, fs.ErrNotExist) {
			return "", nil, fs.ErrNotExist
		} else if errors.Is(err, fs.ErrNotExist) {
			return "", nil, s.errorf(name, "a symlink to something that does not exist")
		}
		return "", nil, s.errorf(name, "%v", err)
	}
	if real != file {
		rel, err := filepath.Rel(s.root, real)
		switch {
		case rel == ".":
			return "", nil, s.errorf(name, "a symlink to the whole project")
		case err != nil || !filepath.IsLocal(rel):
			return "", nil, s.errorf(name, "a symlink to %s, outside the project; copy the file in", show(real))
		case isPrivate(filepath.ToSlash(rel)):
			return "", nil, s.errorf(name, "a symlink to %s, which no node may get", show(rel))
		}
	}
	info, err := os.Stat(real)
	if err != nil {
		return "", nil, s.errorf(name, "%v", errors.Unwrap(err))
	}
	return real, info, nil
}

func (s source) errorf(name, format string, args ...any) error {
	return fmt.Errorf("%s: %s", show(path.Join(s.name, name)), fmt.Sprintf(format, args...))
}

// isPrivate tells of a path below the project whether it holds keys, credentials or secrets. Some file systems know no
// difference of case.
func isPrivate(name string) bool {
	name = strings.ToLower(name)
	parts := strings.Split(name, "/")
	switch parts[0] {
	case "ssh":
		return !strings.HasSuffix(name, ".pub")
	case "ca":
		return slices.Contains(parts, "private") || len(parts) == 1
	case "secrets", ".git", "nix-infra":
		return true
	}
	return strings.HasPrefix(parts[0], ".env") || strings.HasSuffix(name, ".age") || strings.HasSuffix(name, ".creds")
}

// isLeftover tells of files that version control, editors and file managers leave about.
func isLeftover(base string) bool {
	switch base {
	case ".git", ".hg", ".svn", ".jj", ".DS_Store", ".direnv":
		return true
	}
	swap := strings.HasPrefix(base, ".") && (strings.HasSuffix(base, ".swp") || strings.HasSuffix(base, ".swo"))
	return swap || strings.HasSuffix(base, "~") || strings.HasPrefix(base, ".#") ||
		strings.HasPrefix(base, "#") && strings.HasSuffix(base, "#")
}

func describe(m fs.FileMode) string {
	switch {
	case m&fs.ModeSocket != 0:
		return "socket"
	case m&fs.ModeNamedPipe != 0:
		return "named pipe"
	case m&fs.ModeDevice != 0:
		return "device"
	}
	return "special file"
}
