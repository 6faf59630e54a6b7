package command

import (
	"context"
	"errors"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/ui"
)

// closedDocument says whether SSH is closed to the world on a node, and open through its agent, in --json.
type closedDocument struct {
	Event string `json:"event"` // closed
	Name  string `json:"name"`
	OK    bool   `json:"ok"`
	Error string `json:"error,omitempty"`
}

// closedTime is how long a port may be silent until it counts as closed.
const closedTime = 3 * time.Second

// checkClosed sees to it that SSH is closed on those nodes whose settings say so, as far as can be told from here, and that
// nix-infra ssh gets there all the same.
func (a *app) checkClosed(ctx context.Context, provider provision.Provider, o *provisionOptions, names []string) error {
	me, err := a.identity()
	if err != nil {
		return err
	}
	var closing []string
	for _, name := range names {
		if *me.project.Settings.Node(name).CloseSSH {
			closing = append(closing, name)
		}
	}
	if len(closing) == 0 {
		return nil
	}
	servers, err := provider.Servers(ctx, closing...)
	if err != nil {
		return err
	}
	s, err := a.connectAs(ctx, me)
	if err != nil {
		return err
	}
	defer s.Close()
	errs := make([]error, len(servers))
	var looks sync.WaitGroup
	for i, server := range servers {
		looks.Go(func() {
			ways, err := a.waysTo(server, o.sshKey, me.project)
			if err == nil {
				err = a.isClosed(ctx, s, ways[0])
			}
			errs[i] = err
		})
	}
	looks.Wait()
	if ctx.Err() != nil {
		return ctx.Err()
	}
	return a.tellClosed(servers, errs)
}

func (a *app) tellClosed(servers []provision.Server, errs []error) error {
	var wrong []error
	for i, server := range servers {
		d := closedDocument{"closed", server.Name, errs[i] == nil, ""}
		if errs[i] != nil {
			d.Error = message(errs[i])
			wrong = append(wrong, fmt.Errorf("%s: %w", server.Name, errs[i]))
		}
		if a.json {
			a.document(d)
		}
	}
	if len(wrong) > 0 {
		return &outcome{SomeFailed, several("are not closed as the settings say", wrong)}
	}
	a.say("%s\n", a.out.Paint(ui.Green, fmt.Sprintf("SSH is closed to the world on %s, and open to nix-infra ssh", nodes(len(servers)))))
	return nil
}

// isClosed tells what keeps a node from being closed to the world and open through its agent.
func (a *app) isClosed(ctx context.Context, s *session, t provision.Target) error {
	node, err := s.Node(ctx, t.Node)
	if err != nil {
		return err
	}
	to := &tunnels{s, node, net.JoinHostPort("127.0.0.1", "22")}
	c, err := to.open(ctx)
	if err != nil {
		return err
	}
	defer giveUp(c)
	key, err := provision.HostKey(ctx, c)
	if err != nil {
		return fmt.Errorf("its sshd, through the tunnel: %w", err)
	}
	if err := provision.CheckNode(t.KnownHosts, t.Node, key); err != nil {
		return err
	}
	t.Timeout = closedTime
	if t.Open(ctx) == nil {
		return fmt.Errorf("port %d of %s takes connections from here: its configuration opens it beside services.nix-infra-agent.closeSSH (close_ssh in %s), such as by networking.firewall.allowedTCPPorts",
			t.Port, t.Host, project.SettingsFile)
	}
	return nil
}

// deployTo deploys to machines that are in, as one deployment, and records their version and node module. They are new: no
// window, canary or soak of the project keeps them from it.
func (a *app) deployTo(ctx context.Context, provider provision.Provider, o *provisionOptions, names []string) error {
	u := &updateOptions{}
	u.flags(a, &cobra.Command{}, true) // with them, what holds where nothing is said
	u.back = true
	u.targets, u.nixosVersion, u.nodeModule = names, o.nixosVersion, o.nodeModule
	if err := a.update(ctx, u); err != nil {
		return err
	}
	err := a.checkClosed(ctx, provider, o, names)
	var how *outcome
	if err != nil && !errors.As(err, &how) {
		return &outcome{SomeFailed, fmt.Errorf("whether SSH is closed was not found out: %w", err)}
	}
	return err
}
