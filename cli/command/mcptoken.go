package command

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// mcpTokensFile has the bearer tokens of MCP servers over HTTP, below ownDir: their hashes, and whose credentials each uses.
const mcpTokensFile = "mcp-tokens.json"

// bearerDocument is a token in `mcp token list --json`.
type bearerDocument struct {
	Name    string        `json:"name"`
	User    string        `json:"user"`
	Role    protocol.Role `json:"role"`
	Creds   string        `json:"creds"`
	Created time.Time     `json:"created"`
	Expires *time.Time    `json:"expires"`
	Problem string        `json:"problem"`
}

// bearerAddedDocument is `mcp token add --json`.
type bearerAddedDocument struct {
	Name  string `json:"name"`
	Token string `json:"token"`
}

func (a *app) mcpTokens() mcp.Tokens { return mcp.Tokens{Path: a.own(mcpTokensFile)} }

// tokenCreds is a token's credentials file. One that is not absolute is below ownDir.
func (a *app) tokenCreds(t *mcp.Token) string {
	if filepath.IsAbs(t.Creds) {
		return t.Creds
	}
	return a.own(t.Creds)
}

// tokenCaller is who a token is of.
func (a *app) tokenCaller(tokens mcp.Tokens, secret string, fleet bool) (mcp.Caller, error) {
	t, err := tokens.Find(secret, time.Now())
	if err != nil {
		return mcp.Caller{}, err
	}
	if !fleet {
		return mcp.Caller{Name: t.Name, Token: t.Name}, nil
	}
	caller, err := a.mcpCaller(a.tokenCreds(t))
	if err != nil {
		return mcp.Caller{}, fmt.Errorf("the token %s: %w", t.Name, err)
	}
	caller.Token = t.Name
	return caller, nil
}

// checkTokens wants a server over HTTP to have somebody who may come in.
func (a *app) checkTokens(tokens mcp.Tokens, fleet bool) error {
	all, err := tokens.List()
	if err != nil {
		return err
	}
	if len(all) == 0 {
		return errors.New("nobody has a token, without which nobody comes in over HTTP; make one: nix-infra mcp token add NAME")
	}
	for i := range all {
		if _, err := a.mcpCaller(a.tokenCreds(&all[i])); fleet && err != nil {
			a.note("the token %s can't be used: %s", all[i].Name, message(err))
		}
	}
	return nil
}

func (a *app) mcpTokenCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "token",
		Short: "Make tokens for MCP servers over HTTP, and take them away",
		Example: `  nix-infra mcp token add alice
  nix-infra mcp token list
  nix-infra mcp token remove alice`,
		Args: unknownSubcommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(a.mcpTokenAddCommand(), a.mcpTokenListCommand(), a.mcpTokenRemoveCommand())
	return c
}

func (a *app) mcpTokenAddCommand() *cobra.Command {
	var role, creds, expires string
	c := &cobra.Command{
		Use:   "add NAME",
		Short: "Make a token, and print it this once",
		Long: `Make a token for MCP servers over HTTP, and print it this once: the project keeps its hash in
nix-infra/mcp-tokens.json. Who has it asks the fleet as the user of a credentials file, which nodes and record know by name:
nix-infra/mcp.creds, a viewer's, unless --creds names another one. With --role, credentials are made for NAME alone, as by
nix-infra access add, so that the record tells them apart and they can be revoked.`,
		Example: `  nix-infra mcp token add alice
  nix-infra mcp token add alice --role viewer --expires 90d
  nix-infra mcp token add ops --creds ops.creds`,
		Args: cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error { return a.addBearer(args[0], role, creds, expires) },
	}
	f := c.Flags()
	f.StringVar(&role, "role", "", "make credentials of this `role` for it: viewer, operator, deployer or admin")
	f.StringVar(&creds, "creds-file", "", "credentials `file` that it uses (default nix-infra/mcp.creds)")
	f.StringVar(&expires, "expires", "", "when it ends: after a time such as 90d or 12h, or at a date such as 2027-01-31 (default never)")
	return c
}

func (a *app) addBearer(name, role, creds, expires string) error {
	if err := protocol.CheckName(name); err != nil {
		return err
	}
	if _, err := a.openProject(); err != nil {
		return err
	}
	now := time.Now().UTC().Truncate(time.Second)
	until, err := expiry(expires, now)
	if err != nil {
		return fmt.Errorf("--expires: %w", err)
	}
	if err := a.mcpTokens().Free(name); err != nil { // before credentials are made for it
		return err
	}
	creds = first(creds, mcpCreds)
	switch {
	case role != "" && creds != mcpCreds:
		return errors.New("--role makes credentials, and --creds-file names some that are there; leave one out")
	case role != "":
		creds = "mcp-" + name + ".creds"
		quiet := a.as(a.creds)
		quiet.out, err = ui.New(a.Stderr, "never", a.Getenv) // stdout is for the token
		if err != nil {
			return err
		}
		if err := quiet.accessAdd(name, accessOptions{role: role, expires: expires, out: a.own(creds)}); err != nil {
			return err
		}
	case creds != mcpCreds:
		if creds, err = filepath.Abs(creds); err != nil {
			return err
		}
	}
	if _, err := a.mcpCaller(a.tokenCreds(&mcp.Token{Creds: creds})); err != nil {
		return err
	}
	var secret string
	if err := a.alone(func() (err error) {
		secret, err = a.mcpTokens().Add(name, creds, until, now)
		return err
	}); err != nil {
		return err
	}
	if a.json {
		a.document(bearerAddedDocument{name, secret})
	}
	a.say("%s\n", secret)
	return nil
}

func (a *app) mcpTokenListCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "list",
		Short:   "List tokens, and as whom they ask the fleet",
		Example: `  nix-infra mcp token list`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if _, err := a.openProject(); err != nil {
				return err
			}
			all, err := a.mcpTokens().List()
			if err != nil {
				return err
			}
			var rows [][]ui.Cell
			for i := range all {
				t := &all[i]
				d := bearerDocument{Name: t.Name, Creds: a.tokenCreds(t), Created: t.Created, Expires: t.Expires}
				caller, err := a.mcpCaller(d.Creds)
				if d.User, d.Role = caller.Name, caller.Role; err != nil {
					d.Problem = message(err)
				} else if t.Expires != nil && time.Now().After(*t.Expires) {
					d.Problem = "expired"
				}
				if a.json {
					a.document(d)
				}
				rows = append(rows, ui.Text(d.Name, d.User, string(d.Role), ends(d.Expires), d.Problem))
			}
			if !a.json {
				a.out.Table([]string{"NAME", "USER", "ROLE", "EXPIRES", "PROBLEM"}, rows)
			}
			return nil
		},
	}
}

func (a *app) mcpTokenRemoveCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "remove NAME",
		Short: "Take a token away",
		Long: `Take a token away: servers that run refuse it from the next request on. Credentials that were made for it are
removed with it; what was signed with them is refused once they are revoked, too (nix-infra access revoke NAME).`,
		Example: `  nix-infra mcp token remove alice`,
		Args:    cobra.ExactArgs(1),
		RunE: func(_ *cobra.Command, args []string) error {
			if _, err := a.openProject(); err != nil {
				return err
			}
			if err := a.alone(func() error { return a.mcpTokens().Remove(args[0]) }); err != nil {
				return err
			}
			own := a.own("mcp-" + args[0] + ".creds")
			if err := os.Remove(own); err == nil {
				a.note("%s is gone, too; revoke it, so that a copy of it is void: nix-infra access revoke %s", own, args[0])
			} else if !errors.Is(err, os.ErrNotExist) {
				return err
			}
			a.say("the token %s is gone\n", args[0])
			return nil
		},
	}
}
