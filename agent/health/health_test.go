package health

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"
)

func none(context.Context) ([]string, error) { return nil, nil }
func reached(context.Context) error          { return nil }

func TestCheckHoldsAfterSettling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		before := []string{"old.service"}
		failed := func(context.Context) ([]string, error) { return before, nil }
		if _, err := Check(ctx, Checks{Failed: failed, Before: before, Probe: reached, Settle: 10 * time.Second}); err != nil {
			t.Fatal(err)
		}
		if took := time.Since(start); took < 10*time.Second || took > 11*time.Second {
			t.Errorf("took %v, want the settling time", took)
		}
	})
}

func TestCheckUnitFailsWhileSettling(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		start := time.Now()
		failed := func(context.Context) ([]string, error) {
			if time.Since(start) > 4*time.Second && time.Since(start) < 5*time.Second {
				return []string{"b.service", "a.service"}, nil // as in automatic restart, and then up again
			}
			return nil, nil
		}
		_, err := Check(ctx, Checks{Failed: failed, Probe: reached, Settle: 10 * time.Second})
		var f *Failure
		if !errors.As(err, &f) || len(f.Units) != 2 || f.Error() != "newly failed: a.service, b.service" {
			t.Fatalf("got %v", err)
		}
	})
}

func TestCheckProbe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
		defer cancel()
		var tries atomic.Int32
		flaky := func(context.Context) error {
			if tries.Add(1) < 5 {
				return errors.New("no route")
			}
			return nil
		}
		if _, err := Check(ctx, Checks{Failed: none, Probe: flaky}); err != nil {
			t.Fatal(err)
		}
		hangs := func(ctx context.Context) error { <-ctx.Done(); return ctx.Err() }
		var f *Failure
		if _, err := Check(ctx, Checks{Failed: none, Probe: hangs}); !errors.As(err, &f) {
			t.Fatalf("a probe that hangs: %v", err)
		}
	})
}

func TestCheckUnknownUnitsDontPass(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		unknown := func(context.Context) ([]string, error) { return nil, errors.New("bus is gone") }
		var f *Failure
		if _, err := Check(ctx, Checks{Failed: unknown, Probe: reached}); !errors.As(err, &f) {
			t.Fatalf("got %v", err)
		}
	})
}

func TestCheckCancelled(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		time.AfterFunc(time.Second, cancel)
		if _, err := Check(ctx, Checks{Failed: none, Probe: reached, Settle: time.Hour}); !errors.Is(err, context.Canceled) {
			t.Fatalf("got %v", err)
		}
	})
}
