package provision

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/nix-infra/nix-infra/cli/project"
)

// Cloud opens a cloud's API with a token. It asks nothing yet.
type Cloud func(token string) (Provider, error)

// Choose finds the provider of a project's machines: what insist names, else its inventory where it has one, else
// Hetzner where there is a token.
func Choose(p *project.Project, insist string, hetzner Cloud) (Provider, error) {
	inventory := filepath.Join(p.Dir, project.ServersFile)
	_, err := os.Stat(inventory)
	listed := err == nil
	token := p.Env.Get("HCLOUD_TOKEN")
	cloud := func() (Provider, error) {
		if token == "" {
			return nil, errors.New("provider hetzner: HCLOUD_TOKEN is not set; put an API token with read and write rights into the environment or the project's .env")
		}
		return hetzner(token)
	}
	switch insist {
	case "hetzner":
		return cloud()
	case SelfHostedName:
		if !listed {
			return nil, fmt.Errorf("provider %s: the project has no %s; list the machines there, each with ip and ssh_key", SelfHostedName, project.ServersFile)
		}
	case "":
		if !listed && token == "" {
			return nil, fmt.Errorf("there is nothing to take machines from: list your own in %s (each with ip and ssh_key), or set HCLOUD_TOKEN to have them made at Hetzner", project.ServersFile)
		}
		if !listed {
			return cloud()
		}
	default:
		return nil, fmt.Errorf("provider %q is not known; use hetzner or %s", insist, SelfHostedName)
	}
	servers, err := p.Servers()
	if err != nil {
		return nil, err
	}
	return &SelfHosted{dir: p.Dir, servers: servers, cloud: cloud}, nil
}
