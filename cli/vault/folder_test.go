package vault

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

var private = map[string]string{".env": "TOKEN=1", "ssh/id": "a key", "ca/private/ca.key.pem": "another", "empty.creds": ""}

func privateFolder(t *testing.T) (dir string, paths []string) {
	t.Helper()
	dir = t.TempDir()
	for path, content := range private {
		write(t, filepath.Join(dir, path), []byte(content))
		paths = append(paths, path)
	}
	slices.Sort(paths)
	if err := os.Chmod(filepath.Join(dir, ".env"), 0o640); err != nil {
		t.Fatal(err)
	}
	return dir, paths
}

func folder(dir, pass string) *Folder {
	return open(filepath.Join(dir, "own", "keys"), pass).Folder(dir, filepath.Join(dir, "own", "locked.json"))
}

func nobody(string) {}

// plain are the files that are there in clear.
func plain(dir string) (paths []string) {
	for path := range private {
		if _, err := os.Lstat(filepath.Join(dir, path)); err == nil {
			paths = append(paths, path)
		}
	}
	slices.Sort(paths)
	return paths
}

func allThere(t *testing.T, dir string) {
	t.Helper()
	for path, content := range private {
		if got, err := os.ReadFile(filepath.Join(dir, path)); err != nil || string(got) != content {
			t.Errorf("%s: %q, %v", path, got, err)
		}
		if _, err := os.Lstat(filepath.Join(dir, path) + ".age"); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s is still there locked", path)
		}
	}
}

func TestFolder(t *testing.T) {
	dir, paths := privateFolder(t)
	var told []string
	if err := folder(dir, "p").Lock(paths, func(path string) { told = append(told, path) }); err != nil {
		t.Fatal(err)
	}
	if locked, err := folder(dir, "p").Locked(); err != nil || !slices.Equal(locked, paths) || !slices.Equal(told, paths) || len(plain(dir)) != 0 {
		t.Errorf("locked %q, %v, told %q, in clear %q", locked, err, told, plain(dir))
	}
	if err := folder(dir, "wrong").Unlock(nobody); !errors.Is(err, ErrWrongPassword) || len(plain(dir)) != 0 {
		t.Errorf("wrong password: %v, in clear %q", err, plain(dir))
	}
	if err := folder(dir, "p").Unlock(nobody); err != nil {
		t.Fatal(err)
	}
	allThere(t, dir)
	if info, err := os.Stat(filepath.Join(dir, ".env")); err != nil || info.Mode().Perm() != 0o640 {
		t.Errorf("%v, %v", info.Mode(), err)
	}
	if locked, err := folder(dir, "p").Locked(); err != nil || locked != nil {
		t.Errorf("%q, %v", locked, err)
	}
}

// TestFolderInterrupted stops after each file, on both ways: locking again, and unlocking, end it.
func TestFolderInterrupted(t *testing.T) {
	for stop := range private {
		for _, unlocking := range []bool{false, true} {
			for _, next := range []string{"lock", "unlock"} {
				dir, paths := privateFolder(t)
				kill := func(path string) {
					if path == stop {
						panic("killed")
					}
				}
				killed := func(do func() error) {
					defer func() { recover() }()
					do()
					t.Error("it was not killed")
				}
				if unlocking {
					if err := folder(dir, "p").Lock(paths, nobody); err != nil {
						t.Fatal(err)
					}
					killed(func() error { return folder(dir, "p").Unlock(kill) })
				} else {
					killed(func() error { return folder(dir, "p").Lock(paths, kill) })
				}
				if next == "lock" {
					if err := folder(dir, "p").Lock(plain(dir), nobody); err != nil || len(plain(dir)) != 0 {
						t.Errorf("%s, unlocking %v: %v, in clear %q", stop, unlocking, err, plain(dir))
					}
				}
				if err := folder(dir, "p").Unlock(nobody); err != nil {
					t.Errorf("%s, unlocking %v: %v", stop, unlocking, err)
				}
				allThere(t, dir)
			}
		}
	}
}

// TestFolderBothThere: after a crash between the encrypted form and the removal both are there, with the same content; with
// another, nobody knows which is wanted.
func TestFolderBothThere(t *testing.T) {
	dir, paths := privateFolder(t)
	if err := folder(dir, "p").Lock(paths, nobody); err != nil {
		t.Fatal(err)
	}
	id := filepath.Join(dir, "ssh/id")
	write(t, id, []byte("a key"))
	if err := folder(dir, "p").Lock([]string{"ssh/id"}, nobody); err != nil || len(plain(dir)) != 0 {
		t.Errorf("the same: %v, in clear %q", err, plain(dir))
	}
	write(t, id, []byte("made anew"))
	if err := folder(dir, "p").Lock([]string{"ssh/id"}, nobody); err == nil || !strings.Contains(err.Error(), "differ") {
		t.Errorf("lock: %v", err)
	}
	if err := folder(dir, "p").Unlock(nobody); err == nil || !strings.Contains(err.Error(), "differ") {
		t.Errorf("unlock: %v", err)
	}
	if locked, err := folder(dir, "p").Locked(); err != nil || !slices.Equal(locked, []string{"ssh/id"}) || len(plain(dir)) != 4 {
		t.Errorf("locked %q, %v, in clear %q", locked, err, plain(dir))
	}
	if err := os.Remove(id); err != nil {
		t.Fatal(err)
	}
	if err := folder(dir, "p").Unlock(nobody); err != nil {
		t.Error(err)
	}
	allThere(t, dir)
}

func TestFolderRefuses(t *testing.T) {
	dir, paths := privateFolder(t)
	write(t, filepath.Join(dir, "ssh/id.age"), []byte("somebody's own"))
	if err := folder(dir, "p").Lock(paths, nobody); err == nil || !strings.Contains(err.Error(), "in the way") || len(plain(dir)) != 4 {
		t.Errorf("%v, in clear %q", err, plain(dir))
	}
	os.Remove(filepath.Join(dir, "ssh/id.age"))
	if err := folder(dir, "p").Lock(paths, nobody); err != nil {
		t.Fatal(err)
	}
	os.Remove(filepath.Join(dir, "ssh/id.age"))
	write(t, filepath.Join(dir, ".env.age"), []byte("rubbish"))
	err := folder(dir, "p").Unlock(nobody)
	if err == nil || !strings.Contains(err.Error(), "ssh/id.age is gone") || !errors.Is(err, ErrDamaged) {
		t.Errorf("%v", err)
	}
	if got := plain(dir); !slices.Equal(got, []string{"ca/private/ca.key.pem", "empty.creds"}) {
		t.Errorf("open are %q", got)
	}
	for _, record := range []string{"{", `[{"path":"../x"}]`, `[{"path":"/etc/passwd"}]`} {
		write(t, filepath.Join(dir, "own", "locked.json"), []byte(record))
		if err := folder(dir, "p").Unlock(nobody); !errors.Is(err, ErrDamaged) {
			t.Errorf("%s: %v", record, err)
		}
	}
}
