package command

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	pollEvery   = 1500 * time.Millisecond // how things really are
	pollSoonest = 200 * time.Millisecond  // after an event that says something ended
	onlineEvery = 3 * time.Second
	silentAfter = 15 * time.Second // without a beat, a node that has not accepted is off, whatever the controller thinks yet
	lostGrace   = 10 * time.Second // for a node that the controller calls lost to show up again
	reportGrace = 5 * time.Second  // between a node's last beat about a deployment and its report
	slack       = 90 * time.Second // for what is not the node's work: heartbeats, reconnects
	keptLines   = 40               // of a node's build log, for when it fails
	shownLines  = 20
)

// watch follows a deployment until every node that can be expected to has ended it. Events make it
// lively; what counts is the controller's record.
type watch struct {
	*app
	s        *session
	p        *plan
	verbose  bool
	perNode  time.Duration // for which a node that is lost while it switches may still come back by itself
	deadline time.Duration
	live     *ui.Live
	hurry    chan struct{} // somebody ended: look now

	mu    sync.Mutex
	nodes map[string]*follow
	over  bool // nobody listens any more
}

// follow is one node on its way.
type follow struct {
	phase   protocol.Phase
	heard   bool // an event came: it is newer than what the controller tells
	lines   []string
	awaited bool      // it was online at some time, so that its end is waited for
	lostAt  time.Time // since when it is offline, zero while it is online
	beat    time.Time // its last one, by the controller's clock
	beatAt  time.Time // when that was first seen here
	silence time.Duration
	endedAt time.Time // when its end was first seen
	result  protocol.NodeResult
	settled bool
}

// newWatch prepares to watch. Events wait until begin or abandon: nothing is told of a deployment before
// it is known to be one.
func newWatch(a *app, s *session, p *plan, o deployOptions) *watch {
	w := &watch{app: a, s: s, p: p, verbose: o.verbose, hurry: make(chan struct{}, 1), nodes: map[string]*follow{},
		perNode: o.timeout + slack, deadline: o.build + o.timeout + slack}
	for i := range p.items {
		n := &p.items[i].node
		f := &follow{awaited: n.Online, beatAt: time.Now(), silence: silentAfter}
		if n.LastSeen != nil {
			f.beat = *n.LastSeen
		}
		if n.Beat != nil { // its interval is its own choice
			f.silence = max(f.silence, time.Duration(n.Beat.Interval)*time.Second*3/2)
		}
		w.nodes[n.Name] = f
	}
	w.mu.Lock()
	return w
}

// begin lets the events through: the deployment was taken over.
func (w *watch) begin() {
	defer w.mu.Unlock()
	if w.json {
		return
	}
	w.live = w.out.Live(fmt.Sprintf("deployment %s, %s", w.p.request.Deployment, w.p.request.Mode))
	for _, name := range w.p.names() {
		w.show(name)
	}
}

// abandon is begin for a deployment that was refused.
func (w *watch) abandon() {
	w.over = true
	w.mu.Unlock()
}

// progressDocument is a step of a node in `deploy --json`.
type progressDocument struct {
	Event      string         `json:"event"` // progress
	Deployment string         `json:"deployment"`
	Node       string         `json:"node"`
	Phase      protocol.Phase `json:"phase"`
	Reason     string         `json:"reason"`
	Lines      []string       `json:"lines"`
	Time       time.Time      `json:"time"`
}

// waitedFor tells whether a node is expected to end the deployment soon. One that was off all the time
// is not; one that went is, for as long as it may come back by itself: while it switches, until it would
// have rolled back.
func (f *follow) waitedFor(now time.Time, perNode time.Duration) bool {
	switch {
	case f.settled || !f.awaited || f.silent(now):
		return false
	case f.lostAt.IsZero():
		return true
	case f.switching():
		return now.Sub(f.lostAt) < perNode
	}
	return now.Sub(f.lostAt) < lostGrace
}

// silent tells whether a node that has not accepted yet does not beat any more: it was switched off or
// cut off a moment ago, and the controller has not noticed yet.
func (f *follow) silent(now time.Time) bool { return f.phase == "" && now.Sub(f.beatAt) >= f.silence }

func (f *follow) switching() bool {
	switch f.phase {
	case protocol.Activating, protocol.Checking, protocol.Confirming, protocol.RollingBack:
		return true
	}
	return false
}

// away tells whether a node that has not ended is one that is not there.
func (f *follow) away(now time.Time) bool { return !f.awaited || !f.lostAt.IsZero() || f.silent(now) }

// event takes an event from a node.
func (w *watch) event(node string, e protocol.Event) {
	w.mu.Lock()
	defer w.mu.Unlock()
	f := w.nodes[node]
	if w.over || f == nil || f.settled {
		return
	}
	if w.json {
		w.document(progressDocument{"progress", w.p.request.Deployment, node, e.Phase, e.Reason, list(e.Lines), e.Time})
	}
	for _, l := range e.Lines {
		f.lines = append(f.lines, l)
		if w.verbose && w.live != nil {
			w.live.Print(node + " | " + l)
		}
	}
	f.lines = f.lines[max(0, len(f.lines)-keptLines):]
	f.phase, f.heard, f.awaited = e.Phase, true, true
	w.show(node)
	if e.Phase.Ended() {
		select {
		case w.hurry <- struct{}{}:
		default:
		}
	}
}

// show updates a node's line. The caller holds mu.
func (w *watch) show(node string) {
	if w.live == nil {
		return
	}
	f := w.nodes[node]
	status, kind := string(f.phase), ui.Active
	switch {
	case f.settled:
		r := resultOf(w.p.request.Deployment, node, f.result)
		status, kind = r.Outcome, ui.Bad
		if f.result.Phase.Succeeded() && f.result.Superseded == "" {
			kind = ui.Good
		} else if r.Reason != "" {
			status += ": " + r.Reason
		}
	case f.phase == "" && f.away(time.Now()):
		status, kind = "pending, offline", ui.Waiting
	case f.phase == "":
		status, kind = "pending", ui.Waiting
	case !f.lostAt.IsZero():
		status += ", offline"
	case len(f.lines) > 0 && f.phase == protocol.Building && w.out.Interactive():
		status += ": " + f.lines[len(f.lines)-1]
	}
	w.live.Set(node, status, kind)
}

// run watches to the end and tells it.
func (w *watch) run(ctx context.Context) error {
	err := w.follow(ctx)
	if w.live != nil {
		w.live.Close()
	}
	if ctx.Err() != nil {
		if w.json {
			return &outcome{Interrupted, nil}
		}
		return &outcome{Interrupted, fmt.Errorf("no longer watching; the deployment goes on: nix-infra deployment show %s", w.p.request.Deployment)}
	}
	if err != nil {
		return err
	}
	w.fetchDetails(ctx)
	return w.summary()
}

// fetchDetails asks, once, for what polling leaves out and the summary shows: the logs of those that
// failed and of a dry run, and for programs everything.
func (w *watch) fetchDetails(ctx context.Context) {
	w.mu.Lock()
	var names []string
	for name, f := range w.nodes {
		if r := f.result.Report; r != nil && (w.json || !r.Phase.Succeeded() || w.p.request.Mode == protocol.DryActivate) {
			names = append(names, name)
		}
	}
	w.mu.Unlock()
	if len(names) == 0 {
		return
	}
	d, err := w.s.Deployment(ctx, protocol.DeploymentQuery{ID: w.p.request.Deployment, Names: names})
	if err != nil {
		w.note("the logs are missing here, nix-infra deployment show %s --log has them: %s", w.p.request.Deployment, message(err))
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, r := range d.Nodes {
		if f := w.nodes[name]; f != nil && r.Report != nil {
			f.result.Report = r.Report
		}
	}
}

func (w *watch) follow(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, w.deadline)
	defer cancel()
	poll := time.NewTicker(pollEvery)
	defer poll.Stop()
	var online time.Time
	for {
		if err := w.poll(ctx); err != nil {
			return err
		}
		if time.Since(online) >= onlineEvery {
			online = time.Now()
			w.lookWhoIsOnline(ctx)
		}
		if w.done() {
			return nil
		}
		select {
		case <-ctx.Done():
			return nil // in time or not, run and summary tell
		case <-poll.C:
		case <-w.hurry:
			if !pause(ctx, pollSoonest) { // so that a thousand ends are not a thousand questions
				return nil
			}
		}
	}
}

func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

// poll takes over how the controller's record stands. That it does not answer for a while, because it
// is being restarted, changes nothing about the deployment; a refusal does.
func (w *watch) poll(ctx context.Context) error {
	d, err := w.s.Deployment(ctx, protocol.DeploymentQuery{ID: w.p.request.Deployment, Brief: true})
	var refused *protocol.Refusal
	switch {
	case errors.As(err, &refused):
		return err
	case err != nil:
		w.log.Debug("no answer about the deployment, asking again", "error", err)
		return nil
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, f := range w.nodes {
		r, ok := d.Nodes[name]
		if !ok || f.settled {
			continue
		}
		f.result = r
		if r.Phase != "" {
			f.awaited = true
		}
		if !f.heard || r.Phase.Ended() {
			f.phase = r.Phase
		}
		ended := r.Phase.Ended() || r.Superseded != ""
		if ended && f.endedAt.IsZero() {
			f.endedAt = time.Now()
		}
		f.settled = ended && (r.Report != nil || r.Superseded != "" || time.Since(f.endedAt) > reportGrace)
		w.show(name)
	}
	return nil
}

// lookWhoIsOnline notes who went and who came.
func (w *watch) lookWhoIsOnline(ctx context.Context) {
	w.mu.Lock()
	var names []string
	for name, f := range w.nodes {
		if !f.settled {
			names = append(names, name)
		}
	}
	w.mu.Unlock()
	if len(names) == 0 {
		return
	}
	states, err := w.s.ListNodes(ctx, names...)
	if err != nil {
		w.log.Debug("no answer about the nodes, asking again", "error", err)
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for i := range states {
		f := w.nodes[states[i].Name]
		if f == nil {
			continue
		}
		if seen := states[i].LastSeen; seen != nil && !seen.Equal(f.beat) {
			f.beat, f.beatAt = *seen, time.Now()
		}
		switch {
		case states[i].Online:
			f.awaited, f.lostAt = true, time.Time{}
		case f.lostAt.IsZero():
			f.lostAt = time.Now()
		}
		w.show(states[i].Name)
	}
}

// done tells whether nobody is left to wait for.
func (w *watch) done() bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	for _, f := range w.nodes {
		if f.waitedFor(now, w.perNode) {
			return false
		}
	}
	return true
}

// endDocument is the end of a node in `deploy --json`: a resultDocument that is marked as one.
type endDocument struct {
	Event string `json:"event"` // result
	resultDocument
}

// summary tells how it ended for every node, and gives the status to exit with.
func (w *watch) summary() error {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.over = true
	count := map[string]int{}
	var failing, away, late []string
	now := time.Now()
	for _, name := range w.p.names() {
		f := w.nodes[name]
		r := resultOf(w.p.request.Deployment, name, f.result)
		switch {
		case f.settled:
		case f.away(now):
			away = append(away, name)
			r.Reason = first(r.Reason, "offline"+w.later("; it takes the deployment over when it comes back"))
		default:
			late = append(late, name)
		}
		if f.settled && (!f.result.Phase.Succeeded() || f.result.Superseded != "") {
			failing = append(failing, name)
		}
		if w.json {
			w.document(endDocument{"result", r})
		}
		count[r.Outcome]++
	}
	w.say("deployment %s: %s\n", w.p.request.Deployment, ui.Clean(counts(count)))
	for _, name := range failing {
		w.tellFailure(name)
	}
	if w.p.request.Mode == protocol.DryActivate {
		w.tellDryRun()
	}
	var says []string
	if len(failing) > 0 {
		says = append(says, fmt.Sprintf("%s did not confirm: %s", nodes(len(failing)), some(failing)))
	}
	if len(away) > 0 {
		says = append(says, fmt.Sprintf("offline: %s%s", some(away), w.later(" (pending, until they come back)")))
	}
	if len(late) > 0 {
		says = append(says, fmt.Sprintf("not done in time: %s (nix-infra deployment show %s tells how it goes)", some(late), w.p.request.Deployment))
	}
	switch text := strings.Join(says, "; "); {
	case len(failing) > 0:
		return &outcome{SomeFailed, errors.New(text)}
	case text != "":
		return &outcome{Unanswered, errors.New(text)}
	}
	return nil
}

// later is what is said of nodes that follow later; a dry run is not wanted of anybody later.
func (w *watch) later(text string) string {
	if w.p.request.Mode == protocol.DryActivate {
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
	r := resultOf(w.p.request.Deployment, name, f.result)
	w.say("\n%s %s: %s\n", w.out.Paint(ui.Bold, ui.Clean(name)), w.out.Paint(ui.Red, ui.Clean(r.Outcome)), ui.Clean(r.Reason))
	lines := f.lines
	if r.Log != "" {
		lines = strings.Split(strings.TrimRight(r.Log, "\n"), "\n")
	}
	w.printLog(lines[max(0, len(lines)-shownLines):])
}

func (w *watch) tellDryRun() {
	for _, name := range w.p.names() {
		if r := w.nodes[name].result.Report; r != nil && r.Phase.Succeeded() && r.Log != "" {
			w.say("\n%s would:\n", w.out.Paint(ui.Bold, ui.Clean(name)))
			w.printLog(strings.Split(strings.TrimRight(r.Log, "\n"), "\n"))
		}
	}
}
