package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// grantDocument is a grant in `access add --json` and `access list --json`.
type grantDocument struct {
	Name      string        `json:"name"`
	Role      protocol.Role `json:"role"`
	Key       string        `json:"key"`
	Targets   []string      `json:"targets"`
	State     string        `json:"state"`
	Expires   *time.Time    `json:"expires"`
	By        string        `json:"by"`
	At        *time.Time    `json:"at"`
	Revoked   *time.Time    `json:"revoked"`
	RevokedBy string        `json:"revoked_by"`
	File      string        `json:"file,omitempty"`
}

func documentOfGrant(g grant, now time.Time) grantDocument {
	d := grantDocument{Name: g.Name, Role: g.Role, Key: g.Key, Targets: list(g.Targets), State: g.state(now), Expires: g.Expires,
		By: g.By, Revoked: g.Revoked, RevokedBy: g.RevokedBy}
	if !g.At.IsZero() {
		d.At = &g.At
	}
	return d
}

func (a *app) accessCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "access",
		Short: "Give people and programs access, and take it back",
		Example: `  nix-infra access add bob --role operator --expires 90d
  nix-infra access list
  nix-infra access revoke bob`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.accessAddCommand(), a.accessListCommand(), a.accessRevokeCommand())
	return c
}

type accessOptions struct {
	role, expires, out string
	targets            []string
}

func (a *app) accessAddCommand() *cobra.Command {
	var o accessOptions
	c := &cobra.Command{
		Use:   "add NAME --role ROLE",
		Short: "Make credentials for somebody",
		Long: `Make credentials for somebody, as a file that only its owner can read. Who has it, has the access: give it over a
safe way, and with --creds or NIX_INFRA_CREDS they use it. Nobody needs to be told; the fleet goes by the signature.

Roles, each with what the ones before it may: viewer asks, operator runs what nodes' policies allow, deployer deploys,
rolls back and reboots, admin does everything.

--target restricts it to some nodes, by names and globs, since a node judges a grant by its own name; tags and facts are
what a controller says of a node. The others refuse whatever it signs, and it does not see them in lists. The progress
of deployments, which the broker hands to everybody who may ask, is not restricted.`,
		Example: `  nix-infra access add bob --role operator --expires 90d
  nix-infra access add ci --role deployer --target "web* db1" --out ci.creds
  nix-infra access add wall --role viewer --expires 12h --out - | ssh bob@desk 'umask 077; cat > wall.creds'`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return a.accessAdd(args[0], o) },
	}
	f := c.Flags()
	f.StringVar(&o.role, "role", "", "viewer, operator, deployer or admin")
	f.StringArrayVar(&o.targets, "target", nil, "the only nodes that it reaches: names, globs or all; repeatable (default all)")
	f.StringVar(&o.expires, "expires", "", "when it ends: after a time such as 90d or 12h, or at a date such as 2027-01-31 (default never)")
	f.StringVar(&o.out, "out", "", "file for the credentials, - for stdout (default NAME.creds)")
	return c
}

func (a *app) accessAdd(name string, o accessOptions) error {
	if err := protocol.CheckName(name); err != nil {
		return err
	}
	role := protocol.Role(o.role)
	if !role.AtLeast(protocol.Viewer) {
		return fmt.Errorf("--role %q: expected viewer, operator, deployer or admin", o.role)
	}
	targets, err := protocol.ParseTargets(o.targets)
	if err != nil {
		return fmt.Errorf("--target: %w", err)
	}
	if role == protocol.Admin && len(targets) > 0 {
		return errors.New("--target: an admin has the whole fleet, since access itself knows no nodes; give another role")
	}
	now := time.Now().UTC().Truncate(time.Second)
	expires, err := expiry(o.expires, now)
	if err != nil {
		return fmt.Errorf("--expires: %w", err)
	}
	file := first(o.out, name+".creds")
	if file != "-" {
		if _, err := os.Lstat(file); err == nil {
			return fmt.Errorf("there is a file %s already; name another one by --out", file)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	e, err := a.openEnrolment()
	if err != nil {
		return err
	}
	g := grant{Name: name, Role: role, Targets: targets, By: e.me.Name, At: now}
	var last time.Time
	if expires != nil {
		g.Expires, last = expires, *expires
	}
	creds, err := e.Keys.Credentials(name, role, last, targets...)
	if err != nil {
		return err
	}
	_, claims, err := protocol.ParseCredentials(creds)
	if err != nil {
		return err
	}
	// On record before anybody can have it: what is not there can't be revoked.
	g.Key = claims.Subject
	err = a.changeAccess(func(r *accessRecord) error {
		if g := r.find(name); g != nil {
			return fmt.Errorf("%s has access already, as %s by %s; take it back first: nix-infra access revoke %s", name, g.Role, first(g.By, "somebody"), name)
		}
		r.Grants = append(r.Grants, g)
		return nil
	})
	if err != nil {
		return err
	}
	if err := a.handOut(file, creds); err != nil {
		return errors.Join(err, a.forgetGrant(g.Key))
	}
	if file == "-" {
		a.note("%s has access as %s to %s, until %s", name, role, reaches(targets), ends(g.Expires))
		return nil
	}
	if a.json {
		d := documentOfGrant(g, now)
		d.File = file
		a.document(d)
	}
	a.say("%s has access as %s to %s, until %s: %s\n", name, role, reaches(targets), ends(g.Expires), file)
	return nil
}

// handOut gives the credentials away.
func (a *app) handOut(file string, creds []byte) error {
	if file != "-" {
		return atomicfile.Write(file, creds, 0o600)
	}
	_, err := a.Stdout.Write(creds)
	return err
}

// expiry reads when credentials end: after a time, or at a date. nil is never.
func expiry(s string, now time.Time) (*time.Time, error) {
	if s == "" {
		return nil, nil
	}
	at, err := time.Parse(time.RFC3339, s)
	if err != nil {
		at, err = time.Parse(time.DateOnly, s)
	}
	if err != nil {
		d, err := project.ParseAge(s)
		if err != nil {
			return nil, fmt.Errorf("%q is no time; use such as 90d, 12h or 2027-01-31", s)
		}
		at = now.Add(d)
	}
	if at = at.UTC(); !at.After(now) {
		return nil, fmt.Errorf("%q is not in the future", s)
	}
	return &at, nil
}

func (a *app) accessListCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "list",
		Short: "List who was given access, and whose was taken back",
		Long: `List who was given access, and whose was taken back, machines too. This is the project's own record: it is read
from nix-infra/access.json, and nothing is asked of the fleet.`,
		Example: `  nix-infra access list
  nix-infra access list --json | jq -r 'select(.state == "valid") | .name'`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if _, err := a.openProject(); err != nil {
				return err
			}
			record, err := a.readAccess()
			if err != nil {
				return err
			}
			now := time.Now()
			var rows [][]ui.Cell
			for _, g := range record.Grants {
				d := documentOfGrant(g, now)
				if a.json {
					a.document(d)
				}
				state, by := d.State, g.By
				if g.Revoked != nil {
					state += " " + g.Revoked.Format(time.DateOnly) + " by " + g.RevokedBy
				}
				rows = append(rows, ui.Text(g.Name, string(g.Role), reaches(g.Targets), state, ends(g.Expires), by, g.Key))
			}
			if !a.json {
				a.out.Table([]string{"NAME", "ROLE", "NODES", "STATE", "EXPIRES", "BY", "KEY"}, rows)
			}
			return nil
		},
	}
}

func (a *app) accessRevokeCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "revoke NAME",
		Short: "Take back somebody's access",
		Long: `Take back somebody's access. The controller ends their connections at once, and it and every node that is there
refuse what they signed, manifests of theirs that were not carried out yet too; a node that is away does so when it
returns. Revoking once more tells the fleet again, where it could not be reached.`,
		Example: `  nix-infra access revoke bob
  nix-infra access revoke bob --batch`,
		Args: cobra.ExactArgs(1),
		RunE: func(c *cobra.Command, args []string) error { return a.accessRevoke(c.Context(), args[0]) },
	}
}

func (a *app) accessRevoke(ctx context.Context, name string) error {
	e, err := a.openEnrolment()
	if err != nil {
		return err
	}
	record, err := a.readAccess()
	if err != nil {
		return err
	}
	g := record.find(name)
	switch {
	case g == nil:
		for _, old := range record.Grants {
			if old.Name == name {
				if err := a.putInForce(ctx, e); err != nil {
					return err
				}
				a.say("%s was revoked before; the fleet was told again\n", name)
				return nil
			}
		}
		return fmt.Errorf("nobody called %s was given access; nix-infra access list tells who was", name)
	case g.Key == e.me.Key:
		return fmt.Errorf("%s is you; somebody else has to revoke you, with their own credentials", name)
	}
	if err := a.confirm(fmt.Sprintf("revoke %s, %s, given by %s?", name, g.Role, first(g.By, "somebody"))); err != nil {
		return err
	}
	if err := a.revoke(ctx, e, *g); err != nil {
		return err
	}
	a.say("%s is revoked\n", name)
	return nil
}

// confirm asks whether to go on, unless --batch says that nothing is asked.
func (a *app) confirm(question string) error {
	if a.batch {
		return nil
	}
	fmt.Fprintf(a.Stderr, "%s Type yes to go on: ", ui.Clean(question))
	switch answer, err := a.typed(); {
	case answer == "yes":
		return nil
	case errors.Is(err, context.Canceled):
		return err
	case answer == "" && err != nil:
		return errors.New("nobody answered, and nothing was done; --batch goes on without asking")
	}
	return errors.New("nothing was done")
}
