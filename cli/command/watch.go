package command

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

const (
	pollEvery   = 1500 * time.Millisecond // how the rollout really is
	pollSoonest = 200 * time.Millisecond  // after an event that says something ended
	onlineEvery = 3 * time.Second
	silentAfter = 15 * time.Second // without a beat, a node that has not accepted is off, whatever the controller thinks yet
	lostGrace   = 10 * time.Second // for a node that the controller calls lost to show up again
	reportGrace = 5 * time.Second  // between a node's last beat about a deployment and its report
	patience    = 10 * time.Minute // with a controller that does not answer

	resultsPerSecond = 500 // nodes that are asked about in the middle of a rollout: their results; events tell meanwhile
	statesPerSecond  = 300 // and their states, which are larger

	keptLines  = 40 // of a node's build log, for when it fails
	shownLines = 20
)

// watch follows a rollout until it has ended, or goes on only when somebody or a node comes back. Events make it
// lively; what counts is the controller's record. Of that, the summary is asked for all the time, and the nodes only
// when the summary says something new.
type watch struct {
	*app
	s       *session
	id      string
	verbose bool
	live    *ui.Live
	hurry   chan struct{} // somebody ended: look now
	stop    func()        // no more events, after those that are there

	ready     chan struct{} // events wait for it: nothing is told of a deployment before it is known to be one
	makeReady func()

	mu      sync.Mutex
	summary protocol.Deployment // without nodes
	stale   bool                // the summary says something that the nodes were not asked about yet
	nodes   map[string]*follow
	pace    pace
	told    string // the state of the rollout that was told last
	over    bool   // nobody listens any more
}

// follow is one node on its way.
type follow struct {
	phase   protocol.Phase
	heard   bool // an event came: it is newer than what the controller tells
	lines   []string
	awaited bool      // it was there at some time since it could know of the deployment
	lostAt  time.Time // since when it is offline, zero while it is online
	beat    time.Time // its last one, by the controller's clock
	beatAt  time.Time // when that was first seen here, zero: never
	silence time.Duration
	saidEnd time.Time // when an event said that it ended
	endedAt time.Time // when the controller did
	result  protocol.NodeResult
	settled bool // nothing more will become of it here
	gone    bool // out of the fleet
}

// newWatch listens to the events of a deployment that need not be known to the controller yet. Names are its nodes, as
// far as they are known here.
func newWatch(a *app, s *session, id string, names []string, verbose bool) (*watch, error) {
	w := &watch{app: a, s: s, id: id, verbose: verbose, hurry: make(chan struct{}, 1), ready: make(chan struct{}), nodes: map[string]*follow{}, stale: true}
	w.makeReady = sync.OnceFunc(func() { close(w.ready) })
	for _, name := range names {
		w.nodes[name] = &follow{}
	}
	var err error
	w.stop, err = s.Watch(id, w.event)
	return w, err
}

// close ends the telling of events, and the listening.
func (w *watch) close() {
	w.mu.Lock()
	w.over = true
	w.mu.Unlock()
	w.makeReady()
	w.stop()
}

// released tells whether the node knows of the deployment, or could.
func (f *follow) released() bool { return f.result.Released || f.phase != "" }

// waitedFor tells whether a node is expected to end the deployment soon. One that was off all the time
// is not; one that went is, for as long as it may come back by itself: while it switches, until the controller
// counts it as failed.
func (f *follow) waitedFor(now time.Time) bool {
	switch {
	case f.settled || f.gone || !f.released() || f.silent(now):
		return false
	case f.lostAt.IsZero():
		return true
	case f.switching():
		return !f.result.Failed
	}
	return f.awaited && now.Sub(f.lostAt) < lostGrace
}

// silent tells whether a node that has not accepted yet does not beat any more: it was switched off or
// cut off a moment ago, and the controller has not noticed yet.
func (f *follow) silent(now time.Time) bool {
	return f.phase == "" && !f.beatAt.IsZero() && now.Sub(f.beatAt) >= f.silence
}

func (f *follow) switching() bool {
	switch f.phase {
	case protocol.Activating, protocol.Checking, protocol.Confirming, protocol.Rebooting, protocol.RollingBack:
		return true
	}
	return false
}

// failed tells whether a node that has settled did not do what was asked for.
func (f *follow) failed() bool {
	return f.settled && (!f.result.Phase.Succeeded() || f.result.Superseded != "")
}

// run watches to the end and tells it.
func (w *watch) run(ctx context.Context) error {
	if len(w.nodes) > 0 {
		w.makeReady()
	}
	err := w.follow(ctx)
	if ctx.Err() == nil && err == nil {
		w.stop() // with the last lines of the logs
	}
	if w.live != nil {
		w.live.Close()
	}
	switch {
	case ctx.Err() != nil && w.json:
		return &outcome{Interrupted, nil}
	case ctx.Err() != nil:
		return &outcome{Interrupted, fmt.Errorf("no longer watching; the deployment goes on: nix-infra rollout watch %s", w.id)}
	case err != nil:
		return err
	}
	w.fetchDetails(ctx)
	err = w.tell()
	if back := w.summary.Rollout.Back; back != "" {
		return w.watchBack(ctx, back, err)
	}
	return err
}

// watchBack follows the deployment that takes this one back. It ends as this one did, or worse.
func (w *watch) watchBack(ctx context.Context, id string, ended error) error {
	w.close()
	w.say("\n")
	err := w.watchRollout(ctx, w.s, id, w.verbose)
	var how *outcome
	switch {
	case err == nil:
		return ended
	case errors.As(err, &how) && how.status == Interrupted:
		return err
	}
	return &outcome{SomeFailed, fmt.Errorf("%w; the way back: %w", ended, err)}
}

// watchRollout watches a rollout that somebody began.
func (a *app) watchRollout(ctx context.Context, s *session, id string, verbose bool) error {
	w, err := newWatch(a, s, id, nil, verbose)
	if err != nil {
		return err
	}
	defer w.close()
	return w.run(ctx)
}

func (w *watch) follow(ctx context.Context) error {
	began := time.Now()
	nodesAt := began.Add(time.Duration(len(w.nodes)) * time.Second / resultsPerSecond) // not before that: of those that are known nothing has become yet
	onlineAt, answered := began.Add(onlineEvery), began
	for {
		switch err := w.askSummary(ctx); {
		case err == nil:
			answered = time.Now()
		case refusal(err):
			return err
		case time.Since(answered) > patience:
			return &outcome{Unanswered, fmt.Errorf("the controller has not answered for %s; the deployment goes on: nix-infra rollout watch %s (%w)", patience, w.id, err)}
		default: // it may be being restarted, which changes nothing about the deployment
			w.log.Debug("no answer about the deployment, asking again", "error", err)
		}
		if now := time.Now(); w.wantsNodes(now, nodesAt) {
			asked, err := w.askNodes(ctx)
			if refusal(err) {
				return err
			} else if err != nil {
				w.log.Debug("no answer about the deployment's nodes, asking again", "error", err)
			}
			nodesAt = time.Now().Add(time.Duration(asked) * time.Second / resultsPerSecond)
		}
		if !time.Now().Before(onlineAt) {
			asked := w.askWhoIsOnline(ctx)
			onlineAt = time.Now().Add(max(onlineEvery, time.Duration(asked)*time.Second/statesPerSecond))
		}
		w.draw()
		if w.done(time.Now()) {
			return nil
		}
		if !w.pause(ctx) {
			return nil // run tells
		}
	}
}

// refusal tells whether the controller answered, and said no.
func refusal(err error) bool {
	var r *protocol.Refusal
	return errors.As(err, &r)
}

// pause waits until it is time to look again. False means that ctx has ended.
func (w *watch) pause(ctx context.Context) bool {
	every := pollEvery
	if w.soon(time.Now()) {
		every = pollSoonest
	}
	next := time.NewTimer(every)
	defer next.Stop()
	for hurry := w.hurry; ; hurry = nil {
		select {
		case <-ctx.Done():
			return false
		case <-next.C:
			return true
		case <-hurry:
			next.Reset(pollSoonest) // so that a thousand ends are not a thousand questions
		}
	}
}

// soon tells whether the controller is about to say more: somebody told that it ended, or all have.
func (w *watch) soon(now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, f := range w.nodes {
		if !f.settled && now.Sub(f.saidEnd) < reportGrace {
			return true
		}
	}
	return w.summary.ID != "" && underway(&w.summary)+w.summary.Count[""] == 0
}

// askSummary asks how the rollout is, in numbers.
func (w *watch) askSummary(ctx context.Context) error {
	d, err := w.s.Summary(ctx, w.id)
	if err != nil {
		return err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	if string(protocol.Encode(d)) != string(protocol.Encode(&w.summary)) {
		w.summary, w.stale = *d, true
	}
	w.pace.note(d, time.Now())
	return nil
}

// wantsNodes tells whether it is time to ask about nodes: when there is something new, no more often than their
// number allows, unless it is the end; and when only those that are passed over seem to be left.
func (w *watch) wantsNodes(now, notBefore time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.summary.ID == "" || !w.stale && !w.stuck(now) {
		return false
	}
	if !w.stale {
		notBefore = notBefore.Add(onlineEvery)
	}
	return !now.Before(notBefore) || w.summary.Rollout.State.Ended() && underway(&w.summary) == 0
}

// underway is the number of nodes that have heard of a deployment and have not ended it.
func underway(d *protocol.Deployment) int {
	n := 0
	for phase, count := range d.Count {
		if phase != "" && phase != supersededPhase && !phase.Ended() {
			n += count
		}
	}
	return n
}

// supersededPhase is the phase under which the controller counts nodes that a newer deployment has.
const supersededPhase protocol.Phase = "superseded"

// stuck tells whether nothing goes on by itself and nobody is waited for. The caller holds mu.
func (w *watch) stuck(now time.Time) bool {
	if w.summary.Rollout.State.Ended() || !w.summary.Rollout.Next.IsZero() {
		return false
	}
	for _, f := range w.nodes {
		if f.waitedFor(now) {
			return false
		}
	}
	return true
}

// askNodes takes over how the controller's record of the nodes stands: of those that have not settled and whose turn
// it is. It says how many it asked about.
func (w *watch) askNodes(ctx context.Context) (asked int, err error) {
	q := protocol.DeploymentQuery{ID: w.id, Brief: true}
	w.mu.Lock()
	all := len(w.nodes)
	state, wave := w.summary.Rollout.State, w.summary.Rollout.Wave
	stuck := w.stuck(time.Now())
	for name, f := range w.nodes {
		if turn := state.Ended() || state == protocol.RolloutTrailing || stuck || f.result.Wave <= wave; turn && !f.settled {
			q.Names = append(q.Names, name)
		}
	}
	w.mu.Unlock()
	switch asked = len(q.Names); {
	case all > 0 && asked == 0:
		w.mu.Lock()
		w.stale = false
		w.mu.Unlock()
		return 0, nil
	case asked > all/2:
		asked, q.Names = all, nil // the whole is cheaper than many names
	}
	d, err := w.s.Deployment(ctx, q)
	if err != nil {
		return asked, err
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	now := time.Now()
	w.stale = false
	for name, r := range d.Nodes {
		f := w.nodes[name]
		if f == nil {
			f = &follow{}
			w.nodes[name] = f
		}
		if f.take(r, now); !f.settled && (r.Phase.Ended() || r.Superseded != "") {
			w.stale = true // its report is on its way
		}
		w.show(name)
	}
	w.makeReady()
	return len(d.Nodes), nil
}

// take takes over what the controller knows of a node.
func (f *follow) take(r protocol.NodeResult, now time.Time) {
	if f.settled {
		return
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
		f.endedAt = now
	}
	f.settled = ended && (r.Report != nil || r.Superseded != "" || now.Sub(f.endedAt) > reportGrace)
}

// askWhoIsOnline notes who of those on their way went and who came, and says how many it asked about.
func (w *watch) askWhoIsOnline(ctx context.Context) (asked int) {
	w.mu.Lock()
	var names []string
	for name, f := range w.nodes {
		if f.released() && !f.settled {
			names = append(names, name)
		}
	}
	w.mu.Unlock()
	if len(names) == 0 {
		return 0
	}
	states, err := w.s.ListNodes(ctx, names...)
	if err != nil {
		w.log.Debug("no answer about the nodes, asking again", "error", err)
		return len(names)
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for _, name := range names {
		w.nodes[name].gone = true // unless it is in the answer
	}
	for i := range states {
		if f := w.nodes[states[i].Name]; f != nil {
			f.gone = false
			f.see(&states[i], time.Now())
			w.show(states[i].Name)
		}
	}
	return len(names)
}

// see takes over whether a node is there.
func (f *follow) see(n *protocol.NodeState, now time.Time) {
	if seen := n.LastSeen; seen != nil && !seen.Equal(f.beat) {
		f.beat, f.beatAt = *seen, now
	}
	f.silence = silentAfter
	if n.Beat != nil { // its interval is its own choice
		f.silence = max(f.silence, time.Duration(n.Beat.Interval)*time.Second*3/2)
	}
	switch {
	case n.Online:
		f.awaited, f.lostAt = true, time.Time{}
	case f.lostAt.IsZero():
		f.lostAt = now
	}
}

// done tells whether nothing more is to be seen: the rollout has ended, or is paused, or only nodes that are passed
// over are left, and nobody who got it is waited for.
func (w *watch) done(now time.Time) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.stale || len(w.nodes) == 0 {
		return false
	}
	open, passed, succeeded := 0, 0, 0
	for _, f := range w.nodes {
		switch {
		case f.waitedFor(now):
			return false
		case f.settled && !f.failed():
			succeeded++
		case f.settled:
		case f.released() || f.result.Note != "" && !f.result.Failed:
			passed++
		default: // its turn is to come, or the rollout has yet to say what it means that it counts as failed
			open++
		}
	}
	switch r := &w.summary.Rollout; {
	case r.State == protocol.RolloutRolledBack && r.Back == "":
		return now.Sub(w.pace.changed) > reportGrace // the way back is about to be made, unless there is nothing to take back
	case r.State.Ended() || r.State == protocol.RolloutPaused || r.State == protocol.RolloutTrailing:
		return true
	case passed > 0: // they are away, and the others have ended
		return open == 0 && r.Next.IsZero()
	}
	return succeeded == len(w.nodes) // of one that failed, the rollout has yet to say what that means
}

// fetchDetails asks, once, for what polling leaves out and the end shows: the logs of those that failed and of a dry
// run, and for programs everything.
func (w *watch) fetchDetails(ctx context.Context) {
	w.mu.Lock()
	var names []string
	for name, f := range w.nodes {
		if r := f.result.Report; r != nil && (w.json || !r.Phase.Succeeded() || w.dry()) {
			names = append(names, name)
		}
	}
	w.mu.Unlock()
	if len(names) == 0 {
		return
	}
	d, err := w.s.Deployment(ctx, protocol.DeploymentQuery{ID: w.id, Names: names})
	if err != nil {
		w.note("the logs are missing here, nix-infra deployment show %s --log has them: %s", w.id, message(err))
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	for name, r := range d.Nodes {
		if f := w.nodes[name]; f != nil && r.Report != nil {
			f.result = r
		}
	}
}

func (w *watch) dry() bool { return w.summary.Mode == protocol.DryActivate }
