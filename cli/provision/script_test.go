package provision

import (
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/project"
)

func TestFetchInfect(t *testing.T) {
	const text = "#!/bin/sh\necho hello\n"
	pinned := project.Infect{Commit: strings.Repeat("1", 40), SHA256: ScriptHash([]byte(text))}
	served := text
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/"+pinned.Commit+"/nixos-infect" {
			http.NotFound(w, r)
			return
		}
		w.Write([]byte(served))
	}))
	defer server.Close()
	script, err := FetchInfect(t.Context(), server.URL, pinned)
	if err != nil || string(script) != text {
		t.Errorf("%q, %v", script, err)
	}
	for name, c := range map[string]struct{ source, served, want string }{
		"another text":   {server.URL, text + " ", "is not the pinned script"},
		"endless":        {server.URL, strings.Repeat("x", maxScript+2), "is not the pinned script"},
		"not there":      {server.URL + "/other", text, "404"},
		"nobody answers": {"http://127.0.0.1:1", text, "fetch the conversion script"},
	} {
		served = c.served
		if script, err := FetchInfect(t.Context(), c.source, pinned); err == nil || !strings.Contains(err.Error(), c.want) || script != nil {
			t.Errorf("%s: %d bytes, %v", name, len(script), err)
		}
	}
}

func TestReadScript(t *testing.T) {
	file := filepath.Join(t.TempDir(), "script")
	os.WriteFile(file, []byte("abc"), 0o600)
	const abc = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad" // FIPS 180-2, appendix B.1
	for want, fails := range map[string]bool{"": false, abc: false, strings.Repeat("0", 64): true} {
		if _, err := ReadScript(file, want); (err != nil) != fails {
			t.Errorf("%q: %v", want, err)
		}
	}
}
