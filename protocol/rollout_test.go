package protocol

import (
	"testing"
	"time"
	_ "time/tzdata"
)

func TestAmount(t *testing.T) {
	for _, bad := range []Amount{"x", "-1", "+1", "%", "101%", "1.5", " 1", "1 %", "-5%", "99999999999", "0x10"} {
		if bad.Validate() == nil {
			t.Errorf("%q was taken", bad)
		}
	}
	for _, c := range []struct {
		a           Amount
		total       int
		floor, ceil int
	}{
		{"", 10, 0, 0}, {"0", 10, 0, 0}, {"3", 10, 3, 3}, {"30", 10, 10, 10}, {"25%", 10, 2, 3}, {"1%", 10, 0, 1}, {"100%", 7, 7, 7}, {"0%", 7, 0, 0}, {"50%", 0, 0, 0},
	} {
		if err := c.a.Validate(); err != nil {
			t.Errorf("%q: %v", c.a, err)
		}
		if f, u := c.a.Floor(c.total), c.a.Ceil(c.total); f != c.floor || u != c.ceil {
			t.Errorf("%q of %d: %d and %d, want %d and %d", c.a, c.total, f, u, c.floor, c.ceil)
		}
	}
}

func TestWindow(t *testing.T) {
	at := func(s string) time.Time {
		v, err := time.Parse(time.RFC3339, s)
		must(t, err)
		return v
	}
	night := Window{Days: []time.Weekday{time.Friday}, From: 22 * 60, To: 4 * 60}
	office := Window{From: 9 * 60, To: 17 * 60, Zone: "Europe/Stockholm"}
	whole := Window{Days: []time.Weekday{time.Sunday}}
	spring := Window{From: 2 * 60, To: 3 * 60, Zone: "Europe/Stockholm"}
	for _, c := range []struct {
		name string
		w    Window
		t    string
		next string // "": open
	}{
		{"the evening of its day", night, "2026-11-27T22:00:00Z", ""},
		{"before it", night, "2026-11-27T21:59:59Z", "2026-11-27T22:00:00Z"},
		{"after midnight", night, "2026-11-28T03:59:59Z", ""},
		{"over", night, "2026-11-28T04:00:00Z", "2026-12-04T22:00:00Z"},
		{"another night", night, "2026-11-26T23:00:00Z", "2026-11-27T22:00:00Z"},
		{"the zone's clock", office, "2026-11-24T08:00:00Z", ""},
		{"before by the zone's clock", office, "2026-11-24T07:59:00Z", "2026-11-24T08:00:00Z"},
		{"closed by the zone's clock", office, "2026-11-24T16:00:00Z", "2026-11-25T08:00:00Z"},
		{"summer time", office, "2026-07-01T07:00:00Z", ""},
		{"a whole day", whole, "2026-11-29T23:59:00Z", ""},
		{"the day after", whole, "2026-11-30T00:00:00Z", "2026-12-06T00:00:00Z"},
		{"an hour that the clock jumps over", spring, "2026-03-29T00:30:00Z", "2026-03-29T01:00:00Z"},
	} {
		must(t, c.w.Validate())
		open, next := c.w.Open(at(c.t))
		if open != (c.next == "") || !open && !next.Equal(at(c.next)) {
			t.Errorf("%s: open %v, next %v, want %q", c.name, open, next.UTC(), c.next)
		}
	}
	for _, bad := range []Window{{From: -1}, {From: day}, {To: day + 1}, {Zone: "Mars/Olympus"}, {Zone: "Local"}, {Days: []time.Weekday{7}}} {
		if bad.Validate() == nil {
			t.Errorf("%+v was taken", bad)
		}
	}
}

func FuzzStrategy(f *testing.F) {
	fuzzDecode[Strategy](f, Strategy{Canary: "1", Batch: "10%", Order: []string{"db"}, At: now, Windows: []Window{{From: 1, To: 2, Zone: "UTC"}}})
}
func FuzzRolloutOrder(f *testing.F) {
	fuzzDecode[RolloutOrder](f, RolloutOrder{ID: "a", Verb: PauseRollout})
}
