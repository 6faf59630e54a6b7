package cli

import (
	"bytes"
	"context"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestProgram(t *testing.T) {
	for _, c := range []struct {
		args     []string
		code     int
		out, err string // what is said there
	}{
		{[]string{"version"}, 0, protocol.Build(), ""},
		{[]string{"deploy", "--help"}, 0, "Examples:", ""},
		{[]string{"dploy"}, 2, "", "dploy"},
		{[]string{"-d", t.TempDir(), "status"}, 2, "", "nix-infra init"},
	} {
		var out, errOut bytes.Buffer
		code := Main(context.Background(), c.args, strings.NewReader(""), &out, &errOut, nil)
		if code != c.code || !strings.Contains(out.String(), c.out) || !strings.Contains(errOut.String(), c.err) || (c.err != "") != (errOut.Len() > 0) {
			t.Errorf("nix-infra %s: exit %d\nstdout: %s\nstderr: %s", strings.Join(c.args, " "), code, out.String(), errOut.String())
		}
	}
}

func TestArgsByName(t *testing.T) {
	for argv, want := range map[string]string{
		"/usr/bin/nix-infra status web1":               "status web1",
		"bin/nix-infra-cluster-mcp --project-dir /srv": "mcp cluster --project-dir /srv",
		"nix-infra-dev-mcp":                            "mcp dev",
		"nix-infra-linux-amd64 mcp machine":            "mcp machine",
		"my-mcp status":                                "status",
		"":                                             "",
	} {
		if got := strings.Join(Args(strings.Fields(argv)), " "); got != want {
			t.Errorf("%q is %q, not %q", argv, got, want)
		}
	}
}
