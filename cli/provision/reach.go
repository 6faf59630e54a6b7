package provision

import (
	"context"
	"errors"
	"time"
)

// Patience is how long a machine is waited for.
type Patience struct {
	Reach time.Duration // until SSH answers
	Keys  time.Duration // until it takes one of the keys, since it answers: what is new or boots may not know them yet
}

// retryEvery is how often a machine that does not answer is tried again, and one where something runs is looked at. Tests wait less.
var retryEvery = time.Second

// Reach connects by the first of several ways in, from the most wanted, and waits for a machine that is not there yet. A host
// key that is not the pinned one ends it at once. The error is the last one's, or the first way's.
func Reach(ctx context.Context, ways []Target, p Patience, waiting func(why error)) (*Machine, error) {
	began := time.Now()
	var answered time.Time
	for {
		var first error
		there := false
		for _, w := range ways {
			m, err := Dial(ctx, w)
			if err == nil {
				return m, nil
			}
			if ctx.Err() != nil {
				return nil, context.Cause(ctx)
			}
			var away *unreachable
			var refused *refusedKeys
			switch {
			case errors.As(err, &refused):
				there = true
			case !errors.As(err, &away):
				return nil, err
			}
			if first == nil {
				first = err
			}
			if !there {
				break // the other ways lead to the same address
			}
		}
		now := time.Now()
		switch {
		case !there:
			answered = time.Time{} // what it said when it went down is of before
		case answered.IsZero():
			answered = now
		}
		if there && now.Sub(answered) >= p.Keys || !there && now.Sub(began) >= p.Reach {
			return nil, first
		}
		waiting(first)
		if err := pause(ctx, retryEvery); err != nil {
			return nil, err
		}
	}
}

func pause(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-timer.C:
		return nil
	}
}
