package command

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/examples"
)

func TestInitTemplate(t *testing.T) {
	for _, template := range examples.Names {
		t.Run(template, func(t *testing.T) {
			s := newShell(t)
			s.write("README.md", "mine\n")
			r := s.run("init", "--template", template, "--name", "shop", "--nixos-version", "25.05")
			if r.status != OK || !strings.Contains(r.stderr, "README.md were there already, and differ") {
				t.Fatalf("status %d, %s", r.status, r.stderr)
			}
			files, err := examples.Files(template)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range files {
				info, err := os.Stat(filepath.Join(s.dir, f.Path))
				if err != nil || info.Mode().Perm() != f.Mode {
					t.Errorf("%s: %v, %v", f.Path, info, err)
				}
				if f.Path != "README.md" && s.read(f.Path) != string(f.Data) {
					t.Errorf("%s is not the template's", f.Path)
				}
			}
			if s.read("README.md") != "mine\n" {
				t.Error("a file that was there was replaced")
			}
			p, err := project.Open(s.dir, "")
			if err != nil {
				t.Fatal(err)
			}
			if d := p.Settings.Defaults; p.Settings.Fleet != "shop" || !d.CloseSSH || d.NixOSVersion != "25.05" || d.NodeModule == "" {
				t.Errorf("settings %+v", p.Settings)
			}
			if lock := s.read("flake.lock"); lock != "{\"locked\":true}\n" {
				t.Errorf("flake.lock is %q", lock)
			}

			// Once more changes nothing; --force replaces.
			settings := s.read(project.SettingsFile)
			s.write("configuration.nix", "{ }\n")
			if s.must("init", "--template", template); s.read("configuration.nix") != "{ }\n" || s.read(project.SettingsFile) != settings {
				t.Error("it was not left as it was")
			}
			if s.must("init", "--template", template, "--force"); s.read("configuration.nix") == "{ }\n" || s.read("README.md") == "mine\n" || s.read(project.SettingsFile) != settings {
				t.Error("--force did not replace the files of the template, or more than them")
			}
		})
	}
}

// A folder that has something in it is made a project, and nothing else.
func TestInitAlone(t *testing.T) {
	s := newShell(t)
	s.write("configuration.nix", "{ }\n")
	s.must("init", "--fleet", "shop")
	for _, name := range []string{"flake.nix", "modules", "README.md", "cli", "flake.lock"} {
		if _, err := os.Lstat(filepath.Join(s.dir, name)); !os.IsNotExist(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for want, args := range map[string][]string{
		`--template "desert": use fleet or cluster`: {"--template", "desert"},
		"--force goes with --template":              {"--force"},
		"--name a and --fleet b mean the same":      {"--template", "fleet", "--name", "a", "--fleet", "b"},
	} {
		if r := newShell(t).run(append([]string{"init"}, args...)...); r.status != Refused || !strings.Contains(r.stderr, want) {
			t.Errorf("%q: status %d, %s", args, r.status, r.stderr)
		}
	}
}
