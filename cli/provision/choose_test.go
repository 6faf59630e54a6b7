package provision

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/cli/project"
)

// cloudOf is a provider that only says which token it was made with.
type cloudOf struct {
	Provider
	token string
}

func (c cloudOf) Name() string { return "cloud of " + c.token }

// TestChoose is the table of what is there, what --provider says, and where machines come from then.
func TestChoose(t *testing.T) {
	const own, hybrid = "servers:\n  a: { ip: 192.0.2.1, ssh_key: k }\n", "servers:\n  a: { provider: hetzner, ssh_key: k }\n"
	for _, c := range []struct {
		servers, token, insist string
		want, err              string
	}{
		{"", "", "", "", "list your own in servers.yaml (each with ip and ssh_key), or set HCLOUD_TOKEN"},
		{"", "t", "", "cloud of t", ""},
		{own, "", "", "self-hosted", ""},
		{own, "t", "", "self-hosted", ""}, // it always wins
		{own, "t", "hetzner", "cloud of t", ""},
		{own, "", "hetzner", "", "HCLOUD_TOKEN is not set"},
		{"", "", "hetzner", "", "HCLOUD_TOKEN is not set"},
		{"", "t", "self-hosted", "", "the project has no servers.yaml"},
		{"servers:\n", "", "", "self-hosted", ""},
		{"servers:\n  a: {}\n", "", "", "", "servers.yaml:2: a: ip is missing"},
		{"", "t", "aws", "", `provider "aws" is not known; use hetzner or self-hosted`},
		{hybrid, "", "", "self-hosted", ""},
	} {
		dir := t.TempDir()
		for name, text := range map[string]string{"nix-infra.yaml": "fleet: f\n", "servers.yaml": c.servers} {
			if text == "" {
				continue
			}
			if err := os.WriteFile(filepath.Join(dir, name), []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		p, err := project.Open(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		p.Env.Process = func(name string) string { return map[string]string{"HCLOUD_TOKEN": c.token}[name] }
		got, err := Choose(p, c.insist, func(token string) (Provider, error) { return cloudOf{token: token}, nil })
		switch {
		case c.err != "" && (err == nil || !strings.Contains(err.Error(), c.err)):
			t.Errorf("%+v: error %v", c, err)
		case c.err == "" && (err != nil || got.Name() != c.want):
			t.Errorf("%+v: %v, %v", c, got, err)
		}
		if c.servers == hybrid {
			if _, err := got.Servers(context.Background()); err == nil || !strings.Contains(err.Error(), "HCLOUD_TOKEN is not set") {
				t.Errorf("a cloud's machine without its token: %v", err)
			}
		}
	}
}
