package command

import (
	"fmt"
	"strings"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/provision/hetzner"
)

// providerUsage is that of --provider.
var providerUsage = "where machines come from: " + strings.Join(project.Providers, " or ") + " (default: servers.yaml, else HCLOUD_TOKEN)"

// provider is where the project's machines come from; insist is what --provider says.
func (a *app) provider(p *project.Project, insist string) (provision.Provider, error) {
	return provision.Choose(p, first(insist, p.Settings.Provision.Provider), func(token string) (provision.Provider, error) {
		endpoint := a.Getenv(endpointVariable)
		if p.Env.Get(endpointVariable) != endpoint {
			return nil, fmt.Errorf("%s is in the project's environment file, and says where the token is sent, which a project can't: set it in the environment", endpointVariable)
		}
		return hetzner.New(hetzner.Options{Token: token, Fleet: p.Settings.Fleet, Endpoint: endpoint})
	})
}

// endpointVariable names another API than Hetzner's own. The token may be the user's own, from the environment.
const endpointVariable = "HCLOUD_ENDPOINT"
