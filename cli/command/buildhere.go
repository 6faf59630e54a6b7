package command

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
)

// building is one system that is built on this machine.
type building struct {
	node string
	tree *project.Tree
	own  map[string][]byte // files of the node itself, by path
	dir  string
	path string // store path, once it is built
}

// buildDocument is a step of a build on this machine, in --json.
type buildDocument struct {
	Event   string `json:"event"` // build
	Node    string `json:"node"`
	State   string `json:"state"` // building, built, pushing, pushed or failed
	Closure string `json:"closure"`
	Reason  string `json:"reason"`
}

// buildHere builds the systems of nodes on this machine, pushes them to the binary cache and signs them. Where one
// can't be built, nothing is pushed.
func (a *app) buildHere(ctx context.Context, s *session, o *deployOptions, t *trees, cache project.Cache, chosen []protocol.NodeState) (source, error) {
	if _, err := nix.LookPath("nix"); err != nil {
		return nil, fmt.Errorf("--build=local needs Nix on this machine, and %w; install it, or have the nodes build with --build=node", err)
	}
	key, err := a.cacheKey(t.project, o.key)
	if err != nil {
		return nil, err
	}
	systems, err := composeAll(t, chosen)
	if err != nil {
		return nil, err
	}
	if err := a.fetchOwnFiles(ctx, s, systems, chosen); err != nil {
		return nil, err
	}
	w := &workshop{app: a, verbose: o.verbose, impure: o.impure, push: cache.Push, key: key.secret}
	if err := w.run(ctx, systems, o.jobs); err != nil {
		return nil, err
	}
	built := map[string]*building{}
	for _, b := range systems {
		built[b.node] = b
	}
	return func(p *plan, m *protocol.Manifest) error {
		p.addTree(m, built[m.Node].tree)
		m.Closure = &protocol.Closure{Path: built[m.Node].path, Caches: cache.Pulls(), Keys: key.with(cache.Keys)}
		return nil
	}, nil
}

func composeAll(t *trees, chosen []protocol.NodeState) ([]*building, error) {
	var systems []*building
	var broken []error
	for _, n := range chosen {
		tree, err := t.of(n.Name)
		if err != nil {
			broken = append(broken, fmt.Errorf("%s: %w", n.Name, err))
			continue
		}
		systems = append(systems, &building{node: n.Name, tree: tree, own: map[string][]byte{}})
	}
	if len(broken) > 0 {
		return nil, several("can't be composed; nothing was deployed", broken)
	}
	return systems, nil
}

// fetchOwnFiles asks each node for the files that belong to it, without which its system can't be evaluated.
func (a *app) fetchOwnFiles(ctx context.Context, s *session, systems []*building, chosen []protocol.NodeState) error {
	var away []string
	for _, n := range chosen {
		if !n.Online {
			away = append(away, n.Name)
		}
	}
	byName := map[string]*building{}
	for _, b := range systems {
		byName[b.node] = b
	}
	if len(away) == 0 {
		r, err := ask(ctx, s, namesOf(chosen), protocol.OwnFiles, nil, answerTime, func(node string, l protocol.FileList) {
			b := byName[node]
			for _, name := range append(slices.Clone(protocol.NodeFiles), protocol.FactsFile) { // and nothing else that it may say it has
				if data, ok := l.Files[name]; ok && (name != protocol.FactsFile || b.has(protocol.ModuleFile)) {
					b.own[name] = data
				}
			}
		})
		if err != nil {
			return err
		}
		if len(r.failed) > 0 {
			return several("don't give the files that belong to them, without which nothing can be built here; nothing was deployed", r.failed)
		}
		away = r.silent
	}
	if len(away) > 0 {
		return &outcome{Unanswered, fmt.Errorf("--build=local needs files that belong to the nodes (%s), and these are offline: %s; leave them out, or have nodes build with --build=node",
			strings.Join(protocol.NodeFiles, ", "), some(away))}
	}
	return nil
}

// workshop builds systems and pushes them.
type workshop struct {
	*app
	verbose, impure bool
	push            string
	key             []byte
	live            *ui.Live
}

func (w *workshop) run(ctx context.Context, systems []*building, jobs int) (err error) {
	dir, err := os.MkdirTemp("", "nix-infra-build-")
	if err == nil {
		defer os.RemoveAll(dir)
		dir, err = filepath.EvalSymlinks(dir) // Nix takes no link on the way to a flake
	}
	if err != nil {
		return err
	}
	if !w.json {
		w.live = w.out.Live(fmt.Sprintf("building %s here", nodes(len(systems))))
		defer w.live.Close()
	}
	for _, b := range systems {
		b.dir = filepath.Join(dir, b.node)
		w.tell(b, "waiting", "", ui.Waiting)
	}
	if err := w.each(ctx, systems, jobs, w.build); err != nil {
		return err
	}
	return w.each(ctx, systems, jobs, w.pushOne)
}

// each does something for all systems, several at a time, and ends with the first that fails. That one's log is shown.
func (w *workshop) each(ctx context.Context, systems []*building, jobs int, do func(context.Context, *building) error) error {
	g, working := errgroup.WithContext(ctx)
	g.SetLimit(jobs)
	for _, b := range systems {
		g.Go(func() error {
			if working.Err() != nil {
				return working.Err()
			}
			err := do(working, b)
			if err == nil || working.Err() != nil {
				return err
			}
			w.tell(b, "failed", err.Error(), ui.Bad)
			return &failedBuild{b.node, err}
		})
	}
	err := g.Wait()
	var failed *failedBuild
	if ctx.Err() != nil || !errors.As(err, &failed) {
		return err
	}
	if w.live != nil {
		w.live.Close()
	}
	var run *nix.RunError
	if errors.As(failed.err, &run) {
		w.say("\n")
		w.printLog(run.Tail[max(0, len(run.Tail)-shownLines):])
	}
	return &outcome{SomeFailed, fmt.Errorf("%s: %w; nothing was deployed", failed.node, failed.err)}
}

// failedBuild is a system that could not be built or pushed.
type failedBuild struct {
	node string
	err  error
}

func (f *failedBuild) Error() string { return f.node + ": " + f.err.Error() }

// tell shows a step of a system.
func (w *workshop) tell(b *building, state, reason string, kind ui.Kind) {
	if w.json {
		if kind != ui.Waiting {
			w.document(buildDocument{"build", b.node, state, b.path, reason})
		}
		return
	}
	if reason != "" {
		state += ": " + reason
	}
	w.live.Set(b.node, state, kind)
}

func (w *workshop) build(ctx context.Context, b *building) error {
	w.tell(b, "building", "", ui.Active)
	if err := b.write(); err != nil {
		return err
	}
	if err := b.addPrograms(ctx); err != nil {
		return err
	}
	path, err := nix.Build(ctx, nix.BuildRequest{Dir: b.dir, Attr: protocol.SystemAttr(b.node), OutLink: b.dir + ".result", Impure: w.impure, Log: w.logger(b, "building")})
	if err != nil {
		return err
	}
	b.path = path
	w.tell(b, "built", "", ui.Good)
	return b.keepLock()
}

// logger shows the log of a step.
func (w *workshop) logger(b *building, step string) func(string) {
	return func(line string) {
		switch {
		case w.json:
		case w.verbose:
			w.live.Print(b.node + " | " + line)
		case w.out.Interactive():
			w.live.Set(b.node, step+": "+line, ui.Active)
		}
	}
}

// pushOne pushes a system and signs it. It is signed in the cache, which needs no rights on this machine's store;
// only the old way over SSH takes no signatures afterwards.
func (w *workshop) pushOne(ctx context.Context, b *building) error {
	w.tell(b, "pushing", "", ui.Active)
	log := w.logger(b, "pushing")
	copying := func() error { return nix.Copy(ctx, b.path, w.push, log) }
	signing := func(store string) error {
		return nix.Sign(ctx, nix.SignRequest{Store: store, Path: b.path, Key: w.key, Log: log})
	}
	var err error
	if strings.HasPrefix(w.push, "ssh://") {
		if err = signing(""); err == nil {
			err = copying()
		}
	} else if err = copying(); err == nil {
		err = signing(w.push)
	}
	if err == nil {
		w.tell(b, "pushed", "", ui.Good)
	}
	return err
}

func (b *building) has(file string) bool {
	return slices.ContainsFunc(b.tree.Files, func(f project.File) bool { return f.Path == file })
}

// write lays the tree and the node's own files out for Nix.
func (b *building) write() error {
	files := slices.Clone(b.tree.Files)
	for name, data := range b.own {
		files = append(files, project.File{Path: name, Mode: 0o644, Data: data})
	}
	for _, f := range files {
		path := filepath.Join(b.dir, filepath.FromSlash(f.Path))
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			return err
		}
		if err := os.WriteFile(path, f.Data, f.Mode); err != nil {
			return err
		}
	}
	return nil
}

// lockFile is what Nix writes into a flake that it evaluates.
const lockFile = "flake.lock"

// keepLock takes a lock that Nix made into the tree, so that the node's /etc/nixos shows what was built.
func (b *building) keepLock() error {
	if b.has(lockFile) {
		return nil
	}
	data, err := os.ReadFile(filepath.Join(b.dir, lockFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	} else if err != nil {
		return err
	}
	tree := *b.tree
	tree.Files = append(slices.Clone(tree.Files), project.File{Path: lockFile, Mode: 0o644, Data: data})
	b.tree = &tree
	return nil
}
