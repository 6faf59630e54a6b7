package command

import (
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/vault"
)

func (a *app) secretsRekeyCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "rekey",
		Short: "Give the project another password, or encrypt it to a team",
		Long: `Encrypt the project's secrets and keys anew, with a key that is new: to the recipients in nix-infra/recipients, where
there is that file, and else with a new password, which is SECRETS_NEW_PASS or asked for.

nix-infra/recipients lists public keys, a line each: age1…, ssh-ed25519 … and ssh-rsa …. Then there is no password any
more: each of them opens the project with their own key, the one in NIX_INFRA_IDENTITY or ~/.ssh/id_ed25519. Whoever was
taken off the list can still read copies of before, so rotate the secrets too.

An interrupted rekey loses nothing: everything opens with the new password once that was written, and else with the old
one; run it again to finish it.`,
		Example: `  nix-infra secrets rekey
  cat ~/.ssh/id_ed25519.pub bob.pub > nix-infra/recipients && nix-infra secrets rekey`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return a.secretsRekey() },
	}
}

func (a *app) secretsRekey() error {
	p, err := a.openProject()
	if err != nil {
		return err
	}
	v := a.vault(p.Env.Get)
	a.secretStore(p) // goes along
	recipients, err := v.Recipients()
	if err != nil {
		return err
	}
	if len(recipients) > 0 {
		if err := a.confirm(fmt.Sprintf("encrypt the project to these, and with no password? %s.", strings.Join(short(recipients), ", "))); err != nil {
			return err
		}
	}
	finished, err := v.Rekey(vault.NewPassword(p.Env.Get, a.newPrompt()))
	switch {
	case err != nil:
		return err
	case finished:
		a.say("finished what was interrupted: the project has the password or recipients that it was given then\n")
	case len(recipients) > 0:
		a.say("encrypted to %s; the password opens nothing any more\n", strings.Join(short(recipients), ", "))
	default:
		a.say("the project has the new password; change %s where it is set, such as in .env\n", vault.Variable)
	}
	return nil
}

// newPrompt asks for a new password; nil where nobody may be asked.
func (a *app) newPrompt() func(string) (string, error) {
	if a.batch {
		return nil
	}
	return vault.Twice(a.prompt)
}

// short are recipients as people know them: an SSH key by its comment.
func short(recipients []string) []string {
	names := make([]string, len(recipients))
	for i, r := range recipients {
		words := strings.Fields(r)
		if names[i] = words[0]; strings.HasPrefix(r, "ssh-") {
			names[i] = first(strings.Join(words[min(2, len(words)):], " "), words[0]+" …"+words[1][max(0, len(words[1])-8):])
		}
	}
	return names
}

// migratedDocument is a secret of the earlier tool, in `secrets migrate --json`.
type migratedDocument struct {
	Name     string       `json:"name"`
	Format   vault.Format `json:"format"`
	Migrated bool         `json:"migrated"`
	Reason   string       `json:"reason"`
}

func (a *app) secretsMigrateCommand() *cobra.Command {
	var cipher string
	c := &cobra.Command{
		Use:   "migrate [NAME]...",
		Short: "Encrypt the secrets that the earlier tool left",
		Long: `Encrypt the secrets that the earlier tool left (all, if none is named). It meant to encrypt them with the password, but
most are plain base64, which anybody can read: treat those as known to all who ever saw the folder, and rotate them. An
old file is removed once the new one was read back.

What OpenSSL did encrypt (Salted__) is opened with SECRETS_LEGACY_PASS, else the project's password, and tried with
` + strings.Join(vault.Ciphers(), ", ") + `;
the ctr ones only where --cipher names them. OpenSSL proves neither the password nor the content, so that only text is
taken for a secret; with --cipher anything is, and one in 256 wrong passwords goes unnoticed.`,
		Example: `  nix-infra secrets migrate
  SECRETS_LEGACY_PASS=… nix-infra secrets migrate app.key --cipher aes-256-cbc`,
		RunE: func(_ *cobra.Command, args []string) error { return a.secretsMigrate(args, cipher) },
	}
	c.Flags().StringVar(&cipher, "cipher", "", "the `cipher` of openssl enc that they were encrypted with")
	return c
}

func (a *app) secretsMigrate(names []string, cipher string) error {
	p, err := a.openProject()
	if err != nil {
		return err
	}
	s := a.secretStore(p)
	if cipher != "" {
		if err := s.Legacy(cipher); err != nil {
			return fmt.Errorf("--cipher: %w", err)
		}
	}
	legacy, err := s.LegacyNames()
	if err != nil {
		return err
	}
	for _, name := range names {
		if !slices.Contains(legacy, name) {
			return fmt.Errorf("%q is no secret that the earlier tool left", name)
		}
	}
	if len(names) == 0 {
		names = legacy
	}
	if len(names) == 0 {
		a.say("there is nothing to migrate: no secret is of the earlier tool\n")
		return nil
	}
	var failed []error
	plain := 0
	for _, name := range names {
		d := migratedDocument{Name: name}
		d.Format, err = s.Migrate(name)
		if errors.Is(err, vault.ErrNoPassword) {
			return err
		}
		if err != nil {
			d.Reason = err.Error()
			failed = append(failed, fmt.Errorf("%s: %w", name, err))
		} else {
			d.Migrated = true
			a.say("migrated secret %s\n", name)
			if d.Format == vault.Base64 {
				plain++
			}
		}
		if a.json {
			a.document(d)
		}
	}
	if plain > 0 {
		a.note("WARNING: %s plain base64, which everybody could read who ever had the folder or a backup of it: rotate them", are(plain, "of them was", "of them were"))
	}
	switch len(failed) {
	case 0:
		return nil
	case 1:
		return &outcome{SomeFailed, failed[0]}
	}
	return &outcome{SomeFailed, &errorList{"these were not migrated, and stay as they are:", failed}}
}

func are(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
