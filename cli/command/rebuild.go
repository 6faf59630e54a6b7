package command

import (
	"context"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/protocol"
)

// rebuild is what a text asks for that the earlier tool's scripts have nodes run after they brought them their files.
type rebuild struct {
	impure, back bool
}

// parseRebuild recognises nixos-rebuild switch, with options that don't change what it is; nothing else, and no text in which a
// shell would find more than that.
func parseRebuild(text string) (r rebuild, ok bool) {
	words := strings.Fields(text)
	if len(words) < 2 || words[0] != "nixos-rebuild" || words[1] != "switch" {
		return r, false
	}
	for _, w := range words[2:] {
		switch w {
		case "--fast":
		case "--impure":
			r.impure = true
		case "--rollback":
			r.back = true
		default:
			return r, false
		}
	}
	return r, true
}

// rebuildNodes is what nixos-rebuild switch is here: a deployment of the nodes, or their way back. On the node itself it
// would build the files of the last deployment, prove nothing, and leave a drift.
func (a *app) rebuildNodes(ctx context.Context, selectors []string, r rebuild) error {
	if r.back {
		a.note("nixos-rebuild switch --rollback is nix-infra rollback here: each node goes back to what it proved before, and proves it again")
		flags := rolloutFlags{back: true}
		flags.register(pflag.NewFlagSet("", pflag.ContinueOnError), new(bool))
		return a.orderNodes(ctx, selectors, protocol.Switch, &flags, rollbackTo(protocol.Rollback{}), nil)
	}
	a.note("nixos-rebuild switch is nix-infra deploy here: each node gets its files, builds, and proves the system or goes back")
	var o deployOptions
	o.register(pflag.NewFlagSet("", pflag.ContinueOnError), new(bool))
	o.targets, o.impure = slices.Clone(selectors), r.impure
	return a.deploy(ctx, &o)
}
