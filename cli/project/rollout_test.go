package project

import (
	"reflect"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

func TestRolloutSettings(t *testing.T) {
	s, err := parseSettings([]byte(`
fleet: home
rollout:
  canary: 1
  batch: 25%
  order: ["@db", web]
  max_unavailable: 10%
  max_failures: 2
  on_failure: rollback
  soak: 10m
  at: "22:00"
  window:
    - mon-fri 22:00-04:00 Europe/Stockholm
    - sat,sun 0:00-24:00
`))
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 3, 4, 12, 0, 0, 0, time.UTC)
	got, err := s.Rollout.Strategy(now)
	if err != nil {
		t.Fatal(err)
	}
	want := protocol.Strategy{
		Canary: "1", Batch: "25%", Order: []string{"db", "web"}, MaxUnavailable: "10%", MaxFailures: "2", OnFailure: protocol.RollbackOnFailure,
		Soak: 600, At: time.Date(2026, 3, 4, 22, 0, 0, 0, time.UTC),
		Windows: []protocol.Window{
			{Days: []time.Weekday{1, 2, 3, 4, 5}, From: 22 * 60, To: 4 * 60, Zone: "Europe/Stockholm"},
			{Days: []time.Weekday{6, 0}, From: 0, To: 24 * 60},
		},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	flags := Rollout{Canary: "0", Batch: "", Order: []string{"eu"}, MaxFailures: "50%", OnFailure: "pause", At: Now, Windows: []string{Always}}
	got, err = flags.Over(s.Rollout).Strategy(now)
	want = protocol.Strategy{Canary: "0", Batch: "25%", Order: []string{"eu"}, MaxUnavailable: "10%", MaxFailures: "50%", OnFailure: protocol.PauseOnFailure, Soak: 600}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v: flags win over settings: got  %+v\nwant %+v", err, got, want)
	}
	got, err = s.Rollout.GoingBack().Strategy(now)
	if want := (protocol.Strategy{MaxUnavailable: "10%", MaxFailures: "100%"}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%v: going back: got  %+v\nwant %+v", err, got, want)
	}
}

func TestRolloutMistakes(t *testing.T) {
	for text, want := range map[string][]string{
		"canary: -1": {`:3: rollout.canary: "-1" is no number of nodes`},
		"canary: 101%\n  batch: many\n  max_unavailable: 1.5\n  max_failures: '%'": {
			":3: rollout.canary: ", ":4: rollout.batch: ", ":5: rollout.max_unavailable: ", ":6: rollout.max_failures: "},
		"order:\n  - web\n  - No Tag\n  - '@web'\n  - '@'": {`:5: rollout.order.1: "No Tag" is no tag`, ":6: rollout.order.2: @web is listed twice", ":7: rollout.order.3: "},
		"on_failure: panic":        {`:3: rollout.on_failure: "panic": use stop, pause or rollback`},
		"soak: 10":                 {`:3: rollout.soak: "10": use whole seconds`},
		"soak: 1500ms":             {":3: rollout.soak"},
		"soak: -1s":                {":3: rollout.soak"},
		"soak: 1000h":              {":3: rollout.soak"},
		"at: noon":                 {`:3: rollout.at: "noon" is no time`},
		"at: 2026-01-02T22:00:00Z": {":3: rollout.at: 2026-01-02T22:00:00Z is one moment"},
		"window: ['mon 22:00-04:00', 'someday 1:00-2:00']":          {`:3: rollout.window.1: "someday" are no days of the week`},
		"window:\n  - 22:00-04:00 Europe/Atlantis\n  - 25:00-26:00": {`:4: rollout.window.0: time zone "Europe/Atlantis" is not known`, ":5: rollout.window.1: "},
		"window: 22:00-04:00": {":3: "},
		"wave: 3":             {`:3: unknown key "wave"`},
	} {
		_, err := parseSettings([]byte("fleet: f\nrollout:\n  " + text))
		failsWith(t, err, want...)
	}
	for _, c := range []struct {
		r    Rollout
		want string
	}{
		{Rollout{MaxUnavailable: "x"}, "--max-unavailable: "},
		{Rollout{Windows: []string{"x"}}, "--window: "},
		{Rollout{Windows: []string{"1:00-2:00", "always"}}, "--window: "},
		{Rollout{At: "2026-01-02T22:00:00Z"}, "--at: 2026-01-02T22:00:00Z is over"},
	} {
		if _, err := c.r.Strategy(time.Date(2026, 3, 4, 0, 0, 0, 0, time.UTC)); err == nil || !strings.HasPrefix(err.Error(), c.want) {
			t.Errorf("%+v: %v, want %q", c.r, err, c.want)
		}
	}
}

func TestParseAt(t *testing.T) {
	stockholm, err := time.LoadLocation("Europe/Stockholm")
	if err != nil {
		t.Fatal(err)
	}
	now := time.Date(2026, 3, 4, 22, 30, 1, 500, stockholm) // 21:30 UTC
	for text, want := range map[string]time.Time{
		"":                          {},
		"now":                       {},
		"23:00":                     time.Date(2026, 3, 4, 22, 0, 0, 0, time.UTC),
		"22:30":                     time.Date(2026, 3, 5, 21, 30, 0, 0, time.UTC),
		"4:05":                      time.Date(2026, 3, 5, 3, 5, 0, 0, time.UTC),
		"+2h":                       time.Date(2026, 3, 4, 23, 30, 1, 0, time.UTC),
		"+90m":                      time.Date(2026, 3, 4, 23, 0, 1, 0, time.UTC),
		"2026-03-05T06:00:00+01:00": time.Date(2026, 3, 5, 5, 0, 0, 0, time.UTC),
	} {
		if got, err := parseAt(text, now); err != nil || !got.Equal(want) {
			t.Errorf("%q is %v, %v; want %v", text, got, err, want)
		}
	}
	for _, text := range []string{"+", "+2", "2h", "+-2h", "24:00", "22:60", "tomorrow", "2026-03-05", "2026-03-05 06:00"} {
		if got, err := parseAt(text, now); err == nil {
			t.Errorf("%q was understood as %v", text, got)
		}
	}
}

func TestWindow(t *testing.T) {
	type days = []time.Weekday
	for text, want := range map[string]struct {
		window protocol.Window
		again  string
	}{
		"mon-fri 22:00-04:00 Europe/Stockholm": {protocol.Window{Days: days{1, 2, 3, 4, 5}, From: 1320, To: 240, Zone: "Europe/Stockholm"}, "mon-fri 22:00-04:00 Europe/Stockholm"},
		"22:00-4:30":                           {protocol.Window{From: 1320, To: 270}, "22:00-04:30 UTC"},
		" Sat,sun   0:00-24:00  UTC ":          {protocol.Window{Days: days{6, 0}, From: 0, To: 1440, Zone: "UTC"}, "sat-sun 00:00-24:00 UTC"},
		"fri-mon,wed 1:00-1:00":                {protocol.Window{Days: days{5, 6, 0, 1, 3}, From: 60, To: 60}, "mon,wed,fri-sun 01:00-01:00 UTC"},
	} {
		got, err := parseWindow(text)
		if err != nil || !reflect.DeepEqual(got, want.window) {
			t.Errorf("%q is %+v, %v", text, got, err)
		}
		if again := WindowText(got); again != want.again {
			t.Errorf("%q is told as %q, want %q", text, again, want.again)
		}
	}
	for _, text := range []string{"", "mon", "22:00", "22:00-", "22:00-04:60", "22:60-4:00", "24:00-1:00", "22:00-25:00", "mon- 1:00-2:00", "mon-fri-sun 1:00-2:00",
		"mon tue 1:00-2:00", "1:00-2:00 Local", "1:00-2:00 UTC UTC", "-1:00-2:00", "1:00-2:00 ../x"} {
		if got, err := parseWindow(text); err == nil {
			t.Errorf("%q was understood as %+v", text, got)
		}
	}
}

func FuzzRollout(f *testing.F) {
	f.Add("25%", "@web", "10m", "+2h", "mon-fri 22:00-04:00 Europe/Stockholm")
	f.Add("0", "", "0s", "22:00", "0:00-24:00")
	f.Fuzz(func(t *testing.T, amount, tag, soak, at, window string) {
		s, err := Rollout{Canary: amount, MaxFailures: amount, Order: []string{tag}, Soak: soak, At: at, Windows: []string{window}}.Strategy(time.Now())
		if err != nil {
			return
		}
		if err := s.Validate(); err != nil {
			t.Errorf("the controller would refuse it: %v", err)
		}
		for _, w := range s.Windows { // what is told of a window is the window
			again, err := parseWindow(WindowText(w))
			opens := func(w protocol.Window) [7 * 24]bool {
				var open [7 * 24]bool
				for h := range open {
					open[h], _ = w.Open(time.Date(2026, 3, 2, h, 30, 0, 0, time.UTC))
				}
				return open
			}
			if err != nil || opens(again) != opens(w) {
				t.Errorf("%q is told as %q, which is %+v, %v", window, WindowText(w), again, err)
			}
		}
	})
}
