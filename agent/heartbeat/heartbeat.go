// Package heartbeat tells the controllers that a node lives and what it is: every few seconds, and at
// once when something changed.
//
// Start with Heart.Run. host.go reads the facts of a real machine, units.go follows which of its units
// have failed. An idle node costs a few small reads per beat and no question to systemd.
package heartbeat

import (
	"context"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// Interval is how often an agent beats unless it is told otherwise.
const Interval = 10 * time.Second

// shortest is the time between two beats, however much changes.
const shortest = 200 * time.Millisecond

// Source knows a machine's facts.
type Source interface {
	// Facts gives the part of a beat that is about the machine. It must not take long.
	Facts(ctx context.Context) protocol.Beat
}

// Options are what a beat is made of and where it goes.
type Options struct {
	Interval time.Duration // 0: Interval
	Source   Source
	Complete func(*protocol.Beat)      // adds what the agent knows of itself
	Send     func(protocol.Beat) error // an error is no news: the next beat says it all again
	Log      *slog.Logger
}

// Heart beats.
type Heart struct {
	o       Options
	changed chan struct{}
	passed  atomic.Int64 // when the loop came by last, Unix nanoseconds
	sending sync.Mutex   // no beat is overtaken by an older one
}

// New makes a heart; Run starts it.
func New(o Options) *Heart {
	if o.Interval == 0 {
		o.Interval = Interval
	}
	h := &Heart{o: o, changed: make(chan struct{}, 1)}
	h.passed.Store(time.Now().UnixNano())
	return h
}

// Changed has a beat sent soon, one for all changes of the moment. It never blocks.
func (h *Heart) Changed() {
	select {
	case h.changed <- struct{}{}:
	default:
	}
}

// Now sends a beat before it returns. Whoever tells the controllers something else of the node afterwards, over the
// same connection, has told them first where it stands.
func (h *Heart) Now(ctx context.Context) {
	h.sending.Lock()
	defer h.sending.Unlock()
	if err := h.o.Send(h.Beat(ctx)); err != nil {
		h.o.Log.Debug("beat not sent", "error", err)
	}
}

// Beat is what a beat says now.
func (h *Heart) Beat(ctx context.Context) protocol.Beat {
	b := h.o.Source.Facts(ctx)
	b.Version, b.Interval, b.Agent = protocol.Version, max(1, int(h.o.Interval/time.Second)), protocol.Build()
	h.o.Complete(&b)
	return b
}

// Run beats until ctx ends. The regular beats keep a phase of their own, so that nodes which were all
// connected in the same moment don't speak in chorus ever after.
func (h *Heart) Run(ctx context.Context) error {
	regular := time.NewTimer(rand.N(h.o.Interval))
	defer regular.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-regular.C:
			regular.Reset(h.o.Interval*19/20 + rand.N(h.o.Interval/10))
		case <-h.changed:
		}
		h.passed.Store(time.Now().UnixNano())
		h.Now(ctx)
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(shortest):
		}
	}
}

// Check is for a watchdog: an error means that the loop hangs.
func (h *Heart) Check() error {
	if idle := time.Since(time.Unix(0, h.passed.Load())); idle > 3*h.o.Interval+30*time.Second {
		return fmt.Errorf("no beat for %s", idle.Round(time.Second))
	}
	return nil
}
