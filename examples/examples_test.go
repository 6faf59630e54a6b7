package examples

import (
	"bytes"
	"encoding/json"
	"os/exec"
	"slices"
	"strings"
	"testing"
)

// Each template has what its README and `init` count on, its scripts are scripts, and its documents are documents.
func TestTemplates(t *testing.T) {
	for _, template := range Names {
		files, err := Files(template)
		if err != nil {
			t.Fatal(err)
		}
		var paths []string
		mcp := ""
		for _, f := range files {
			if slices.Contains(paths, f.Path) {
				t.Errorf("%s has %s twice: in its own folder and in shared/", template, f.Path)
			}
			paths = append(paths, f.Path)
			if f.Path == ".mcp.json" {
				mcp = string(f.Data)
			}
			script := bytes.HasPrefix(f.Data, []byte("#!"))
			if script != (f.Mode == 0o755) {
				t.Errorf("%s/%s has mode %o", template, f.Path, f.Mode)
			}
			switch {
			case script || strings.HasSuffix(f.Path, ".sh"):
				cmd := exec.CommandContext(t.Context(), "bash", "-n")
				cmd.Stdin = bytes.NewReader(f.Data)
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("%s/%s: %v: %s", template, f.Path, err, out)
				}
			case strings.HasSuffix(f.Path, ".json") && !json.Valid(f.Data):
				t.Errorf("%s/%s is no JSON", template, f.Path)
			}
		}
		for _, want := range []string{"README.md", ".env.in", ".gitignore", ".mcp.json", "servers.yaml.in", "flake.nix", "configuration.nix", "modules/default.nix", "app_modules/default.nix",
			"app_modules/hello/action.sh", "cli", "__test__/run-tests.sh", "__test__/test-nodes"} {
			if !slices.Contains(paths, want) {
				t.Errorf("%s has no %s", template, want)
			}
		}
		// What looks at the fleet, and what works on the project.
		for _, server := range []string{map[string]string{"fleet": "machine", "cluster": "cluster"}[template], "dev"} {
			if !strings.Contains(mcp, `"nix-infra-`+server+`"`) || !strings.Contains(mcp, `["mcp", "`+server+`"]`) {
				t.Errorf("%s: assistants don't get the server %s: %s", template, server, mcp)
			}
		}
		for _, secret := range []string{".env", "ssh/", "ca/", "*.creds"} {
			i := slices.Index(paths, ".gitignore")
			if i < 0 || !slices.Contains(strings.Split(string(files[i].Data), "\n"), secret) {
				t.Errorf("%s: git is not told to leave out %s", template, secret)
			}
		}
	}
	if _, err := Files("desert"); err == nil || !strings.Contains(err.Error(), "there are fleet and cluster") {
		t.Errorf("a template that there isn't: %v", err)
	}
}
