package command

import (
	"crypto/sha256"
	"fmt"
	"maps"
	"slices"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// contentDocument says what exactly a deploy would bring, in `diff --json`.
type contentDocument struct {
	Event  string `json:"event"`  // content
	Digest string `json:"digest"` // for deploy --expect
}

// content is what a deploy brings nodes: each one's files and, by the way they are stored, its secrets. Two deploys with the
// same digest bring the same, whatever their ways, waves and times are.
type content struct {
	secrets func(name string) string // the digest of one as it is stored
	nodes   map[string]nodeContent
}

type nodeContent struct {
	Files   []protocol.File   `json:"files"`   // by path
	Secrets map[string]string `json:"secrets"` // by name
}

// newContent is of a project's secrets. Each is looked at once.
func (a *app) newContent(p *project.Project) *content {
	store, seen := a.secretStore(p), map[string]string{}
	return &content{nodes: map[string]nodeContent{}, secrets: func(name string) string {
		if _, ok := seen[name]; !ok {
			seen[name] = store.Stored(name)
		}
		return seen[name]
	}}
}

// add adds what a node would have.
func (c *content) add(node string, files []protocol.File, secrets []string) {
	n := nodeContent{Files: files, Secrets: map[string]string{}}
	for _, name := range secrets {
		n.Secrets[name] = c.secrets(name)
	}
	c.nodes[node] = n
}

func (c *content) digest() string {
	h := sha256.New()
	for _, node := range slices.Sorted(maps.Keys(c.nodes)) {
		fmt.Fprintf(h, "%s %s\n", node, protocol.Digest(protocol.Encode(c.nodes[node])))
	}
	return fmt.Sprintf("%x", h.Sum(nil))
}

// expect refuses a plan that brings something else than was expected; "" expects nothing.
func (a *app) expect(p *project.Project, made *plan, digest string) error {
	if digest == "" {
		return nil
	}
	c := a.newContent(p)
	for i := range made.items {
		m := made.items[i].manifest
		var secrets []string
		for _, s := range m.Secrets {
			secrets = append(secrets, s.Name)
		}
		c.add(m.Node, m.Files, secrets)
	}
	if got := c.digest(); got != digest {
		return fmt.Errorf("what would be deployed is not what --expect says: it has the digest %s; the project, its secrets or the fleet changed since, so look at the difference again (nix-infra diff)", got)
	}
	return nil
}

// tellContent says what exactly a deploy of trees would bring.
func (a *app) tellContent(t *trees, systems []*building) error {
	c := a.newContent(t.project)
	for _, b := range systems {
		uses, err := t.project.Secrets(b.node, t.testDir)
		if err != nil {
			return err
		}
		var secrets []string
		for _, use := range uses {
			if !t.allowMissing || t.secrets.Has(use.Name) {
				secrets = append(secrets, use.Name)
			}
		}
		files := filesOf(b.tree)
		sortFiles(files)
		c.add(b.node, files, secrets)
	}
	a.document(contentDocument{"content", c.digest()})
	return nil
}
