package command

import (
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// progressDocument is a step of a node in --json.
type progressDocument struct {
	Event      string         `json:"event"` // progress
	Deployment string         `json:"deployment"`
	Node       string         `json:"node"`
	Phase      protocol.Phase `json:"phase"`
	Reason     string         `json:"reason"`
	Lines      []string       `json:"lines"`
	Time       time.Time      `json:"time"`
}

// rolloutEvent is a change of the rollout in --json.
type rolloutEvent struct {
	Event string `json:"event"` // rollout
	deploymentDocument
}

// event takes an event from a node.
func (w *watch) event(node string, e protocol.Event) {
	<-w.ready
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.nodes[node]
	if w.over || f == nil {
		return
	}
	if w.json {
		w.document(progressDocument{"progress", w.id, node, e.Phase, e.Reason, list(e.Lines), e.Time})
	}
	for _, l := range e.Lines {
		f.lines = append(f.lines, l)
		if w.verbose && w.live != nil {
			w.live.Print(node + " | " + l)
		}
	}
	f.lines = f.lines[max(0, len(f.lines)-keptLines):]
	if f.settled {
		return
	}
	f.phase, f.heard, f.awaited = e.Phase, true, true
	w.show(node)
	if e.Phase.Ended() {
		f.saidEnd = time.Now()
		select {
		case w.hurry <- struct{}{}:
		default:
		}
	}
}

// show updates a node's line. One whose turn has not come, and of which there is nothing to say, has none. The caller
// holds mu.
func (w *watch) show(node string) {
	if w.live == nil {
		return
	}
	f := w.nodes[node]
	status, kind := string(f.phase), ui.Active
	switch {
	case f.settled:
		r := resultOf(w.id, node, f.result)
		status, kind = r.Outcome, ui.Good
		if f.failed() {
			kind = ui.Bad
			status = strings.TrimSuffix(status+": "+r.Reason, ": ")
		}
	case !f.released() && f.result.Note == "":
		return
	case !f.released():
		status, kind = pending+", "+f.result.Note, ui.Waiting
	case f.phase == "" && (!f.lostAt.IsZero() || f.silent(time.Now())):
		status, kind = pending+", "+offline, ui.Waiting
	case f.phase == "":
		status, kind = pending, ui.Waiting
	case !f.lostAt.IsZero():
		status += ", " + offline
	case len(f.lines) > 0 && f.phase == protocol.Building && w.out.Interactive():
		status += ": " + f.lines[len(f.lines)-1]
	}
	w.live.Set(node, status, kind)
}

// draw shows how the rollout is: above the nodes on a terminal, elsewhere in a line whenever it is another state.
func (w *watch) draw() {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.summary.ID == "" {
		return
	}
	if w.live == nil && !w.json {
		w.live = w.out.Live(fmt.Sprintf("deployment %s, %s", w.id, w.summary.Mode))
		for _, node := range slices.Sorted(maps.Keys(w.nodes)) {
			w.show(node)
		}
	}
	now := time.Now()
	if w.live != nil && w.out.Interactive() {
		w.live.Head(w.head(now)...)
	}
	r := &w.summary.Rollout
	state := fmt.Sprint(r.State, r.Wave, r.Next)
	if w.dry() || state == w.told {
		return
	}
	w.told = state
	switch {
	case w.json:
		w.document(rolloutEvent{"rollout", documentOfDeployment(&w.summary)})
	case !w.out.Interactive():
		w.live.Print("rollout " + stateText(r, now))
	}
}

// head is the rollout in at most three lines: how much of it is done, the waves that are on their way, and what it
// waits for.
func (w *watch) head(now time.Time) []string {
	r := &w.summary.Rollout
	ended, all := finished(&w.summary), total(&w.summary)
	parts := []string{fmt.Sprintf("%s %d of %d", bar(ended, all), ended, all)}
	if len(r.Waves) > 1 && r.Wave > 0 {
		parts = append(parts, fmt.Sprintf("wave %d of %d", r.Wave, len(r.Waves)))
	}
	if r.Failures > 0 {
		parts = append(parts, fmt.Sprintf("%d failed, %d may", r.Failures, r.MaxFailures))
	}
	passed := 0
	for _, f := range w.nodes {
		if !f.settled && !f.waitedFor(now) && (f.released() || f.result.Note != "") {
			passed++
		}
	}
	if rate := w.pace.rate(now); rate > 0 {
		parts = append(parts, fmt.Sprintf("%.2g nodes/s", rate))
	}
	if left := w.pace.left(now, r, all-ended-passed); left > 0 {
		parts = append(parts, "about "+left.Round(time.Second).String()+" left")
	}
	head := []string{strings.Join(parts, " · ")}
	if line := w.waveLine(); line != "" && len(r.Waves) > 1 {
		head = append(head, line)
	}
	if r.State != protocol.RolloutRunning || r.Reason != "" {
		head = append(head, stateText(r, now))
	}
	return head
}

// waveLine says in which phases the nodes of the waves are that are on their way.
func (w *watch) waveLine() string {
	busy := map[int]map[string]int{}
	for _, f := range w.nodes {
		if f.released() && !f.settled && busy[f.result.Wave] == nil {
			busy[f.result.Wave] = map[string]int{}
		}
	}
	for _, f := range w.nodes {
		if of := busy[f.result.Wave]; of != nil {
			of[first(string(f.phase), pending)]++
		}
	}
	var parts []string
	for _, wave := range slices.Sorted(maps.Keys(busy)) {
		parts = append(parts, fmt.Sprintf("wave %d: %s", wave, counts(busy[wave])))
	}
	return strings.Join(parts, "; ")
}

// stateText is where a rollout stands, why, and when it goes on by itself.
func stateText(r *protocol.RolloutStatus, now time.Time) string {
	text := string(r.State)
	if len(r.Waves) > 1 && r.Wave > 0 && !r.State.Ended() {
		text += fmt.Sprintf(", wave %d of %d", r.Wave, len(r.Waves))
		if r.Wave <= len(r.Waves) && r.State == protocol.RolloutRunning {
			text += fmt.Sprintf(" (%s)", nodes(r.Waves[r.Wave-1]))
		}
	}
	if r.Reason != "" {
		text += ": " + r.Reason
	}
	if wait := r.Next.Sub(now); !r.Next.IsZero() && wait > 0 {
		text += fmt.Sprintf(", until %s (%s)", r.Next.Local().Format(time.DateTime), wait.Round(time.Second))
	}
	return text
}

// bar is a share of something, drawn.
func bar(done, of int) string {
	const width = 20
	filled := 0
	if of > 0 {
		filled = min(width, done*width/of)
	}
	return strings.Repeat("█", filled) + strings.Repeat("░", width-filled)
}

// total is the number of a deployment's nodes.
func total(d *protocol.Deployment) int {
	n := 0
	for _, c := range d.Count {
		n += c
	}
	return n
}

// finished is the number of nodes that have ended a deployment, or will not.
func finished(d *protocol.Deployment) int { return total(d) - underway(d) - d.Count[""] }

// pace is how fast a rollout goes, as far as it was seen here.
type pace struct {
	state    protocol.RolloutState
	changed  time.Time // the state
	began    time.Time // the measuring; zero while the rollout does not run
	finished int       // then
	now      int
	wave     int       // that is released
	waveAt   time.Time // when it began
	fullAt   time.Time // when the first wave that was seen from its beginning began; zero: none yet
	full     int       // and its number
}

// note takes over how the rollout is now.
func (p *pace) note(d *protocol.Deployment, now time.Time) {
	r := &d.Rollout
	if r.State != p.state {
		p.state, p.changed = r.State, now
	}
	if r.State != protocol.RolloutRunning {
		p.began, p.fullAt, p.wave = time.Time{}, time.Time{}, r.Wave
		return
	}
	p.now = finished(d)
	fresh := p.began.IsZero() && r.Wave == 1 && p.now == 0
	if p.began.IsZero() {
		p.began, p.finished = now, p.now
	}
	if r.Wave != p.wave || fresh {
		p.wave, p.waveAt = r.Wave, now
		if p.fullAt.IsZero() && (fresh || now.After(p.began)) {
			p.fullAt, p.full = now, r.Wave
		}
	}
}

// rate is how many nodes end in a second; 0: not known.
func (p *pace) rate(now time.Time) float64 {
	took := now.Sub(p.began).Seconds()
	if p.began.IsZero() || took < 1 {
		return 0
	}
	return float64(p.now-p.finished) / took
}

// left is how long the rollout will take if it goes on like this; 0: not known. Where there are waves, whole ones
// count, with all that they wait for; else the nodes.
func (p *pace) left(now time.Time, r *protocol.RolloutStatus, nodesLeft int) time.Duration {
	if len(r.Waves) > 1 {
		if p.fullAt.IsZero() || p.wave <= p.full {
			return 0
		}
		each := p.waveAt.Sub(p.fullAt) / time.Duration(p.wave-p.full)
		return max(0, each*time.Duration(len(r.Waves)-p.wave+1)-now.Sub(p.waveAt))
	}
	if rate := p.rate(now); rate > 0 {
		return time.Duration(float64(nodesLeft) / rate * float64(time.Second))
	}
	return 0
}
