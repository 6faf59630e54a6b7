package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// bring makes the system of a manifest be here, and says which one it is: it is built, comes from a
// binary cache, or is one that the node had before.
func (e *Engine) bring(ctx context.Context, m *protocol.Manifest) (string, error) {
	if m.Rollback != nil {
		obs, err := e.observe(ctx)
		if err != nil {
			return "", err
		}
		to, err := e.resolve(ctx, m.Rollback, obs)
		if to.closure == "" && err == nil {
			to.closure = obs.Running
		}
		return to.closure, err
	}
	if err := os.MkdirAll(e.o.Roots, 0o755); err != nil {
		return "", fmt.Errorf("can't make the folder of gc roots: %w", err)
	}
	netrc, err := e.secrets.Netrc(m.Secrets)
	if err != nil {
		return "", err
	}
	log := e.startLog(m.Deployment, protocol.Building)
	defer log.stop()
	link := filepath.Join(e.o.Roots, rootBuilt)
	c := m.Closure
	if c == nil {
		return e.o.Host.Build(ctx, Build{Dir: e.stagedTree(m.Deployment), Attr: m.Attr, Impure: m.Impure, OutLink: link, Netrc: netrc, Log: log.add})
	}
	if len(c.Caches) == 0 {
		log.add(fmt.Sprintf("%s has to be here already: no binary cache is named", c.Path))
	} else {
		log.add(fmt.Sprintf("substituting %s from %s; nothing is built", c.Path, strings.Join(c.Caches, ", ")))
	}
	return c.Path, e.o.Host.Substitute(ctx, Substitution{Path: c.Path, Caches: c.Caches, Keys: c.Keys, OutLink: link, Netrc: netrc, Log: log.add})
}

// resolve says which system a rollback means, without a closure where there is nothing to do.
func (e *Engine) resolve(ctx context.Context, r *protocol.Rollback, obs Observation) (to system, err error) {
	switch {
	case r.Before != "":
		e.mu.Lock()
		c, found := e.j.newest(func(c Confirmation) bool { return c.Deployment == r.Before })
		e.mu.Unlock()
		if !found || c.idle() {
			return system{}, nil
		}
		to = c.before()
	case r.Generation != 0:
		to.closure, err = e.generation(ctx, r.Generation)
	case r.Path != "":
		to.closure, err = r.Path, e.hasRun(ctx, r.Path, obs)
	default:
		if to, err = e.previous(ctx, obs); err == nil && to.closure == "" {
			err = errors.New("there is nothing to go back to: no other system was proven here, and the system profile has no older generation of another")
		}
	}
	if err != nil {
		return system{}, err
	}
	to.secrets = e.provenWith(to)
	if to.closure == obs.Running {
		return to, nil
	}
	if err := e.o.Host.Check(to.closure); err != nil {
		return system{}, fmt.Errorf("can't go back to %s: %w; `nix-infra generations %s` lists what is there", to.closure, err, e.o.Node)
	}
	return to, nil
}

// previous is where a rollback goes to that names nothing, without a closure where there is no such system.
func (e *Engine) previous(ctx context.Context, obs Observation) (system, error) {
	live, _ := e.secrets.Standing()
	e.mu.Lock()
	to := e.j.previous(system{obs.Running, live.Number})
	e.mu.Unlock()
	if to.closure != "" {
		return to, nil
	}
	all, err := e.o.Host.Generations(ctx)
	if err != nil {
		return system{}, err
	}
	for _, g := range all {
		if g.Number < obs.Generation && g.Closure != obs.Running {
			return system{closure: g.Closure}, nil
		}
	}
	return system{}, nil
}

// generation is the closure of a generation of the system profile.
func (e *Engine) generation(ctx context.Context, number int) (string, error) {
	all, err := e.o.Host.Generations(ctx)
	if err != nil {
		return "", err
	}
	for _, g := range all {
		if g.Number == number {
			return g.Closure, nil
		}
	}
	return "", fmt.Errorf("the system profile has no generation %d; `nix-infra generations %s` lists them", number, e.o.Node)
}

// hasRun refuses a path that never was a system of this machine: what runs here comes from manifests.
func (e *Engine) hasRun(ctx context.Context, closure string, obs Observation) error {
	e.mu.Lock()
	_, known := e.j.newest(func(c Confirmation) bool { return c.Closure == closure || c.Before == closure })
	e.mu.Unlock()
	if known || closure == obs.Running {
		return nil
	}
	all, err := e.o.Host.Generations(ctx)
	if err != nil {
		return err
	}
	for _, g := range all {
		if g.Closure == closure {
			return nil
		}
	}
	return fmt.Errorf("%s is no generation of the system profile and was never proven here; `nix-infra generations %s` lists what is there", closure, e.o.Node)
}

// tryable refuses a closure that is in quarantine.
func (e *Engine) tryable(closure string) error {
	e.mu.Lock()
	defer e.mu.Unlock()
	q, bad := e.j.Quarantine[closure]
	if !bad {
		return nil
	}
	return fmt.Errorf("in quarantine: this closure was rolled back from in deployment %s (%s); `nix-infra node release %s` lets it be tried again",
		q.Deployment, clip(q.Reason, maxReason/2), e.o.Node)
}

// madeOf is the manifest whose files an attempt's new closure is made of, and its digest: nil where no
// files of it are known.
func (e *Engine) madeOf(a *attempt, m *protocol.Manifest) (*protocol.Manifest, string) {
	digest := a.Digest
	if m.Rollback != nil || m.Mode == protocol.Reboot {
		if digest = a.Source; digest == "" {
			return nil, ""
		}
		var err error
		if m, err = stored(e.o.Dir, digest); err != nil {
			e.o.Log.Warn("the manifest of the system that was proven can't be read", "error", err)
			return nil, ""
		}
	}
	if len(m.Files) == 0 {
		return nil, ""
	}
	return m, digest
}

// show brings the source tree that a proven closure is made of into the node's own. Where that can't be,
// it says what is to be seen there instead.
func (e *Engine) show(ctx context.Context, a *attempt, made *protocol.Manifest) (reason string) {
	before := e.installedManifest()
	if made == nil {
		return fmt.Sprintf("proven and kept, but %s shows %s: the files that %s is made of are not known here", e.o.Etc, shown(before), a.New)
	}
	_, err := os.Stat(e.stagedTree(made.Deployment))
	if made.Deployment != a.Deployment && err != nil || a.Rollback {
		if err := e.restage(ctx, made); err != nil {
			return fmt.Sprintf("proven and kept, but %s shows %s: %v", e.o.Etc, shown(before), err)
		}
	}
	if err := e.install(made, before); err != nil {
		return fmt.Sprintf("proven and kept, but %s is not up to date: %v", e.o.Etc, err)
	}
	return ""
}

func shown(m *protocol.Manifest) string {
	if m == nil {
		return "no deployment"
	}
	return "deployment " + m.Deployment
}

// restage stages the tree of a manifest from what the node still has of it.
func (e *Engine) restage(ctx context.Context, m *protocol.Manifest) error {
	s, err := e.newStage(ctx, m)
	if err != nil {
		return err
	}
	defer s.root.Close()
	for _, blob := range m.Blobs() {
		data, ok := e.cache.get(blob)
		if !ok {
			return fmt.Errorf("the files of deployment %s are not on this node any more", m.Deployment)
		}
		if err := s.put(blob, data); err != nil {
			return err
		}
	}
	return nil
}

// Deployed is the content of a file of the node's source tree as the deployment brought it that the tree shows, which is
// one that was proven here. What the node has instead of it meanwhile is not given out: the content is the one that the
// manifest names.
func (e *Engine) Deployed(file string) (deployment string, content []byte, err error) {
	m := e.installedManifest()
	if m == nil {
		return "", nil, protocol.Refuse(protocol.Unknown, "nothing is deployed on %s yet that has files: deploy first", e.o.Node)
	}
	i := slices.IndexFunc(m.Files, func(f protocol.File) bool { return f.Path == file })
	if i < 0 {
		return "", nil, protocol.Refuse(protocol.Unknown, "deployment %s, which %s shows, has no file %s: deploy first", m.Deployment, e.o.Node, file)
	}
	if content, ok := e.cache.get(m.Files[i].SHA256); ok {
		return m.Deployment, content, nil
	}
	etc, err := os.OpenRoot(e.o.Etc)
	if err != nil {
		return "", nil, err
	}
	defer etc.Close()
	f, err := etc.OpenFile(file, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err == nil {
		defer f.Close()
		content, err = io.ReadAll(io.LimitReader(f, m.Files[i].Size+1))
	}
	if err != nil || protocol.Digest(content) != m.Files[i].SHA256 {
		return "", nil, protocol.Refuse(protocol.Failed, "%s is not as deployment %s brought it to %s any more: deploy again", file, m.Deployment, e.o.Node)
	}
	return m.Deployment, content, nil
}
