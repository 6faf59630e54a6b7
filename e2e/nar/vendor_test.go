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
	// It takes modules that nothing here was built with, those of other systems, so it may have to fetch some: what a network
	// spoils is tried again, and goes on with what has come.
	for tries := 3; ; tries-- {
		cmd := exec.CommandContext(t.Context(), "go", "mod", "vendor", "-o", dir)
		cmd.Dir = "../.."
		out, err := cmd.CombinedOutput()
		if err == nil {
			break
		}
		if tries == 1 {
			t.Fatalf("go mod vendor: %v\n%s", err, out)
		}
		t.Logf("go mod vendor, which is tried again: %v\n%s", err, out)
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
