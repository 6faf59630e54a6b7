package command

import (
	"context"
	"errors"
	"log/slog"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/mcp"
	"github.com/nix-infra/nix-infra/protocol"
)

// mcpCreds is the credentials file that init makes for the MCP servers, below ownDir.
const mcpCreds = "mcp.creds"

// mcpOptions is how an MCP server is started.
type mcpOptions struct {
	dir      string
	readOnly bool
	toolsets []string
	allow    []string
	dev      devFlags
}

// mcpServer is one of the three servers.
type mcpServer struct {
	name, title  string
	short, long  string
	example      string
	readOnly     bool // unless said otherwise
	fleet        bool // it asks the fleet, as the user of credentials
	instructions string
}

var mcpServers = []mcpServer{
	{name: "cluster", title: "nix-infra cluster", readOnly: true, fleet: true,
		short: "Serve a cluster to an assistant: nodes, units, journals, statistics, files, deployments, etcd"},
	{name: "machine", title: "nix-infra machines", readOnly: true, fleet: true,
		short: "Serve a fleet of machines to an assistant: the cluster's server without etcd"},
	{name: "dev", title: "nix-infra development",
		short: "Serve the project's modules and tests to an assistant"},
}

func (a *app) mcpCommand() *cobra.Command {
	c := &cobra.Command{
		Use:   "mcp",
		Short: "Serve the fleet, or the project, to AI assistants (Model Context Protocol)",
		Args:  unknownSubcommand,
		RunE:  func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	for _, s := range mcpServers {
		c.AddCommand(a.mcpServerCommand(s))
	}
	c.AddCommand(superviseSession())
	return c
}

func (a *app) mcpServerCommand(s mcpServer) *cobra.Command {
	var o mcpOptions
	c := &cobra.Command{
		Use: s.name, Short: s.short, Long: s.long, Example: s.example,
		Args: cobra.NoArgs,
		RunE: func(c *cobra.Command, _ []string) error {
			if o.dir != "" {
				a.dir = o.dir
			}
			if len(o.allow) > 0 {
				if c.Flags().Changed("read-only") && o.readOnly {
					return errors.New("--read-only and --allow contradict each other; leave one out")
				}
				o.readOnly = false
			}
			return a.serveMCP(c.Context(), s, o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.dir, "project-dir", "", "the project's folder; the same as --working-dir")
	f.BoolVar(&o.readOnly, "read-only", s.readOnly, "only tools that change nothing")
	f.StringSliceVar(&o.toolsets, "toolsets", nil, "only the tools of these `sets`")
	if s.name == "dev" {
		o.dev.register(f)
	}
	if s.fleet {
		f.StringSliceVar(&o.allow, "allow", nil, "tools that change the fleet, each of which a person has to confirm")
	}
	return c
}

// serveMCP is one of the servers over stdin and stdout, until stdin ends.
func (a *app) serveMCP(ctx context.Context, s mcpServer, o mcpOptions) (err error) {
	dir, err := filepath.Abs(a.dir)
	if err != nil {
		return err
	}
	a.dir = dir
	a.batch = true // there is nobody at the terminal
	options := mcp.Options{
		Name: "nix-infra-" + s.name + "-mcp", Title: s.title, Version: protocol.Build(), Instructions: s.instructions,
		ReadOnly: o.readOnly, Toolsets: o.toolsets, Allow: o.allow,
		Log: slog.New(slog.NewTextHandler(a.Stderr, nil)),
	}
	server := mcp.New(options)
	if s.name == "dev" {
		end, err := a.addDev(server, o.dev)
		if err != nil {
			return err
		}
		defer func() { err = errors.Join(err, end()) }()
	}
	if err := server.CheckToolsets(nil); err != nil {
		return err
	}
	return server.ServeStdio(ctx, a.Stdin, a.Stdout)
}
