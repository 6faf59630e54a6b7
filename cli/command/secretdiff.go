package command

import (
	"context"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// secretChange is what a deploy would do about one secret of a node: added, removed or changed.
type secretChange struct{ name, change string }

// compareSecrets adds to differences what a deploy would do about secrets. What was sealed can't be compared, but when a
// secret got its value is known, and a node that is there says since when it has it.
func (a *app) compareSecrets(ctx context.Context, s *session, t *trees, chosen []protocol.NodeState, all differences) error {
	var asked []string
	for i := range all {
		d := &all[i]
		if d.unknown != "" {
			continue
		}
		uses, err := t.project.Secrets(d.node, t.testDir)
		if err != nil {
			return err
		}
		had := map[string]bool{}
		if d.base != nil {
			for _, old := range d.base.Secrets {
				had[old.Name] = true
			}
		}
		newer := false
		for _, use := range uses {
			switch {
			case t.allowMissing && !t.secrets.Has(use.Name):
				continue
			case !had[use.Name]:
				d.secrets = append(d.secrets, secretChange{use.Name, "added"})
			case t.secrets.Changed(use.Name).After(d.base.Created):
				d.secrets = append(d.secrets, secretChange{use.Name, "changed"})
				newer = true
			}
			delete(had, use.Name)
		}
		for name := range had {
			d.secrets = append(d.secrets, secretChange{name, "removed"})
		}
		if newer && chosen[i].Online {
			asked = append(asked, d.node)
		}
	}
	if len(asked) == 0 {
		return nil
	}
	_, err := ask(ctx, s, asked, protocol.ListSecrets, nil, answerTime, func(node string, held protocol.SecretList) {
		d := &all[slices.IndexFunc(all, func(d difference) bool { return d.node == node })]
		for _, h := range held.Secrets {
			d.secrets = slices.DeleteFunc(d.secrets, func(c secretChange) bool {
				return c.name == h.Name && c.change == "changed" && h.Written >= t.secrets.Changed(h.Name).Unix() // rotated since
			})
		}
	})
	return err
}

func (all differences) foldSecrets() []secretDifference {
	var folded []secretDifference
	for _, d := range all {
		for _, c := range d.secrets {
			i := slices.IndexFunc(folded, func(f secretDifference) bool { return f.Name == c.name && f.Change == c.change })
			if i < 0 {
				i = len(folded)
				folded = append(folded, secretDifference{"secret", c.name, c.change, nil})
			}
			folded[i].Nodes = append(folded[i].Nodes, d.node)
		}
	}
	slices.SortFunc(folded, func(x, y secretDifference) int {
		return strings.Compare(x.Name+" "+x.Change, y.Name+" "+y.Change)
	})
	return folded
}

// secretsDocument is what a node would get, in `deploy --mode dry-activate --json`.
type secretsDocument struct {
	Event    string   `json:"event"` // secrets
	Node     string   `json:"node"`
	Secrets  []string `json:"secrets"`
	PreBuild []string `json:"pre_build"`
}

// tellSecrets names the secrets that a plan brings.
func (a *app) tellSecrets(p *plan) {
	for i := range p.items {
		m := p.items[i].manifest
		d := secretsDocument{"secrets", m.Node, []string{}, []string{}}
		var shown []string
		for _, s := range m.Secrets {
			d.Secrets = append(d.Secrets, s.Name)
			shown = append(shown, s.Name)
			if s.PreBuild {
				d.PreBuild = append(d.PreBuild, s.Name)
				shown[len(shown)-1] += " (also for builds)"
			}
		}
		if len(shown) == 0 {
			continue
		}
		if a.json {
			a.document(d)
		}
		a.say("%s would have the secrets %s\n", a.out.Paint(ui.Bold, m.Node), strings.Join(shown, ", "))
	}
}
