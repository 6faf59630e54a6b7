package reconcile

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

const (
	lockFile  = "flake.lock"
	emptyNode = "{ }\n" // a node file that the machine does not have
)

// nodeFiles are the node's own files by name, which a tree gets beside what its manifest brings: an empty one where it has
// none. A flake.lock is among them only where the machine has one, and the facts only where the tree has the module that
// reads them.
func (e *Engine) nodeFiles(ctx context.Context, m *protocol.Manifest) (map[string][]byte, error) {
	own := map[string][]byte{}
	for _, name := range append(slices.Clone(protocol.NodeFiles), lockFile) {
		if lists(m, name) {
			continue
		}
		data, err := atomicfile.Read(filepath.Join(e.o.Etc, name), protocol.MaxFileSize)
		if errors.Is(err, fs.ErrNotExist) {
			if name == lockFile {
				continue
			}
			data, err = []byte(emptyNode), nil
		}
		if err != nil {
			return nil, fmt.Errorf("can't read the node's own file: %w", err)
		}
		own[name] = data
	}
	if e.o.Facts != nil && lists(m, protocol.ModuleFile) {
		data, err := e.o.Facts(ctx)
		if err != nil {
			return nil, fmt.Errorf("the facts for the configuration: %w", err)
		}
		own[protocol.FactsFile] = data
	}
	return own, nil
}

// treeKey is the digest of all that is built: what the manifest brings and what the node adds. While it
// stays the same, so does the closure.
func (e *Engine) treeKey(ctx context.Context, m *protocol.Manifest) (string, error) {
	own, err := e.nodeFiles(ctx, m)
	if err != nil {
		return "", err
	}
	key := struct {
		Tree string
		Own  map[string]string
	}{m.Tree(), map[string]string{}}
	for name, data := range own {
		key.Own[name] = protocol.Digest(data)
	}
	return protocol.Digest(protocol.Encode(key)), nil
}

func lists(m *protocol.Manifest, file string) bool {
	return slices.ContainsFunc(m.Files, func(f protocol.File) bool { return f.Path == file })
}

// stagedTree is where the source tree of an attempt is.
func (e *Engine) stagedTree(deployment string) string {
	return filepath.Join(e.o.Dir, treesDir, deployment)
}

// stage is a fresh folder that takes a manifest's files. All writing goes through an os.Root: whatever
// the paths say, and whatever stands there, nothing is written outside.
type stage struct {
	root  *os.Root
	files map[string][]protocol.File // by blob
}

func (e *Engine) newStage(ctx context.Context, m *protocol.Manifest) (*stage, error) {
	dir := e.stagedTree(m.Deployment)
	if err := os.RemoveAll(dir); err != nil {
		return nil, fmt.Errorf("can't clear the staged tree: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("can't make the staged tree: %w", err)
	}
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("can't open the staged tree: %w", err)
	}
	s := &stage{root: root, files: map[string][]protocol.File{}}
	for _, f := range m.Files {
		s.files[f.SHA256] = append(s.files[f.SHA256], f)
	}
	own, err := e.nodeFiles(ctx, m)
	for name, data := range own {
		err = errors.Join(root.MkdirAll(path.Dir(name), 0o755), root.WriteFile(name, data, 0o644))
		if err != nil {
			err = fmt.Errorf("can't stage the node's own file: %w", err)
			break
		}
	}
	if err != nil {
		root.Close()
		return nil, err
	}
	return s, nil
}

// put writes all files that have a blob's content. Several run at once, for different blobs.
func (s *stage) put(blob string, data []byte) error {
	for _, f := range s.files[blob] {
		if err := s.root.MkdirAll(path.Dir(f.Path), 0o755); err != nil {
			return fmt.Errorf("can't stage %s: %w", f.Path, err)
		}
		if err := s.root.WriteFile(f.Path, data, mode(f.Exec)); err != nil {
			return fmt.Errorf("can't stage %s: %w", f.Path, err)
		}
	}
	return nil
}

func mode(exec bool) fs.FileMode {
	if exec {
		return 0o755
	}
	return 0o644
}

// install brings the staged tree into the node's source tree: each file atomically, the ones that the
// manifest before had installed and this one has not are removed, and nothing else is touched.
func (e *Engine) install(m, before *protocol.Manifest) error {
	from, err := os.OpenRoot(e.stagedTree(m.Deployment))
	if err != nil {
		return err
	}
	defer from.Close()
	if err := os.MkdirAll(e.o.Etc, 0o755); err != nil {
		return err
	}
	to, err := os.OpenRoot(e.o.Etc)
	if err != nil {
		return err
	}
	defer to.Close()
	for _, f := range m.Files {
		if err := e.installFile(from, to, f.Path, mode(f.Exec)); err != nil {
			return err
		}
	}
	if !lists(m, lockFile) {
		// The build may have written the lock; another build has to find the same one.
		if err := e.installFile(from, to, lockFile, 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	if lists(m, protocol.ModuleFile) {
		if err := e.installFile(from, to, protocol.FactsFile, 0o644); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	for _, name := range protocol.NodeFiles {
		if _, err := to.Stat(name); errors.Is(err, fs.ErrNotExist) {
			if err := e.installFile(from, to, name, 0o644); err != nil {
				return err
			}
		}
	}
	if before != nil {
		return removeGone(to, m, before)
	}
	return nil
}

func (e *Engine) installFile(from, to *os.Root, name string, mode fs.FileMode) error {
	data, err := from.ReadFile(name)
	if err != nil {
		return err
	}
	if info, err := to.Lstat(name); err == nil && info.Mode() == mode {
		if old, err := to.ReadFile(name); err == nil && bytes.Equal(old, data) {
			return nil
		}
	}
	dir := path.Dir(name)
	if err := to.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	// A symbolic link inside the tree may lead out of it; the root refuses to follow that one.
	sub, err := to.OpenRoot(dir)
	if err != nil {
		return err
	}
	defer sub.Close()
	return replace(sub, path.Base(name), data, mode)
}

// replace is atomicfile.Write within a root.
func replace(dir *os.Root, name string, data []byte, mode fs.FileMode) (err error) {
	temp := "." + name + ".nix-infra-new"
	if len(temp) > 255 {
		temp = ".nix-infra-new"
	}
	if err := dir.RemoveAll(temp); err != nil {
		return err
	}
	f, err := dir.OpenFile(temp, os.O_WRONLY|os.O_CREATE|os.O_EXCL, mode)
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			f.Close()
			_ = dir.Remove(temp)
		}
	}()
	if _, err = f.Write(data); err != nil {
		return err
	}
	if err = f.Chmod(mode); err != nil {
		return err
	}
	if err = f.Sync(); err != nil {
		return err
	}
	if err = f.Close(); err != nil {
		return err
	}
	if err = dir.Rename(temp, name); err != nil {
		return err
	}
	folder, err := dir.Open(".")
	if err != nil {
		return err
	}
	defer folder.Close()
	return folder.Sync()
}

// removeGone removes what only the manifest before had, and the folders that this leaves empty.
func removeGone(to *os.Root, m, before *protocol.Manifest) error {
	now := make(map[string]bool, len(m.Files))
	for _, f := range m.Files {
		now[f.Path] = true
	}
	gone := slices.Clone(before.Files)
	if lists(before, protocol.ModuleFile) && !lists(m, protocol.ModuleFile) {
		gone = append(gone, protocol.File{Path: protocol.FactsFile})
	}
	for _, f := range gone {
		if now[f.Path] || f.Path == lockFile {
			continue
		}
		if info, err := to.Lstat(f.Path); err != nil || info.IsDir() {
			continue // gone already, or made into a folder by this manifest
		}
		if err := to.Remove(f.Path); err != nil {
			return err
		}
		for dir := path.Dir(f.Path); dir != "."; dir = path.Dir(dir) {
			if to.Remove(dir) != nil { // not empty
				break
			}
		}
	}
	return nil
}
