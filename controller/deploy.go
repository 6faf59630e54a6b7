package controller

import (
	"context"
	"errors"
	"maps"
	"runtime"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	keepManifests = 3         // newest deployments whose manifests stay
	blobAge       = time.Hour // what was uploaded or asked for since then stays
	collectEvery  = time.Hour
	collectAfter  = 10 * time.Minute // a deployment
)

// deploy takes over a deployment, all of it or nothing. Every manifest is verified here although every
// node does it again: an operator should hear of a mistake before any node does.
func (t *term) deploy(ctx context.Context, order *protocol.Verified) (any, error) {
	r, err := payload[protocol.DeployRequest](order)
	if err != nil {
		return nil, err
	}
	items := make(map[string]store.Entry, len(r.Items))
	for _, i := range r.Items {
		if _, twice := items[i.Node]; twice {
			return nil, protocol.Refuse(protocol.Invalid, "deployment %s names %s twice", r.Deployment, i.Node)
		}
		items[i.Node] = store.Entry{Serial: i.Serial, Digest: i.Digest}
	}
	if err := t.checkManifests(ctx, r, order.Sender); err != nil {
		return nil, err
	}

	t.changing.Lock()
	defer t.changing.Unlock()
	if exists, same := t.fleet.sameDeployment(r, order.Sender.Name); same {
		s, _ := t.summary(r.Deployment)
		return s, nil
	} else if exists {
		return nil, protocol.Refuse(protocol.Conflict, "there is a deployment %s already", r.Deployment)
	}
	for _, i := range r.Items {
		if !t.fleet.enrolled(i.Node) {
			return nil, unknownNode(i.Node)
		}
		if d, ok := t.fleet.wanted(i.Node); ok && r.Mode != protocol.DryActivate && i.Serial <= d.Serial {
			return nil, protocol.Refuse(protocol.Conflict, "%s has serial %d by deployment %s already, this one has %d; deploy again", i.Node, d.Serial, d.Deployment, i.Serial)
		}
	}
	// What etcd is about to remember must not name blobs that a loss of power takes.
	if err := t.c.broker.Sync(); err != nil {
		return nil, err
	}
	d := store.Deployment{ID: r.Deployment, By: order.Sender.Name, Created: time.Now().UTC(), Mode: r.Mode}
	if err := t.lead.Release(ctx, d, items); err != nil {
		if errors.Is(err, store.ErrUnsettled) {
			t.mustRecover()
		}
		return nil, err
	}
	t.fleet.released(d, items)
	t.log.Info("deployment", "id", d.ID, "by", d.By, "mode", d.Mode, "nodes", len(items))
	for node, e := range items {
		t.look(node, protocol.Desired{Serial: e.Serial, Digest: e.Digest}, false)
	}
	t.dropOld(ctx)
	select {
	case t.deployed <- struct{}{}:
	default:
	}
	s, _ := t.summary(d.ID)
	return s, nil
}

func (t *term) checkManifests(ctx context.Context, r protocol.DeployRequest, sender protocol.Identity) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(runtime.GOMAXPROCS(0))
	for _, i := range r.Items {
		if ctx.Err() != nil {
			break
		}
		g.Go(func() error { return t.checkManifest(ctx, r, i, sender) })
	}
	return g.Wait()
}

func (t *term) checkManifest(ctx context.Context, r protocol.DeployRequest, i protocol.DeployItem, sender protocol.Identity) error {
	if !t.blobs.Touch(i.Digest) {
		return protocol.Refuse(protocol.Unknown, "the manifest of %s was not uploaded", i.Node)
	}
	doc, err := t.document(ctx, i.Digest, t.blobs.Get)
	if err != nil {
		return err
	}
	m, signer, err := t.c.verifier.Manifest(doc, i.Node, time.Now())
	if err != nil {
		var refusal *protocol.Refusal
		if errors.As(err, &refusal) {
			return protocol.Refuse(refusal.Code, "the manifest of %s: %s", i.Node, refusal.Reason)
		}
		return err
	}
	switch {
	case signer.Key != sender.Key:
		return protocol.Refuse(protocol.Invalid, "the manifest of %s was signed by %s, and %s deploys it", i.Node, signer.Name, sender.Name)
	case m.Deployment != r.Deployment || m.Serial != i.Serial || m.Mode != r.Mode:
		return protocol.Refuse(protocol.Invalid, "the manifest of %s is of deployment %s, serial %d, mode %s; the request says %s, %d, %s",
			i.Node, m.Deployment, m.Serial, m.Mode, r.Deployment, i.Serial, r.Mode)
	}
	blobs := m.Blobs()
	for _, b := range blobs {
		if !t.blobs.Touch(b) {
			return protocol.Refuse(protocol.Unknown, "blob %s of %s was not uploaded", b, i.Node)
		}
	}
	t.listings.Add(i.Digest, blobs, int64(len(blobs)*80))
	return nil
}

// dropOld forgets the oldest deployments. Failing is no reason to refuse a new one.
func (t *term) dropOld(ctx context.Context) {
	for _, id := range t.fleet.surplus() {
		if err := t.lead.RemoveDeployment(ctx, id); err != nil {
			t.log.Warn("can't forget an old deployment", "id", id, "error", err)
			return
		}
		t.fleet.dropDeployment(id)
	}
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
