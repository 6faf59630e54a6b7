package health

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// maxReason bounds the reason of a result, in bytes: a report carries those of all checks.
const maxReason = 300

// watch tries the declared checks until it is stopped, each in its own time. Apart from the trying, it belongs to one
// goroutine, which takes the tries in.
type watch struct {
	tries  chan try
	checks []*watched

	started time.Time
	settled time.Time // zero: not yet; a check counts as passing by a try that began after it

	cancel context.CancelFunc
	ended  sync.WaitGroup
}

// watched is what is known of a check.
type watched struct {
	Declaration
	result protocol.CheckResult
	began  time.Time     // of the last try
	ever   bool          // it has passed once
	failed int           // tries in a row
	now    chan struct{} // try at once
}

// try is one that ended.
type try struct {
	check        int
	began, ended time.Time
	err          error
}

func startWatch(ctx context.Context, declared []Declaration, state UnitState) *watch {
	ctx, cancel := context.WithCancel(ctx)
	w := &watch{tries: make(chan try), started: time.Now(), cancel: cancel}
	for i, d := range declared {
		c := &watched{Declaration: d, result: protocol.CheckResult{Name: d.Name, Kind: d.Kind}, now: make(chan struct{}, 1)}
		w.checks = append(w.checks, c)
		w.ended.Go(func() { w.follow(ctx, i, c, state) })
	}
	return w
}

func (w *watch) stop() {
	w.cancel()
	w.ended.Wait()
}

// follow tries one check every interval. A try that takes longer than that is followed by the next one at once.
func (w *watch) follow(ctx context.Context, check int, c *watched, state UnitState) {
	for {
		t := try{check: check, began: time.Now()}
		one, stop := context.WithTimeout(ctx, c.Timeout)
		t.err = c.probe(one, state)
		switch late := t.err != nil && one.Err() != nil; {
		case late && errors.Is(t.err, context.DeadlineExceeded):
			t.err = fmt.Errorf("no result within %v", c.Timeout)
		case late:
			t.err = fmt.Errorf("no result within %v: %w", c.Timeout, t.err)
		}
		stop()
		t.ended = time.Now()
		select {
		case <-ctx.Done():
			return
		case w.tries <- t:
		}
		select {
		case <-ctx.Done():
			return
		case <-c.now:
		case <-time.After(c.Interval - time.Since(t.began)):
		}
	}
}

// again has each check tried once more, now that the system has settled: what passed before may be over.
func (w *watch) again() {
	w.settled = time.Now()
	for _, c := range w.checks {
		c.now <- struct{}{}
	}
}

// take takes a try in. An error is that check's end.
func (w *watch) take(t try) error {
	c := w.checks[t.check]
	c.began = t.began
	c.result.Tries++
	if t.err == nil {
		if !c.result.Passed {
			c.result.Millis = t.ended.Sub(w.started).Milliseconds()
		}
		c.ever, c.failed, c.result.Passed = true, 0, true
		return nil
	}
	c.failed++
	c.result.Passed, c.result.Reason = false, line(t.err)
	c.result.Millis = t.ended.Sub(w.started).Milliseconds()
	switch {
	case c.ever && c.failed > 1:
		return c.failure("passed, and then failed twice in a row")
	case !c.ever && t.began.Sub(w.started) >= c.Grace:
		return c.failure(fmt.Sprintf("did not pass within its grace of %v", c.Grace))
	}
	return nil
}

func (c *watched) failure(what string) *Failure {
	return &Failure{Reason: fmt.Sprintf("health check %q (%s) %s: %s", c.Name, c.Kind, what, c.result.Reason)}
}

// passing tells whether every check passed when it was tried last, and after the settling time.
func (w *watch) passing() bool {
	if w.settled.IsZero() {
		return false
	}
	for _, c := range w.checks {
		if !c.result.Passed || c.began.Before(w.settled) {
			return false
		}
	}
	return true
}

// missing names the first check that doesn't pass, for the deadline; "" where all do.
func (w *watch) missing() string {
	for _, c := range w.checks {
		if !c.result.Passed {
			if c.result.Tries == 0 {
				c.result.Reason = "no try of it ended"
			}
			return c.failure("had not passed by the deadline").Reason
		}
	}
	return ""
}

func (w *watch) results() []protocol.CheckResult {
	var all []protocol.CheckResult
	for _, c := range w.checks {
		all = append(all, c.result)
	}
	return all
}

// line makes one line of an error, and of what others wrote into it.
func line(err error) string {
	s := strings.ToValidUTF8(err.Error(), "?")
	s = strings.Join(strings.FieldsFunc(s, func(r rune) bool { return r < ' ' || r == ' ' || r == 0x7f }), " ")
	if len(s) > maxReason {
		s = strings.ToValidUTF8(s[:maxReason], "")
	}
	return s
}
