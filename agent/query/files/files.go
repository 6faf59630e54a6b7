// Package files reads files and lists folders for viewers, below roots.
//
// Start with Reader.Read. open.go opens what was asked for, in a way that nothing outside of a root is ever read: the
// kernel resolves the path beneath the root's folder, and what is looked at afterwards is what was opened.
package files

import (
	"cmp"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// Reader says what may be read.
type Reader struct {
	// Open are the roots of every node. Below them only what everybody on the machine may read is read: that is no secret.
	Open []string
	// Whole are the roots that the node's own policy adds, below which all is read.
	Whole []string
	// Hidden is never read, wherever a root is.
	Hidden []string
	// Store is the Nix store, everybody's to read. A link that leads there from a root is followed: so is most of a
	// NixOS system's configuration made.
	Store string
}

// Default is what every node allows. Hidden has the journal, which has a question of its own, and where secrets are.
func Default() Reader {
	return Reader{
		Open:   []string{"/etc/nixos", "/etc/systemd", "/var/log"},
		Hidden: []string{"/var/log/journal", "/proc", "/sys", "/dev", "/run/credentials", "/run/secrets", "/run/secrets.d", "/run/keys"},
		Store:  "/nix/store",
	}
}

// maxNames bounds how many names of a folder are looked at.
const maxNames = 50_000

// Read answers with a file's content or a folder's names, as much as is wanted and an answer carries.
func (r Reader) Read(ctx context.Context, q protocol.FilesQuery) (*protocol.FileAnswer, error) {
	var answer *protocol.FileAnswer
	err := r.open(q.Path, func(f *os.File) error {
		info, err := f.Stat()
		if err != nil {
			return err
		}
		answer = &protocol.FileAnswer{FileInfo: about(q.Path, info)}
		if info.IsDir() {
			return list(ctx, f, q, answer)
		}
		return read(f, q, answer)
	})
	if err != nil {
		return nil, explain(q.Path, err)
	}
	return answer, nil
}

func explain(path string, err error) error {
	var refusal *protocol.Refusal
	switch {
	case errors.As(err, &refusal):
		return refusal
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ENOTDIR):
		return protocol.Refuse(protocol.Unknown, "there is no file %s", path)
	case errors.Is(err, fs.ErrPermission):
		return protocol.Refuse(protocol.Invalid, "%s is not for everybody on the machine to read", path)
	}
	return protocol.Refuse(protocol.Failed, "%s: %v", path, err)
}

func read(f *os.File, q protocol.FilesQuery, answer *protocol.FileAnswer) error {
	n := int64(protocol.MaxAnswer)
	if q.Limit > 0 {
		n = min(n, q.Limit)
	}
	if left := answer.Size - q.Offset; answer.Size > 0 {
		n = min(n, max(0, left))
	}
	data := make([]byte, n)
	got, err := f.ReadAt(data, q.Offset)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	answer.Offset, answer.Data = q.Offset, data[:got]
	return nil
}

func list(ctx context.Context, f *os.File, q protocol.FilesQuery, answer *protocol.FileAnswer) error {
	answer.Entries = []protocol.FileInfo{}
	names, err := f.Readdirnames(maxNames)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if len(names) == maxNames {
		return protocol.Refuse(protocol.Failed, "%s has more than %d names, which are too many to list", q.Path, maxNames)
	}
	slices.Sort(names)
	from, found := slices.BinarySearch(names, q.After)
	if found {
		from++
	}
	if q.After == "" {
		from = 0
	}
	size := 0
	for _, name := range names[from:] {
		if err := ctx.Err(); err != nil {
			return err
		}
		var s unix.Stat_t
		if unix.Fstatat(int(f.Fd()), name, &s, unix.AT_SYMLINK_NOFOLLOW) != nil {
			continue // it is gone
		}
		e := entry(f, strings.ToValidUTF8(name, "\uFFFD"), &s)
		if size += len(e.Name)*5/4 + len(e.Target)*5/4 + 150; len(answer.Entries) > 0 && size > protocol.MaxAnswer {
			answer.Next = answer.Entries[len(answer.Entries)-1].Name
			break
		}
		answer.Entries = append(answer.Entries, e)
	}
	return nil
}

func entry(dir *os.File, name string, s *unix.Stat_t) protocol.FileInfo {
	e := protocol.FileInfo{Name: name, Size: s.Size, Mode: s.Mode & 0o7777, Modified: modified(time.Unix(s.Mtim.Unix()))}
	switch s.Mode & unix.S_IFMT {
	case unix.S_IFREG:
		e.Kind = "file"
	case unix.S_IFDIR:
		e.Kind = "folder"
	case unix.S_IFLNK:
		e.Kind = "link"
		var target [4096]byte
		if n, err := unix.Readlinkat(int(dir.Fd()), name, target[:]); err == nil {
			e.Target = strings.ToValidUTF8(string(target[:n]), "\uFFFD")
		}
	default:
		e.Kind = "other"
	}
	return e
}

func about(path string, info fs.FileInfo) protocol.FileInfo {
	kind := "file"
	if info.IsDir() {
		kind = "folder"
	}
	return protocol.FileInfo{Name: path, Kind: kind, Size: info.Size(), Mode: uint32(info.Mode().Perm()), Modified: modified(info.ModTime())}
}

// modified is a time that an answer can carry: whoever owns a file can give it one beyond the year 9999.
func modified(t time.Time) time.Time {
	if t = t.UTC(); t.Year() < 1 || t.Year() > 9999 {
		return time.Time{}
	}
	return t
}

// root is the root that a path lies in, the innermost one, and whether all below it is read.
func (r Reader) root(path string) (root string, whole, ok bool) {
	for _, open := range [][]string{r.Whole, r.Open} { // where both have it, the node's word counts
		for _, candidate := range open {
			if within(path, candidate) && (!ok || len(candidate) > len(root)) {
				root, ok = candidate, true
			}
		}
	}
	return root, slices.ContainsFunc(r.Whole, func(w string) bool { return within(path, w) }), ok
}

func within(path, dir string) bool {
	return path == dir || strings.HasPrefix(path, dir+"/")
}

// roots are all roots, for people.
func (r Reader) roots() string {
	all := append(slices.Clone(r.Open), r.Whole...)
	slices.SortFunc(all, cmp.Compare[string])
	return strings.Join(slices.Compact(all), ", ")
}
