package command

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/cobra"
)

// mcpClient is a program that uses MCP servers, by how its settings name them.
type mcpClient struct {
	name, file string // where the entry belongs
	key        string // the object that has the servers
	typed      bool   // each entry says that it is over stdio
}

var mcpClients = []mcpClient{
	{"claude-code", ".mcp.json in the project's folder", "mcpServers", false},
	{"claude-desktop", "claude_desktop_config.json (Settings, Developer, Edit Config)", "mcpServers", false},
	{"cursor", ".cursor/mcp.json in the project's folder", "mcpServers", false},
	{"vscode", ".vscode/mcp.json in the project's folder", "servers", true},
	{"windsurf", "~/.codeium/windsurf/mcp_config.json", "mcpServers", false},
	{"gemini-cli", ".gemini/settings.json in the project's folder", "mcpServers", false},
	{"zed", "settings.json of Zed", "context_servers", false},
	{"codex", "~/.codex/config.toml", "", false},
}

// mcpEntry is a server in a client's settings.
type mcpEntry struct {
	Type    string   `json:"type,omitempty"`
	Command string   `json:"command"`
	Args    []string `json:"args"`
}

func (a *app) mcpConfigCommand() *cobra.Command {
	var client string
	var servers []string
	var names []string
	for _, c := range mcpClients {
		names = append(names, c.name)
	}
	c := &cobra.Command{
		Use:   "config",
		Short: "Print the entry of the servers for a client's settings",
		Long: `Print the entry of the servers for the settings of a client: ` + sentence(names) + `. Where it belongs is said on
stderr; nothing is written.`,
		Example: `  nix-infra mcp config --client claude-code > .mcp.json
  nix-infra mcp config --client vscode --server cluster`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error { return a.mcpConfig(client, servers) },
	}
	f := c.Flags()
	f.StringVar(&client, "client", "claude-code", strings.Join(names, ", "))
	f.StringSliceVar(&servers, "server", []string{"machine", "dev"}, "cluster, machine, dev; repeatable")
	return c
}

func (a *app) mcpConfig(client string, servers []string) error {
	at := slices.IndexFunc(mcpClients, func(c mcpClient) bool { return c.name == client })
	if at < 0 {
		var names []string
		for _, c := range mcpClients {
			names = append(names, c.name)
		}
		return fmt.Errorf("--client %q: use one of %s", client, strings.Join(names, ", "))
	}
	dir, err := filepath.Abs(a.dir)
	if err != nil {
		return err
	}
	program := ownProgram()
	entries := map[string]mcpEntry{}
	for _, s := range servers {
		if !slices.ContainsFunc(mcpServers, func(m mcpServer) bool { return m.name == s }) {
			return fmt.Errorf("--server %q: use cluster, machine or dev", s)
		}
		e := mcpEntry{Command: program, Args: []string{"mcp", s, "--project-dir", dir}}
		if a.envFile != "" {
			e.Args = append(e.Args, "--env", a.envFile)
		}
		if a.creds != "" && s != "dev" {
			creds, err := filepath.Abs(a.creds)
			if err != nil {
				return err
			}
			e.Args = append(e.Args, "--creds", creds)
		}
		if mcpClients[at].typed {
			e.Type = "stdio"
		}
		entries["nix-infra-"+s] = e
	}
	text, err := mcpClients[at].settings(entries)
	if err != nil {
		return err
	}
	fmt.Fprint(a.Stdout, text)
	a.note("this belongs into %s", mcpClients[at].file)
	return nil
}

// ownProgram is this program's path, by the name under which it was called where that leads to it: the name goes on when
// an upgrade replaces what it leads to, as with a profile of Nix.
func ownProgram() string {
	program, err := os.Executable()
	if err != nil {
		return "nix-infra"
	}
	called, err := exec.LookPath(os.Args[0])
	if err == nil {
		called, err = filepath.Abs(called)
	}
	if err != nil {
		return program
	}
	a, errA := os.Stat(called)
	if b, errB := os.Stat(program); errA != nil || errB != nil || !os.SameFile(a, b) {
		return program
	}
	return called
}

// settings are entries as the client's file has them.
func (c *mcpClient) settings(entries map[string]mcpEntry) (string, error) {
	if c.key != "" {
		data, err := json.MarshalIndent(map[string]any{c.key: entries}, "", "  ")
		return string(data) + "\n", err
	}
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(entries)) {
		e := entries[name]
		args, err := json.Marshal(e.Args) // a JSON text is a TOML text, too
		if err != nil {
			return "", err
		}
		command, err := json.Marshal(e.Command)
		if err != nil {
			return "", err
		}
		fmt.Fprintf(&b, "[mcp_servers.%s]\ncommand = %s\nargs = %s\n", name, command, args)
	}
	return b.String(), nil
}
