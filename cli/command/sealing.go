package command

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// sealer fills in the values of secrets for nodes, and seals them: nobody else can read them from there on.
type sealer struct {
	trees    *trees
	verifier *protocol.Verifier
}

func newSealer(me *identity, t *trees) *sealer { return &sealer{t, me.verifier} }

// key is the curve key that a node was enrolled with.
func (s *sealer) key(n *protocol.NodeState) (string, error) {
	if n.JWT == "" && n.Enrolled.IsZero() { // --offline
		return "", fmt.Errorf("secrets are sealed to the key of %s, and %s does not have it, because it was enrolled from elsewhere: leave out --offline", n.Name, filepath.Join(ownDir, nodesDir))
	}
	id, err := s.verifier.ProveNode(&n.NodeRecord, time.Now())
	return id.XKey, err
}

// seal fills in a value for a node and seals it to the node's key.
func (s *sealer) seal(node, key string, use project.SecretUse, value []byte) (protocol.SealedSecret, error) {
	sealed := protocol.SealedSecret{Name: use.Name, PreBuild: use.PreBuild}
	filled, err := s.trees.project.Value(s.trees.request(node), value)
	if err != nil {
		return sealed, fmt.Errorf("the value of secret %s: %w", use.Name, err)
	}
	if len(filled) > protocol.MaxSecretSize {
		return sealed, fmt.Errorf("secret %s has %d bytes, the limit is %d", use.Name, len(filled), protocol.MaxSecretSize)
	}
	sealed.Sealed, err = protocol.Seal(filled, key)
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
	all := &sealedSecrets{of: map[string][]protocol.SealedSecret{}}
	wanted := &wantedSecrets{trees: t, values: map[string][]byte{}}
	s := newSealer(me, t)
	sealed := make([][]protocol.SealedSecret, len(chosen))
	wrong := make([]error, len(chosen))
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0)) // it is arithmetic only: a third of a millisecond for each secret
	for i := range chosen {
		n := &chosen[i]
		uses, missing, err := wanted.of(n.Name)
		if err != nil {
			_ = g.Wait()
			return nil, err
		}
		g.Go(func() error {
			sealed[i], wrong[i] = s.node(n, uses, missing)
			return nil
		})
	}
	_ = g.Wait() // what is wrong is told of all nodes together
	broken := slices.DeleteFunc(wrong, func(err error) bool { return err == nil })
	if len(broken) > 0 {
		return nil, several("can't have their secrets; nothing was deployed", broken)
	}
	for i := range chosen {
		all.of[chosen[i].Name] = sealed[i]
	}
	all.warnings = wanted.warnings
	return all, nil
}

// node seals what one node is to have. All that is wrong with it is one error.
func (s *sealer) node(n *protocol.NodeState, uses []wantedSecret, wrong []string) ([]protocol.SealedSecret, error) {
	var sealed []protocol.SealedSecret
	if len(uses) > 0 {
		key, err := s.key(n)
		if err != nil {
			return nil, fmt.Errorf("%s: %s: %w", n.Name, uses[0].At, err)
		}
		for _, u := range uses {
			one, err := s.seal(n.Name, key, u.SecretUse, u.value)
			if err != nil {
				wrong = append(wrong, fmt.Sprintf("%s: %v", u.At, err))
			}
			sealed = append(sealed, one)
		}
	}
	if len(wrong) > 0 {
		return nil, fmt.Errorf("%s: %s", n.Name, strings.Join(wrong, "; "))
	}
	return sealed, nil
}

// wantedSecrets reads the secrets that nodes' files name, each once.
type wantedSecrets struct {
	trees    *trees
	values   map[string][]byte // as they are stored, by name
	warnings []string
}

// wantedSecret is one that a node's file names, and its value as it is stored.
type wantedSecret struct {
	project.SecretUse
	value []byte
}

// of are a node's, and a line for each that isn't there. An error is of the vault or the project, and so of all nodes.
func (w *wantedSecrets) of(node string) (found []wantedSecret, missing []string, err error) {
	uses, err := w.trees.project.Secrets(node, w.trees.testDir)
	if err != nil {
		return nil, nil, fmt.Errorf("%s: %w", node, err)
	}
	for _, use := range uses {
		value, ok := w.values[use.Name]
		if !ok {
			value, err = w.trees.secrets.Get(use.Name)
			switch {
			case errors.Is(err, fs.ErrNotExist) && w.trees.allowMissing:
				w.warnings = append(w.warnings, fmt.Sprintf("%s: secret not found, skipping: %s", use.At, use.Name))
				continue
			case errors.Is(err, fs.ErrNotExist):
				missing = append(missing, fmt.Sprintf("%s: there is no secret %s (nix-infra secrets store %s, or leave it out with --allow-missing)", use.At, use.Name, use.Name))
				continue
			case err != nil:
				return nil, nil, err
			}
			w.values[use.Name] = value
			if w.trees.secrets.HasPending(use.Name) {
				w.warnings = append(w.warnings, fmt.Sprintf("a rotation of secret %s was not finished, and the nodes get its value of before; nix-infra secrets rotate %s --resume goes on with it", use.Name, use.Name))
			}
		}
		found = append(found, wantedSecret{use, value})
	}
	return found, missing, nil
}
