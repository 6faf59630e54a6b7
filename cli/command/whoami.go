package command

import (
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/protocol"
)

// identityDocument is `whoami --json`.
type identityDocument struct {
	Name        string        `json:"name"`
	Role        protocol.Role `json:"role"`
	Key         string        `json:"key"`
	Fleet       string        `json:"fleet"`
	Targets     []string      `json:"targets"` // none: all nodes
	Expires     *time.Time    `json:"expires"` // null: never
	Controllers []string      `json:"controllers"`
}

func (a *app) whoamiCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "whoami",
		Short: "Say as whom the fleet is spoken to",
		Example: `  nix-infra whoami
  nix-infra --creds bob.creds whoami`,
		Args: cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			me, err := a.identity()
			if err != nil {
				return err
			}
			d := identityDocument{Name: me.Name, Role: me.Role, Key: me.Key, Targets: list(me.Targets), Fleet: me.project.Settings.Fleet, Controllers: list(me.project.Settings.Controllers)}
			until, on := "without end", ""
			if me.expires != 0 {
				at := time.Unix(me.expires, 0).UTC()
				d.Expires, until = &at, "until "+at.Format(time.RFC3339)
			}
			if len(me.Targets) > 0 {
				on = " on " + reaches(me.Targets)
			}
			if a.json {
				a.document(d)
			}
			a.say("%s, %s of fleet %s%s, %s (%s)\n", d.Name, d.Role, d.Fleet, on, until, d.Key)
			a.warnOfExpiry(me)
			return nil
		},
	}
}

// versionDocument is `version --json`.
type versionDocument struct {
	Version  string `json:"version"`
	Protocol int    `json:"protocol"`
}

func (a *app) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		Short:   "Print the version",
		Example: `  nix-infra version`,
		Args:    cobra.NoArgs,
		RunE: func(*cobra.Command, []string) error {
			if a.json {
				a.document(versionDocument{protocol.Build(), protocol.Version})
			}
			a.say("nix-infra %s (protocol v%d)\n", protocol.Build(), protocol.Version)
			return nil
		},
	}
}
