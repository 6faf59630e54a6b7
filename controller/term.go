package controller

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/controller/broker"
	"github.com/nix-infra/nix-infra/controller/liveness"
	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

const (
	nodeWorkers  = 32 // requests of nodes that are served at once
	userWorkers  = 16 // requests of people, for each role that they need
	nodeTimeout  = 30 * time.Second
	userTimeout  = protocol.RequestLifetime
	pendingMsgs  = 100_000  // beats of a large fleet, all at once
	pendingBytes = 64 << 20 // what waits for a worker; more is dropped, and its senders ask again
	stopTimeout  = 3 * time.Second

	aliveFile  = "alive"
	aliveEvery = 10 * time.Second
)

// term is what a controller does while it leads: everything that answers.
type term struct {
	c        *Controller
	log      *slog.Logger
	lead     *store.Term
	blobs    *broker.Blobs
	fleet    *fleet
	alive    *liveness.Tracker
	rollouts *rollouts
	audit    *auditor
	seen     *seen
	uploads  *uploads
	listings *broker.Cache[[]string]
	decoder  *zstd.Decoder
	pace     pace

	// By the role that is needed, those who work on what people ask: so many a viewer's questions may be, whoever takes
	// their access back is heard.
	users map[protocol.Role]chan struct{}

	strange  limiter // log lines about messages that make no sense
	unproven limiter // refused requests of nobody in particular
	joiners  limiter // machines with a token that were refused

	changing  sync.Mutex    // held by whatever changes nodes, deployments or desired states
	deployed  chan struct{} // something may have become garbage
	unsettled chan struct{} // the term must end, so that the next one recovers

	ctx    context.Context
	cancel context.CancelFunc
	subs   []*nats.Subscription
	loops  sync.WaitGroup

	mu      sync.Mutex
	closed  bool
	workers sync.WaitGroup
}

// newTerm brings a new leader up to date and lets it serve.
func (c *Controller) newTerm(ctx context.Context, lead *store.Term) (*term, error) {
	t := &term{
		c: c, log: c.log, lead: lead, blobs: c.broker.Blobs,
		listings: broker.NewCache[[]string](listingBytes),
		strange:  limiter{every: time.Second, burst: 10},
		unproven: limiter{every: time.Second / 20, burst: 20},
		joiners:  limiter{every: 5 * time.Second, burst: 50},
		deployed: make(chan struct{}, 1), unsettled: make(chan struct{}, 1), users: map[protocol.Role]chan struct{}{},
	}
	for _, role := range []protocol.Role{protocol.Viewer, protocol.Operator, protocol.Deployer, protocol.Admin} {
		t.users[role] = make(chan struct{}, userWorkers)
	}
	t.ctx, t.cancel = context.WithCancel(context.WithoutCancel(ctx))
	if err := t.load(ctx); err != nil {
		t.cancel()
		return nil, err
	}
	if err := t.subscribe(); err != nil {
		t.stop()
		return nil, err
	}
	return t, nil
}

func (t *term) load(ctx context.Context) (err error) {
	if err := t.keepAccount(ctx); err != nil {
		return err
	}
	if t.decoder, err = zstd.NewReader(nil, zstd.WithDecoderMaxMemory(protocol.MaxFileSize), zstd.WithDecoderConcurrency(2)); err != nil {
		return err
	}
	if err := t.lead.Recover(ctx); err != nil {
		return fmt.Errorf("can't settle a half-done deployment: %w", err)
	}
	if t.fleet, err = loadFleet(ctx, t.c.store); err != nil {
		return err
	}
	if err := t.blobs.Load(ctx); err != nil {
		return err
	}
	if t.seen, err = loadSeen(ctx, t.c.store, t.lead); err != nil {
		return err
	}
	if t.uploads, err = newUploads(filepath.Join(t.c.cfg.Dir, "spool")); err != nil {
		return err
	}
	t.audit = &auditor{name: t.c.machine.Name, js: t.c.broker.JS, stream: t.c.broker.Audit, log: t.log}
	t.rollouts = newRollouts(t)
	t.alive, err = liveness.New(ctx, liveness.Config{
		Interval: time.Duration(t.c.cfg.Heartbeat.Interval) * time.Second, Floor: t.lastAlive(),
		Anew: len(t.c.cfg.Broker.External) == 0, Changed: t.rollouts.changed,
	}, t.lead, t.log)
	return err
}

// lastAlive is until when an earlier controller in this folder kept track of the nodes. After a kill -9
// it is all that tells when a node was seen whose beats had not changed for a month.
func (t *term) lastAlive() time.Time {
	info, err := os.Stat(filepath.Join(t.c.cfg.Dir, aliveFile))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			t.log.Warn("can't tell when this controller ran last", "error", err)
		}
		return time.Time{}
	}
	return info.ModTime()
}

func (t *term) subscribe() error {
	t.loops.Add(4)
	go func() { defer t.loops.Done(); t.rollouts.run(t.ctx) }()
	go func() { defer t.loops.Done(); t.alive.Run(t.ctx) }()
	go func() { defer t.loops.Done(); t.keepAlive() }()
	go func() { defer t.loops.Done(); t.collectGarbage() }()

	up := func(what string) string { return "ni.*.node.*.up." + what }
	if err := t.on(up(protocol.UpBeat), t.beat); err != nil {
		return err
	}
	nodes := make(chan struct{}, nodeWorkers)
	for what, serve := range map[string]nodeHandler{
		protocol.UpPing: t.ping, protocol.UpManifest: t.manifest, protocol.UpBlob: t.blob, protocol.UpReport: t.report,
	} {
		if err := t.on(up(what), t.bounded(nodes, nodeTimeout, t.forNode(serve))); err != nil {
			return err
		}
	}
	if err := t.on(up(protocol.UpJoin), t.bounded(make(chan struct{}, joinWorkers), nodeTimeout, t.join)); err != nil {
		return err
	}
	for least, users := range t.users {
		if err := t.on(protocol.ControllerRequestsOf(least), t.bounded(users, userTimeout, t.request)); err != nil {
			return err
		}
	}
	// Whoever asks once Start has returned must be heard.
	ctx, cancel := context.WithTimeout(t.ctx, 5*time.Second)
	defer cancel()
	return t.c.broker.Conn.FlushWithContext(ctx)
}

func (t *term) on(subject string, handle nats.MsgHandler) error {
	s, err := t.c.broker.Conn.Subscribe(subject, handle)
	if err != nil {
		return fmt.Errorf("can't subscribe to %s: %w", subject, err)
	}
	t.subs = append(t.subs, s)
	return s.SetPendingLimits(pendingMsgs, pendingBytes)
}

// bounded serves messages at once, but only so many. The rest waits in the subscription.
func (t *term) bounded(slots chan struct{}, timeout time.Duration, serve func(context.Context, *nats.Msg)) nats.MsgHandler {
	return func(m *nats.Msg) {
		select {
		case slots <- struct{}{}:
		case <-t.ctx.Done():
			return
		}
		if !t.begin() {
			<-slots
			return
		}
		go func() {
			defer func() { <-slots; t.workers.Done() }()
			ctx, cancel := context.WithTimeout(t.ctx, timeout)
			defer cancel()
			serve(ctx, m)
		}()
	}
}

func (t *term) begin() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	if !t.closed {
		t.workers.Add(1)
	}
	return !t.closed
}

// stop stops listening, waits for what is being served, and ends.
func (t *term) stop() {
	for _, s := range t.subs {
		if err := s.Unsubscribe(); err != nil && !errors.Is(err, nats.ErrConnectionClosed) {
			t.log.Warn("broker", "error", err)
		}
	}
	t.mu.Lock()
	t.closed = true
	t.mu.Unlock()
	served := make(chan struct{})
	go func() { t.workers.Wait(); close(served) }()
	select {
	case <-served:
	case <-time.After(stopTimeout):
		t.log.Warn("requests are cut off, because they take too long")
	}
	t.cancel()
	<-served
	t.loops.Wait()
	t.decoder.Close()
}

// keepAlive leaves a trace of when this controller last ran; see lastAlive.
func (t *term) keepAlive() {
	path := filepath.Join(t.c.cfg.Dir, aliveFile)
	if err := atomicfile.Write(path, nil, 0o600); err != nil {
		t.log.Warn("last-seen times may be wrong after a crash", "error", err)
	}
	tick := time.NewTicker(aliveEvery)
	defer tick.Stop()
	for {
		select {
		case <-t.ctx.Done():
			return
		case now := <-tick.C:
			if err := os.Chtimes(path, now, now); err != nil {
				t.log.Warn("last-seen times may be wrong after a crash", "error", err)
			}
		}
	}
}

// mustRecover ends the term.
func (t *term) mustRecover() {
	select {
	case t.unsettled <- struct{}{}:
	default:
	}
}

// answer sends a reply. Whoever does not get it asks again.
func (t *term) answer(to string, body any, err error) {
	reply := protocol.Answer(protocol.ControllerName, body, err)
	if err := t.c.broker.Conn.Publish(to, protocol.Encode(reply)); err != nil {
		t.log.Warn("can't answer", "to", to, "error", err)
	}
}

// limiter lets so many through at once and then one per interval. It counts what it held back.
type limiter struct {
	every time.Duration
	burst int

	mu   sync.Mutex
	used int
	last time.Time
	held int
}

func (l *limiter) allow(now time.Time) (ok bool, heldBack int) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if n := int(now.Sub(l.last) / l.every); n > 0 {
		l.used, l.last = max(0, l.used-n), now
	}
	if l.used >= l.burst {
		l.held++
		return false, 0
	}
	l.used++
	heldBack, l.held = l.held, 0
	return true, heldBack
}

// ignore logs a message that is dropped, but not every one of a flood.
func (t *term) ignore(m *nats.Msg, why any) {
	if ok, held := t.strange.allow(time.Now()); ok {
		t.log.Warn("ignored a message", "subject", m.Subject, "why", why, "more_before", held)
	}
}
