package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"slices"
	"sync"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

type destroyOptions struct {
	provider, control   string
	keepServer, offline bool
}

func (a *app) destroyCommand() *cobra.Command {
	var o destroyOptions
	var targets []string
	c := &cobra.Command{
		Use:   "destroy NAME...",
		Short: "Take machines out of the fleet, and delete them at the provider",
		Long: `Take machines out of the fleet and delete them at the provider, with all that is on them. First their credentials
are revoked and the controller forgets them, as nix-infra node remove does; then the servers are deleted. Machines are named
one by one, and the name of each has to be typed again, unless --batch says that nothing is asked.

A machine of your own (in servers.yaml, with its ip) is only taken out of the fleet, and goes on running what it has. So is
any with --keep-server. A server that nix-infra did not make, or not for this fleet as its labels say, is deleted only if
that is said, or --batch is: it is pointed out. One of another fleet is never.

What the project says of a machine (its file below nodes/, its settings) stays for the next one of its name; its pinned host
key, its place in the cluster and its URL as a controller don't. After a failure, run the same command again.`,
		Example: `  nix-infra destroy web3
  nix-infra destroy web3 web4 --batch
  nix-infra destroy web3 --keep-server                  # out of the fleet only
  nix-infra cluster destroy --batch --target="service001 service002" --ctrl-nodes="etcd001"`,
		RunE: func(c *cobra.Command, args []string) error {
			var names []string
			for _, text := range append(args, targets...) {
				names = append(names, nodeList(text)...)
			}
			return a.destroy(c.Context(), names, o)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&targets, "target", nil, "the `machines`, in one text, in place of NAME...; repeatable")
	f.StringVar(&o.provider, "provider", "", providerUsage)
	f.StringVar(&o.control, "ctrl-nodes", "", "the control `nodes` of the cluster, which must be the recorded ones")
	f.BoolVar(&o.keepServer, "keep-server", false, "only take them out of the fleet")
	f.BoolVar(&o.offline, "offline", false, "the controller is gone for good: only delete the servers")
	return c
}

// doomed is a machine that is to be destroyed.
type doomed struct {
	name   string
	node   *protocol.NodeState // nil where no node of that name is enrolled
	server *provision.Server   // nil where there is none, or it is to be kept
	sought bool                // at the provider
	err    error
}

func (a *app) destroy(ctx context.Context, names []string, o destroyOptions) error {
	if len(names) == 0 {
		return errors.New("which machines? Name them (nix-infra destroy web3)")
	}
	slices.Sort(names)
	names = slices.Compact(names)
	for _, name := range names {
		if err := project.ValidNodeName(name); err != nil {
			return fmt.Errorf("%w; machines are named one by one here", err)
		}
	}
	p, err := a.openProject()
	if err != nil {
		return err
	}
	others := slices.DeleteFunc(nodeList(o.control), func(name string) bool { return slices.Contains(names, name) }) // may be gone since a run that failed
	if err := p.Settings.CheckControlNodes(others); err != nil && !errors.Is(err, project.ErrNoCluster) {
		return fmt.Errorf("--ctrl-nodes: %w", err)
	}
	all := make([]*doomed, len(names))
	for i, name := range names {
		all[i] = &doomed{name: name}
	}
	var at provision.Provider
	if !o.keepServer {
		if at, err = a.provider(p, o.provider); err != nil {
			return fmt.Errorf("%w (--keep-server only takes them out of the fleet)", err)
		}
		if err := findServers(ctx, at, all); err != nil {
			return err
		}
	}
	e, s, err := a.findNodes(ctx, all, o.offline)
	if err != nil {
		return err
	}
	if s != nil {
		defer s.Close()
	}
	if err := a.nothingThere(all); err != nil {
		return err
	}
	if err := a.confirmNames(p, all); err != nil {
		return err
	}
	if err := a.unregisterDoomed(ctx, e, s, all); err != nil {
		return err
	}
	a.deleteServers(ctx, at, all)
	if err := a.forgetMachines(p, all); err != nil {
		return err
	}
	return a.destroyed(ctx, all)
}

func findServers(ctx context.Context, at provision.Provider, all []*doomed) error {
	var names []string
	for _, d := range all {
		names = append(names, d.name)
	}
	servers, err := at.Servers(ctx, names...)
	if err != nil {
		return err
	}
	for _, d := range all {
		d.sought = true
		for _, s := range servers {
			if d.name == s.Name {
				d.server = &s
			}
		}
	}
	return nil
}

// findNodes asks the controller which of them are enrolled. The session is nil where nobody is to be asked: offline, or
// in a project that never had a fleet.
func (a *app) findNodes(ctx context.Context, all []*doomed, offline bool) (*enrolment, *session, error) {
	if _, err := os.Stat(a.own(fleetFile)); errors.Is(err, fs.ErrNotExist) || offline {
		return nil, nil, nil
	}
	e, err := a.openEnrolment()
	if err != nil {
		return nil, nil, err
	}
	s, err := a.connectAs(ctx, e.me)
	if err != nil {
		return nil, nil, fmt.Errorf("%w; if the controller is gone for good, --offline deletes the servers without it", err)
	}
	nodes, err := s.ListNodes(ctx)
	if err != nil {
		s.Close()
		return nil, nil, err
	}
	for i := range nodes {
		for _, d := range all {
			if d.name == nodes[i].Name {
				d.node = &nodes[i]
			}
		}
	}
	return e, s, nil
}

func (a *app) unregisterDoomed(ctx context.Context, e *enrolment, s *session, all []*doomed) error {
	var nodes []protocol.NodeState
	for _, d := range all {
		if d.node != nil {
			nodes = append(nodes, *d.node)
		}
	}
	if len(nodes) == 0 {
		return nil
	}
	return a.unregister(ctx, e, s, nodes...)
}

// deletionsAtOnce bounds how many servers are deleted at the same time: the provider bounds requests.
const deletionsAtOnce = 8

func (a *app) deleteServers(ctx context.Context, at provision.Provider, all []*doomed) {
	show := func(string, string, ui.Kind) {}
	if !a.json {
		live := a.out.Live("destroying")
		defer live.Close()
		show = live.Set
	}
	var mu sync.Mutex
	limit := errgroup.Group{}
	limit.SetLimit(deletionsAtOnce)
	for _, d := range all {
		if d.server == nil || d.server.Provider == provision.SelfHostedName {
			continue
		}
		limit.Go(func() error {
			err := at.Destroy(ctx, *d.server, func(what string) { show(d.name, what, ui.Active) })
			mu.Lock()
			d.err = err
			mu.Unlock()
			if err != nil {
				show(d.name, "not deleted", ui.Bad)
				return nil
			}
			show(d.name, "deleted", ui.Good)
			return nil
		})
	}
	_ = limit.Wait() // how each went is in doomed
}

// forgetMachines takes what was true of the machines only out of the project.
func (a *app) forgetMachines(p *project.Project, all []*doomed) error {
	for _, d := range all {
		if !d.gone() {
			continue
		}
		if err := provision.ForgetNode(a.own(knownHostsFile), d.name, d.address(p.Settings)); err != nil {
			return err
		}
		if err := a.forgetJournal(d.name); err != nil {
			return err
		}
	}
	_, err := a.changeSettings(func(now *project.Project) (project.Settings, error) { return withoutMachines(now.Settings, all), nil })
	return err
}

// gone tells whether the machine was deleted, and not only taken out of the fleet: now, or by a run that was ended before it
// could forget it.
func (d *doomed) gone() bool {
	if d.server == nil {
		return d.sought && d.node == nil
	}
	return d.err == nil && d.server.Provider != provision.SelfHostedName
}

// address is the machine's, as its provider has it, or as the settings do where it is gone.
func (d *doomed) address(settings project.Settings) string {
	if d.server != nil {
		return d.server.Host
	}
	return settings.Nodes[d.name].IPv4
}

// withoutMachines are the settings without what was true of deleted machines only.
func withoutMachines(after project.Settings, all []*doomed) project.Settings {
	after.Cluster.ControlNodes = slices.Clone(after.Cluster.ControlNodes)
	after.Cluster.ServiceGroups = maps.Clone(after.Cluster.ServiceGroups)
	after.Nodes = maps.Clone(after.Nodes)
	for _, d := range all {
		if !d.gone() {
			continue
		}
		address := d.address(after)
		after.Controllers = slices.DeleteFunc(slices.Clone(after.Controllers), func(url string) bool { return isAt(url, d.name, address) })
		after.Cluster.ControlNodes = slices.DeleteFunc(after.Cluster.ControlNodes, func(name string) bool { return name == d.name })
		delete(after.Cluster.ServiceGroups, d.name)
		if n, ok := after.Nodes[d.name]; ok {
			if n.OverlayIP = ""; n.IPv4 == address {
				n.IPv4 = ""
			}
			after.Nodes[d.name] = n
		}
	}
	return after
}

// forgetJournal removes what is remembered of a machine that was being brought in.
func (a *app) forgetJournal(name string) error {
	j, err := provision.OpenJournal(a.own(journalDir), name)
	if err != nil {
		return err
	}
	return j.Remove()
}
