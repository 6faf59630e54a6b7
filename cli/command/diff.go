package command

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

type diffOptions struct {
	treeFlags
	stat, closure, exitCode bool
	build                   time.Duration
}

func (a *app) diffCommand() *cobra.Command {
	var o diffOptions
	c := &cobra.Command{
		Use:   "diff SELECTOR...",
		Short: "Show what a deploy would change",
		Long: `Show what a deploy would change: the files of each node that are other ones now than what was deployed to it
last, and the names of secrets that it would get, lose, or get another value of. What changes in the same way on many
nodes is shown once. A flake.lock that Nix made by itself is no change.

With --closure the nodes then build their systems, and say which units a switch would stop, restart, reload
and start, and which packages it would bring, remove and change; nothing is switched (it is a deploy with
--mode dry-activate). That is shown for each node and in sum.`,
		Example: `  nix-infra diff all
  nix-infra diff @web --stat
  nix-infra diff web1 --closure
  nix-infra diff all --exit-code --json`,
		Args: someNodes("what would a deploy to which nodes change?", "diff"),
		RunE: func(c *cobra.Command, args []string) error { return a.diff(c.Context(), args, o) },
	}
	f := c.Flags()
	f.BoolVar(&o.stat, "stat", false, "only count lines")
	f.BoolVar(&o.closure, "closure", false, "have the nodes build, and show what a switch would do to units and packages")
	f.BoolVar(&o.exitCode, "exit-code", false, "end with status 1 where files differ")
	f.DurationVar(&o.build, "build-timeout", 2*time.Hour, "with --closure: how long fetching and building may take")
	o.treeFlags.register(f)
	return c
}

func (a *app) diff(ctx context.Context, selectors []string, o diffOptions) error {
	flags := rolloutFlags{timeout: time.Minute, build: o.build}
	order, err := flags.order(project.Settings{}, protocol.DryActivate)
	if err != nil {
		return err
	}
	s, err := a.connect(ctx)
	if err != nil {
		return err
	}
	defer s.Close()
	chosen, all, err := a.choose(ctx, s, selectors, protocol.DryActivate)
	if err != nil {
		return err
	}
	t := a.newTrees(s.me.project, o.treeFlags, all)
	systems, err := composeAll(t, chosen)
	if err != nil {
		return err
	}
	differences, err := newDiffer(s).compare(ctx, systems, chosen)
	if err != nil {
		return err
	}
	if err := a.compareSecrets(ctx, s, t, chosen, differences); err != nil {
		return err
	}
	a.tellDifferences(differences, o.stat)
	if a.json {
		if err := a.tellContent(t, systems); err != nil {
			return err
		}
	}
	if o.closure {
		sealed, err := a.sealSecrets(s.me, t, chosen)
		if err != nil {
			return err
		}
		p, err := makePlan(s.me.signer, order, chosen, sealed.with(t.source), time.Now())
		if err != nil {
			return err
		}
		if err := a.carryOut(ctx, s, p, &flags); err != nil {
			return err
		}
	}
	return differences.outcome(o.exitCode)
}

// differ compares what would be deployed with what was.
type differ struct {
	s        *session
	verifier *protocol.Verifier

	// Asked for once, and only where a node's last deployment brought no files.
	deployments func(context.Context) ([]protocol.Deployment, error)

	mu    sync.Mutex
	blobs map[string][]byte // by digest: nodes share most of theirs
}

const (
	comparedAtOnce = 8
	searchedBack   = 50 // deployments, for the one that brought what runs
)

func newDiffer(s *session) *differ {
	d := &differ{s: s, verifier: s.me.verifier, blobs: map[string][]byte{}}
	var once sync.Once
	var all []protocol.Deployment
	var failed error
	d.deployments = func(ctx context.Context) ([]protocol.Deployment, error) {
		once.Do(func() { all, failed = s.Deployments(ctx, searchedBack) })
		return all, failed
	}
	return d
}

// difference is what a deploy would change on one node.
type difference struct {
	node       string
	deployment string // whose files are compared with; "": nothing was deployed yet
	unknown    string // why nothing can be compared
	changes    []change
	base       *protocol.Manifest // that deployment's; nil: there is none
	secrets    []secretChange
}

// change is a file that would be another one.
type change struct {
	path          string
	before, after *protocol.File // nil: there is none
	unified       string         // "" where both are there and only the mode changes
	added, gone   int            // lines
}

func (d *differ) compare(ctx context.Context, systems []*building, chosen []protocol.NodeState) (differences, error) {
	all := make(differences, len(systems))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(comparedAtOnce)
	for i, b := range systems {
		g.Go(func() (err error) {
			all[i], err = d.one(ctx, &chosen[i], b.tree)
			return err
		})
	}
	return all, g.Wait()
}

func (d *differ) one(ctx context.Context, n *protocol.NodeState, tree *project.Tree) (difference, error) {
	r := difference{node: n.Name}
	manifest, base, err := d.base(ctx, n)
	var unknown *unknownBase
	switch {
	case errors.As(err, &unknown):
		r.unknown = unknown.reason
		return r, nil
	case err != nil:
		return r, fmt.Errorf("%s: %w", n.Name, err)
	}
	before, after := map[string]*protocol.File{}, map[string]*protocol.File{}
	if r.base = base; base != nil {
		r.deployment = base.Deployment
		for i := range base.Files {
			before[base.Files[i].Path] = &base.Files[i]
		}
	}
	data := map[string][]byte{}
	for _, f := range tree.Files {
		data[f.Path] = f.Data
	}
	for _, f := range filesOf(tree) {
		after[f.Path] = &f
	}
	if after[lockFile] == nil {
		delete(before, lockFile)
	}
	paths := maps.Clone(before)
	maps.Copy(paths, after)
	for _, path := range slices.Sorted(maps.Keys(paths)) {
		c := change{path: path, before: before[path], after: after[path]}
		if c.before != nil && c.after != nil && c.before.SHA256 == c.after.SHA256 && c.before.Exec == c.after.Exec {
			continue
		}
		if base != nil { // all files of a node that is new are
			if err := d.lines(ctx, &c, n.Name, manifest, data[path]); err != nil {
				return r, fmt.Errorf("%s: %s: %w", n.Name, path, err)
			}
		}
		r.changes = append(r.changes, c)
	}
	return r, nil
}

// unknownBase says why it is not known what a node was brought.
type unknownBase struct{ reason string }

func (u *unknownBase) Error() string { return u.reason }

// base is the manifest, and its digest, that brought the files that a node has; nil where there was none yet.
func (d *differ) base(ctx context.Context, n *protocol.NodeState) (string, *protocol.Manifest, error) {
	digest, last, err := d.manifest(ctx, n.Name, "")
	if err != nil || last == nil || len(last.Files) > 0 {
		return digest, last, err
	}
	// A reboot, a way back or a closure from elsewhere: the files are of the deployment that brought what runs.
	deployments, err := d.deployments(ctx)
	if err != nil {
		return "", nil, err
	}
	for _, before := range deployments {
		digest, m, err := d.manifest(ctx, n.Name, before.ID)
		if errors.Is(err, &protocol.Refusal{Code: protocol.Unknown}) || err == nil && (m == nil || len(m.Files) == 0 || m.Mode == protocol.DryActivate) {
			continue // it had no part in it, or its manifest is not kept any more
		} else if err != nil {
			return "", nil, err
		}
		record, err := d.s.Deployment(ctx, protocol.DeploymentQuery{ID: before.ID, Brief: true, Names: []string{n.Name}})
		if err != nil {
			return "", nil, err
		}
		if r := record.Nodes[n.Name].Report; r != nil && n.Beat != nil && r.Closure == n.Beat.Closure {
			return digest, m, nil
		}
	}
	return "", nil, &unknownBase{fmt.Sprintf("deployment %s brought no files, and those of what runs are not kept any more", last.Deployment)}
}

// manifest is what a deployment has for a node. It counts as of the time at which it was signed: that its signer's
// credentials expired meanwhile does not matter for looking at it.
func (d *differ) manifest(ctx context.Context, node, deployment string) (digest string, m *protocol.Manifest, err error) {
	doc, err := d.s.Manifest(ctx, node, deployment)
	if err != nil || len(doc) == 0 {
		return "", nil, err
	}
	signed, err := protocol.Decode[protocol.Signed](doc)
	if err != nil {
		return "", nil, err
	}
	header, err := protocol.Decode[protocol.Header](signed.Header)
	if err != nil {
		return "", nil, err
	}
	m, _, err = d.verifier.Manifest(doc, node, time.Unix(header.NotBefore, 0))
	if err != nil {
		return "", nil, fmt.Errorf("what the controller says was deployed: %w", err)
	}
	return protocol.Digest(doc), m, nil
}

// lines finds out which lines of a file change.
func (d *differ) lines(ctx context.Context, c *change, node, manifest string, after []byte) error {
	var before []byte
	if c.before != nil {
		d.mu.Lock()
		before = d.blobs[c.before.SHA256]
		d.mu.Unlock()
		if before == nil {
			var err error
			if before, err = d.s.Blob(ctx, node, manifest, c.before.SHA256); err != nil {
				return err
			}
			d.mu.Lock()
			d.blobs[c.before.SHA256] = before
			d.mu.Unlock()
		}
	}
	return c.unify(before, after)
}
