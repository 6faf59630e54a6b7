package controller

import (
	"context"
	"maps"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/controller/rollout"
	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

// Bounds of an answer, well below protocol.MaxMessage: one node may come on top of the bytes.
const (
	maxListed      = 500
	maxListedBytes = 1 << 20
	maxShownBytes  = 2 << 20
)

func (t *term) listNodes(_ context.Context, order *protocol.Verified) (any, error) {
	page, err := payload[protocol.Page](order)
	if err != nil {
		return nil, err
	}
	names := slices.DeleteFunc(t.fleet.names(), func(n string) bool { return !order.Sender.Covers(n) })
	if len(page.Names) > 0 {
		wanted := make(map[string]bool, len(page.Names))
		for _, n := range page.Names {
			wanted[n] = true
		}
		names = slices.DeleteFunc(names, func(n string) bool { return !wanted[n] })
	}
	limit := maxListed
	if page.Limit > 0 {
		limit = min(limit, page.Limit)
	}
	start, found := slices.BinarySearch(names, page.After)
	if found {
		start++
	}
	list := protocol.NodeList{Nodes: []protocol.NodeState{}}
	size := 0
	for _, name := range names[start:] {
		if len(list.Nodes) >= limit || size > maxListedBytes {
			list.Next = list.Nodes[len(list.Nodes)-1].Name
			break
		}
		if s, ok := t.nodeState(name); ok {
			list.Nodes = append(list.Nodes, s)
			size += len(protocol.Encode(s))
		}
	}
	return list, nil
}

func (t *term) nodeState(name string) (protocol.NodeState, bool) {
	record, ok := t.fleet.node(name)
	if !ok {
		return protocol.NodeState{}, false
	}
	s := protocol.NodeState{NodeRecord: record, Serial: t.fleet.serial(name)}
	if d, ok := t.fleet.wanted(name); ok {
		s.Desired = &d
	}
	if a, ok := t.alive.State(name); ok {
		s.Online, s.LastSeen, s.Beat = a.Online, &a.Seen, &a.Beat
	}
	return s, true
}

func (t *term) listDeployments(_ context.Context, order *protocol.Verified) (any, error) {
	page, err := payload[protocol.Page](order)
	if err != nil {
		return nil, err
	}
	limit := 50
	if page.Limit > 0 {
		limit = min(maxDeployments, page.Limit)
	}
	ids := t.fleet.newest()
	if page.After != "" {
		i := slices.Index(ids, page.After)
		if i < 0 {
			return nil, protocol.Refuse(protocol.Unknown, "deployment %s is not on record (any more)", page.After)
		}
		ids = ids[i+1:]
	}
	list := protocol.DeploymentList{Deployments: []protocol.Deployment{}}
	for _, id := range ids {
		if len(page.Names) > 0 && !slices.Contains(page.Names, id) || !t.fleet.reaches(order.Sender, id) {
			continue
		}
		if len(list.Deployments) == limit {
			list.Next = list.Deployments[limit-1].ID
			break
		}
		if s, _, ok := t.summary(id); ok {
			list.Deployments = append(list.Deployments, s)
		}
	}
	return list, nil
}

func (t *term) showDeployment(ctx context.Context, order *protocol.Verified) (any, error) {
	q, err := payload[protocol.DeploymentQuery](order)
	if err != nil {
		return nil, err
	}
	d, decision, ok := t.summary(q.ID)
	if !ok || !t.fleet.reaches(order.Sender, q.ID) {
		return nil, protocol.Refuse(protocol.Unknown, "deployment %s is not on record (any more)", short(q.ID, 64))
	}
	entry := func(node string) (store.Entry, bool, error) { return t.c.store.Entry(ctx, d.ID, node) }
	if len(q.Names) == 0 {
		all, err := t.c.store.Entries(ctx, d.ID)
		if err != nil {
			return nil, err
		}
		entry = func(node string) (store.Entry, bool, error) { e, ok := all[node]; return e, ok, nil }
	}
	d.Nodes = map[string]protocol.NodeResult{}
	last, size := "", 0
	nodes := slices.DeleteFunc(t.fleet.nodesOf(q), func(n string) bool { return !order.Sender.Covers(n) })
	for _, node := range nodes {
		if size > maxShownBytes {
			d.Next = last
			break
		}
		e, ok, err := entry(node)
		if err != nil {
			return nil, err
		}
		if !ok {
			continue
		}
		r := t.result(d.ID, node, e, decision)
		if q.Brief && r.Report != nil {
			r.Report.Log, r.Report.FailedUnits = "", nil
		}
		d.Nodes[node] = r
		last, size = node, size+len(node)+len(protocol.Encode(r))
	}
	return d, nil
}

// nodesOf are the nodes that a query asks for, sorted.
func (f *fleet) nodesOf(q protocol.DeploymentQuery) []string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	d := f.deployments[q.ID]
	if d == nil {
		return nil
	}
	names := slices.Collect(maps.Keys(d.parts))
	if len(q.Names) > 0 {
		names = slices.DeleteFunc(slices.Clone(q.Names), func(n string) bool { _, has := d.parts[n]; return !has })
	}
	names = slices.DeleteFunc(names, func(n string) bool { return n <= q.After })
	slices.Sort(names)
	return slices.Compact(names)
}

func (t *term) result(deployment, node string, e store.Entry, decision rollout.Decision) protocol.NodeResult {
	r := protocol.NodeResult{Serial: e.Serial, Report: e.Report, Wave: e.Wave, Released: !e.Released.IsZero()}
	t.fleet.mu.RLock()
	defer t.fleet.mu.RUnlock()
	d := t.fleet.deployments[deployment]
	if d == nil {
		return r
	}
	s := t.standing(d, node, time.Now())
	r.Phase, r.Superseded = s.phase, s.by
	r.Note, r.Failed = decision.Failing[node]
	if s.Status == rollout.Failed {
		r.Failed = true
	} else if r.Note == "" {
		r.Note = decision.Passed[node]
	}
	return r
}

func (t *term) putNode(ctx context.Context, order *protocol.Verified) (any, error) {
	r, err := payload[protocol.NodeRecord](order)
	if err != nil {
		return nil, err
	}
	proven, err := t.c.verifier.ProveNode(&r, time.Now())
	if err != nil {
		return nil, err
	}
	if proven.Key != r.Key || proven.XKey != r.XKey {
		return nil, protocol.Refuse(protocol.Invalid, "the JWT of %s is about other keys than its record", r.Name)
	}
	t.changing.Lock()
	defer t.changing.Unlock()
	before, known := t.fleet.node(r.Name)
	if known {
		if before.Key != r.Key && before.Key != r.Replaces {
			return nil, protocol.Refuse(protocol.Conflict, "node %s is enrolled with another key (%s); if it was set up anew, remove it first", r.Name, before.Key)
		}
		if r.Enrolled.IsZero() {
			r.Enrolled = before.Enrolled
		}
	}
	if r.Enrolled.IsZero() {
		r.Enrolled = time.Now().UTC()
	}
	r.By = order.Sender.Name
	r.Lock = before.Lock
	r.Replaces = ""
	if err := t.lead.PutNode(ctx, r); err != nil {
		return nil, err
	}
	t.fleet.putNode(r)
	t.rollouts.touchNode(r.Name)
	return r, nil
}

func unknownNode(name string) error {
	return protocol.Refuse(protocol.Unknown, "there is no node %s; see `nix-infra nodes`", short(name, 64))
}

func (t *term) removeNode(ctx context.Context, order *protocol.Verified) (any, error) {
	r, err := payload[protocol.NameRequest](order)
	if err != nil {
		return nil, err
	}
	t.changing.Lock()
	defer t.changing.Unlock()
	if !t.fleet.enrolled(r.Name) {
		return nil, unknownNode(r.Name)
	}
	if err := t.lead.RemoveNode(ctx, r.Name); err != nil {
		return nil, err
	}
	t.fleet.removeNode(r.Name) // from here on its beats don't count
	t.alive.Forget(r.Name)
	t.rollouts.touchNode(r.Name)
	// Once more: a beat may have been written down in between.
	return nil, t.lead.RemoveNode(ctx, r.Name)
}

func (t *term) tagNode(ctx context.Context, order *protocol.Verified) (any, error) {
	r, err := payload[protocol.TagsRequest](order)
	if err != nil {
		return nil, err
	}
	slices.Sort(r.Tags)
	return t.changeNode(ctx, order, r.Node, func(record *protocol.NodeRecord) { record.Tags = slices.Compact(r.Tags) })
}

// lockNode keeps deployments from a node or, without a reason, lets them again.
func (t *term) lockNode(ctx context.Context, order *protocol.Verified) (any, error) {
	r, err := payload[protocol.LockRequest](order)
	if err != nil {
		return nil, err
	}
	defer t.rollouts.touchNode(r.Node)
	return t.changeNode(ctx, order, r.Node, func(record *protocol.NodeRecord) {
		record.Lock = nil
		if r.Reason != "" {
			record.Lock = &protocol.Lock{Reason: r.Reason, By: order.Sender.Name, At: time.Now().UTC()}
		}
	})
}

// changeNode changes the record of a node that the sender may reach, and answers with it.
func (t *term) changeNode(ctx context.Context, order *protocol.Verified, node string, change func(*protocol.NodeRecord)) (any, error) {
	if err := order.Sender.Reach(node); err != nil {
		return nil, err
	}
	t.changing.Lock()
	defer t.changing.Unlock()
	record, ok := t.fleet.node(node)
	if !ok {
		return nil, unknownNode(node)
	}
	change(&record)
	if err := t.lead.PutNode(ctx, record); err != nil {
		return nil, err
	}
	t.fleet.putNode(record)
	return record, nil
}

func (t *term) missingBlobs(_ context.Context, order *protocol.Verified) (any, error) {
	asked, err := payload[protocol.DigestList](order)
	if err != nil {
		return nil, err
	}
	if len(asked.Digests) > protocol.MaxDigests {
		return nil, protocol.Refuse(protocol.Invalid, "%d digests at once, the limit is %d", len(asked.Digests), protocol.MaxDigests)
	}
	missing := protocol.DigestList{Digests: []string{}}
	for _, d := range asked.Digests {
		if !protocol.IsDigest(d) {
			return nil, protocol.Refuse(protocol.Invalid, "%q is not a digest", short(d, 80))
		}
		// Whoever asks is about to deploy: what is there must stay until then.
		if !t.blobs.Touch(d) {
			missing.Digests = append(missing.Digests, d)
		}
	}
	return missing, nil
}

func (t *term) putBlobs(ctx context.Context, order *protocol.Verified) (any, error) {
	b, err := payload[protocol.BlobPieces](order)
	if err != nil {
		return nil, err
	}
	for _, p := range b.Pieces {
		if err := t.putPiece(ctx, order.Sender.Name, p); err != nil {
			return nil, err
		}
	}
	return nil, nil
}

func (t *term) putPiece(ctx context.Context, user string, p protocol.BlobPiece) error {
	if t.blobs.Touch(p.Digest) {
		return nil
	}
	content, done, err := t.uploads.piece(user, p)
	if err != nil || !done {
		return err
	}
	plain, err := t.decoder.DecodeAll(content, nil)
	if err != nil {
		return protocol.Refuse(protocol.Invalid, "blob %s can't be decompressed, or to more than %d bytes: %v", p.Digest, protocol.MaxFileSize, err)
	}
	if protocol.Digest(plain) != p.Digest {
		return protocol.Refuse(protocol.Invalid, "blob %s has another content than its digest says", p.Digest)
	}
	return t.blobs.Put(ctx, p.Digest, content)
}
