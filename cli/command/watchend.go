package command

import (
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// endDocument is the end of a node in --json: a resultDocument that is marked as one.
type endDocument struct {
	Event string `json:"event"` // result
	resultDocument
}

// tell says how it ended for every node, and gives the status to exit with.
func (w *watch) tell() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	r := &w.summary.Rollout
	count := map[string]int{}
	var failing []string
	passed, out := map[string][]string{}, map[string][]string{} // by why
	for _, name := range slices.Sorted(maps.Keys(w.nodes)) {
		f := w.nodes[name]
		result := resultOf(w.id, name, f.result)
		switch {
		case f.failed():
			failing = append(failing, name)
		case f.settled:
		case !f.released() && r.State.Ended():
			result.Outcome = leftOut
			out[result.Reason] = append(out[result.Reason], name)
		case !f.released() && r.State == protocol.RolloutPaused:
		default:
			why := offline
			if !f.released() {
				why = first(f.result.Note, why)
			}
			result.Reason = why + w.later("; it takes the deployment over later")
			passed[why] = append(passed[why], name)
		}
		if w.json {
			w.document(endDocument{"result", result})
		}
		count[result.Outcome]++
	}
	w.say("deployment %s: %s\n", w.id, ui.Clean(counts(count)))
	for _, name := range failing {
		w.tellFailure(name)
	}
	if w.dry() {
		w.tellDryRun()
	}
	var says []string
	if len(failing) > 0 {
		says = append(says, fmt.Sprintf("%s did not confirm: %s", nodes(len(failing)), some(failing)))
	}
	for _, why := range slices.Sorted(maps.Keys(passed)) {
		says = append(says, fmt.Sprintf("%s: %s%s", why, some(passed[why]), w.later(until[why == offline])))
	}
	stopped := w.stopped()
	if stopped != "" {
		says = append(says, stopped)
	}
	for _, why := range slices.Sorted(maps.Keys(out)) {
		says = append(says, fmt.Sprintf("%s left out: %s%s", nodes(len(out[why])), some(out[why]), strings.TrimSuffix(" ("+why+")", " ()")))
	}
	switch text := strings.Join(says, "; "); {
	case len(failing) > 0 || len(out) > 0 || stopped != "":
		return &outcome{SomeFailed, errors.New(text)}
	case text != "":
		return &outcome{Unanswered, errors.New(text)}
	}
	return nil
}

const offline = "offline" // as controllers call it, too

var until = map[bool]string{true: " (pending, until they come back)", false: " (pending)"}

// stopped is what is said of a rollout that did not get to its end.
func (w *watch) stopped() string {
	r := &w.summary.Rollout
	because := strings.TrimSuffix(": "+r.Reason, ": ")
	switch r.State {
	case protocol.RolloutPaused:
		return fmt.Sprintf("the rollout is paused%s; nix-infra rollout resume %s goes on, nix-infra rollout abort %s ends it", because, w.id, w.id)
	case protocol.RolloutStopped:
		return "the rollout stopped" + because
	case protocol.RolloutAborted:
		return "the rollout was aborted" + because
	case protocol.RolloutRolledBack:
		return "the rollout was taken back" + because
	}
	return ""
}

// later is what is said of nodes that follow later; a dry run is not wanted of anybody later.
func (w *watch) later(text string) string {
	if w.dry() {
		return ""
	}
	return text
}

// shownNames is how many nodes a line names.
const shownNames = 20

// some names nodes, but not a thousand.
func some(names []string) string {
	if more := len(names) - shownNames; more > 0 {
		return fmt.Sprintf("%s and %d more", strings.Join(names[:shownNames], " "), more)
	}
	return strings.Join(names, " ")
}

func (w *watch) tellFailure(name string) {
	f := w.nodes[name]
	r := resultOf(w.id, name, f.result)
	w.say("\n%s %s: %s\n", w.out.Paint(ui.Bold, ui.Clean(name)), w.out.Paint(ui.Red, ui.Clean(r.Outcome)), ui.Clean(r.Reason))
	w.printChecks(r.Checks)
	lines := f.lines
	if r.Log != "" {
		lines = strings.Split(strings.TrimRight(r.Log, "\n"), "\n")
	}
	w.printLog(lines[max(0, len(lines)-shownLines):])
}

// tellDryRun says what would change, in units and packages where the node's system tells, else in its words.
func (w *watch) tellDryRun() {
	plans := map[string]*protocol.UnitPlan{}
	for _, name := range slices.Sorted(maps.Keys(w.nodes)) {
		switch r := w.nodes[name].result.Report; {
		case r == nil || !r.Phase.Succeeded():
		case r.Plan != nil:
			plans[name] = r.Plan
		case r.Log != "":
			w.say("\n%s would:\n", w.out.Paint(ui.Bold, ui.Clean(name)))
			w.printLog(strings.Split(strings.TrimRight(r.Log, "\n"), "\n"))
		}
	}
	if !w.json && len(plans) > 0 {
		w.tellPlans(plans)
	}
}
