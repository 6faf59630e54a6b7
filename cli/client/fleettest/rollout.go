package fleettest

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// superseded is the phase under which nodes are counted that a newer deployment has.
const superseded protocol.Phase = "superseded"

// deploy takes a deployment over. It is let out as a simple controller would do it: in waves of nodes in order of name,
// each when the one before has ended and its soak is over, until more nodes failed than may. Order, windows and
// MaxUnavailable are left to the real one.
func (f *Fleet) deploy(o *protocol.Verified) (any, error) {
	r, err := protocol.Decode[protocol.DeployRequest](o.Payload)
	if err != nil {
		return nil, err
	}
	d := &protocol.Deployment{ID: r.Deployment, By: o.Sender.Name, Created: time.Now().UTC(), Mode: r.Mode, Strategy: r.Strategy, Undoes: r.Undoes,
		Nodes: map[string]protocol.NodeResult{}}
	dry := r.Mode == protocol.DryActivate
	for _, item := range r.Items {
		m, _, err := f.verifier.Manifest(f.blobs[item.Digest], item.Node, time.Now())
		if err != nil {
			return nil, err
		}
		for _, b := range m.Blobs() {
			if _, ok := f.blobs[b]; !ok {
				return nil, protocol.Refuse(protocol.Invalid, "blob %s of %s was not uploaded", b, item.Node)
			}
		}
		switch n := f.records[item.Node]; {
		case n == nil:
			return nil, protocol.Refuse(protocol.Unknown, "there is no node %q", item.Node)
		case !dry && n.Lock != nil:
			return nil, protocol.Refuse(protocol.Conflict, "%s is locked by %s: %s", item.Node, n.Lock.By, n.Lock.Reason)
		case !dry && item.Serial <= n.Serial:
			return nil, protocol.Refuse(protocol.Conflict, "%s has serial %d already", item.Node, n.Serial)
		}
		if item.Back != "" {
			back, _, err := f.verifier.Manifest(f.blobs[item.Back], item.Node, time.Now())
			if err != nil {
				return nil, err
			}
			if back.Serial != m.Serial+1 || back.Deployment != protocol.BackID(r.Deployment) || back.Rollback == nil || back.Rollback.Before != r.Deployment {
				return nil, protocol.Refuse(protocol.Invalid, "the way back of %s is none", item.Node)
			}
		}
	}
	for _, item := range r.Items {
		f.manifests[r.Deployment+" "+item.Node] = item.Digest
		serial := item.Serial
		if item.Back != "" {
			f.manifests[protocol.BackID(r.Deployment)+" "+item.Node] = item.Back
			serial++
		}
		if !dry {
			f.records[item.Node].Serial = serial
		}
	}
	f.begin(d, r.Items)
	return f.summary(d), nil
}

// begin makes the waves of a deployment and lets out the first.
func (f *Fleet) begin(d *protocol.Deployment, items []protocol.DeployItem) {
	items = slices.SortedFunc(slices.Values(items), func(a, b protocol.DeployItem) int { return strings.Compare(a.Node, b.Node) })
	wave, room := 0, 0
	for _, item := range items {
		if room == 0 {
			wave++
			if room = d.Strategy.Batch.Ceil(len(items)); wave == 1 && d.Strategy.Canary.Ceil(len(items)) > 0 {
				room = d.Strategy.Canary.Ceil(len(items))
			}
			d.Rollout.Waves = append(d.Rollout.Waves, 0)
		}
		room--
		d.Rollout.Waves[wave-1]++
		d.Nodes[item.Node] = protocol.NodeResult{Serial: item.Serial, Wave: wave}
		for _, older := range f.deployments {
			if was, ok := older.Nodes[item.Node]; ok && !was.Phase.Ended() && d.Mode != protocol.DryActivate {
				was.Superseded = d.ID
				older.Nodes[item.Node] = was
			}
		}
	}
	f.deployments = append(f.deployments, d)
	f.stand(d, protocol.RolloutScheduled, "")
	f.advance(d)
	for _, older := range f.deployments {
		f.advance(older)
	}
}

func (f *Fleet) stand(d *protocol.Deployment, s protocol.RolloutState, reason string) {
	if d.Rollout.State != s {
		d.Rollout.State, d.Rollout.Since = s, time.Now().UTC()
	}
	d.Rollout.Reason, d.Rollout.Next = reason, time.Time{}
}

// advance goes on with a deployment as far as it may.
func (f *Fleet) advance(d *protocol.Deployment) {
	r := &d.Rollout
	if r.State.Ended() || r.State == protocol.RolloutPaused {
		return
	}
	if d.Strategy.At.After(f.now()) {
		f.wait(d, "waits for its time", d.Strategy.At)
		return
	}
	if d.Mode == protocol.DryActivate {
		f.release(d, 1)
		f.stand(d, protocol.RolloutRunning, "")
		if !f.open(d, 1) {
			f.stand(d, protocol.RolloutDone, "")
		}
		return
	}
	if failed, may := f.failures(d), d.Strategy.MaxFailures.Floor(len(d.Nodes)); failed > may {
		f.fail(d, fmt.Sprintf("%d failed, %d may", failed, may))
		return
	}
	for r.Wave = max(r.Wave, 1); ; r.Wave++ {
		f.stand(d, protocol.RolloutRunning, "")
		f.release(d, r.Wave)
		if f.underway(d) {
			return
		}
		if r.Wave == len(r.Waves) {
			break
		}
		wave := fmt.Sprint(d.ID, " ", r.Wave)
		if f.through[wave].IsZero() {
			f.through[wave] = f.now()
		}
		if soaked := f.through[wave].Add(time.Duration(d.Strategy.Soak) * time.Second); soaked.After(f.now()) {
			f.wait(d, fmt.Sprintf("wave %d is through and soaks", r.Wave), soaked)
			return
		}
	}
	if f.open(d, r.Wave) {
		f.stand(d, protocol.RolloutTrailing, "waits for nodes that are away")
	} else {
		f.stand(d, protocol.RolloutDone, "every node has ended it")
	}
}

// now is the controller's clock.
func (f *Fleet) now() time.Time { return time.Now().Add(f.ahead) }

// PassTime has the controller's clock go on, for what waits for its time.
func (f *Fleet) PassTime(d time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.ahead += d
	for _, d := range f.deployments {
		f.advance(d)
	}
}

// wait has a deployment wait for PassTime.
func (f *Fleet) wait(d *protocol.Deployment, reason string, until time.Time) {
	if d.Rollout.State != protocol.RolloutRunning {
		f.stand(d, protocol.RolloutScheduled, reason)
	}
	d.Rollout.Reason, d.Rollout.Next = reason, until.UTC()
}

// fail does what the strategy says of too many failures.
func (f *Fleet) fail(d *protocol.Deployment, reason string) {
	switch d.Strategy.OnFailure {
	case protocol.PauseOnFailure:
		f.stand(d, protocol.RolloutPaused, reason)
	case protocol.RollbackOnFailure:
		f.stand(d, protocol.RolloutRolledBack, reason)
		back := &protocol.Deployment{ID: protocol.BackID(d.ID), By: d.By, Created: time.Now().UTC(), Mode: protocol.Switch, Undoes: d.ID, Nodes: map[string]protocol.NodeResult{}}
		back.Strategy = protocol.Strategy{MaxUnavailable: d.Strategy.MaxUnavailable, MaxFailures: "100%"}
		var items []protocol.DeployItem
		for _, node := range slices.Sorted(maps.Keys(d.Nodes)) {
			if n := d.Nodes[node]; n.Released && !n.Failed && n.Superseded == "" {
				items = append(items, protocol.DeployItem{Node: node, Serial: n.Serial + 1})
			}
		}
		if len(items) > 0 {
			d.Rollout.Back = back.ID
			f.begin(back, items)
		}
	default:
		f.stand(d, protocol.RolloutStopped, reason)
	}
}

// release lets the nodes of the waves up to one have the deployment, as far as they are there.
func (f *Fleet) release(d *protocol.Deployment, wave int) {
	for node, r := range d.Nodes {
		record, n := f.records[node], f.nodes[node]
		if r.Released || r.Wave > wave || r.Superseded != "" || record == nil {
			continue
		}
		switch r.Note = ""; {
		case !record.Online:
			r.Note = "offline"
		case record.Lock != nil && d.Mode != protocol.DryActivate:
			r.Note = "locked"
		default:
			r.Released = true
		}
		d.Nodes[node] = r
		if !r.Released {
			continue
		}
		digest := f.manifests[d.ID+" "+node]
		m, _, err := f.verifier.Manifest(f.blobs[digest], node, time.Now())
		must(f.t, err)
		if d.Mode != protocol.DryActivate {
			record.Desired = &protocol.Desired{Serial: r.Serial, Digest: digest, Deployment: d.ID, Mode: d.Mode}
		}
		if n != nil {
			go n.deploy(m)
		}
	}
}

// underway tells whether somebody who got it has yet to end it.
func (f *Fleet) underway(d *protocol.Deployment) bool {
	for _, r := range d.Nodes {
		if r.Released && !r.Phase.Ended() && r.Superseded == "" {
			return true
		}
	}
	return false
}

// open tells whether some node of the waves up to one has yet to end it.
func (f *Fleet) open(d *protocol.Deployment, wave int) bool {
	for _, r := range d.Nodes {
		if r.Wave <= wave && !r.Phase.Ended() && r.Superseded == "" {
			return true
		}
	}
	return false
}

func (f *Fleet) failures(d *protocol.Deployment) int {
	n := 0
	for _, r := range d.Nodes {
		if r.Failed {
			n++
		}
	}
	return n
}

// progress takes over how far a node is; at its end, with the report.
func (f *Fleet) progress(deployment, node string, phase protocol.Phase, report *protocol.Report) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range f.deployments {
		r, ok := d.Nodes[node]
		if d.ID != deployment || !ok || r.Superseded != "" {
			continue
		}
		r.Phase, r.Report = phase, report
		r.Failed = phase.Ended() && !phase.Succeeded()
		d.Nodes[node] = r
		if phase.Ended() {
			f.advance(d)
		}
	}
}

// steer does what somebody wants of a rollout.
func (f *Fleet) steer(o *protocol.Verified) (any, error) {
	order, err := protocol.Decode[protocol.RolloutOrder](o.Payload)
	if err != nil {
		return nil, err
	}
	i := slices.IndexFunc(f.deployments, func(d *protocol.Deployment) bool { return d.ID == order.ID })
	if i < 0 {
		return nil, protocol.Refuse(protocol.Unknown, "there is no deployment %q", order.ID)
	}
	d := f.deployments[i]
	if d.Rollout.State.Ended() {
		return nil, protocol.Refuse(protocol.Conflict, "the rollout has ended, it can't be told to %s", order.Verb)
	}
	d.Rollout.By = o.Sender.Name
	switch order.Verb {
	case protocol.PauseRollout:
		f.stand(d, protocol.RolloutPaused, o.Sender.Name+" paused it")
	case protocol.AbortRollout:
		f.stand(d, protocol.RolloutAborted, o.Sender.Name+" aborted it")
	case protocol.ResumeRollout:
		d.Strategy.MaxFailures = protocol.Amount(fmt.Sprint(f.failures(d))) // they are forgiven
		f.stand(d, protocol.RolloutScheduled, "")
		f.advance(d)
	}
	return f.summary(d), nil
}

// lock locks a node, or without a reason unlocks it.
func (f *Fleet) lock(o *protocol.Verified) (any, error) {
	r, err := protocol.Decode[protocol.LockRequest](o.Payload)
	if err != nil {
		return nil, err
	}
	n := f.records[r.Node]
	if n == nil {
		return nil, protocol.Refuse(protocol.Unknown, "there is no node %q", r.Node)
	}
	n.Lock = nil
	if r.Reason != "" {
		n.Lock = &protocol.Lock{Reason: r.Reason, By: o.Sender.Name, At: time.Now().UTC()}
	}
	return n.NodeRecord, nil
}

// summary is a deployment without its nodes.
func (f *Fleet) summary(d *protocol.Deployment) protocol.Deployment {
	s := *d
	s.Nodes, s.Count = nil, map[protocol.Phase]int{}
	s.Rollout.Failures, s.Rollout.MaxFailures = f.failures(d), d.Strategy.MaxFailures.Floor(len(d.Nodes))
	for _, r := range d.Nodes {
		if r.Superseded != "" {
			s.Count[superseded]++
		} else {
			s.Count[r.Phase]++
		}
		if r.Released {
			s.Rollout.Released++
		}
		if r.Released && !r.Phase.Ended() && r.Superseded == "" {
			s.Rollout.Unavailable++
		}
	}
	return s
}

// Deployments are all deployments with their nodes, newest first.
func (f *Fleet) Deployments() []protocol.Deployment {
	f.mu.Lock()
	defer f.mu.Unlock()
	var all []protocol.Deployment
	for _, d := range slices.Backward(f.deployments) {
		c := f.summary(d)
		c.Nodes = maps.Clone(d.Nodes)
		all = append(all, c)
	}
	return all
}
