// Package nar computes Nix's hash of a folder: SHA-256 over its archive (NAR), which has names, contents, links and the
// executable bit, and nothing else. It is how flake.lock and fixed-output derivations name what they take.
package nar

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"io"
	"io/fs"
	"path"
)

// Hash is the SRI hash ("sha256-…") of what fsys has at name. It reads everything, and fails on what an archive can't
// hold, such as a device.
func Hash(fsys fs.FS, name string) (string, error) {
	sum := sha256.New()
	text(sum, "nix-archive-1")
	if err := node(sum, fsys, name); err != nil {
		return "", fmt.Errorf("NAR hash of %s: %w", name, err)
	}
	return "sha256-" + base64.StdEncoding.EncodeToString(sum.Sum(nil)), nil
}

func node(w io.Writer, fsys fs.FS, name string) error {
	info, err := fs.Lstat(fsys, name)
	if err != nil {
		return err
	}
	text(w, "(", "type")
	switch info.Mode().Type() {
	case 0:
		data, err := fs.ReadFile(fsys, name)
		if err != nil {
			return err
		}
		text(w, "regular")
		if info.Mode()&0o100 != 0 {
			text(w, "executable", "")
		}
		text(w, "contents", string(data))
	case fs.ModeSymlink:
		target, err := fs.ReadLink(fsys, name)
		if err != nil {
			return err
		}
		text(w, "symlink", "target", target)
	case fs.ModeDir:
		text(w, "directory")
		entries, err := fs.ReadDir(fsys, name) // by name, as an archive wants them
		if err != nil {
			return err
		}
		for _, e := range entries {
			text(w, "entry", "(", "name", e.Name(), "node")
			if err := node(w, fsys, path.Join(name, e.Name())); err != nil {
				return err
			}
			text(w, ")")
		}
	default:
		return fmt.Errorf("%s is a %v, which no archive holds", name, info.Mode().Type())
	}
	text(w, ")")
	return nil
}

// text writes strings as an archive has them: the length, the bytes, and zeros up to a multiple of 8. A hash never fails.
func text(w io.Writer, all ...string) {
	for _, s := range all {
		var length [8]byte
		binary.LittleEndian.PutUint64(length[:], uint64(len(s)))
		_, _ = w.Write(length[:])
		_, _ = io.WriteString(w, s)
		_, _ = w.Write(make([]byte, -len(s)&7))
	}
}
