package command

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

type deployOptions struct {
	targets                  []string
	mode                     string
	timeout, build, settle   time.Duration
	detach, verbose          bool
	nodeModule, nixosVersion string
	testDir                  string
	allowUnknownPlaceholders bool
	impure                   bool
}

func (a *app) deployCommand() *cobra.Command {
	var o deployOptions
	c := &cobra.Command{
		Use:   "deploy SELECTOR...",
		Short: "Deploy the project to nodes, and watch them prove it or roll back",
		Long: `Deploy the project to nodes. Each one fetches its files, builds its system, activates it and proves
it: it must reach the controller, and no unit may fail. A node that can't prove it within --timeout goes
back to the system that ran before, by itself.

Nodes that are offline take it over when they come back. Ctrl-C while watching detaches: the deployment
goes on. The exit status is 0 only if every node confirmed, 1 if one failed or rolled back, 3 if some
are offline or were not done in time.`,
		Example: `  nix-infra deploy web1 web2
  nix-infra deploy --target="@web not web3" --timeout 10m
  nix-infra deploy all --mode dry-activate
  nix-infra deploy all --detach
  nix-infra deploy testnode001 --test-dir __test__/hello`,
		RunE: func(c *cobra.Command, args []string) error {
			o.targets = append(o.targets, args...)
			return a.deploy(c.Context(), o)
		},
	}
	f := c.Flags()
	f.StringArrayVar(&o.targets, "target", nil, "nodes to deploy to, as a selector; repeatable")
	f.StringVar(&o.mode, "mode", string(protocol.Switch), "switch, boot, test or dry-activate")
	f.DurationVar(&o.timeout, "timeout", 5*time.Minute, "from the start of activation to the proof; then the node rolls back")
	f.DurationVar(&o.build, "build-timeout", 2*time.Hour, "how long fetching and building may take")
	f.DurationVar(&o.settle, "settle", 5*time.Second, "for how long no unit may fail after activation")
	f.BoolVar(&o.detach, "detach", false, "don't watch")
	f.BoolVarP(&o.verbose, "verbose", "v", false, "print the build logs")
	f.StringVar(&o.nodeModule, "node-module", "", "node type for all of them, such as node_types/standalone_machine.nix")
	f.StringVar(&o.nixosVersion, "nixos-version", "", "NixOS version for all of them")
	f.StringVar(&o.testDir, "test-dir", "", "folder of a test whose nodes and app modules come on top")
	f.BoolVar(&o.allowUnknownPlaceholders, "allow-unknown-placeholders", false, "leave placeholders that nobody knows as they are")
	f.BoolVar(&o.impure, "impure", false, "let the evaluation see the node's environment")
	return c
}

func (o *deployOptions) check() error {
	if len(o.targets) == 0 || strings.TrimSpace(strings.Join(o.targets, "")) == "" {
		return errors.New("deploy to which nodes? Name them (nix-infra deploy web1 @db), or say all")
	}
	if !slices.Contains(protocol.Modes, protocol.Mode(o.mode)) {
		return fmt.Errorf("--mode %q: use switch, boot, test or dry-activate", o.mode)
	}
	for _, d := range []struct {
		flag     string
		value    time.Duration
		min, max time.Duration
	}{
		{"--timeout", o.timeout, time.Second, 24 * time.Hour},
		{"--build-timeout", o.build, time.Second, 7 * 24 * time.Hour},
		{"--settle", o.settle, 0, o.timeout - time.Second},
	} {
		if d.value < d.min || d.value > d.max || d.value%time.Second != 0 {
			return fmt.Errorf("%s %s: use whole seconds from %s to %s", d.flag, d.value, d.min, d.max)
		}
	}
	return nil
}

// deploymentStart is the first document of `deploy --json`.
type deploymentStart struct {
	Event      string        `json:"event"` // deployment
	Deployment string        `json:"deployment"`
	Mode       protocol.Mode `json:"mode"`
	Nodes      []string      `json:"nodes"`
	Offline    []string      `json:"offline"`
	Uploaded   int           `json:"uploaded_blobs"`
	Bytes      int64         `json:"uploaded_bytes"`
}

func (a *app) deploy(ctx context.Context, o deployOptions) error {
	if err := o.check(); err != nil {
		return err
	}
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	all, err := s.ListNodes(ctx)
	if err != nil {
		return err
	}
	chosen, err := selectFrom(all, o.targets)
	if err != nil {
		return err
	}
	if len(chosen) == 0 {
		return errors.New("the targets name no node; nix-infra nodes lists them")
	}
	p, err := planDeployment(s.me, o, chosen, all, time.Now())
	if err != nil {
		return err
	}
	for _, w := range p.warnings {
		a.note("warning: %s", ui.Clean(w))
	}
	uploaded, err := s.Upload(ctx, p.blobs)
	if err != nil {
		return err
	}
	a.log.Debug("uploaded", "blobs", uploaded.Blobs, "bytes", uploaded.Bytes, "of", len(p.blobs))
	if o.detach {
		return a.handOver(ctx, s, p, uploaded, true)
	}
	w := newWatch(a, s, p, o)
	stop, err := s.Watch(p.request.Deployment, w.event)
	if err != nil {
		return err
	}
	defer stop()
	if err := a.handOver(ctx, s, p, uploaded, false); err != nil {
		w.abandon()
		return err
	}
	w.begin()
	return w.run(ctx)
}

// handOver makes the plan wanted. Up to here, nothing was wanted of anybody.
func (a *app) handOver(ctx context.Context, s *session, p *plan, uploaded client.Uploaded, detach bool) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.Deploy(ctx, p.request); err != nil {
		return p.explain(ctx, err)
	}
	if a.json {
		a.document(deploymentStart{"deployment", p.request.Deployment, p.request.Mode, p.names(), list(p.offline()), uploaded.Blobs, uploaded.Bytes})
	}
	if detach {
		a.say("deployment %s to %s; nix-infra deployment show %s tells how it goes\n", p.request.Deployment, nodes(len(p.items)), p.request.Deployment)
	}
	return nil
}

// nodes is "1 node" or "2 nodes".
func nodes(n int) string {
	if n == 1 {
		return "1 node"
	}
	return fmt.Sprintf("%d nodes", n)
}
