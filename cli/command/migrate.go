package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

func (a *app) migrateCommand() *cobra.Command {
	o := &provisionOptions{}
	c := &cobra.Command{
		Use:   "migrate [NAME...]",
		Short: "Enroll the running machines of a project of the earlier tool",
		Long: `Enroll the running machines of a project that the earlier tool made: all that are in its servers.yaml or at its provider,
or those that are named. They are reached by SSH, as before; their host keys are pinned; each gets the agent, and nothing else
on it is changed. Nothing is deployed: what a deployment would change is shown by nix-infra diff. It keeps
hardware-configuration.nix and networking.nix, which each machine has in /etc/nixos and no project knows.

The folder has to be a project: nix-infra init makes it one, and keeps all that is there. With --dry-run it goes to the
machines, looks, and says what it would do.`,
		Example: `  nix-infra init --nixos-version 25.11 && nix-infra migrate --dry-run
  nix-infra migrate
  nix-infra migrate web1 db1 --controller ctl1`,
		RunE: func(c *cobra.Command, args []string) error {
			o.names, o.method = args, string(project.MethodNone)
			return a.migrate(c.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.provider, "provider", "", "where the machines are: "+strings.Join(project.Providers, " or ")+" (default: servers.yaml, else HCLOUD_TOKEN)")
	o.enrolmentFlags(f)
	f.BoolVar(&o.dryRun, "dry-run", false, "only look at the machines and say what would be done")
	return c
}

func (a *app) migrate(ctx context.Context, o *provisionOptions) error {
	me, err := a.identity()
	if err != nil {
		return err
	}
	provider, err := a.provider(me.project, o.provider)
	if err != nil {
		return err
	}
	servers, err := provider.Servers(ctx, o.names...)
	if err != nil {
		return err
	}
	for _, name := range o.names {
		if !slices.ContainsFunc(servers, func(s provision.Server) bool { return s.Name == name }) {
			return fmt.Errorf("%s does not know a machine %s", provider.Name(), name)
		}
	}
	if len(o.names) == 0 {
		for _, s := range servers {
			o.names = append(o.names, s.Name)
		}
	}
	if len(o.names) == 0 {
		return fmt.Errorf("%s has no machines: there is nothing to migrate", provider.Name())
	}
	if err := o.check(me.project.Settings); err != nil {
		return err
	}
	if o.dryRun {
		return a.surveyMigration(ctx, me, o, servers)
	}
	b, err := a.newBringIn(me, o, provider, &provision.Plan{})
	if err != nil {
		return err
	}
	in, err := b.run(ctx)
	if ctx.Err() != nil {
		return &outcome{Interrupted, errors.New("interrupted; run the same command again, it goes on where this ended")}
	}
	if len(in) > 0 {
		a.say("what a deployment would change: nix-infra diff %s\n", strings.Join(in, " "))
	}
	return err
}

// migrationDocument is a machine in `migrate --dry-run --json`.
type migrationDocument struct {
	Event      string   `json:"event"` // migration
	Name       string   `json:"name"`
	Host       string   `json:"host"`
	Runs       string   `json:"runs,omitempty"`
	Would      string   `json:"would"` // enroll, nothing (it is enrolled), or fail
	Controller bool     `json:"controller"`
	Keeps      []string `json:"keeps"` // of the files that are the machine's own
	Error      string   `json:"error,omitempty"`
}

// surveyMigration goes to the machines and says what would be done. What it pins is forgotten.
func (a *app) surveyMigration(ctx context.Context, me *identity, o *provisionOptions, servers []provision.Server) error {
	controller, err := a.controllerOf(me, o)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp("", "nix-infra-survey-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	known := filepath.Join(dir, knownHostsFile)
	if pinned, err := os.ReadFile(a.own(knownHostsFile)); err == nil {
		if err := os.WriteFile(known, pinned, 0o600); err != nil {
			return err
		}
	}
	online := a.onlineNodes(ctx, me, controller)
	found := make([]migrationDocument, len(servers))
	looks := errgroup.Group{}
	looks.SetLimit(o.jobs)
	for i, s := range servers {
		looks.Go(func() error {
			d := migrationDocument{Event: "migration", Name: s.Name, Host: s.Host, Would: "enroll", Controller: s.Name == controller, Keeps: []string{}}
			ways, err := a.waysTo(s, o.sshKey, me.project)
			for j := range ways {
				ways[j].KnownHosts = known
			}
			if err == nil {
				err = d.survey(ctx, ways)
			}
			switch {
			case err != nil:
				d.Would, d.Error = "fail", message(err)
			case slices.Contains(online, s.Name):
				d.Would = "nothing"
			}
			found[i] = d
			return nil
		})
	}
	_ = looks.Wait() // what was found is in the documents
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return a.tellMigration(found)
}

// onlineNodes are those that the controller hears, where there is one already.
func (a *app) onlineNodes(ctx context.Context, me *identity, controller string) []string {
	if controller != "" {
		return nil
	}
	s, err := a.connectAs(ctx, me)
	if err != nil {
		a.note("which machines are enrolled was not found out: %s", message(err))
		return nil
	}
	defer s.Close()
	states, err := s.ListNodes(ctx)
	if err != nil {
		a.note("which machines are enrolled was not found out: %s", message(err))
	}
	return namesOf(slices.DeleteFunc(states, func(n protocol.NodeState) bool { return !n.Online }))
}

// survey looks at a machine.
func (d *migrationDocument) survey(ctx context.Context, ways []provision.Target) error {
	m, err := provision.Reach(ctx, ways, provision.Patience{}, func(error) {})
	if err != nil {
		return err
	}
	defer m.Close()
	facts, err := provision.Look(ctx, m)
	if err != nil {
		return err
	}
	d.Runs = facts.OS
	if !facts.NixOS {
		return fmt.Errorf("it runs %s, not NixOS; nix-infra provision converts it", facts.OS)
	}
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for _, file := range protocol.NodeFiles {
		if _, err := m.Run(ctx, nil, "test", "-e", "/etc/nixos/"+file); err == nil {
			d.Keeps = append(d.Keeps, file)
		}
	}
	return nil
}

func (a *app) tellMigration(found []migrationDocument) error {
	var failed []error
	var rows [][]ui.Cell
	for _, d := range found {
		if d.Error != "" {
			failed = append(failed, fmt.Errorf("%s: %s", d.Name, d.Error))
		}
		if a.json {
			a.document(d)
			continue
		}
		would := map[string]string{"enroll": "be enrolled", "nothing": "stay enrolled", "fail": "fail"}[d.Would]
		if d.Controller && d.Error == "" {
			would += ", and become the controller"
		}
		rows = append(rows, ui.Text(d.Name, d.Host, d.Runs, would, strings.Join(d.Keeps, " ")))
	}
	if !a.json {
		a.out.Table([]string{"MACHINE", "HOST", "RUNS", "WOULD", "KEEPS"}, rows)
		a.say("nothing was changed\n")
	}
	if len(failed) > 0 {
		return &outcome{SomeFailed, several("can't be migrated as they are", failed)}
	}
	return nil
}
