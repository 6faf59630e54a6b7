// Package health proves, or fails to prove, that a machine works after its system was switched.
//
// Start with Check. declared.go reads the health checks that a system declares, watch.go tries each of them again and
// again and judges, try.go is one try of each kind. docs/health.md is for those who declare some.
package health

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	pollUnits    = 500 * time.Millisecond
	probeTimeout = 10 * time.Second
	probeFirst   = 250 * time.Millisecond // wait after the first failed probe; doubled after each
	probeLast    = 5 * time.Second
)

// Checks is what has to hold. The deadline is that of the context.
type Checks struct {
	// Failed lists the units that are failed now, those that wait for their automatic restart included.
	// An error means that they can't be known now; it is asked again.
	Failed func(ctx context.Context) ([]string, error)
	// Before are the units that had failed before the switch: they don't count.
	Before []string
	// Probe reaches the controller over a new connection and is answered. It is tried again until the
	// deadline: a network takes its time to come back.
	Probe func(ctx context.Context) error
	// Settle is for how long no unit may newly fail.
	Settle time.Duration
	// Declared are the checks that the system declares. Each has to pass, and to pass still once all else holds.
	Declared []Declaration
	// UnitState is asked for those of kind unit.
	UnitState UnitState
}

// Failure is what did not hold. Error is one line.
type Failure struct {
	Units  []string // newly failed
	Reason string
}

func (f *Failure) Error() string { return f.Reason }

// NewlyFailed is what is in now and was not in before, sorted.
func NewlyFailed(before, now []string) []string {
	var failed []string
	for _, u := range now {
		if !slices.Contains(before, u) && !slices.Contains(failed, u) {
			failed = append(failed, u)
		}
	}
	slices.Sort(failed)
	return failed
}

// FailedUnits makes the Failure of newly failed units.
func FailedUnits(units []string) *Failure {
	const named = 5
	names := strings.Join(units[:min(len(units), named)], ", ")
	if more := len(units) - named; more > 0 {
		names += fmt.Sprintf(" and %d more", more)
	}
	return &Failure{Units: units, Reason: "newly failed: " + names}
}

// Check waits until the probe succeeded, no unit newly failed for the settling time and all declared checks passed:
// nil. A newly failed unit, a check that failed for good or the passed deadline is a *Failure; a cancelled context is
// its own error. How the declared checks went comes in any case, in their order. It is to begin as the activation ends.
func Check(ctx context.Context, c Checks) ([]protocol.CheckResult, error) {
	probe := startProbe(ctx, c.Probe)
	defer probe.stop()
	watch := startWatch(ctx, c.Declared, c.UnitState)
	defer watch.stop()
	err := c.await(ctx, probe, watch)
	return watch.results(), err
}

func (c Checks) await(ctx context.Context, probe *prober, watch *watch) error {
	settled := time.NewTimer(c.Settle)
	defer settled.Stop()
	poll := time.NewTicker(pollUnits)
	defer poll.Stop()

	var calm, reached bool
	var unknown error
	for {
		now, err := c.Failed(ctx)
		if unknown = err; err == nil {
			if units := NewlyFailed(c.Before, now); len(units) > 0 {
				return FailedUnits(units)
			}
			if calm && reached && watch.passing() {
				return nil
			}
		}
		// Units are looked at once more after the last of the others held.
		select {
		case <-ctx.Done():
			return c.late(ctx, reached, unknown, probe, watch)
		case <-probe.done:
			reached, probe.done = probe.succeeded(), nil
		case <-settled.C:
			calm = true
			watch.again()
		case t := <-watch.tries:
			if err := watch.take(t); err != nil {
				return err
			}
		case <-poll.C:
		}
	}
}

// late says what was missing at the deadline.
func (c Checks) late(ctx context.Context, reached bool, unknown error, p *prober, w *watch) error {
	if !errors.Is(ctx.Err(), context.DeadlineExceeded) {
		return ctx.Err()
	}
	switch missing := w.missing(); {
	case !reached:
		return &Failure{Reason: fmt.Sprintf("the controller could not be reached before the deadline: %v", p.lastError())}
	case unknown != nil:
		return &Failure{Reason: fmt.Sprintf("the units could not be read before the deadline: %v", unknown)}
	case missing != "":
		return &Failure{Reason: missing}
	}
	return &Failure{Reason: fmt.Sprintf("the deadline came before the settling time of %v had passed", c.Settle)}
}

// prober tries the probe in the background until it succeeds.
type prober struct {
	done   chan struct{}
	ended  chan struct{}
	cancel context.CancelFunc

	mu   sync.Mutex
	ok   bool
	last error
}

func startProbe(ctx context.Context, probe func(context.Context) error) *prober {
	ctx, cancel := context.WithCancel(ctx)
	p := &prober{done: make(chan struct{}), ended: make(chan struct{}), cancel: cancel, last: errors.New("no answer")}
	done := p.done
	go func() {
		defer close(p.ended)
		for wait := probeFirst; ; wait = min(2*wait, probeLast) {
			one, stop := context.WithTimeout(ctx, probeTimeout)
			err := probe(one)
			stop()
			p.note(err)
			if err == nil {
				close(done)
				return
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(wait):
			}
		}
	}()
	return p
}

func (p *prober) stop() {
	p.cancel()
	<-p.ended
}

func (p *prober) note(err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.ok = err == nil
	if err != nil && !errors.Is(err, context.Canceled) {
		p.last = err
	}
}

func (p *prober) succeeded() bool {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.ok
}

func (p *prober) lastError() error {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.last
}
