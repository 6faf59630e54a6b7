// Package testos is a tiny operating system with NixOS's interfaces, for nodes that have Nix and systemd
// but no nixpkgs. It holds a project folder in the shape of the templates, which real Nix builds into a
// toplevel with a switch-to-configuration, the few files that a Debian image needs so that such a
// toplevel is what boots, and a stand-in of nixpkgs that builds one from a NixOS configuration (nixpkgs.go).
// README.md tells what it keeps of NixOS and which options there are.
package testos

import (
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
)

// Files are the project folder ("project/…"), the image's part ("image/…"), and the stand-in of nixpkgs ("nixpkgs/…").
//
//go:embed all:project image nixpkgs
var Files embed.FS

// imageFiles says where in a root file system the image's files belong.
var imageFiles = []struct {
	name, target string
	mode         os.FileMode
}{
	{"generator", "usr/lib/systemd/system-generators/testos", 0o755},
	{"stage-2", "usr/lib/testos/stage-2", 0o755},
	{"testos-stage-2.service", "usr/lib/systemd/system/testos-stage-2.service", 0o644},
}

// Values fill the placeholders of the base project.
type Values struct {
	NodeName   string
	NixVersion string // the zero value means DefaultVersion
	SSHKey     string
	HWArch     string // the zero value means x86_64-linux, which is all that the templates know
}

// DefaultVersion is what a project of testos calls its NixOS version.
const DefaultVersion = "25.11"

// WriteProject writes the project folder to dir, placeholders and all: the operator's side of a deploy.
func WriteProject(dir string) error {
	return eachProjectFile(func(name string, data []byte) error {
		return writeFile(filepath.Join(dir, filepath.FromSlash(name)), data, 0o644)
	})
}

// WriteBase writes what a fresh node has in /etc/nixos: the base project with its placeholders filled in
// and no node type, and the two files that belong to the node.
func WriteBase(dir string, v Values) error {
	if v.NixVersion == "" {
		v.NixVersion = DefaultVersion
	}
	if v.HWArch == "" {
		v.HWArch = "x86_64-linux"
	}
	fill := strings.NewReplacer(
		"[%%nodeName%%]", v.NodeName, "[%%nixVersion%%]", v.NixVersion,
		"[%%sshKey%%]", strings.TrimSpace(v.SSHKey), "[%%hwArch%%]", v.HWArch,
	)
	own := map[string]string{
		"hardware-configuration.nix": "# This machine's hardware: a container has none to speak of.\n{ ... }: { }\n",
		"networking.nix": "# This machine's network, which its host has set up already. The file is one of testos's and one of NixOS's.\n" +
			"args: let etc.\"testos/networking\".text = \"static\\n\"; in if args ? testos then { inherit etc; } else { environment = { inherit etc; }; }\n",
	}
	for name, text := range own {
		if err := writeFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
			return err
		}
	}
	return eachProjectFile(func(name string, data []byte) error {
		switch {
		case name == "flake.nix" || name == "configuration.nix":
			data = []byte(fill.Replace(string(data)))
		case !strings.HasPrefix(name, "modules/") && !strings.HasPrefix(name, "app_modules/"):
			return nil
		}
		return writeFile(filepath.Join(dir, filepath.FromSlash(name)), data, 0o644)
	})
}

// InstallImage puts testos's part into a Debian root file system: from then on a boot runs what
// /boot/testos/default points to.
func InstallImage(root string) error {
	for _, f := range imageFiles {
		data, err := Files.ReadFile(path.Join("image", f.name))
		if err != nil {
			return fmt.Errorf("testos: image file %s: %w", f.name, err)
		}
		if err := writeFile(filepath.Join(root, f.target), data, f.mode); err != nil {
			return err
		}
	}
	if err := WriteNixpkgs(filepath.Join(root, NixpkgsPath)); err != nil {
		return err
	}
	// switch-to-configuration runs on NixOS only, and says so anywhere else.
	if err := writeFile(filepath.Join(root, "etc/NIXOS"), nil, 0o644); err != nil {
		return err
	}
	links := map[string]string{
		"usr/lib/systemd/system/sysinit.target.wants/testos-stage-2.service": "../testos-stage-2.service",
		// The garbage collector must not take the system that runs.
		"nix/var/nix/gcroots/booted-system":  "/run/booted-system",
		"nix/var/nix/gcroots/current-system": "/run/current-system",
	}
	for name, target := range links {
		name = filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			return fmt.Errorf("testos: %w", err)
		}
		if err := os.Symlink(target, name); err != nil {
			return fmt.Errorf("testos: %w", err)
		}
	}
	return nil
}

// Hash changes with every file of testos, so that whoever caches an image knows when it is stale.
func Hash() (string, error) {
	sum := sha256.New()
	err := fs.WalkDir(Files, ".", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := Files.ReadFile(name)
		if err != nil {
			return err
		}
		fmt.Fprintf(sum, "%s %d\n", name, len(data))
		sum.Write(data)
		return nil
	})
	if err != nil {
		return "", fmt.Errorf("testos: hash: %w", err)
	}
	return hex.EncodeToString(sum.Sum(nil)), nil
}

func eachProjectFile(do func(name string, data []byte) error) error {
	return fs.WalkDir(Files, "project", func(name string, entry fs.DirEntry, err error) error {
		if err != nil || entry.IsDir() {
			return err
		}
		data, err := Files.ReadFile(name)
		if err != nil {
			return fmt.Errorf("testos: %w", err)
		}
		return do(strings.TrimPrefix(name, "project/"), data)
	})
}

func writeFile(name string, data []byte, mode os.FileMode) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return fmt.Errorf("testos: %w", err)
	}
	if err := os.WriteFile(name, data, mode); err != nil {
		return fmt.Errorf("testos: %w", err)
	}
	// WriteFile's mode passes through the umask and leaves an existing file's alone.
	if err := os.Chmod(name, mode); err != nil {
		return fmt.Errorf("testos: %w", err)
	}
	return nil
}
