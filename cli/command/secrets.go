package command

import (
	"encoding/base64"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"
	"unicode/utf8"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

func (a *app) secretsCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "secrets",
		Short: "Keep the project's secrets, and change them on the nodes",
		Long: `Keep the project's secrets: encrypted in secrets/, by the project's password or to the keys of a team. A node's file
names those that it needs, [%%secrets/NAME%%], and deploy seals them to it; a unit reads them with
LoadCredentialEncrypted=NAME:/root/secrets/NAME. See docs/secrets.md.`,
		Example: `  nix-infra secrets store db.password --generate 32
  nix-infra secrets check
  nix-infra secrets rotate db.password --generate 32`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.secretsStoreCommand(), a.secretsListCommand(), a.secretsShowCommand(), a.secretsRemoveCommand(), a.secretsEditCommand(),
		a.secretsCheckCommand(), a.secretsMigrateCommand(), a.secretsRekeyCommand(), a.secretsRotateCommand())
	return c
}

// usesOf tells which nodes' files name which secret. Nodes are those with a file in nodes/.
func usesOf(p *project.Project) (map[string][]use, error) {
	names, err := p.NodeFiles()
	if err != nil {
		return nil, err
	}
	all := map[string][]use{}
	for _, node := range names {
		uses, err := p.Secrets(node, "")
		if err != nil {
			return nil, err
		}
		for _, u := range uses {
			all[u.Name] = append(all[u.Name], use{node, u})
		}
	}
	return all, nil
}

// use is a secret that a node's file names.
type use struct {
	node string
	project.SecretUse
}

func usersOf(uses []use) []string {
	names := []string{}
	for _, u := range uses {
		names = append(names, u.node)
	}
	return names
}

// secretDocument is a secret in `secrets list --json`.
type secretDocument struct {
	Name    string       `json:"name"`
	Format  vault.Format `json:"format"` // age, base64 or openssl; "" where it is none of them
	Changed *time.Time   `json:"changed"`
	Due     *time.Time   `json:"due"` // nil: never
	Pending bool         `json:"pending"`
	Nodes   []string     `json:"nodes"`
}

func documentOfSecret(p *project.Project, s *vault.Secrets, name string, uses map[string][]use) secretDocument {
	d := secretDocument{Name: name, Pending: s.HasPending(name), Nodes: usersOf(uses[name])}
	d.Format, _ = s.Format(name) // check tells of a damaged one
	if changed := s.Changed(name); !changed.IsZero() {
		d.Changed = &changed
		if age := p.Settings.SecretMaxAge(name); age > 0 {
			due := changed.Add(age)
			d.Due = &due
		}
	}
	return d
}

func (a *app) secretsListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List the secrets: how old, how stored, which nodes use them",
		Long:  `List the secrets of the project. No value is read, and no password is needed.`,
		Example: `  nix-infra secrets list
  nix-infra secrets list --json | jq -r 'select(.nodes == []) | .name'`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			p, err := a.openProject()
			if err != nil {
				return err
			}
			s := a.secretStore(p)
			names, err := s.Names()
			if err != nil {
				return err
			}
			uses, err := usesOf(p)
			if err != nil {
				return err
			}
			now := time.Now()
			var rows [][]ui.Cell
			for _, name := range names {
				d := documentOfSecret(p, s, name, uses)
				if a.json {
					a.document(d)
					continue
				}
				due := "never"
				if d.Due != nil {
					due = d.Due.Format(time.DateOnly)
				}
				row := ui.Text(d.Name, ago(d.Changed, now), due, first(string(d.Format), "damaged"), first(strings.Join(d.Nodes, " "), "-"))
				if d.Due != nil && now.After(*d.Due) {
					row[2].Colour = ui.Red
				}
				if d.Format != vault.Age {
					row[3].Colour = ui.Red
				}
				rows = append(rows, row)
			}
			if !a.json {
				a.out.Table([]string{"NAME", "AGE", "DUE", "FORMAT", "NODES"}, rows)
			}
			return nil
		},
	}
}

// shownDocument is a value in `secrets show --json`.
type shownDocument struct {
	Name     string `json:"name"`
	Value    string `json:"value"`
	Encoding string `json:"encoding"` // text or, where it is none, base64
}

func (a *app) secretsShowCommand() *cobra.Command {
	var reveal bool
	c := &cobra.Command{
		Use:   "show NAME",
		Short: "Print a secret's value",
		Long: `Print a secret's value, byte for byte. On a terminal, where somebody may look over your shoulder and the scroll-back
remembers, only with --reveal.`,
		Example: `  nix-infra secrets show db.password | wl-copy
  nix-infra secrets show db.password --reveal`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if a.out.Interactive() && !reveal {
				return errors.New("a terminal is no place for a secret: pipe it where it is needed, or add --reveal")
			}
			p, err := a.openProject()
			if err != nil {
				return err
			}
			value, err := a.existing(a.secretStore(p), args[0])
			if err != nil {
				return err
			}
			switch {
			case a.json:
				d := shownDocument{args[0], string(value), "text"}
				if !utf8.Valid(value) {
					d = shownDocument{args[0], base64.StdEncoding.EncodeToString(value), "base64"}
				}
				a.document(d)
			case a.out.Interactive():
				a.out.Printf("%s\n", ui.Clean(string(value)))
			default:
				a.Stdout.Write(value)
			}
			return nil
		},
	}
	c.Flags().BoolVar(&reveal, "reveal", false, "also on a terminal")
	return c
}

// existing is the value of a secret that has to be there.
func (a *app) existing(s *vault.Secrets, name string) ([]byte, error) {
	if err := protocol.CheckSecretName(name); err != nil {
		return nil, err
	}
	if !s.Has(name) {
		return nil, noSecret(s, name)
	}
	return s.Get(name)
}

func noSecret(s *vault.Secrets, name string) error {
	names, err := s.Names()
	if err != nil {
		return err
	}
	if len(names) == 0 {
		return fmt.Errorf("there is no secret %s; the project has none yet", name)
	}
	return fmt.Errorf("there is no secret %s; the project has %s", name, some(names))
}

func (a *app) secretsRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rm NAME...",
		Short: "Remove secrets from the project",
		Long: `Remove secrets from the project. Nodes lose them by the next deploy. One that a node's file still names keeps that
node from being deployed to, so you are asked first.`,
		Example: `  nix-infra secrets rm old.token
  nix-infra secrets rm old.token --batch`,
		Args: cobra.MinimumNArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			p, err := a.openProject()
			if err != nil {
				return err
			}
			s := a.secretStore(p)
			for _, name := range args {
				if err := protocol.CheckSecretName(name); err != nil {
					return err
				}
				if !s.Has(name) {
					return noSecret(s, name)
				}
			}
			uses, err := usesOf(p)
			if err != nil {
				return err
			}
			slices.Sort(args)
			for _, name := range slices.Compact(args) {
				if len(uses[name]) > 0 {
					if err := a.confirm(fmt.Sprintf("%s names secret %s; remove it?", uses[name][0].At, name)); err != nil {
						return err
					}
				}
				if err := s.Remove(name); err != nil {
					return err
				}
				a.say("removed secret %s\n", name)
			}
			return nil
		},
	}
}
