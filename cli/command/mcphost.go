package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"
	"time"

	mcpfleet "github.com/nix-infra/nix-infra/cli/mcp/fleet"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// mcpCreds is the credentials file that init makes for the MCP servers, below ownDir; mcpUser is its user's name.
const (
	mcpCreds = "mcp.creds"
	mcpUser  = "mcp"
)

// mcpCredsFile is the credentials file that a server uses. $NIX_INFRA_CREDS is not: it is a person's, and may be an
// admin's.
func (a *app) mcpCredsFile() string {
	return first(a.creds, first(a.Getenv("NIX_INFRA_MCP_CREDS"), a.own(mcpCreds)))
}

// as is this run with other credentials, and nobody to ask.
func (a *app) as(creds string) *app {
	return &app{Environment: a.Environment, dir: a.dir, envFile: a.envFile, creds: creds, batch: true, debug: a.debug, log: a.log, out: a.out}
}

// mcpHost is what the servers' tools have of this program.
func (a *app) mcpHost() mcpfleet.Host {
	return mcpfleet.Host{
		Dir: a.dir,
		Connect: func(ctx context.Context, creds string) (*mcpfleet.Session, error) {
			s, err := a.as(creds).connect(ctx)
			if err != nil {
				return nil, err
			}
			return &mcpfleet.Session{Client: s.Client, Verifier: s.me.verifier, Key: s.me.Key}, nil
		},
		Select: selectFrom,
		Run:    a.runFor,
		Action: func(module string) ([]byte, error) {
			p, err := a.openProject()
			if err != nil {
				return nil, err
			}
			return p.Action(module)
		},
		ControlNodes: func() []string {
			p, err := a.open()
			if err != nil {
				return nil
			}
			return p.ControlNodes()
		},
	}
}

// maxRunOutput is how much of what a command line prints is kept for a tool, in bytes of each of stdout and stderr.
const maxRunOutput = 8 << 20

// runFor runs a command line of this program, as the user of credentials, in the same project. Nothing of it reaches this
// run's own stdout.
func (a *app) runFor(ctx context.Context, creds string, args ...string) mcpfleet.Outcome {
	full := []string{"--working-dir=" + a.dir, "--creds=" + creds, "--json"}
	if a.envFile != "" {
		full = append(full, "--env="+a.envFile)
	}
	var stdout, stderr keptOutput
	status := Run(ctx, append(full, args...), Environment{Stdin: strings.NewReader(""), Stdout: &stdout, Stderr: &stderr, Getenv: a.Getenv, VaultOptions: a.VaultOptions})
	return mcpfleet.Outcome{Status: status, Stdout: stdout.whole(), Stderr: stderr.whole()}
}

// keptOutput keeps the beginning of what is written.
type keptOutput struct{ bytes.Buffer }

func (k *keptOutput) Write(p []byte) (int, error) {
	k.Buffer.Write(p[:min(len(p), max(0, maxRunOutput-k.Len()))])
	return len(p), nil
}

// whole is what was kept, up to the end of a line.
func (k *keptOutput) whole() []byte {
	if k.Len() < maxRunOutput {
		return k.Bytes()
	}
	return k.Bytes()[:bytes.LastIndexByte(k.Bytes(), '\n')+1]
}

// initMCP makes a viewer for the MCP servers. What exists is kept; where its file was removed, it has to be revoked first.
func (a *app) initMCP(keys *protocol.FleetKeys) error {
	path := a.own(mcpCreds)
	if _, err := os.Lstat(path); err == nil {
		a.told("credentials for MCP servers", path, true)
		return nil
	} else if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	creds, err := keys.Credentials(mcpUser, protocol.Viewer, time.Time{})
	if err != nil {
		return err
	}
	_, claims, err := protocol.ParseCredentials(creds)
	if err != nil {
		return err
	}
	// On record before anybody can have it: what is not there can't be revoked.
	others := false
	err = a.changeAccess(func(r *accessRecord) error {
		if others = r.find(mcpUser) != nil; others {
			return nil
		}
		by := mcpUser
		if i := slices.IndexFunc(r.Grants, func(g grant) bool { return g.Role == protocol.Admin && g.Revoked == nil }); i >= 0 {
			by = r.Grants[i].Name
		}
		r.Grants = append(r.Grants, grant{Name: mcpUser, Role: protocol.Viewer, Key: claims.Subject, By: by, At: time.Unix(claims.IssuedAt, 0).UTC()})
		return nil
	})
	if err != nil {
		return err
	}
	if others {
		// Somebody else of the team has them: they are in nobody's repository.
		a.note("there is no %s, and %s has access already; with nix-infra access revoke %s and init it is made anew, or make another: nix-infra access add mcp-%s --role viewer --out %s",
			path, mcpUser, mcpUser, "NAME", path)
		return nil
	}
	if err := atomicfile.Write(path, creds, 0o600); err != nil {
		return errors.Join(fmt.Errorf("the credentials for MCP servers: %w", err), a.forgetGrant(claims.Subject))
	}
	a.told("credentials for MCP servers", path, false)
	return nil
}
