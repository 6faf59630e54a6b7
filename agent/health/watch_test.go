package health

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// scripted is a check that is tried every 2 s with a grace of 10 s, and that fails while fails says so.
func scripted(name string, fails func(since time.Duration) bool) Declaration {
	start := time.Now()
	return Declaration{Name: name, Kind: "tcp", Interval: 2 * time.Second, Timeout: time.Second, Grace: 10 * time.Second,
		probe: func(context.Context, UnitState) error {
			if fails(time.Since(start)) {
				return errors.New("not now")
			}
			return nil
		}}
}

func between(from, to time.Duration) func(time.Duration) bool {
	return func(since time.Duration) bool { return since >= from && since < to }
}

const forever = 1000 * time.Hour

// judge runs a check to its end, which may take five minutes.
func judge(t *testing.T, settle time.Duration, declared ...Declaration) (results []protocol.CheckResult, took time.Duration, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	start := time.Now()
	results, err = Check(ctx, Checks{Failed: none, Probe: reached, Settle: settle, Declared: declared})
	return results, time.Since(start), err
}

func TestDeclaredChecksDecide(t *testing.T) {
	for name, c := range map[string]struct {
		settle time.Duration
		fails  func(time.Duration) bool
		least  time.Duration // of the judgement
		most   time.Duration
		want   string // "": proven
		passed bool
	}{
		"passes at once":           {5 * time.Second, between(0, 0), 5 * time.Second, 5 * time.Second, "", true},
		"passes without settling":  {0, between(0, 0), 0, time.Second, "", true},
		"comes up late":            {time.Second, between(0, 7*time.Second), 7 * time.Second, 9 * time.Second, "", true},
		"passes at its last try":   {time.Second, between(0, 10*time.Second), 10 * time.Second, 12 * time.Second, "", true},
		"never passes":             {time.Second, between(0, forever), 10 * time.Second, 12 * time.Second, `health check "it" (tcp) did not pass within its grace of 10s: not now`, false},
		"one bad try":              {20 * time.Second, between(4*time.Second, 5*time.Second), 20 * time.Second, 20 * time.Second, "", true},
		"one bad try after grace":  {20 * time.Second, between(14*time.Second, 15*time.Second), 20 * time.Second, 20 * time.Second, "", true},
		"two bad tries":            {20 * time.Second, between(4*time.Second, 7*time.Second), 6 * time.Second, 6 * time.Second, "twice in a row", false},
		"falls over for good":      {20 * time.Second, between(15*time.Second, forever), 18 * time.Second, 19 * time.Second, "twice in a row", false},
		"fails as it settles":      {9 * time.Second, between(9*time.Second, 10*time.Second), 11 * time.Second, 11 * time.Second, "", true},
		"fails from then on":       {9 * time.Second, between(9*time.Second, forever), 11 * time.Second, 11 * time.Second, "twice in a row", false},
		"is bad every second time": {9 * time.Second, func(since time.Duration) bool { return since/time.Second%4 == 2 }, 9 * time.Second, 13 * time.Second, "", true},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				results, took, err := judge(t, c.settle, scripted("it", c.fails))
				var f *Failure
				if c.want == "" && err != nil || c.want != "" && (!errors.As(err, &f) || !strings.Contains(f.Reason, c.want)) {
					t.Errorf("got %v, want %q", err, c.want)
				}
				if took < c.least || took > c.most {
					t.Errorf("took %v, want %v to %v", took, c.least, c.most)
				}
				if len(results) != 1 || results[0].Passed != c.passed || results[0].Tries == 0 || results[0].Name != "it" || results[0].Kind != "tcp" {
					t.Errorf("results %+v", results)
				}
			})
		})
	}
}

func TestResultsOfAllChecks(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		results, _, err := judge(t, time.Second,
			scripted("good", between(0, 0)), scripted("late", between(0, 5*time.Second)), scripted("bad", between(0, forever)))
		if err == nil || len(results) != 3 {
			t.Fatalf("%v, %+v", err, results)
		}
		good, late, bad := results[0], results[1], results[2]
		if !good.Passed || good.Millis != 0 || good.Reason != "" || good.Tries < 5 {
			t.Errorf("good: %+v", good)
		}
		if !late.Passed || late.Millis < 5000 || late.Millis > 7000 || late.Reason != "not now" {
			t.Errorf("late: %+v", late)
		}
		if bad.Passed || bad.Millis < 10000 || bad.Millis > 12000 || bad.Reason != "not now" {
			t.Errorf("bad: %+v", bad)
		}
	})
}

// However the proof ends, what the checks had said until then is told.
func TestResultsWhereAnUnitFails(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		start := time.Now()
		failed := func(context.Context) ([]string, error) {
			if time.Since(start) > 3*time.Second {
				return []string{"a.service"}, nil
			}
			return nil, nil
		}
		results, err := Check(t.Context(), Checks{Failed: failed, Probe: reached, Settle: time.Minute, Declared: []Declaration{scripted("web", between(0, forever))}})
		var f *Failure
		if !errors.As(err, &f) || len(f.Units) != 1 || len(results) != 1 || results[0].Passed || results[0].Tries != 2 || results[0].Reason != "not now" {
			t.Errorf("%v, %+v", err, results)
		}
	})
}

func TestDeadlineNamesTheCheck(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		hangs := scripted("hangs", nil)
		hangs.Timeout = time.Hour
		hangs.probe = func(ctx context.Context, _ UnitState) error { <-ctx.Done(); return ctx.Err() }
		results, err := Check(ctx, Checks{Failed: none, Probe: reached, Declared: []Declaration{hangs}})
		want := `health check "hangs" (tcp) had not passed by the deadline: no try of it ended`
		if err == nil || err.Error() != want || results[0].Passed || results[0].Reason == "" {
			t.Errorf("%v, %+v", err, results)
		}
	})
}

func TestATryEndsWithItsTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		hangs := scripted("hangs", nil)
		hangs.probe = func(ctx context.Context, _ UnitState) error { <-ctx.Done(); return ctx.Err() }
		results, took, err := judge(t, time.Minute, hangs)
		if err == nil || results[0].Reason != "no result within 1s" || took != 11*time.Second {
			t.Errorf("%v after %v, %+v", err, took, results)
		}
		// Its tries are an interval apart, counted from where each begins.
		if results[0].Tries != 6 {
			t.Errorf("%d tries", results[0].Tries)
		}
	})
}

func TestReasonsAreOneBoundedLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		noisy := scripted("noisy", nil)
		noisy.probe = func(context.Context, UnitState) error {
			return fmt.Errorf("\x1b[31mred\nand\x00long \xff%s", strings.Repeat("ä", 1000))
		}
		results, _, err := judge(t, 0, noisy)
		if err == nil || !strings.HasPrefix(results[0].Reason, "[31mred and long ?ää") || len(results[0].Reason) > maxReason {
			t.Errorf("%q", results[0].Reason)
		}
	})
}
