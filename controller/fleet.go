package controller

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/controller/rollout"
	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

// What is kept of old deployments. The newest one is always kept.
const (
	maxDeployments = 200
	maxParts       = 200_000   // nodes of all deployments
	maxPartBytes   = 512 << 20 // of all their reports
)

// fleet is the leader's copy of what etcd holds. Only the leader writes to etcd, so that the copy is
// never behind.
type fleet struct {
	mu          sync.RWMutex
	nodes       map[string]protocol.NodeRecord
	desired     map[string]protocol.Desired
	dry         map[string][]dryRun
	deployments map[string]*deployment
	live        map[string]*deployment // those whose rollout has not ended
	claims      map[string]claim
}

// dryRun is a manifest that a node may have for a while without its being desired.
type dryRun struct {
	digest  string
	expires time.Time
}

// claim is the newest deployment that names a node, whether it was released to it or not: it has the node.
type claim struct {
	deployment string
	serial     uint64
	highest    uint64 // serial of anything on record, ways back too
}

// deployment is a record with what is needed to carry it out and to count its nodes. The reports stay in etcd.
type deployment struct {
	store.Deployment
	rollout *rollout.Rollout // nil: it has none, since it is a dry-activate
	parts   map[string]part
	names   []string // of the parts, sorted
	bytes   int
}

// part is a node's entry, without its report.
type part struct {
	store.Entry
	phase protocol.Phase // how it ended, "": not yet
	bytes int
}

func partOf(e store.Entry, size int) part {
	p := part{Entry: e, bytes: size}
	if e.Report != nil {
		p.phase, p.Report = e.Report.Phase, nil
	}
	return p
}

func (p *part) held() bool { return p.Released.IsZero() }

func loadFleet(ctx context.Context, s *store.Store) (*fleet, error) {
	f := &fleet{dry: map[string][]dryRun{}, deployments: map[string]*deployment{}, live: map[string]*deployment{}, claims: map[string]claim{}}
	var err error
	if f.nodes, err = s.Nodes(ctx); err != nil {
		return nil, err
	}
	if f.desired, err = s.Desired(ctx); err != nil {
		return nil, err
	}
	stands, err := s.Rollouts(ctx)
	if err != nil {
		return nil, err
	}
	of := func(id string) *deployment {
		if f.deployments[id] == nil {
			f.deployments[id] = &deployment{parts: map[string]part{}}
		}
		return f.deployments[id]
	}
	err = s.Deployments(ctx, func(d store.Deployment) { of(d.ID).Deployment = d },
		func(id, node string, e store.Entry, size int) { of(id).set(node, partOf(e, size)) })
	if err != nil {
		return nil, err
	}
	for node, d := range f.desired {
		f.claims[node] = claim{deployment: d.Deployment, serial: d.Serial, highest: d.Serial}
	}
	for id, d := range f.deployments {
		if r, ok := stands[id]; ok {
			d.rollout = &r
		}
		f.add(d)
	}
	return f, nil
}

func (d *deployment) set(node string, p part) {
	d.bytes += p.bytes - d.parts[node].bytes
	d.parts[node] = p
}

// accepted takes over a deployment that the store has taken over.
func (f *fleet) accepted(d store.Deployment, items map[string]store.Entry, r *rollout.Rollout) {
	taken := &deployment{Deployment: d, rollout: r, parts: make(map[string]part, len(items))}
	for node, e := range items {
		taken.set(node, partOf(e, len(protocol.Encode(e))))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.add(taken)
}

// add makes a deployment count. f.mu is held, or nobody else has f.
func (f *fleet) add(d *deployment) {
	d.names = slices.Sorted(maps.Keys(d.parts))
	f.deployments[d.ID] = d
	if d.rollout != nil && !d.rollout.State.Ended() {
		f.live[d.ID] = d
	}
	f.allowDryRun(d)
	for node, p := range d.parts {
		f.claim(node, d.ID, p)
	}
}

// claim gives a node to a deployment, unless a newer one has it. f.mu is held.
func (f *fleet) claim(node, id string, p part) {
	c := f.claims[node]
	if p.Serial > 0 && p.Serial >= c.serial {
		c.deployment, c.serial = id, p.Serial
	}
	c.highest = max(c.highest, p.Serial)
	if p.Back != "" {
		c.highest = max(c.highest, p.Serial+1)
	}
	f.claims[node] = c
}

// allowDryRun lets the nodes of a dry-activate have its manifests until these expire. f.mu is held.
func (f *fleet) allowDryRun(d *deployment) {
	expires := d.dryUntil()
	if d.Mode != protocol.DryActivate || time.Now().After(expires) {
		return
	}
	for node, p := range d.parts {
		f.dry[node] = append(f.currentDryRuns(node), dryRun{p.Digest, expires})
	}
}

// dryUntil is when the manifests of a dry-activate have expired everywhere.
func (d *deployment) dryUntil() time.Time {
	return d.Created.Add(protocol.DryRunLifetime + protocol.ClockSkew)
}

func (f *fleet) currentDryRuns(node string) []dryRun {
	return slices.DeleteFunc(slices.Clone(f.dry[node]), func(r dryRun) bool { return time.Now().After(r.expires) })
}

// enrolled tells whether there is such a node.
func (f *fleet) enrolled(node string) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	_, ok := f.nodes[node]
	return ok
}

func (f *fleet) node(name string) (protocol.NodeRecord, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	r, ok := f.nodes[name]
	return r, ok
}

func (f *fleet) wanted(node string) (protocol.Desired, bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	d, ok := f.desired[node]
	return d, ok
}

// mayHave tells whether a manifest is one that this node was given: the desired one or a dry run's.
func (f *fleet) mayHave(node, digest string) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if _, ok := f.nodes[node]; !ok {
		return false
	}
	if d, ok := f.desired[node]; ok && d.Digest == digest {
		return true
	}
	return slices.ContainsFunc(f.dry[node], func(r dryRun) bool {
		return r.digest == digest && time.Now().Before(r.expires)
	})
}

func (f *fleet) putNode(r protocol.NodeRecord) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.nodes[r.Name] = r
}

func (f *fleet) removeNode(name string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.nodes, name)
	delete(f.desired, name)
	delete(f.dry, name)
}

// names are all nodes' names, sorted.
func (f *fleet) names() []string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return slices.Sorted(maps.Keys(f.nodes))
}
