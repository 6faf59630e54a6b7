package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
)

func (a *app) sshKeyCommand() *cobra.Command {
	c := &cobra.Command{
		Use:        "ssh-key",
		SuggestFor: []string{"remove-ssh-key"}, // as the earlier tool once had it
		Short:      "Make SSH keys, and have the provider know them",
		Long: `Make the SSH key pairs that machines are reached with until they are enrolled (below ssh/ in the project), and have
the provider know their public halves, or forget them. nix-infra init makes a pair, and nix-infra provision adds it to the
provider by itself: these commands are for further ones, and for cleaning up.`,
		Example: `  nix-infra ssh-key create --name deploy --email ops@example.org
  nix-infra ssh-key add --name deploy
  nix-infra ssh-key remove --name deploy`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.sshKeyCreateCommand(), a.sshKeyAddCommand(), a.sshKeyRemoveCommand())
	return c
}

func (a *app) sshKeyCreateCommand() *cobra.Command {
	var email string
	c := a.sshKeyVerb("create", "Make a key pair below ssh/", `Make an ed25519 key pair below ssh/ in the project, without a passphrase. A pair that is there is kept.`,
		func(_ context.Context, p *project.Project, name string) error {
			return a.initSSHKey(name, first(email, first(p.Env.Get("SSH_EMAIL"), name)))
		})
	c.Flags().StringVar(&email, "email", "", "whom the key belongs to, as its comment (default $SSH_EMAIL, else the key's name)")
	return c
}

func (a *app) sshKeyAddCommand() *cobra.Command {
	var insist string
	c := a.sshKeyVerb("add", "Have the provider know the public half of a key", `Have the provider know the public half of the pair ssh/NAME, for machines that are made later.`,
		func(ctx context.Context, p *project.Project, name string) error {
			public, err := os.ReadFile(filepath.Join(p.Dir, "ssh", name+".pub"))
			if errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("there is no %s; nix-infra ssh-key create --name %s makes a pair", filepath.Join(p.Dir, "ssh", name+".pub"), name)
			} else if err != nil {
				return err
			}
			return a.atProvider(p, insist, name, "added", "is known there already", func(at provision.Provider) (bool, error) {
				return at.AddKey(ctx, provision.SSHKey{Name: name, PublicKey: strings.TrimSpace(string(public))})
			})
		})
	c.Flags().StringVar(&insist, "provider", "", providerUsage)
	return c
}

func (a *app) sshKeyRemoveCommand() *cobra.Command {
	var insist string
	c := a.sshKeyVerb("remove", "Have the provider forget a key", `Have the provider forget the key of that name. Machines that let it in go on doing so, and the pair below ssh/ stays.`,
		func(ctx context.Context, p *project.Project, name string) error {
			return a.atProvider(p, insist, name, "removed", "is not known there", func(at provision.Provider) (bool, error) {
				return at.RemoveKey(ctx, name)
			})
		})
	c.Flags().StringVar(&insist, "provider", "", providerUsage)
	return c
}

// sshKeyVerb is a command about the key that --name names.
func (a *app) sshKeyVerb(verb, short, long string, do func(ctx context.Context, p *project.Project, name string) error) *cobra.Command {
	var name string
	c := &cobra.Command{
		Use:     verb + " --name NAME",
		Short:   short,
		Long:    long,
		Example: "  nix-infra ssh-key " + verb + " --name deploy",
		Args:    cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if err := project.ValidKeyName(name); err != nil {
				return fmt.Errorf("--name: %w", err)
			}
			p, err := a.openProject()
			if err != nil {
				return err
			}
			return do(c.Context(), p, name)
		},
	}
	c.Flags().StringVar(&name, "name", "", "of the key: its file below ssh/, and what the provider calls it")
	return c
}

// sshKeyDocument is what `ssh-key add` and `remove` print with --json.
type sshKeyDocument struct {
	Name     string `json:"name"`
	Provider string `json:"provider"`
	State    string `json:"state"` // added, removed, or unchanged
}

// atProvider changes a key at the provider, and says whether it did. Providers that keep no keys have nothing to change.
func (a *app) atProvider(p *project.Project, insist, name, done, otherwise string, change func(provision.Provider) (bool, error)) error {
	at, err := a.provider(p, insist)
	if err != nil {
		return err
	}
	changed, err := change(at)
	d := sshKeyDocument{name, at.Name(), "unchanged"}
	switch {
	case errors.Is(err, provision.ErrOwners):
		a.note("the machines in %s are their owner's own, and no provider keeps keys for them: see to their authorized_keys yourself", project.ServersFile)
	case err != nil:
		return err
	case changed:
		d.State = done
		a.say("SSH key %s: %s (%s)\n", name, done, at.Name())
	default:
		a.say("SSH key %s %s (%s)\n", name, otherwise, at.Name())
	}
	if a.json {
		a.document(d)
	}
	return nil
}
