package command

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// sealer fills in the values of secrets for nodes, and seals them: nobody else can read them from there on.
type sealer struct {
	trees    *trees
	verifier *protocol.Verifier
	now      time.Time
	values   map[string][]byte // as they are stored, by name
}

func newSealer(me *identity, t *trees) *sealer {
	return &sealer{t, me.verifier, time.Now(), map[string][]byte{}}
}

// value is a secret's, as it is stored.
func (s *sealer) value(name string) ([]byte, error) {
	if value, ok := s.values[name]; ok {
		return value, nil
	}
	value, err := s.trees.secrets.Get(name)
	if err == nil {
		s.values[name] = value
	}
	return value, err
}

// seal fills in a value for a node and seals it to the key that the node was enrolled with.
func (s *sealer) seal(n *protocol.NodeState, use project.SecretUse, value []byte) (protocol.SealedSecret, error) {
	sealed := protocol.SealedSecret{Name: use.Name, PreBuild: use.PreBuild}
	if n.JWT == "" && n.Key == "" { // --offline
		return sealed, fmt.Errorf("secrets are sealed to the key of %s, and %s does not have it, because it was enrolled from elsewhere: leave out --offline", n.Name, filepath.Join(ownDir, nodesDir))
	}
	id, err := s.verifier.ProveNode(&n.NodeRecord, s.now)
	if err != nil {
		return sealed, err
	}
	filled, err := s.trees.project.Value(s.trees.request(n.Name), value)
	if err != nil {
		return sealed, fmt.Errorf("the value of secret %s: %w", use.Name, err)
	}
	if len(filled) > protocol.MaxSecretSize {
		return sealed, fmt.Errorf("secret %s has %d bytes, the limit is %d", use.Name, len(filled), protocol.MaxSecretSize)
	}
	sealed.Sealed, err = protocol.Seal(filled, id.XKey)
	return sealed, err
}

// sealedSecrets are the secrets of the nodes of a deployment.
type sealedSecrets struct {
	of       map[string][]protocol.SealedSecret // by node
	warnings []string
}

// with adds the secrets to the manifests that a source completes.
func (s *sealedSecrets) with(from source) source {
	return func(p *plan, m *protocol.Manifest) error {
		p.warn(s.warnings...)
		m.Secrets = s.of[m.Node]
		return from(p, m)
	}
}

// sealSecrets seals to each node what its file names. A secret that isn't there keeps all nodes from being deployed to,
// unless --allow-missing leaves it out.
func (a *app) sealSecrets(me *identity, t *trees, chosen []protocol.NodeState) (*sealedSecrets, error) {
	s := newSealer(me, t)
	all := &sealedSecrets{of: map[string][]protocol.SealedSecret{}}
	var broken []error
	for i := range chosen {
		n := &chosen[i]
		uses, err := t.project.Secrets(n.Name, t.testDir)
		if err != nil {
			broken = append(broken, fmt.Errorf("%s: %w", n.Name, err))
			continue
		}
		var wrong []string
		for _, use := range uses {
			value, err := s.value(use.Name)
			switch {
			case errors.Is(err, fs.ErrNotExist) && t.allowMissing:
				all.warnings = append(all.warnings, fmt.Sprintf("%s: secret not found, skipping: %s", use.At, use.Name))
				continue
			case errors.Is(err, fs.ErrNotExist):
				wrong = append(wrong, fmt.Sprintf("%s: there is no secret %s (nix-infra secrets store %s, or leave it out with --allow-missing)", use.At, use.Name, use.Name))
				continue
			case err != nil:
				return nil, err // of the vault, and so of all nodes
			}
			if t.secrets.HasPending(use.Name) {
				all.warnings = append(all.warnings, fmt.Sprintf("a rotation of secret %s was not finished, and the nodes get its value of before; nix-infra secrets rotate %s --resume goes on with it", use.Name, use.Name))
			}
			sealed, err := s.seal(n, use, value)
			if err != nil {
				wrong = append(wrong, fmt.Sprintf("%s: %v", use.At, err))
				continue
			}
			all.of[n.Name] = append(all.of[n.Name], sealed)
		}
		if len(wrong) > 0 {
			broken = append(broken, fmt.Errorf("%s: %s", n.Name, strings.Join(wrong, "; ")))
		}
	}
	all.warnings = slices.Compact(all.warnings)
	if len(broken) > 0 {
		return nil, several("can't have their secrets; nothing was deployed", broken)
	}
	return all, nil
}
