package controller

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

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
}

// dryRun is a manifest that a node may have for a while without its being desired.
type dryRun struct {
	digest  string
	expires time.Time
}

// deployment is a record with what is needed to count its nodes. The reports stay in etcd.
type deployment struct {
	store.Deployment
	parts map[string]part
	bytes int
}

type part struct {
	serial uint64
	digest string
	phase  protocol.Phase // how it ended, "": not yet
	bytes  int
}

func partOf(e store.Entry, size int) part {
	p := part{serial: e.Serial, digest: e.Digest, bytes: size}
	if e.Report != nil {
		p.phase = e.Report.Phase
	}
	return p
}

func loadFleet(ctx context.Context, s *store.Store) (*fleet, error) {
	f := &fleet{dry: map[string][]dryRun{}, deployments: map[string]*deployment{}}
	var err error
	if f.nodes, err = s.Nodes(ctx); err != nil {
		return nil, err
	}
	if f.desired, err = s.Desired(ctx); err != nil {
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
	for _, d := range f.deployments {
		f.allowDryRun(d)
	}
	return f, nil
}

func (d *deployment) set(node string, p part) {
	d.bytes += p.bytes - d.parts[node].bytes
	d.parts[node] = p
}

// allowDryRun lets the nodes of a dry-activate have its manifests until these expire. f.mu is held.
func (f *fleet) allowDryRun(d *deployment) {
	expires := d.Created.Add(protocol.DryRunLifetime + protocol.ClockSkew)
	if d.Mode != protocol.DryActivate || time.Now().After(expires) {
		return
	}
	for node, p := range d.parts {
		f.dry[node] = append(f.currentDryRuns(node), dryRun{p.digest, expires})
	}
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

// released takes over a deployment that the store has released, all at once for whoever looks.
func (f *fleet) released(d store.Deployment, items map[string]store.Entry) {
	taken := &deployment{Deployment: d, parts: make(map[string]part, len(items))}
	for node, e := range items {
		taken.set(node, partOf(e, len(protocol.Encode(e))))
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.deployments[d.ID] = taken
	f.allowDryRun(taken)
	if d.Mode == protocol.DryActivate {
		return
	}
	for node, e := range items {
		f.desired[node] = protocol.Desired{Serial: e.Serial, Digest: e.Digest, Deployment: d.ID, Mode: d.Mode}
	}
}

// newest are the ids of all deployments, newest first.
func (f *fleet) newest() []string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	ids := slices.Collect(maps.Keys(f.deployments))
	slices.SortFunc(ids, func(a, b string) int {
		if c := f.deployments[b].Created.Compare(f.deployments[a].Created); c != 0 {
			return c
		}
		if a < b {
			return 1
		}
		return -1
	})
	return ids
}

// surplus are the deployments that are too old to be kept.
func (f *fleet) surplus() []string {
	ids := f.newest()
	f.mu.RLock()
	defer f.mu.RUnlock()
	parts, bytes := 0, 0
	for i, id := range ids {
		d := f.deployments[id]
		parts, bytes = parts+len(d.parts), bytes+d.bytes
		if i > 0 && (i >= maxDeployments || parts > maxParts || bytes > maxPartBytes) {
			return ids[i:]
		}
	}
	return nil
}

func (f *fleet) dropDeployment(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.deployments, id)
}

// part is a node's part of a deployment; kept tells whether there is such a deployment.
func (f *fleet) part(id, node string) (p part, has, kept bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	d, kept := f.deployments[id]
	if !kept {
		return part{}, false, false
	}
	p, has = d.parts[node]
	return p, has, true
}

func (f *fleet) setPart(id, node string, p part) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if d, ok := f.deployments[id]; ok {
		d.set(node, p)
	}
}

// manifests are the digests that must not be collected: what is desired, what is being tried dry, and
// the manifests of the newest deployments, so that going back to one stays possible.
func (f *fleet) manifests(newest int) map[string]bool {
	ids := f.newest()
	f.mu.RLock()
	defer f.mu.RUnlock()
	keep := map[string]bool{}
	for _, d := range f.desired {
		keep[d.Digest] = true
	}
	for node := range f.dry {
		for _, r := range f.currentDryRuns(node) {
			keep[r.digest] = true
		}
	}
	for _, id := range ids[:min(newest, len(ids))] {
		if d := f.deployments[id]; d != nil {
			for _, p := range d.parts {
				keep[p.digest] = true
			}
		}
	}
	return keep
}
