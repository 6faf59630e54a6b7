package nar_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/nar"
)

// TestVendorHash: package.nix names the hash of what `go mod vendor` makes of this tree, by which nixpkgs takes what we
// depend on.
func TestVendorHash(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "vendor")
	cmd := exec.Command("go", "mod", "vendor", "-o", dir)
	cmd.Dir = "../.."
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go mod vendor: %v\n%s", err, out)
	}
	want, err := nar.Hash(os.DirFS(filepath.Dir(dir)), "vendor")
	if err != nil {
		t.Fatal(err)
	}
	text, err := os.ReadFile("../../nixos-module/package.nix")
	if err != nil {
		t.Fatal(err)
	}
	got := regexp.MustCompile(`vendorHash = "([^"]*)";`).FindSubmatch(text)
	if got == nil || string(got[1]) != want {
		t.Errorf("package.nix has another vendorHash than what is vendored: write\n  vendorHash = \"%s\";", want)
	}
}
