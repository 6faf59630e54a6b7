package nix

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

func TestAddFixed(t *testing.T) {
	said := filepath.Join(t.TempDir(), "said")
	sum := "sha256:" + strings.Repeat("0", 52)
	script := func(path, hash string) string {
		return `echo "$*" >> ` + said + `; case $1 in --query) echo ` + hash + ` ;; *) echo ` + path + ` ;; esac`
	}
	fake(t, "nix-store", script(StoreDir+"/"+hash+"-tool", sum))
	got, err := AddFixed(t.Context(), "/tmp/tool")
	if err != nil || got != (Fixed{StoreDir + "/" + hash + "-tool", sum}) {
		t.Fatalf("%+v, %v", got, err)
	}
	calls, err := os.ReadFile(said)
	if err != nil {
		t.Fatal(err)
	}
	if want := "--add-fixed --recursive sha256 /tmp/tool\n--query --hash " + got.Path + "\n"; string(calls) != want {
		t.Errorf("nix-store was called as %q", calls)
	}
	if _, err := AddFixed(t.Context(), "tool"); err == nil {
		t.Error("a relative path was taken")
	}
	for name, wrong := range map[string]string{"no path": script("done", sum), "no hash": script(got.Path, "sha256:x"), "fails": "echo error: no >&2; exit 1"} {
		fake(t, "nix-store", wrong)
		if _, err := AddFixed(t.Context(), "/tmp/tool"); err == nil {
			t.Errorf("%s: taken", name)
		}
	}
}
