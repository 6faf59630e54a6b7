// Package projectfiles reads and changes the files of a project for an assistant, whose every word may be
// somebody else's: what a log said, or a web page.
//
// Start here: a Folder is a project of which only some files are to be seen, and fewer to be written. name.go says which
// names are good, open.go opens what has one without leaving the project; list.go, read.go, search.go and write.go
// are what can be done.
//
// Nothing is decided by a name alone, because what a name leads to can change between a look and a use: each folder on
// the way is opened beneath the one before, and what is then used is what was opened. Links are followed one step at a
// time, and each step is judged like a path that was asked for. A file's content counts, too: a private key is not
// handed out, however its file is called.
package projectfiles

import (
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
)

// What an answer or a change may have, at most.
const (
	MaxFile    = 1 << 20 // bytes of a file that is read or written
	MaxFiles   = 20      // of ReadMany
	MaxEntries = 10_000  // of List
)

// ErrRefused marks what is not for an assistant, whatever is there. Other errors are about the files as they are.
var ErrRefused = errors.New("refused")

// Folder is a project. It holds nothing open, and is safe for concurrent use.
type Folder struct{ dir string }

// readable and writable are at a project's root.
var (
	readable = []string{"__test__", "app_modules", "modules", "node_types", "nodes", "cli", "configuration.nix", "flake.nix"}
	writable = []string{"__test__", "app_modules", "modules", "node_types", "nodes"}
)

// New takes the project in dir, which need not exist yet.
func New(dir string) *Folder {
	return &Folder{dir}
}

// Readable are the files and folders at the project's root that can be read.
func (f *Folder) Readable() []string { return slices.Clone(readable) }

// Writable are the folders at the project's root in which files can be written.
func (f *Folder) Writable() []string { return slices.Clone(writable) }

// open opens the project itself. Its owner said where it is, so that links on the way there are followed.
func (f *Folder) open() (*os.Root, error) {
	root, err := os.OpenRoot(f.dir)
	if err != nil {
		return nil, fmt.Errorf("the project folder can't be opened: %w", reason(err))
	}
	return root, nil
}

func refuse(name, format string, args ...any) error {
	return fmt.Errorf("%w: %s: %s", ErrRefused, quote(name), fmt.Sprintf(format, args...))
}

func failed(name, format string, args ...any) error {
	return fmt.Errorf("%s: %w", quote(name), fmt.Errorf(format, args...))
}

// quote shows a name that may be anything, and of a long one the beginning.
func quote(name string) string {
	const most = 120
	if len(name) > most {
		name = strings.ToValidUTF8(name[:most], "") + "…"
	}
	plain := name != "" && !strings.ContainsFunc(name, func(r rune) bool { return r <= ' ' || r > '~' || r == '"' || r == '\\' })
	if plain {
		return name
	}
	return fmt.Sprintf("%+q", name)
}

// reason is what the system said, without the path that it said it about.
func reason(err error) error {
	var p *os.PathError
	if errors.As(err, &p) {
		return p.Err
	}
	var l *os.LinkError
	if errors.As(err, &l) {
		return l.Err
	}
	return err
}
