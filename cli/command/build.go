package command

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// Where the systems of a deployment are built.
const (
	onNode   = "node"
	here     = "local"
	prebuilt = "cache"
)

// buildFlags say where systems come from.
type buildFlags struct {
	where string
	paths []string // store paths among the arguments
	jobs  int
	push  string
	pull  []string
	key   string // file
}

func (b *buildFlags) register(f *pflag.FlagSet) {
	f.StringVar(&b.where, "build", onNode, "`where` systems are built: node (each builds its own), local (here, and they are pushed to a binary cache) or cache (a store path that is in one already)")
	f.IntVar(&b.jobs, "jobs", 2, "with --build=local: systems that are built at once")
	f.StringVar(&b.push, "cache-push", "", "with --build=local: `URL` of the binary cache to push to (default: cache.push in nix-infra.yaml)")
	f.StringArrayVar(&b.pull, "cache-pull", nil, "`URL` of a binary cache that the nodes pull from; repeatable (default: cache.pull, else cache.push in nix-infra.yaml)")
	f.StringVar(&b.key, "cache-key", "", "with --build=local: `file` with the secret key to sign with (default: the project's own, made when first needed)")
}

// take splits arguments into selectors, which it gives back, and store paths.
func (b *buildFlags) take(args []string) (selectors []string) {
	for _, arg := range args {
		if strings.HasPrefix(arg, "/") {
			b.paths = append(b.paths, arg)
		} else {
			selectors = append(selectors, arg)
		}
	}
	return selectors
}

func (b *buildFlags) check() error {
	switch {
	case b.where != onNode && b.where != here && b.where != prebuilt:
		return fmt.Errorf("--build %q: use node, local or cache", b.where)
	case b.where == prebuilt && len(b.paths) != 1:
		return fmt.Errorf("--build=cache deploys one store path: nix-infra deploy web1 --build=cache /nix/store/…-nixos-system-web1-25.11")
	case b.where == prebuilt && !protocol.IsStorePath(b.paths[0]):
		return fmt.Errorf("%q is not the path of a store object", b.paths[0])
	case b.where != prebuilt && len(b.paths) > 0:
		return fmt.Errorf("%s is no selector; a store path is deployed with --build=cache", b.paths[0])
	case b.jobs < 1:
		return fmt.Errorf("--jobs %d: use 1 or more", b.jobs)
	case b.where != here && (b.push != "" || b.key != ""):
		return errors.New("--cache-push and --cache-key go with --build=local, which builds here")
	case b.where == onNode && len(b.pull) > 0:
		return errors.New("--cache-pull goes with --build=local and --build=cache: a node that builds has its own binary caches")
	}
	for _, url := range slices.Concat(b.pull, []string{b.push}) {
		if url == "" {
			continue
		}
		if err := protocol.CheckCache(url); err != nil {
			return err
		}
	}
	return nil
}

// cache is the binary cache by the flags and, where they don't say, the settings.
func (b *buildFlags) cache(s project.Settings) (project.Cache, error) {
	c := s.Cache
	if b.push != "" { // what the settings say about pulling is about another one
		c.Push, c.Pull = b.push, nil
	}
	if len(b.pull) > 0 {
		c.Pull = b.pull
	}
	const where = "set %s in " + project.SettingsFile + ", or give %s"
	switch {
	case b.where == here && c.Push == "":
		return c, fmt.Errorf("there is no binary cache to push to: "+where, "cache.push", "--cache-push")
	case len(c.Pulls()) == 0 && c.Push != "":
		return c, fmt.Errorf("nodes can't pull from %s, a folder of this machine: "+where, c.Push, "cache.pull", "--cache-pull")
	case len(c.Pulls()) == 0:
		return c, fmt.Errorf("there is no binary cache that nodes could pull from: "+where, "cache.pull", "--cache-pull")
	case b.where == prebuilt && len(c.Keys) == 0:
		return c, fmt.Errorf("no key is known that nodes could check %s with: list the public key of the cache under cache.keys in %s", b.paths[0], project.SettingsFile)
	}
	return c, nil
}

// sourceFor is where the systems of a deployment come from. With --build=local, they are built and pushed before it
// returns, but not where one of the nodes can't have its secrets. s is nil where no controller is asked.
func (a *app) sourceFor(ctx context.Context, me *identity, s *session, o *deployOptions, chosen, all []protocol.NodeState) (source, error) {
	t := a.newTrees(me.project, o.treeFlags, all)
	sealed, err := a.sealSecrets(me, t, chosen)
	if err != nil {
		return nil, err
	}
	if o.where == onNode {
		return sealed.with(t.source), nil
	}
	cache, err := o.cache(me.project.Settings)
	if err != nil {
		return nil, err
	}
	if o.where == here {
		built, err := a.buildHere(ctx, s, o, t, cache, chosen)
		return sealed.with(built), err
	}
	return sealed.with(func(_ *plan, m *protocol.Manifest) error {
		m.Closure = &protocol.Closure{Path: o.paths[0], Caches: cache.Pulls(), Keys: cache.Keys}
		return nil
	}), nil
}
