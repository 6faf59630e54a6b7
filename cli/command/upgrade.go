package command

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// upgradeDocument says what upgrade-nixos pins, in --json.
type upgradeDocument struct {
	Event   string        `json:"event"` // upgrade
	Version string        `json:"nixos_version"`
	Pinned  string        `json:"pinned"` // defaults or nodes
	Nodes   []upgradeNode `json:"nodes"`
}

type upgradeNode struct {
	Node         string `json:"node"`
	Before       string `json:"before"`
	StateVersion string `json:"state_version"`
}

func (a *app) upgradeCommand() *cobra.Command {
	var o deployOptions
	c := &cobra.Command{
		Use:   "upgrade-nixos SELECTOR... --nixos-version V",
		Short: "Bring nodes to another release of NixOS",
		Long: `Bring nodes to another release of NixOS: pin it in nix-infra.yaml (defaults.nixos_version when it is for all
nodes, else nodes.NAME.nixos_version), and deploy.

system.stateVersion stays what it was: the version before is kept as state_version, and fills in [%%nixVersion%%]
where that is the value of stateVersion. It says with which release a machine was new, not which one it has.

The pin is written once all files can be composed (and built, with --build=local), and stays if nodes fail
to prove the new system and roll back: the next deploy tries again. To go back for good, run it again with
the version before.`,
		Example: `  nix-infra upgrade-nixos all --nixos-version 25.11 --canary 1 --batch 25% --soak 10m
  nix-infra upgrade-nixos web1 --nixos-version 25.11
  nix-infra upgrade-nixos all --nixos-version 25.11 --mode dry-activate`,
		Args: someNodes("upgrade which nodes?", "upgrade-nixos"),
		RunE: func(c *cobra.Command, args []string) error {
			o.targets = o.take(args)
			return a.upgrade(c.Context(), &o)
		},
	}
	f := c.Flags()
	f.StringVar(&o.nixosVersion, "nixos-version", "", "the release, such as 25.11")
	f.StringVar(&o.mode, "mode", string(protocol.Switch), "switch, boot, test or dry-activate (which pins nothing)")
	o.buildFlags.register(f)
	o.rolloutFlags.register(f, &a.batch)
	return withTarget(c)
}

func (a *app) upgrade(ctx context.Context, o *deployOptions) error {
	version := o.nixosVersion
	if version == "" {
		return errors.New("to which release? Give --nixos-version, such as 25.11")
	}
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
	s, err := a.connectAs(ctx, me)
	if err != nil {
		return err
	}
	defer s.Close()
	chosen, all, err := a.choose(ctx, s, o.targets, order.mode)
	if err != nil {
		return err
	}
	if o.where == here { // a key that is made now belongs into the settings of before, too
		if _, err := a.cacheKey(me.project, o.key); err != nil {
			return err
		}
	}
	before := me.project.Settings
	runs := releases(chosen)
	after := before.Upgrade(version, namesOf(chosen), len(chosen) == len(all), runs)
	if err := after.Validate(); err != nil {
		return err
	}
	if err := checkUpgrade(after, version, chosen); err != nil {
		return err
	}
	me.project.Settings = after
	from, err := a.sourceFor(ctx, me, s, o, chosen, all)
	if err != nil {
		return err
	}
	p, err := makePlan(me.signer, order, chosen, from, time.Now())
	if err != nil {
		return err
	}
	pins := order.mode != protocol.DryActivate && !reflect.DeepEqual(before, after)
	if pins {
		if _, err := a.changeSettings(func(now *project.Project) (project.Settings, error) {
			return now.Settings.Upgrade(version, namesOf(chosen), len(chosen) == len(all), runs), nil
		}); err != nil {
			return err
		}
	}
	a.tellUpgrade(upgradeOf(before, after, version, chosen, all, runs), pins)
	if _, err := os.Stat(filepath.Join(me.project.Dir, lockFile)); err == nil && pins {
		a.note("warning: %s locks the sources of the release before; Nix looks for those of %s when it builds, unless you renew it", lockFile, version)
	}
	err = a.carryOut(ctx, s, p, &o.rolloutFlags)
	if pins && status(ctx, err) == SomeFailed {
		a.note("%s keeps the pin: the next deploy tries %s again; to go back, run this again with --nixos-version and the version before", project.SettingsFile, version)
	}
	return err
}

// release is the start of what a node says of its NixOS, such as 25.11.20260101.abc.
var release = regexp.MustCompile(`^\d\d\.\d\d\b`)

// releases are those that nodes run, as far as they said.
func releases(chosen []protocol.NodeState) map[string]string {
	runs := map[string]string{}
	for _, n := range chosen {
		if n.Beat == nil {
			continue
		}
		if r := release.FindString(n.Beat.NixOS); r != "" {
			runs[n.Name] = r
		}
	}
	return runs
}

// checkUpgrade refuses a release before the one that a machine was new with: its data is not of that format.
func checkUpgrade(after project.Settings, version string, chosen []protocol.NodeState) error {
	var wrong []error
	for _, n := range chosen {
		if was := after.StateVersion(n.Name); release.MatchString(version) && release.MatchString(was) && version < was {
			wrong = append(wrong, fmt.Errorf("%s was new with NixOS %s (its state_version in %s), and can't have %s", n.Name, was, project.SettingsFile, version))
		}
	}
	if len(wrong) > 0 {
		return several("can't have that release; nothing was deployed", wrong)
	}
	return nil
}

func upgradeOf(before, after project.Settings, version string, chosen, all []protocol.NodeState, runs map[string]string) upgradeDocument {
	d := upgradeDocument{Event: "upgrade", Version: version, Pinned: "nodes"}
	if len(chosen) == len(all) {
		d.Pinned = "defaults"
	}
	for _, n := range chosen {
		d.Nodes = append(d.Nodes, upgradeNode{n.Name, first(before.Node(n.Name).NixOSVersion, runs[n.Name]), after.StateVersion(n.Name)})
	}
	return d
}

// tellUpgrade says what is pinned; nodes with the same versions in one line.
func (a *app) tellUpgrade(d upgradeDocument, pins bool) {
	if a.json {
		a.document(d)
		return
	}
	alike := map[string][]string{}
	for _, n := range d.Nodes {
		line := fmt.Sprintf("NixOS %s → %s, system.stateVersion stays %s", first(n.Before, "unknown"), d.Version, n.StateVersion)
		alike[line] = append(alike[line], n.Node)
	}
	var lines []string
	for line, names := range alike {
		lines = append(lines, fmt.Sprintf("%s: %s", some(names), line))
	}
	slices.Sort(lines)
	a.say("%s\n", strings.Join(lines, "\n"))
	switch {
	case !pins:
		a.say("%s stays as it is\n", project.SettingsFile)
	case d.Pinned == "defaults":
		a.say("pinned in %s: defaults.nixos_version\n", project.SettingsFile)
	default:
		a.say("pinned in %s: nixos_version of %s\n", project.SettingsFile, nodes(len(d.Nodes)))
	}
}
