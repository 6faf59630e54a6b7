package agent

import (
	"context"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/agent/link"
	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/protocol"
)

// maxOrders bounds what recorder remembers.
const maxOrders = 64

// recorder is the engine's way to the controller, with a record of every manifest that comes along it
// and of how it ended. It judges a manifest as the engine does, and changes nothing on the way.
type recorder struct {
	*link.Link
	node     string
	verifier *protocol.Verifier
	record   func(protocol.AuditRecord) error
	state    func() reconcile.State

	mu       sync.Mutex
	recorded map[string]bool              // digests of manifests that have their record
	senders  map[string]protocol.Identity // by deployment
	ended    string                       // the deployment whose end was recorded last
}

// Manifest passes the question on and records the order that comes back, once.
func (r *recorder) Manifest(ctx context.Context, digest string) (protocol.ManifestReply, error) {
	reply, err := r.Link.Manifest(ctx, digest)
	if err == nil && len(reply.Manifest) > 0 {
		r.judge(digest, reply.Manifest)
	}
	return reply, err
}

// judge writes down what a manifest is, and why it will be refused if it will.
func (r *recorder) judge(wanted string, doc []byte) {
	digest := protocol.Digest(doc)
	if !r.first(digest) {
		return
	}
	m, id, err := r.verifier.Manifest(doc, r.node, time.Now())
	a := protocol.AuditRecord{User: id.Name, Role: id.Role, Action: protocol.Deploy, Target: r.node, Payload: digest}
	switch now := r.state(); {
	case err != nil:
	case wanted != "" && wanted != digest:
		err = protocol.Refuse(protocol.Tampered, "the controller sent it in place of %s", wanted)
	case m.Mode != protocol.DryActivate && m.Serial < now.Serial:
		err = protocol.Refuse(protocol.Outdated, "serial %d is below %d, which was seen before", m.Serial, now.Serial)
	case m.Deployment == now.Deployment && now.Phase.Ended():
		return // asked for once more after a restart: its records are there
	}
	if m != nil {
		a.Request = m.Deployment
		r.remember(m.Deployment, id)
	}
	if err != nil {
		a.Outcome, a.Reason = string(protocol.Answer(r.node, nil, err).Refused.Code), err.Error()
	}
	_ = r.record(a) // it says so itself; a rescue must not fail for want of a record
}

// Event passes progress on and records an end.
func (r *recorder) Event(deployment string, e protocol.Event) {
	r.Link.Event(deployment, e)
	if !e.Phase.Ended() || len(e.Lines) > 0 || !r.end(deployment+" "+string(e.Phase)) {
		return
	}
	r.mu.Lock()
	id := r.senders[deployment]
	r.mu.Unlock()
	a := protocol.AuditRecord{User: id.Name, Role: id.Role, Action: protocol.Deploy, Target: r.node, Request: deployment, Outcome: "ok", Reason: string(e.Phase)}
	if !e.Phase.Succeeded() {
		a.Outcome = string(protocol.Failed)
	}
	if e.Reason != "" {
		a.Reason += ": " + e.Reason
	}
	_ = r.record(a) // it says so itself, and what was done is done
}

func (r *recorder) first(digest string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.recorded[digest] {
		return false
	}
	if r.recorded == nil || len(r.recorded) >= maxOrders {
		r.recorded = map[string]bool{}
	}
	r.recorded[digest] = true
	return true
}

func (r *recorder) remember(deployment string, id protocol.Identity) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.senders == nil || len(r.senders) >= maxOrders {
		r.senders = map[string]protocol.Identity{}
	}
	r.senders[deployment] = id
}

// end tells whether an end is news.
func (r *recorder) end(what string) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended == what {
		return false
	}
	r.ended = what
	return true
}
