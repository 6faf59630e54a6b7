package reconcile

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	refusedFor     = 10 * time.Minute
	unwrittenFor   = time.Minute // a disk may be freed
	maxRefused     = 64
	manifestTries  = 3
	requestTimeout = 30 * time.Second
)

// order is a verified manifest and the document that it came in.
type order struct {
	digest   string
	doc      []byte
	m        *protocol.Manifest
	by       protocol.Identity
	local    bool // given on the node itself, by root
	unsigned bool // and made there, too: a rollback
}

// letter is what a mailbox holds: a look, or an order that was given on the node itself.
type letter struct {
	look  protocol.Look
	order *order
}

// mailbox holds an order that was given on the node itself, the newest look for a desired state and the newest
// one for a dry run.
type mailbox struct {
	mu      sync.Mutex
	local   *letter
	desired *letter
	dry     *letter
	wake    chan struct{}

	given  string // deployment of the newest order that was given on the node itself
	failed string // why that one did not become an attempt
}

func newMailbox() *mailbox { return &mailbox{wake: make(chan struct{}, 1)} }

func (b *mailbox) put(l protocol.Look) {
	b.mu.Lock()
	switch {
	case l.Serial == 0 && l.Digest != "":
		b.dry = &letter{look: l}
	case b.desired == nil || l.Serial == 0 || l.Serial >= b.desired.look.Serial:
		b.desired = &letter{look: l}
	}
	b.mu.Unlock()
	b.ring()
}

// give leaves an order that was given on the node itself; false: another one waits.
func (b *mailbox) give(o *order) bool {
	b.mu.Lock()
	free := b.local == nil
	if free {
		b.local, b.given, b.failed = &letter{order: o}, o.m.Deployment, ""
	}
	b.mu.Unlock()
	b.ring()
	return free
}

func (b *mailbox) ring() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

// fail says why an order did not become an attempt.
func (b *mailbox) fail(deployment, reason string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.given == deployment {
		b.failed = reason
	}
}

// wasGiven tells whether a deployment is the newest that was given on the node itself, and why it failed before
// it became an attempt.
func (b *mailbox) wasGiven(deployment string) (given bool, failed string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.given == deployment, b.failed
}

// take empties the slot of the node's own order or of the desired state, or, unless only those are wanted, of
// the dry run.
func (b *mailbox) take(onlyDesired bool) (letter, bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	slots := []**letter{&b.local, &b.desired, &b.dry}
	if onlyDesired {
		slots = slots[:2]
	}
	for _, slot := range slots {
		if l := *slot; l != nil {
			*slot = nil
			return *l, true
		}
	}
	return letter{}, false
}

func (b *mailbox) wait(ctx context.Context) (letter, bool) {
	for {
		if l, ok := b.take(false); ok {
			return l, true
		}
		select {
		case <-ctx.Done():
			return letter{}, false
		case <-b.wake:
		}
	}
}

// refused remembers manifests that were not accepted, so that a beat every few seconds does not fetch
// and report them again. What was refused under one account JWT may be good under another, so a change of
// it, by whatever way it came, makes it forget. Only Run's goroutine uses it.
type refused struct {
	account string               // JWT under which they were refused
	until   map[string]time.Time // by digest
}

// under makes it forget where the account is another one than before.
func (r *refused) under(account string) {
	if r.account != account {
		r.account, r.until = account, nil
	}
}

func (r *refused) add(digest string, until time.Time) {
	if r.until == nil || len(r.until) >= maxRefused {
		r.until = map[string]time.Time{}
	}
	r.until[digest] = until
}

func (r *refused) has(digest string, now time.Time) bool { return now.Before(r.until[digest]) }

// takeAccount hands a newer account JWT to the verifier.
func (e *Engine) takeAccount(token string) {
	if token == "" {
		return
	}
	changed, err := e.o.Verifier.SetAccount(token)
	if err != nil {
		e.o.Log.Warn("an account JWT was not accepted", "error", err)
	}
	if changed && e.o.Account != nil {
		e.o.Account(token)
	}
}

// obtain gives the order of a letter; nil where there is nothing to do.
func (e *Engine) obtain(ctx context.Context, l letter) *order {
	o := l.order
	if o == nil {
		return e.fetchOrder(ctx, l.look)
	}
	// Another manifest may have been accepted since it was given.
	if seen := e.seen(); !o.unsigned && o.m.Serial <= seen {
		e.giveUp(o, outdated(o.m.Serial, seen).Error())
		return nil
	}
	return o
}

func outdated(serial, seen uint64) error {
	return protocol.Refuse(protocol.Outdated, "serial %d is not above %d, which was seen before; deploy again", serial, seen)
}

// fetchOrder fetches and verifies the manifest that a look is about; nil where there is nothing to do.
func (e *Engine) fetchOrder(ctx context.Context, l protocol.Look) *order {
	e.takeAccount(l.Account)
	e.refuse.under(e.o.Verifier.Account())
	seen := e.seen()
	if l.Serial != 0 && l.Serial <= seen || l.Digest != "" && e.refuse.has(l.Digest, time.Now()) {
		return nil
	}
	reply, err := e.fetchManifest(ctx, l.Digest)
	if err != nil {
		if ctx.Err() == nil {
			e.o.Log.Warn("the manifest can't be fetched; the next look tries again", "digest", l.Digest, "error", err)
		}
		return nil
	}
	e.takeAccount(reply.Account)
	// Asked before it is judged: one that changes meanwhile is another one at the next look.
	e.refuse.under(e.o.Verifier.Account())
	if len(reply.Manifest) == 0 {
		return nil
	}
	digest := protocol.Digest(reply.Manifest)
	if e.refuse.has(digest, time.Now()) {
		return nil
	}
	m, by, err := e.verify(reply.Manifest)
	if l.Digest != "" && l.Digest != digest {
		e.refuse.add(l.Digest, time.Now().Add(refusedFor))
		if err == nil {
			err = protocol.Refuse(protocol.Tampered, "the controller sent manifest %s in place of %s", digest, l.Digest)
		}
	}
	if err == nil && m.Mode != protocol.DryActivate && m.Serial <= seen {
		if e.known(m.Deployment) {
			return nil
		}
		err = outdated(m.Serial, seen)
	}
	var deployment string
	if m != nil {
		deployment = m.Deployment
	}
	if err != nil {
		e.record(by, deployment, digest, code(err), err.Error())
		e.refuseOrder(digest, reply.Manifest, err)
		return nil
	}
	e.o.Log.Info("a manifest arrived", "deployment", deployment, "serial", m.Serial, "mode", m.Mode, "by", by.Name)
	e.record(by, deployment, digest, "", "")
	return &order{digest: digest, doc: reply.Manifest, m: m, by: by}
}

func (e *Engine) seen() uint64 {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.j.Seen
}

// verify is the Verifier's, and keeps the names of the node's own orders to the node.
func (e *Engine) verify(doc []byte) (*protocol.Manifest, protocol.Identity, error) {
	m, by, err := e.o.Verifier.Manifest(doc, e.o.Node, time.Now())
	if err == nil && isLocal(m.Deployment) {
		err = protocol.Refuse(protocol.Invalid, "deployment %s is named as only the node's own orders are", m.Deployment)
	}
	return m, by, err
}

// known tells whether a manifest is one that this node acted on, so that it is not refused when it is
// looked at once more.
func (e *Engine) known(deployment string) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	_, confirmed := e.j.newest(func(c Confirmation) bool { return c.Deployment == deployment })
	return confirmed || e.j.Newest == deployment
}

// fetchManifest tries a few times: the controller may be on its way back.
func (e *Engine) fetchManifest(ctx context.Context, digest string) (protocol.ManifestReply, error) {
	var reply protocol.ManifestReply
	err := retry(ctx, manifestTries, func() (err error) {
		one, cancel := context.WithTimeout(ctx, requestTimeout)
		defer cancel()
		reply, err = e.o.Upstream.Manifest(one, digest)
		return err
	})
	return reply, err
}

// refuseOrder remembers a manifest that was not accepted, and tells people: in State, and in a report
// where the document is at least a manifest of this node.
func (e *Engine) refuseOrder(digest string, doc []byte, why error) {
	e.refuse.add(digest, time.Now().Add(refusedFor))
	e.o.Log.Error("a manifest was refused", "digest", digest, "reason", why)
	m, err := unverified(doc)
	if err != nil || m.Node != e.o.Node {
		e.setNotice(fmt.Sprintf("a manifest was refused: %v", why))
		return
	}
	e.setNotice(fmt.Sprintf("deployment %s was refused: %v", m.Deployment, why))
	e.mu.Lock()
	// What arrives unproven must not push out what is owed: half of the queue is for the owed.
	room := len(e.j.Reports) < maxReports/2 && m.Deployment != e.j.State.Deployment
	e.mu.Unlock()
	if !room {
		return
	}
	now := e.now()
	e.report(protocol.Report{Version: protocol.Version, Deployment: m.Deployment, Serial: m.Serial, Mode: m.Mode,
		Phase: protocol.FailedPhase, Reason: clip("refused: "+why.Error(), maxReason), Started: now, Ended: now})
}

// retry repeats what may work later, with a growing and jittered wait. A refusal is final.
func retry(ctx context.Context, tries int, try func() error) error {
	wait := 250 * time.Millisecond
	for n := 1; ; n++ {
		err := try()
		var refusal *protocol.Refusal
		if err == nil || n == tries || errors.As(err, &refusal) || ctx.Err() != nil {
			return err
		}
		if !sleep(ctx, jitter(wait)) {
			return err
		}
		wait = min(2*wait, 10*time.Second)
	}
}

// jitter spreads a wait over half to one and a half of it.
func jitter(d time.Duration) time.Duration { return d/2 + rand.N(d) }

// sleep tells whether the time passed; false: ctx ended.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}
