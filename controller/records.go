package controller

import (
	"bytes"
	"cmp"
	"maps"
	"slices"

	"github.com/nix-infra/nix-infra/controller/rollout"
	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
)

// release lets nodes have their part, once the store has.
func (f *fleet) release(id string, items map[string]store.Entry) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := f.deployments[id]
	for node, e := range items {
		d.set(node, partOf(e, len(protocol.Encode(e))))
		f.desired[node] = e.Desired(d.Deployment)
	}
}

// settle takes over where a rollout stands.
func (f *fleet) settle(id string, r rollout.Rollout) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.deployments[id].rollout = &r
	if r.State.Ended() {
		delete(f.live, id)
	}
}

// underway are the ids of the rollouts that have not ended and have a node.
func (f *fleet) underway(node string) []string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var found []string
	for id, d := range f.live {
		if _, has := d.parts[node]; has {
			found = append(found, id)
		}
	}
	return found
}

// unfinished are the ids of the rollouts in which something is left to do.
func (f *fleet) unfinished() []string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	var found []string
	for id, d := range f.deployments {
		if f.live[id] != nil || f.lacksBack(d) {
			found = append(found, id)
		}
	}
	return found
}

// serial is the highest one on record for a node.
func (f *fleet) serial(node string) uint64 {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return f.claims[node].highest
}

func older(a, b *deployment) int {
	return cmp.Or(a.Created.Compare(b.Created), cmp.Compare(a.ID, b.ID))
}

func ids(all []*deployment) []string {
	names := make([]string, len(all))
	for i, d := range all {
		names[i] = d.ID
	}
	return names
}

// newest are the ids of all deployments, newest first.
func (f *fleet) newest() []string {
	f.mu.RLock()
	defer f.mu.RUnlock()
	return ids(f.byAge())
}

// byAge are all deployments, newest first. f.mu is held.
func (f *fleet) byAge() []*deployment {
	all := slices.SortedFunc(maps.Values(f.deployments), older)
	slices.Reverse(all)
	return all
}

// surplus are the deployments that must go for the others to be within bounds: the oldest of those whose rollout has ended
// and, where these are not enough, of those that only wait for nodes that are away.
func (f *fleet) surplus() (gone []string) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	all := f.byAge()
	count, parts, bytes := len(all), 0, 0
	for _, d := range all {
		parts, bytes = parts+len(d.parts), bytes+d.bytes
	}
	for _, trailing := range []bool{false, true} {
		for _, d := range slices.Backward(all[min(1, len(all)):]) {
			if count <= maxDeployments && parts <= maxParts && bytes <= maxPartBytes {
				return gone
			}
			waits := f.live[d.ID] != nil
			if waits != trailing || waits && d.rollout.State != protocol.RolloutTrailing {
				continue
			}
			gone = append(gone, d.ID)
			count, parts, bytes = count-1, parts-len(d.parts), bytes-d.bytes
		}
	}
	return gone
}

// dropDeployment forgets a deployment. What it had goes back to the newest of the others, as after a restart.
func (f *fleet) dropDeployment(id string) {
	f.mu.Lock()
	defer f.mu.Unlock()
	dropped := f.deployments[id]
	delete(f.deployments, id)
	delete(f.live, id)
	for _, node := range dropped.names {
		if f.claims[node].deployment != id {
			continue
		}
		d := f.desired[node]
		f.claims[node] = claim{deployment: d.Deployment, serial: d.Serial, highest: d.Serial}
		for _, other := range f.deployments {
			if p, has := other.parts[node]; has {
				f.claim(node, other.ID, p)
			}
		}
	}
}

// sameDeployment tells whether a deployment on record is the one that is asked for again, by somebody
// who did not get the answer.
func (f *fleet) sameDeployment(r *protocol.DeployRequest, by string) (exists, same bool) {
	f.mu.RLock()
	defer f.mu.RUnlock()
	d, exists := f.deployments[r.Deployment]
	if !exists || d.By != by || d.Undoes != r.Undoes || len(d.parts) != len(r.Items) ||
		!bytes.Equal(protocol.Encode(d.Strategy), protocol.Encode(r.Strategy)) {
		return exists, false
	}
	for _, i := range r.Items {
		if p, ok := d.parts[i.Node]; !ok || p.Digest != i.Digest || p.Back != i.Back {
			return true, false
		}
	}
	return true, true
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

// onRecord tells whether a manifest is one of a node's, as far as deployments are on record.
func (f *fleet) onRecord(node, digest string) bool {
	f.mu.RLock()
	defer f.mu.RUnlock()
	if d, ok := f.desired[node]; ok && d.Digest == digest {
		return true
	}
	for _, d := range f.deployments {
		if p, has := d.parts[node]; has && p.Digest == digest {
			return true
		}
	}
	return false
}

func (f *fleet) setPart(id, node string, p part) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if d, ok := f.deployments[id]; ok {
		d.set(node, p)
	}
}

// manifests are the digests that must not be collected: what is desired or held back, the ways back that may be
// needed, what is being tried dry, and the manifests of the newest deployments, so that going back to one stays possible.
func (f *fleet) manifests(newest int) map[string]bool {
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
	for i, d := range f.byAge() {
		pending := f.live[d.ID] != nil || f.lacksBack(d)
		if i >= newest && !pending {
			continue
		}
		for _, p := range d.parts {
			keep[p.Digest] = true
			if p.Back != "" && pending {
				keep[p.Back] = true
			}
		}
	}
	return keep
}

// lacksBack tells whether a deployment is to be taken back, and what takes it back is not on record. f.mu is held.
func (f *fleet) lacksBack(d *deployment) bool {
	return d.rollout != nil && d.rollout.State == protocol.RolloutRolledBack && f.deployments[protocol.BackID(d.ID)] == nil
}
