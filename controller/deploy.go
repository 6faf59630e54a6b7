package controller

import (
	"context"
	"errors"
	"maps"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/controller/rollout"
	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	keepManifests = 3         // newest deployments whose manifests stay
	blobAge       = time.Hour // what was uploaded or asked for since then stays
	collectEvery  = time.Hour
	collectAfter  = 10 * time.Minute // a deployment
)

// deploy takes over a deployment, all of it or nothing; its rollout then hands it to the nodes. Every manifest
// is verified here although every node does it again: an operator should hear of a mistake before any node does.
func (t *term) deploy(ctx context.Context, order *protocol.Verified) (any, error) {
	r, err := payload[protocol.DeployRequest](order)
	if err != nil {
		return nil, err
	}
	items, err := t.checkManifests(ctx, &r, order.Sender)
	if err != nil {
		return nil, err
	}

	t.changing.Lock()
	defer t.changing.Unlock()
	if exists, same := t.fleet.sameDeployment(&r, order.Sender.Name); same {
		s, _, _ := t.summary(r.Deployment)
		return s, nil
	} else if exists {
		return nil, protocol.Refuse(protocol.Conflict, "there is a deployment %s already", r.Deployment)
	}
	if err := t.fleet.mayDeploy(&r); err != nil {
		return nil, err
	}
	// What etcd is about to remember must not name blobs that a loss of power takes.
	if err := t.c.broker.Sync(); err != nil {
		return nil, err
	}
	d := store.Deployment{ID: r.Deployment, By: order.Sender.Name, Created: time.Now().UTC(), Mode: r.Mode, Strategy: r.Strategy, Undoes: r.Undoes}
	if err := t.accept(ctx, d, items); err != nil {
		return nil, err
	}
	t.dropOld(ctx)
	select {
	case t.deployed <- struct{}{}:
	default:
	}
	s, _, _ := t.summary(d.ID)
	return s, nil
}

// mayDeploy refuses a deployment that names nodes which can't have it.
func (f *fleet) mayDeploy(r *protocol.DeployRequest) error {
	f.mu.RLock()
	defer f.mu.RUnlock()
	for _, d := range f.deployments {
		if d.Strategy.OnFailure == protocol.RollbackOnFailure && protocol.BackID(d.ID) == r.Deployment {
			return protocol.Refuse(protocol.Conflict, "%s is the id of what takes deployment %s back", r.Deployment, d.ID)
		}
	}
	if back := protocol.BackID(r.Deployment); r.Strategy.OnFailure == protocol.RollbackOnFailure && f.deployments[back] != nil {
		return protocol.Refuse(protocol.Conflict, "there is a deployment %s already, which is what the way back would be called", back)
	}
	for _, i := range r.Items {
		node, ok := f.nodes[i.Node]
		if !ok {
			return unknownNode(i.Node)
		}
		if r.Mode == protocol.DryActivate {
			continue
		}
		if l := node.Lock; l != nil {
			return protocol.Refuse(protocol.Conflict, "%s is locked by %s: %s; see `nix-infra node unlock`", i.Node, l.By, l.Reason)
		}
		if c := f.claims[i.Node]; i.Serial <= c.highest {
			return protocol.Refuse(protocol.Conflict, "%s has serial %d by deployment %s already, this one has %d; deploy again", i.Node, c.highest, c.deployment, i.Serial)
		}
	}
	return nil
}

// accept takes over a deployment whose manifests were found good, cuts it into waves, and has its rollout begin. A
// dry-activate has none: everybody may have it at once. t.changing is held.
func (t *term) accept(ctx context.Context, d store.Deployment, items map[string]store.Entry) error {
	t.cut(d.Strategy, items)
	var r *rollout.Rollout
	if d.Mode == protocol.DryActivate {
		for node, e := range items {
			e.Released = d.Created
			items[node] = e
		}
	} else {
		begun := rollout.New(d.Strategy, d.Created)
		r = &begun
	}
	if err := t.lead.Accept(ctx, d, items, r); err != nil {
		if errors.Is(err, store.ErrUnsettled) {
			t.mustRecover()
		}
		return err
	}
	t.fleet.accepted(d, items, r)
	t.log.Info("deployment", "id", d.ID, "by", d.By, "mode", d.Mode, "nodes", len(items))
	if r == nil {
		for node, e := range items {
			t.look(node, e.Desired(d), false)
		}
		return nil
	}
	t.rollouts.touchAll() // this one begins, and others don't have its nodes any more
	return nil
}

// cut puts the nodes into waves, by the tags that they have and whether they are there now.
func (t *term) cut(s protocol.Strategy, items map[string]store.Entry) {
	members := make([]rollout.Member, 0, len(items))
	for name := range items {
		record, _ := t.fleet.node(name)
		alive, _ := t.alive.State(name)
		members = append(members, rollout.Member{Name: name, Tags: record.Tags, Offline: !alive.Online})
	}
	for i, wave := range rollout.Waves(members, s) {
		for _, name := range wave {
			e := items[name]
			e.Wave = i + 1
			items[name] = e
		}
	}
}

// checkManifests verifies all manifests and ways back, and gives what is to be remembered of them.
func (t *term) checkManifests(ctx context.Context, r *protocol.DeployRequest, sender protocol.Identity) (map[string]store.Entry, error) {
	entries := make([]store.Entry, len(r.Items))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for n, i := range r.Items {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() (err error) {
			entries[n], err = t.checkItem(ctx, r, i, sender)
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	items := make(map[string]store.Entry, len(r.Items))
	for n, i := range r.Items {
		if _, twice := items[i.Node]; twice {
			return nil, protocol.Refuse(protocol.Invalid, "deployment %s names %s twice", r.Deployment, i.Node)
		}
		items[i.Node] = entries[n]
	}
	return items, nil
}

func (t *term) checkItem(ctx context.Context, r *protocol.DeployRequest, i protocol.DeployItem, sender protocol.Identity) (store.Entry, error) {
	m, err := t.checkManifest(ctx, "the manifest", i.Node, i.Digest, sender)
	if err != nil {
		return store.Entry{}, err
	}
	if m.Deployment != r.Deployment || m.Serial != i.Serial || m.Mode != r.Mode {
		return store.Entry{}, protocol.Refuse(protocol.Invalid, "the manifest of %s is of deployment %s, serial %d, mode %s; the request says %s, %d, %s",
			i.Node, m.Deployment, m.Serial, m.Mode, r.Deployment, i.Serial, r.Mode)
	}
	e := store.Entry{Digest: i.Digest, Serial: i.Serial, Back: i.Back, Timeout: m.Timeout, Build: m.BuildTimeout}
	if m.Closure != nil {
		e.Closure = m.Closure.Path
	}
	if i.Back == "" {
		return e, nil
	}
	back, err := t.checkManifest(ctx, "the way back", i.Node, i.Back, sender)
	if err != nil {
		return store.Entry{}, err
	}
	if id := protocol.BackID(r.Deployment); back.Deployment != id || back.Serial != i.Serial+1 || back.Mode != protocol.Switch ||
		back.Rollback == nil || back.Rollback.Before != r.Deployment {
		return store.Entry{}, protocol.Refuse(protocol.Invalid, "the way back of %s must be deployment %s, serial %d, mode %s, to what ran before %s",
			i.Node, id, i.Serial+1, protocol.Switch, r.Deployment)
	}
	e.Timeout, e.Build = max(e.Timeout, back.Timeout), max(e.Build, back.BuildTimeout)
	return e, nil
}

// checkManifest verifies one signed document (what says which), and that all its blobs are there.
func (t *term) checkManifest(ctx context.Context, what, node, digest string, sender protocol.Identity) (*protocol.Manifest, error) {
	if !t.blobs.Touch(digest) {
		return nil, protocol.Refuse(protocol.Unknown, "%s of %s was not uploaded", what, node)
	}
	doc, err := t.document(ctx, digest, t.blobs.Get)
	if err != nil {
		return nil, err
	}
	m, signer, err := t.c.verifier.Manifest(doc, node, time.Now())
	if err != nil {
		var refusal *protocol.Refusal
		if errors.As(err, &refusal) {
			return nil, protocol.Refuse(refusal.Code, "%s of %s: %s", what, node, refusal.Reason)
		}
		return nil, err
	}
	if signer.Key != sender.Key {
		return nil, protocol.Refuse(protocol.Invalid, "%s of %s was signed by %s, and %s deploys it", what, node, signer.Name, sender.Name)
	}
	blobs := m.Blobs()
	for _, b := range blobs {
		if !t.blobs.Touch(b) {
			return nil, protocol.Refuse(protocol.Unknown, "blob %s of %s was not uploaded", b, node)
		}
	}
	t.listings.Add(digest, blobs, int64(len(blobs)*80))
	return m, nil
}

// dropOld forgets the oldest deployments. Failing is no reason to refuse a new one. t.changing is held.
func (t *term) dropOld(ctx context.Context) {
	for _, id := range t.fleet.surplus() {
		if err := t.drop(ctx, id); err != nil {
			t.log.Warn("can't forget an old deployment", "id", id, "error", err)
			return
		}
	}
}

// drop forgets a deployment. A rollout that only waits for nodes that are away ends with it.
func (t *term) drop(ctx context.Context, id string) error {
	d, c, _ := t.inspect(id)
	if d != nil && !d.rollout.State.Ended() {
		r, err := rollout.Steer(*d.rollout, c.nodes, protocol.AbortRollout, t.c.machine.Name, time.Now())
		if err != nil {
			return err
		}
		r.Reason = "nodes are still away, and too many newer deployments are on record"
		record := protocol.AuditRecord{Request: id, Action: protocol.SteerRollout, Outcome: "ok", Reason: "now " + string(r.State) + ": " + r.Reason}
		if err := t.audit.record(ctx, record); err != nil {
			return err
		}
		if err := t.remember(ctx, id, r); err != nil {
			return err
		}
	}
	if err := t.lead.RemoveDeployment(ctx, id); err != nil {
		return err
	}
	t.fleet.dropDeployment(id)
	return nil
}

// collectGarbage removes blobs that nothing needs any more, some time after each deployment and hourly.
func (t *term) collectGarbage() {
	timer := time.NewTimer(collectEvery)
	defer timer.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case <-t.deployed:
			timer.Reset(collectAfter)
			continue
		case <-timer.C:
		}
		n, err := t.collect(t.ctx, blobAge)
		if err != nil && t.ctx.Err() == nil {
			t.log.Warn("can't remove old blobs", "error", err)
		} else if n > 0 {
			t.log.Info("removed old blobs", "count", n)
		}
		t.uploads.clean(time.Now())
		timer.Reset(collectEvery)
	}
}

// collect removes blobs older than age that no manifest in use lists. If one such manifest can't be
// read, nothing is removed.
func (t *term) collect(ctx context.Context, age time.Duration) (int, error) {
	manifests := t.fleet.manifests(keepManifests)
	keep := maps.Clone(manifests)
	for digest := range manifests {
		doc, err := t.document(ctx, digest, t.blobs.Read)
		if err != nil {
			return 0, err
		}
		blobs, err := listed(doc)
		if err != nil {
			return 0, err
		}
		for _, b := range blobs {
			keep[b] = true
		}
	}
	return t.blobs.Collect(ctx, keep, age)
}
