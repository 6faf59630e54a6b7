package command

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
)

// provisionOptions are what provision, init-machine and migrate are told. The section provision of the settings has what
// the flags don't say.
type provisionOptions struct {
	names        []string
	provider     string
	order        provision.Order // type, location, image, placement group, networks, firewalls
	labels       []string        // key=value
	nixosVersion string
	nodeModule   string

	method, mutation, infectScript string

	sshKey           string
	controller       string // the node that becomes it, or none; "": the first, where the project has none
	agentBinary      string
	controllerBinary string
	tags             []string
	jobs             int
	wait             time.Duration

	create, deploy, dryRun bool
}

// noController is what --controller says where none may be made.
const noController = "none"

// provisionCommand deploys by default where deploy says so: the scripts of the earlier tool do that by another command.
func (a *app) provisionCommand(deploy bool) *cobra.Command {
	o := &provisionOptions{create: true}
	var names string
	var noDeploy bool
	c := &cobra.Command{
		Use:   "provision NAME...",
		Short: "Make machines, convert them to NixOS, enroll them and deploy to them",
		Long: `Make machines where they are missing, convert them to NixOS, enroll them as nodes, and deploy to them: one command from
nothing to nodes that run their configuration. Machines come from the project's servers.yaml, else from Hetzner
(HCLOUD_TOKEN); SSH is used until the agent runs, and then no more.

A machine goes through these phases, many machines at a time: create, reach (by SSH; its host key is pinned), look
(NixOS stays; Debian and what is made of it are converted; all else is refused), convert, reboot, verify, agent, heartbeat.
Then one deployment goes to all of them, and where close_ssh says so, it is checked that SSH is closed to the world and open
to nix-infra ssh. One that fails stops no other. After Ctrl-C, or a failure, run the same command again: what is done is asked
of the machines, and it goes on there. A conversion goes on without this program.

The conversion script is nixos-infect, of a fixed commit, which nix-infra init --fetch brings, or --infect-script. With
--mutation, it is another script in nix-infra/infect/, run with --apply; you then reboot, and run this again.

Where the project has no controller yet, the first machine becomes it, too, or that of --controller.`,
		Example: `  nix-infra provision web1 web2 db1 --dry-run
  nix-infra provision web1 web2 db1 --nixos-version 25.11 --location hel1 --machine-type cpx22
  nix-infra provision old1 --method none --no-deploy         # NixOS runs on it
  nix-infra provision --node-names="node001 node002" --nixos-version=25.11 --location=hel1 --machine-type=cpx22 --batch`,
		RunE: func(c *cobra.Command, args []string) error {
			o.names, o.deploy = append(args, nodeList(names)...), !noDeploy
			return a.provision(c.Context(), o)
		},
	}
	f := c.Flags()
	f.StringVar(&names, "node-names", "", "the `nodes`, in one text, in place of NAME...")
	o.creationFlags(f)
	o.conversionFlags(f)
	o.enrolmentFlags(f)
	f.BoolVar(&noDeploy, "no-deploy", !deploy, "enroll them, and leave the deployment to another command")
	f.BoolVar(&o.dryRun, "dry-run", false, "only say what would be made, and what it costs")
	return c
}

func (o *provisionOptions) creationFlags(f *pflag.FlagSet) {
	f.StringVar(&o.provider, "provider", "", providerUsage)
	f.StringVar(&o.order.Type, "machine-type", "", "such as cpx22")
	f.StringVar(&o.order.Location, "location", "", "such as hel1")
	f.StringVar(&o.order.Image, "image", "", "what a new machine runs at first, such as debian-12")
	f.StringVar(&o.order.PlacementGroup, "placement-group", "", "group whose machines don't share hardware; made where it is missing")
	f.StringArrayVar(&o.order.Networks, "network", nil, "private network to be in; repeatable")
	f.StringArrayVar(&o.order.Firewalls, "firewall", nil, "firewall of the provider's; repeatable")
	f.StringArrayVar(&o.labels, "label", nil, "`key=value` at the provider; repeatable")
}

func (o *provisionOptions) conversionFlags(f *pflag.FlagSet) {
	f.StringVar(&o.nixosVersion, "nixos-version", "", "their NixOS version, such as 25.11; recorded where the settings say another")
	f.StringVar(&o.method, "method", "", "how a machine becomes a NixOS machine: infect, nixos-anywhere or none (default infect)")
	f.StringVar(&o.infectScript, "infect-script", "", "`file` with the conversion script (default: nix-infra/infect/nixos-infect)")
	f.StringVar(&o.mutation, "mutation", "", "`name` of another conversion script in nix-infra/infect/")
}

func (o *provisionOptions) enrolmentFlags(f *pflag.FlagSet) {
	f.StringVar(&o.sshKey, "ssh-key", "", "SSH key file, or the name of a key in the project's ssh folder")
	f.StringVar(&o.controller, "controller", "", "the `machine` that becomes the controller, too; none: no one may (default: the first, where the project has no controller)")
	f.StringVar(&o.agentBinary, "agent-binary", "", "the agent to upload (default: the one beside this program)")
	f.StringVar(&o.controllerBinary, "controller-binary", "", "the controller to upload (default: the one beside this program)")
	f.StringArrayVar(&o.tags, "tag", nil, "tag of the nodes; repeatable")
	f.IntVar(&o.jobs, "jobs", 20, "machines at a time")
	f.DurationVar(&o.wait, "wait", time.Minute, "how long to wait for a machine's first sign of life")
}

func (o *provisionOptions) check(settings project.Settings) error {
	if len(o.names) == 0 {
		return errors.New("which machines? Name them (nix-infra provision web1 web2)")
	}
	for i, name := range o.names {
		if err := project.ValidNodeName(name); err != nil {
			return err
		}
		if slices.Contains(o.names[:i], name) {
			return fmt.Errorf("%s is named twice", name)
		}
	}
	if o.jobs < 1 {
		return fmt.Errorf("--jobs %d: use 1 or more", o.jobs)
	}
	if o.provider != "" && !slices.Contains(project.Providers, o.provider) {
		return fmt.Errorf("--provider %q is not known; use %s", o.provider, strings.Join(project.Providers, " or "))
	}
	o.method = first(o.method, first(string(settings.Provision.Method), string(project.MethodInfect)))
	if err := project.ValidMethod(project.Method(o.method)); err != nil {
		return fmt.Errorf("--method %w", err)
	}
	if c := o.controller; c != "" && c != noController && !slices.Contains(o.names, c) {
		return fmt.Errorf("--controller %s: it is not among the machines: %s", c, some(o.names))
	}
	return o.completeOrder(settings)
}

// completeOrder fills in what the settings say.
func (o *provisionOptions) completeOrder(settings project.Settings) error {
	p := settings.Provision
	labels := maps.Clone(p.Labels)
	if labels == nil {
		labels = map[string]string{}
	}
	for _, l := range o.labels {
		key, value, ok := strings.Cut(l, "=")
		if !ok {
			return fmt.Errorf("--label %q: expected key=value", l)
		}
		if err := project.ValidLabel(key, value); err != nil {
			return fmt.Errorf("--label: %w", err)
		}
		labels[key] = value
	}
	r := &o.order
	r.Fleet, r.Names, r.Labels = settings.Fleet, o.names, labels
	r.Type, r.Location, r.Image = first(r.Type, p.MachineType), first(r.Location, p.Location), first(r.Image, p.Image)
	r.PlacementGroup = first(r.PlacementGroup, p.PlacementGroup)
	if len(r.Networks) == 0 {
		r.Networks = p.Networks
	}
	if len(r.Firewalls) == 0 {
		r.Firewalls = p.Firewalls
	}
	return nil
}

// provision carries it out, from the machines at their provider to the check that SSH is closed.
func (a *app) provision(ctx context.Context, o *provisionOptions) error {
	me, err := a.identity()
	if err != nil {
		return err
	}
	if err := o.check(me.project.Settings); err != nil {
		return err
	}
	provider, err := a.provider(me.project, o.provider)
	if err != nil {
		return err
	}
	o.order.SSHKey = a.newMachinesKey(o.sshKey, me.project)
	plan, err := provider.Plan(ctx, o.order)
	if err != nil {
		return err
	}
	if o.dryRun {
		return a.tellMachines(me, o, plan)
	}
	if o.deploy {
		if err := a.refuseUndeployable(me.project, o); err != nil {
			return err
		}
	}
	b, err := a.newBringIn(me, o, provider, plan)
	if err != nil {
		return err
	}
	in, failed := b.run(ctx)
	if ctx.Err() != nil {
		return &outcome{Interrupted, errors.New("interrupted; run the same command again, it goes on where this ended")}
	}
	if o.deploy && len(in) > 0 {
		if err := a.deployTo(ctx, provider, o, in); err != nil && failed == nil {
			return err
		} else if err != nil {
			return &outcome{SomeFailed, errors.Join(failed, err)}
		}
	}
	return failed
}

// newMachinesKey is the key pair that a new machine lets in: its public half is empty where it is missing, which is a
// mistake only where a machine is made.
func (a *app) newMachinesKey(named string, p *project.Project) provision.SSHKey {
	for _, file := range a.sshKeys(named, p) {
		if line, err := os.ReadFile(file + ".pub"); err == nil {
			return provision.SSHKey{Name: filepath.Base(file), PublicKey: strings.TrimSpace(string(line))}
		}
	}
	return provision.SSHKey{Name: first(named, p.SSHKeyName())}
}

// refuseUndeployable keeps from making machines that nothing could be deployed to.
func (a *app) refuseUndeployable(p *project.Project, o *provisionOptions) error {
	for _, file := range []string{"flake.nix", "configuration.nix"} {
		if _, err := os.Stat(filepath.Join(p.Dir, file)); err != nil {
			return fmt.Errorf("there is no %s in %s, so there is nothing to deploy; write it (nix-infra init --template fleet makes one), or give --no-deploy", file, p.Dir)
		}
	}
	for _, name := range o.names {
		if first(o.nixosVersion, p.Settings.Node(name).NixOSVersion) == "" {
			return fmt.Errorf("no NixOS version is known for %s; give --nixos-version, or set defaults.nixos_version in %s", name, project.SettingsFile)
		}
	}
	return nil
}
