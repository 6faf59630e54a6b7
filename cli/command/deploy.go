package command

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/protocol"
)

type deployOptions struct {
	targets []string
	mode    string
	expect  string // digest of what is to be deployed
	treeFlags
	buildFlags
	bundleFlags
	rolloutFlags
}

func (a *app) deployCommand() *cobra.Command {
	var o deployOptions
	c := &cobra.Command{
		Use:   "deploy SELECTOR...",
		Short: "Deploy the project to nodes, and watch them prove it or roll back",
		Long: `Deploy the project to nodes. Each one fetches its files, builds its system, activates it and proves
it: it must reach the controller, and no unit may fail. A node that can't prove it within --timeout goes
back to the system that ran before, by itself.

The controller lets it out in waves: --canary nodes first, then --batch at a time, in the --order of tags,
each wave when the one before has ended and --soak is over. When more than --max-failures nodes failed, no
further node gets it. Without any of these, all nodes get it at once. The section rollout of nix-infra.yaml
has the defaults, in the same words.

With --build=local the systems are built on this machine, pushed to a binary cache (nix copy) and signed;
nodes fetch them, and evaluate and build nothing. With --build=cache PATH they fetch one that is there already.
With --out nothing is deployed: the deployment of one node is written into a file, which nix-infra-agent apply
carries out on the node when no controller can be reached.

Nodes that are offline take it over when they come back. Ctrl-C while watching detaches: the deployment
goes on, and nix-infra rollout watch follows it again. The exit status is 0 only if every node confirmed,
1 if one failed or rolled back, or the rollout was stopped or paused, 3 if some are offline.`,
		Example: `  nix-infra deploy web1 web2
  nix-infra deploy --target="@web not web3" --timeout 10m
  nix-infra deploy all --canary 1 --batch 25% --soak 10m --max-failures 2 --on-failure rollback
  nix-infra deploy all --order @db,@web --max-unavailable 10% --at 22:00
  nix-infra deploy all --window "mon-fri 22:00-04:00 Europe/Stockholm" --detach
  nix-infra deploy all --mode dry-activate
  nix-infra deploy @small --build=local --jobs 4 --cache-push s3://our-cache?region=eu-north-1
  nix-infra deploy web1 --build=cache /nix/store/3c2k…-nixos-system-web1-25.11
  nix-infra deploy web1 --out web1.bundle
  nix-infra deploy @web --expect "$(nix-infra diff @web --json | jq -r 'select(.event == "content").digest')"
  nix-infra deploy testnode001 --test-dir __test__/hello`,
		RunE: func(c *cobra.Command, args []string) error {
			o.targets = append(o.targets, o.take(args)...)
			return a.deploy(c.Context(), &o)
		},
	}
	o.register(c.Flags(), &a.batch)
	return c
}

// register adds the flags to a command's, and with them what holds without them. quiet is what --batch alone sets.
func (o *deployOptions) register(f *pflag.FlagSet, quiet *bool) {
	f.StringArrayVar(&o.targets, "target", nil, targetUsage)
	f.StringVar(&o.mode, "mode", string(protocol.Switch), "switch, boot, test or dry-activate")
	f.StringVar(&o.expect, "expect", "", "deploy only what has this `digest`, as diff --json said it of the same nodes, and else nothing")
	o.treeFlags.register(f)
	o.buildFlags.register(f)
	o.bundleFlags.register(f)
	o.rolloutFlags.register(f, quiet)
}

func (o *deployOptions) check() error {
	if len(o.targets) == 0 || strings.TrimSpace(strings.Join(o.targets, "")) == "" {
		return errors.New("deploy to which nodes? Name them (nix-infra deploy web1 @db), or say all")
	}
	if !slices.Contains(protocol.Modes, protocol.Mode(o.mode)) {
		return fmt.Errorf("--mode %q: use switch, boot, test or dry-activate", o.mode)
	}
	if o.expect != "" && (!protocol.IsDigest(o.expect) || o.where != onNode || o.out != "") {
		return errors.New("--expect takes the digest that nix-infra diff --json ends with, of what the nodes build themselves: no --build and no --out go with it")
	}
	if err := o.buildFlags.check(); err != nil {
		return err
	}
	return o.bundleFlags.check(o)
}

func (a *app) deploy(ctx context.Context, o *deployOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	me, err := a.identity()
	if err != nil {
		return err
	}
	order, err := o.order(me.project.Settings, protocol.Mode(o.mode))
	if err != nil {
		return err
	}
	if o.out != "" {
		return a.deployToFile(ctx, me, order, o)
	}
	s, err := a.connectAs(ctx, me)
	if err != nil {
		return err
	}
	defer s.Close()
	chosen, all, err := a.choose(ctx, s, o.targets, order.mode)
	if err != nil {
		return err
	}
	from, err := a.sourceFor(ctx, me, s, o, chosen, all)
	if err != nil {
		return err
	}
	p, err := makePlan(me.signer, order, chosen, from, time.Now())
	if err != nil {
		return err
	}
	if err := a.expect(me.project, p, o.expect); err != nil {
		return err
	}
	if order.mode == protocol.DryActivate {
		a.tellSecrets(p)
	}
	return a.carryOut(ctx, s, p, &o.rolloutFlags)
}
