package project

import (
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"
	_ "time/tzdata" // windows name zones, and not every machine knows them

	"github.com/nix-infra/nix-infra/protocol"
)

// Rollout is how a deployment reaches its nodes, in the words of nix-infra.yaml and of the flags. What is empty is
// not said.
type Rollout struct {
	Canary         string   `yaml:"canary,omitempty"`          // nodes of the first wave: 3 or 25%
	Batch          string   `yaml:"batch,omitempty"`           // nodes of each other wave
	Order          []string `yaml:"order,omitempty,flow"`      // tags, with or without @
	MaxUnavailable string   `yaml:"max_unavailable,omitempty"` // nodes at once
	MaxFailures    string   `yaml:"max_failures,omitempty"`    // nodes that may fail
	OnFailure      string   `yaml:"on_failure,omitempty"`      // stop, pause or rollback
	Soak           string   `yaml:"soak,omitempty"`            // between waves, such as 10m
	At             string   `yaml:"at,omitempty"`              // not before: see parseAt
	Windows        []string `yaml:"window,omitempty"`          // see parseWindow
}

// Over gives what r says and, where it says nothing, what defaults says.
func (r Rollout) Over(defaults Rollout) Rollout {
	r.Canary = firstOf(r.Canary, defaults.Canary)
	r.Batch = firstOf(r.Batch, defaults.Batch)
	r.MaxUnavailable = firstOf(r.MaxUnavailable, defaults.MaxUnavailable)
	r.MaxFailures = firstOf(r.MaxFailures, defaults.MaxFailures)
	r.OnFailure = firstOf(r.OnFailure, defaults.OnFailure)
	r.Soak = firstOf(r.Soak, defaults.Soak)
	r.At = firstOf(r.At, defaults.At)
	if len(r.Order) == 0 {
		r.Order = defaults.Order
	}
	if len(r.Windows) == 0 {
		r.Windows = defaults.Windows
	}
	return r
}

// GoingBack is what holds for a way back by default: no window, soak or canary of the project delays it, and a node
// that can't go back keeps no other one from it.
func (r Rollout) GoingBack() Rollout {
	return Rollout{MaxUnavailable: r.MaxUnavailable, MaxFailures: "100%"}
}

// Strategy makes of the words what the controller carries out. A mistake is named by its flag.
func (r Rollout) Strategy(now time.Time) (protocol.Strategy, error) {
	var errs []error
	s := r.parse(now, func(err error, words ...string) {
		errs = append(errs, fmt.Errorf("--%s: %w", strings.ReplaceAll(words[0], "_", "-"), err))
	})
	if !s.At.IsZero() && s.At.Before(now) {
		errs = append(errs, fmt.Errorf("--at: %s is over", r.At))
	}
	if len(errs) > 0 {
		return protocol.Strategy{}, errs[0]
	}
	return s, s.Validate()
}

// mistakes calls wrong for each mistake that a project's settings have.
func (r Rollout) mistakes(wrong func(err error, words ...string)) {
	r.parse(time.Now(), wrong)
	if _, err := time.Parse(time.RFC3339, r.At); err == nil {
		wrong(fmt.Errorf("%s is one moment, no default; use a time of the day such as 22:00, or --at", r.At), "at")
	}
}

func (r Rollout) parse(now time.Time, wrong func(err error, words ...string)) protocol.Strategy {
	amount := func(text, word string) protocol.Amount {
		a := protocol.Amount(text)
		if err := a.Validate(); err != nil {
			wrong(err, word)
		}
		return a
	}
	s := protocol.Strategy{
		Canary: amount(r.Canary, "canary"), Batch: amount(r.Batch, "batch"),
		MaxUnavailable: amount(r.MaxUnavailable, "max_unavailable"), MaxFailures: amount(r.MaxFailures, "max_failures"),
		OnFailure: protocol.OnFailure(r.OnFailure),
	}
	for i, tag := range r.Order {
		tag = strings.TrimPrefix(tag, "@")
		if tag == "" || (&protocol.TagsRequest{Tags: []string{tag}}).Validate() != nil {
			wrong(fmt.Errorf("%q is no tag: use such as @web", r.Order[i]), "order", strconv.Itoa(i))
		} else if slices.Contains(s.Order, tag) {
			wrong(fmt.Errorf("@%s is listed twice", tag), "order", strconv.Itoa(i))
		}
		s.Order = append(s.Order, tag)
	}
	if err := (&protocol.Strategy{OnFailure: s.OnFailure}).Validate(); err != nil {
		wrong(fmt.Errorf("%q: use stop, pause or rollback", r.OnFailure), "on_failure")
	}
	if r.Soak != "" {
		soak, err := time.ParseDuration(r.Soak)
		s.Soak = int(soak / time.Second)
		if err != nil || soak%time.Second != 0 || (&protocol.Strategy{Soak: s.Soak}).Validate() != nil {
			wrong(fmt.Errorf("%q: use whole seconds up to 31 days, such as 90s, 10m or 2h", r.Soak), "soak")
		}
	}
	var err error
	if s.At, err = parseAt(r.At, now); err != nil {
		wrong(err, "at")
	}
	for i, text := range r.Windows {
		if text == Always && len(r.Windows) == 1 {
			break
		}
		w, err := parseWindow(text)
		if err != nil {
			wrong(err, "window", strconv.Itoa(i))
		}
		s.Windows = append(s.Windows, w)
	}
	return s
}

// What takes a default of the project away.
const (
	Now    = "now"    // in place of a time
	Always = "always" // in place of windows
)

// parseAt understands RFC 3339, a time of the day (the next one, by the clock of now's zone), a time from now such as
// +2h, and Now.
func parseAt(text string, now time.Time) (time.Time, error) {
	if text == "" || text == Now {
		return time.Time{}, nil
	}
	if t, err := time.Parse(time.RFC3339, text); err == nil {
		return t.UTC(), nil
	}
	if ahead, found := strings.CutPrefix(text, "+"); found {
		if d, err := time.ParseDuration(ahead); err == nil && d > 0 {
			return now.Add(d).UTC().Truncate(time.Second), nil
		}
	} else if t, err := time.Parse("15:04", text); err == nil {
		at := time.Date(now.Year(), now.Month(), now.Day(), t.Hour(), t.Minute(), 0, 0, now.Location())
		if !at.After(now) {
			at = time.Date(now.Year(), now.Month(), now.Day()+1, t.Hour(), t.Minute(), 0, 0, now.Location())
		}
		return at.UTC(), nil
	}
	return time.Time{}, fmt.Errorf("%q is no time: use such as 22:00, +2h or 2026-01-02T22:00:00+01:00", text)
}

// days in the order of a working week, which is how people write ranges.
var days = []string{"mon", "tue", "wed", "thu", "fri", "sat", "sun"}

func weekday(i int) time.Weekday { return time.Weekday((i + 1) % 7) }

var timesForm = regexp.MustCompile(`^(\d{1,2}):(\d{2})-(\d{1,2}):(\d{2})$`)

// parseWindow understands "mon-fri 22:00-04:00 Europe/Stockholm": days (none: all), from and to, time zone (none: UTC).
func parseWindow(text string) (protocol.Window, error) {
	wrong := fmt.Errorf("%q is no maintenance window: use such as \"mon-fri 22:00-04:00 Europe/Stockholm\" (no days: every day; no zone: UTC)", text)
	fields := strings.Fields(text)
	i := slices.IndexFunc(fields, timesForm.MatchString)
	if i < 0 || i > 1 || len(fields) > i+2 {
		return protocol.Window{}, wrong
	}
	var w protocol.Window
	if i == 1 {
		var err error
		if w.Days, err = parseDays(fields[0]); err != nil {
			return protocol.Window{}, err
		}
	}
	times := timesForm.FindStringSubmatch(fields[i])
	w.From, w.To = minutes(times[1], times[2]), minutes(times[3], times[4])
	if len(fields) == i+2 {
		w.Zone = fields[i+1]
	}
	if err := w.Validate(); err != nil {
		if _, zone := time.LoadLocation(w.Zone); zone != nil {
			return protocol.Window{}, err
		}
		return protocol.Window{}, wrong
	}
	return w, nil
}

// minutes are those from midnight, -1 where the clock has no such time.
func minutes(hour, minute string) int {
	h, _ := strconv.Atoi(hour)
	m, _ := strconv.Atoi(minute)
	if m > 59 {
		return -1
	}
	return h*60 + m
}

// parseDays understands "mon-fri", "sat,sun" and "fri-mon".
func parseDays(text string) ([]time.Weekday, error) {
	var found []time.Weekday
	for _, part := range strings.Split(strings.ToLower(text), ",") {
		from, to, isRange := strings.Cut(part, "-")
		if !isRange {
			to = from
		}
		first, last := slices.Index(days, from), slices.Index(days, to)
		if first < 0 || last < 0 {
			return nil, fmt.Errorf("%q are no days of the week: use such as mon-fri or sat,sun", text)
		}
		for i := first; ; i = (i + 1) % 7 {
			if !slices.Contains(found, weekday(i)) {
				found = append(found, weekday(i))
			}
			if i == last {
				break
			}
		}
	}
	return found, nil
}

// WindowText is a window in the words that parseWindow understands.
func WindowText(w protocol.Window) string {
	var parts []string
	for i := 0; i < 7; i++ {
		first := i
		for i < 7 && slices.Contains(w.Days, weekday(i)) {
			i++
		}
		switch i - first {
		case 0:
		case 1:
			parts = append(parts, days[first])
		default:
			parts = append(parts, days[first]+"-"+days[i-1])
		}
	}
	clock := func(minutes int) string { return fmt.Sprintf("%02d:%02d", minutes/60, minutes%60) }
	return strings.TrimSpace(strings.Join(parts, ",") + " " + clock(w.From) + "-" + clock(w.To) + " " + firstOf(w.Zone, "UTC"))
}
