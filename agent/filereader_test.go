package agent

import (
	"errors"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/agent/policy"
	"github.com/nix-infra/nix-infra/protocol"
)

// However wide the roots of a policy are, keys and the environments of actions are below none of them.
func TestFilesThatNobodyReads(t *testing.T) {
	r := fileReader(DefaultDir, policy.Policy{Files: policy.Files{Roots: []string{"/run", "/var/lib"}}})
	for _, path := range []string{DefaultDir + "/user.nk", "/run/nix-infra-agent/some-id/environment", "/var/lib/nix-infra-controller/tls.key", "/run/secrets.d/1/key", "/run/keys/key"} {
		if _, err := r.Read(t.Context(), protocol.FilesQuery{Path: path}); !errors.Is(err, &protocol.Refusal{Code: protocol.Invalid}) || !strings.Contains(err.Error(), "not among the files") {
			t.Errorf("%s: %v", path, err)
		}
	}
}
