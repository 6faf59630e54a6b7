package protocol

import (
	"fmt"
	"strconv"
	"strings"
	"time"
)

// Every deployment is carried out as a rollout: the controller releases its manifests to the nodes in waves, and
// releases no more once too many failed. What is held back is known to nobody but the controller, and what the
// controller releases was signed before.

// Amount is a number of nodes, "3", or a share of those of a rollout, "25%". "" is not said.
type Amount string

// Validate checks the form: a whole number from 0 to 1,000,000, or one from 0 to 100 with a percent sign.
func (a Amount) Validate() error {
	if a == "" {
		return nil
	}
	number, share := strings.CutSuffix(string(a), "%")
	n, err := strconv.Atoi(number)
	if err != nil || n < 0 || number[0] == '+' || share && n > 100 || n > 1_000_000 {
		return fmt.Errorf("%q is no number of nodes: use a whole number such as 3, or a share such as 25%%", string(a))
	}
	return nil
}

// Floor is the amount of total nodes, a share rounded down; of an amount that is not said it is 0.
func (a Amount) Floor(total int) int { return a.of(total, 0) }

// Ceil is Floor with a share rounded up.
func (a Amount) Ceil(total int) int { return a.of(total, 99) }

func (a Amount) of(total, round int) int {
	number, share := strings.CutSuffix(string(a), "%")
	n, _ := strconv.Atoi(number) // Validate was asked
	if share {
		n = (total*n + round) / 100
	}
	return min(n, total)
}

// OnFailure is what a rollout does when more nodes failed than may.
type OnFailure string

const (
	StopOnFailure     OnFailure = "stop"     // release nothing more, for good
	PauseOnFailure    OnFailure = "pause"    // release nothing more until somebody says so
	RollbackOnFailure OnFailure = "rollback" // stop, and take back those that have it
)

// Strategy is how a deployment reaches its nodes. The zero value is all at once, stopping at the first failure, which
// then concerns only the nodes that are offline and get it later.
type Strategy struct {
	Canary         Amount    `json:"canary,omitempty"`          // nodes of the first wave; "" or 0: no such wave
	Batch          Amount    `json:"batch,omitempty"`           // nodes of each other wave; "" or 0: all that are left
	Order          []string  `json:"order,omitempty"`           // tags: nodes with the first one come first, those with none of them last; a wave has nodes of one tag only
	MaxUnavailable Amount    `json:"max_unavailable,omitempty"` // nodes at once that are on their way or lost on it; a share is rounded down, but to 1 at least; "" or 0: any number
	MaxFailures    Amount    `json:"max_failures,omitempty"`    // nodes that may fail; a share is rounded down; "": 0
	OnFailure      OnFailure `json:"on_failure,omitempty"`      // "": stop
	Soak           int       `json:"soak,omitempty"`            // seconds between the end of a wave and the next one
	At             time.Time `json:"at,omitzero"`               // not before
	Windows        []Window  `json:"windows,omitempty"`         // nothing is released outside of all of them; none: always
}

// maxSoak is a month, in seconds.
const maxSoak = 31 * 24 * 3600

// Validate checks what can be checked without the nodes.
func (s *Strategy) Validate() error {
	for _, a := range []struct {
		what  string
		value Amount
	}{{"canary", s.Canary}, {"batch", s.Batch}, {"max-unavailable", s.MaxUnavailable}, {"max-failures", s.MaxFailures}} {
		if err := a.value.Validate(); err != nil {
			return fmt.Errorf("%s: %w", a.what, err)
		}
	}
	if err := checkTags(s.Order); err != nil {
		return fmt.Errorf("order: %w", err)
	}
	switch s.OnFailure {
	case "", StopOnFailure, PauseOnFailure, RollbackOnFailure:
	default:
		return fmt.Errorf("on-failure %q: use stop, pause or rollback", s.OnFailure)
	}
	if s.Soak < 0 || s.Soak > maxSoak {
		return fmt.Errorf("soak of %d s: use 0 s to 31 days", s.Soak)
	}
	if len(s.Windows) > 100 {
		return fmt.Errorf("%d maintenance windows; at most 100 are possible", len(s.Windows))
	}
	for i := range s.Windows {
		if err := s.Windows[i].Validate(); err != nil {
			return err
		}
	}
	return nil
}

// Window is a time of the week in which a rollout may release. One that ends before it begins goes over midnight, and
// belongs to the day on which it begins.
type Window struct {
	Days []time.Weekday `json:"days,omitempty"` // none: every day
	From int            `json:"from"`           // minutes from midnight, of the zone's clock
	To   int            `json:"to"`             // minutes from midnight, not included; the same as From: a whole day
	Zone string         `json:"zone,omitempty"` // of the IANA database, such as Europe/Stockholm; "": UTC
}

const day = 24 * 60 // minutes

// Validate checks the window. The zone has to be known here.
func (w *Window) Validate() error {
	if w.From < 0 || w.From >= day || w.To < 0 || w.To > day {
		return fmt.Errorf("a window from minute %d to %d of a day that has %d", w.From, w.To, day)
	}
	for _, d := range w.Days {
		if d < time.Sunday || d > time.Saturday {
			return fmt.Errorf("a window on day %d of the week", d)
		}
	}
	if _, err := time.LoadLocation(w.Zone); err != nil || w.Zone == "Local" {
		return fmt.Errorf("time zone %q is not known; use a name such as Europe/Stockholm or UTC", w.Zone)
	}
	return nil
}

// Open tells whether t lies in the window and, where it doesn't, when the window opens next.
func (w *Window) Open(t time.Time) (open bool, next time.Time) {
	zone, err := time.LoadLocation(w.Zone)
	if err != nil {
		zone = time.UTC // Validate was asked
	}
	local := t.In(zone)
	to := w.To
	if to <= w.From {
		to += day
	}
	// From yesterday, whose window may go on until now, to a week ahead. Time.Date makes sense of a clock that is changed.
	for offset := -1; offset <= 7; offset++ {
		begin := time.Date(local.Year(), local.Month(), local.Day()+offset, 0, w.From, 0, 0, zone)
		if !w.on(begin.Weekday()) {
			continue
		}
		end := time.Date(local.Year(), local.Month(), local.Day()+offset, 0, to, 0, 0, zone)
		switch {
		case !t.Before(begin) && t.Before(end):
			return true, time.Time{}
		case begin.After(t):
			return false, begin
		}
	}
	return false, t.Add(7 * 24 * time.Hour)
}

func (w *Window) on(d time.Weekday) bool {
	if len(w.Days) == 0 {
		return true
	}
	for _, wanted := range w.Days {
		if d == wanted {
			return true
		}
	}
	return false
}

// RolloutState is where a rollout stands.
type RolloutState string

const (
	RolloutScheduled  RolloutState = "scheduled"   // waits for its time
	RolloutRunning    RolloutState = "running"     // releases, wave after wave
	RolloutTrailing   RolloutState = "trailing"    // all waves are through; nodes that are offline get it when they return
	RolloutPaused     RolloutState = "paused"      // releases nothing until it is resumed
	RolloutStopped    RolloutState = "stopped"     // end: too many failed
	RolloutAborted    RolloutState = "aborted"     // end: somebody said so
	RolloutRolledBack RolloutState = "rolled-back" // end: too many failed, and those that had it were told to go back
	RolloutDone       RolloutState = "done"        // end: every node has ended it, or will not get it any more
)

// Ended tells whether nothing more will be released.
func (s RolloutState) Ended() bool {
	switch s {
	case RolloutStopped, RolloutAborted, RolloutRolledBack, RolloutDone:
		return true
	}
	return false
}

// RolloutStatus is a rollout as its controller sees it.
type RolloutStatus struct {
	State       RolloutState `json:"state"`
	Reason      string       `json:"reason,omitempty"` // one line, for people: why it stands there, or what it waits for
	By          string       `json:"by,omitempty"`     // who paused, resumed or aborted it last
	Since       time.Time    `json:"since"`            // of the state
	Next        time.Time    `json:"next,omitzero"`    // when it goes on by itself: its time, its window, the end of the soak
	Wave        int          `json:"wave"`             // from 1; 0: not begun
	Waves       []int        `json:"waves"`            // nodes of each wave
	Released    int          `json:"released"`         // nodes
	Unavailable int          `json:"unavailable"`      // nodes that are on their way, or were lost on it
	Failures    int          `json:"failures"`         // nodes that count as failed
	MaxFailures int          `json:"max_failures"`     // nodes that may fail
	Back        string       `json:"back,omitempty"`   // the deployment that takes this one back
}

// Verb is what somebody wants of a rollout.
type Verb string

const (
	PauseRollout  Verb = "pause"
	ResumeRollout Verb = "resume"
	AbortRollout  Verb = "abort"
)

// RolloutOrder is SteerRollout's; it is answered with the Deployment. Wanting what is already so is no error.
type RolloutOrder struct {
	ID   string `json:"id"`
	Verb Verb   `json:"verb"`
}

// Validate checks the order's form.
func (o *RolloutOrder) Validate() error {
	switch o.Verb {
	case PauseRollout, ResumeRollout, AbortRollout:
	default:
		return fmt.Errorf("a rollout can't be told to %.40q: use pause, resume or abort", string(o.Verb))
	}
	if !isToken(o.ID) {
		return fmt.Errorf("deployment id %q is not one subject token of at most 64 characters", o.ID)
	}
	return nil
}
