package testos_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/testos"
)

func TestWriteProject(t *testing.T) {
	dir := t.TempDir()
	if err := testos.WriteProject(dir); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{
		"flake.nix", "configuration.nix", "modules/default.nix", "modules/testos/default.nix", "app_modules/default.nix",
		"app_modules/hello/default.nix", "node_types/standalone_machine.nix", "nodes",
	} {
		if _, err := os.Stat(filepath.Join(dir, name)); err != nil {
			t.Error(err)
		}
	}
	flake, err := os.ReadFile(filepath.Join(dir, "flake.nix"))
	if err != nil || !strings.Contains(string(flake), "[%%nodeName%%]") {
		t.Errorf("the project's flake has no placeholder left to fill: %v", err)
	}
}

func TestWriteBase(t *testing.T) {
	dir := t.TempDir()
	if err := testos.WriteBase(dir, testos.Values{NodeName: "n1", SSHKey: "ssh-ed25519 AAAA me\n"}); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string]string{
		"flake.nix":                  `nixosConfigurations."n1"`,
		"configuration.nix":          "ssh-ed25519 AAAA me\\n",
		"networking.nix":             "{",
		"hardware-configuration.nix": "{",
	} {
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
		} else if text := string(data); !strings.Contains(text, want) || strings.Contains(text, "[%%") {
			t.Errorf("%s lacks %s, or has a placeholder left:\n%s", name, want, text)
		}
	}
	for _, name := range []string{"nodes", "node_types"} {
		if _, err := os.Stat(filepath.Join(dir, name)); err == nil {
			t.Errorf("a node got the project's %s", name)
		}
	}
}

func TestHash(t *testing.T) {
	one, err := testos.Hash()
	if err != nil {
		t.Fatal(err)
	}
	two, err := testos.Hash()
	if err != nil || one != two || len(one) != 64 {
		t.Errorf("hashes %q and %q, %v", one, two, err)
	}
}
