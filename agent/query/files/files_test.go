package files

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// machine is a tree of files with an open root, one of the node's policy, and things outside.
type machine struct {
	t      *testing.T
	dir    string
	reader Reader
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	dir, err := os.MkdirTemp("", "files-test-") // everybody may come into it, which is not so with t.TempDir
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	m := &machine{t: t, dir: dir}
	m.reader = Reader{Open: []string{m.path("log")}, Whole: []string{m.path("app")}, Hidden: []string{m.path("log/journal")}, Store: m.path("store")}
	m.write("log/messages", "hello\nworld\n", 0o644)
	m.write("log/secret", "secret", 0o600)
	m.write("log/journal/system.journal", "secret", 0o644)
	m.write("log/private/open", "secret", 0o644)
	m.must(os.Chmod(m.path("log/private"), 0o700))
	m.write("app/key", "for operators", 0o600)
	m.write("outside/file", "secret", 0o644)
	m.write("store/abc-etc/config", "in the store", 0o644)
	m.write("storeroom/file", "secret", 0o644)
	for link, to := range map[string]string{
		"log/inner": "messages", "log/up": "../outside/file", "log/absolute": m.path("outside/file"), "log/dir": "../outside", "log/config": m.path("store/abc-etc/config"), "log/etc": m.path("store/abc-etc"),
		"log/room": m.path("storeroom/file"), "log/back": m.path("store/escape"), "store/escape": m.path("outside/file"), "log/magic": "/proc/self/root", "log/loop": "loop", "log/store": m.path("store"),
		"log/hidden": "journal/system.journal", "app/out": m.path("outside/file"), "app/log": m.path("log/messages"),
	} {
		m.must(os.Symlink(to, m.path(link)))
	}
	m.must(unix.Mkfifo(m.path("log/pipe"), 0o644))
	return m
}

func (m *machine) path(p string) string { return filepath.Join(m.dir, p) }

func (m *machine) must(err error) {
	m.t.Helper()
	if err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) write(p, text string, mode os.FileMode) {
	m.t.Helper()
	m.must(os.MkdirAll(filepath.Dir(m.path(p)), 0o755))
	m.must(os.WriteFile(m.path(p), []byte(text), mode))
}

func (m *machine) read(p string) (*protocol.FileAnswer, error) {
	return m.reader.Read(m.t.Context(), protocol.FilesQuery{Path: p})
}

func TestReads(t *testing.T) {
	m := newMachine(t)
	for p, want := range map[string]string{"log/messages": "hello\nworld\n", "log/inner": "hello\nworld\n", "log/config": "in the store", "log/etc/config": "in the store", "app/key": "for operators"} {
		a, err := m.read(m.path(p))
		if err != nil || string(a.Data) != want || a.Size != int64(len(want)) || a.Kind != "file" || a.Name != m.path(p) || a.Modified.IsZero() {
			t.Errorf("%s: %+v, %v", p, a, err)
		}
	}
	if got := modified(time.Unix(1<<40, 0)); !got.IsZero() {
		t.Errorf("a time that no answer can carry is %v", got)
	}
	a, err := m.reader.Read(t.Context(), protocol.FilesQuery{Path: m.path("log/messages"), Offset: 6, Limit: 3})
	if err != nil || string(a.Data) != "wor" || a.Offset != 6 || a.Size != 12 {
		t.Errorf("a piece: %+v, %v", a, err)
	}
	for _, offset := range []int64{12, 13, 1 << 62} {
		if a, err := m.reader.Read(t.Context(), protocol.FilesQuery{Path: m.path("log/messages"), Offset: offset}); err != nil || len(a.Data) != 0 {
			t.Errorf("at %d: %+v, %v", offset, a, err)
		}
	}
	m.write("log/large", strings.Repeat("x", protocol.MaxAnswer+5), 0o644)
	if a, err := m.read(m.path("log/large")); err != nil || len(a.Data) != protocol.MaxAnswer || a.Size != protocol.MaxAnswer+5 {
		t.Errorf("a large one: %d of %d, %v", len(a.Data), a.Size, err)
	}
}

func TestRefuses(t *testing.T) {
	m := newMachine(t)
	if os.Geteuid() == 0 { // else the machine's own permissions are those of whoever runs this
		for _, p := range []string{"log/secret", "log/private", "log/private/open"} {
			if a, err := m.read(m.path(p)); !errors.Is(err, &protocol.Refusal{Code: protocol.Invalid}) || !strings.Contains(err.Error(), "everybody") {
				t.Errorf("%s: %+v, %v", p, a, err)
			}
		}
	} else {
		t.Error("the agent is root, and so this test has to be")
	}
	for p, code := range map[string]protocol.Code{
		"outside/file": protocol.Invalid, "": protocol.Invalid, "logs": protocol.Invalid, "store/abc-etc/config": protocol.Invalid, "log/journal": protocol.Invalid, "log/journal/system.journal": protocol.Invalid, "log/hidden": protocol.Invalid,
		"log/up": protocol.Invalid, "log/absolute": protocol.Invalid, "log/dir": protocol.Invalid, "log/dir/file": protocol.Invalid, "log/room": protocol.Invalid, "log/back": protocol.Invalid, "log/store": protocol.Invalid,
		"log/magic": protocol.Invalid, "log/magic/etc/shadow": protocol.Invalid, "app/out": protocol.Invalid, "app/log": protocol.Invalid, "log/pipe": protocol.Invalid, "log/loop": protocol.Failed, "log/nothing": protocol.Unknown, "log/messages/x": protocol.Unknown,
	} {
		if a, err := m.read(m.path(p)); !errors.Is(err, &protocol.Refusal{Code: code}) || strings.Contains(err.Error(), "\n") {
			t.Errorf("%s: %+v, %v", p, a, err)
		}
	}
	// Whoever asks after that has the agent's rights again.
	if a, err := m.read(m.path("app/key")); err != nil || len(a.Data) == 0 {
		t.Errorf("%+v, %v", a, err)
	}
}

func TestLists(t *testing.T) {
	m := newMachine(t)
	a, err := m.read(m.path("log"))
	if err != nil || a.Kind != "folder" {
		t.Fatalf("%+v, %v", a, err)
	}
	kinds := map[string]string{}
	var names []string
	for _, e := range a.Entries {
		kinds[e.Name] = e.Kind
		names = append(names, e.Name)
		if e.Name == "messages" && (e.Size != 12 || e.Mode != 0o644 || e.Modified.IsZero()) || e.Name == "inner" && e.Target != "messages" {
			t.Errorf("%+v", e)
		}
	}
	if !slices.IsSorted(names) || kinds["messages"] != "file" || kinds["private"] != "folder" || kinds["inner"] != "link" || kinds["pipe"] != "other" {
		t.Errorf("%v", kinds)
	}
	b, err := m.reader.Read(t.Context(), protocol.FilesQuery{Path: m.path("log"), After: names[2]})
	if err != nil || len(b.Entries) != len(names)-3 || b.Entries[0].Name != names[3] {
		t.Errorf("%+v, %v", b, err)
	}
	// More than an answer carries comes in pages, with nothing twice and nothing left out.
	m.must(os.Mkdir(m.path("log/many"), 0o755))
	const many = 6000
	for i := range many {
		m.must(os.WriteFile(m.path("log/many/"+strings.Repeat("x", 60)+string(rune('a'+i/1000))+strings.Repeat("y", i%1000/10)+string(rune('0'+i%10))), nil, 0o644))
	}
	seen := map[string]bool{}
	pages, after := 0, ""
	for {
		a, err := m.reader.Read(t.Context(), protocol.FilesQuery{Path: m.path("log/many"), After: after})
		if err != nil {
			t.Fatal(err)
		}
		pages++
		for _, e := range a.Entries {
			if seen[e.Name] {
				t.Fatalf("%s twice", e.Name)
			}
			seen[e.Name] = true
		}
		if n := len(protocol.Encode(a)); n > protocol.MaxAnswer*5/4 {
			t.Errorf("a page of %d bytes", n)
		}
		if after = a.Next; after == "" {
			break
		}
	}
	if len(seen) != many || pages < 2 {
		t.Errorf("%d of %d names on %d pages", len(seen), many, pages)
	}
}
