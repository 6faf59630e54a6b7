package reconcile

import (
	"context"
	"errors"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	maxReason   = 1000 // bytes
	maxUnits    = 200  // failed units that a report names
	reportFirst = time.Second
	reportLast  = time.Minute
)

// report queues a report; it is sent until it was acknowledged.
func (e *Engine) report(r protocol.Report) {
	_ = e.update("owed", func(j *journal) { j.Reports = append(j.Reports, r) })
	e.Connected()
}

// deliver sends the reports that wait, oldest first, until ctx ends.
func (e *Engine) deliver(ctx context.Context) {
	wait := reportFirst
	for ctx.Err() == nil {
		r, ok := e.oldestReport()
		var err error
		if ok {
			one, cancel := context.WithTimeout(ctx, requestTimeout)
			err = e.o.Upstream.Report(one, r)
			cancel()
			if err == nil || final(err) {
				if err != nil {
					e.o.Log.Error("the controller refused a report; it is dropped", "deployment", r.Deployment, "error", err)
				}
				e.acknowledge(r)
				wait = reportFirst
				continue
			}
		}
		var retry <-chan time.Time
		if ok {
			retry = time.After(jitter(wait))
			wait = min(2*wait, reportLast)
		}
		select {
		case <-ctx.Done():
		case <-e.kick:
			wait = reportFirst
		case <-retry:
		}
	}
}

// final tells whether sending the same report again would be answered the same.
func final(err error) bool {
	var refusal *protocol.Refusal
	return errors.As(err, &refusal) && (refusal.Code == protocol.Malformed || refusal.Code == protocol.Invalid)
}

func (e *Engine) oldestReport() (protocol.Report, bool) {
	e.mu.Lock()
	defer e.mu.Unlock()
	if len(e.j.Reports) == 0 {
		return protocol.Report{}, false
	}
	return e.j.Reports[0], true
}

// acknowledge removes a report from the queue.
func (e *Engine) acknowledge(r protocol.Report) {
	_ = e.update("reported", func(j *journal) {
		j.Reports = slices.DeleteFunc(j.Reports, func(q protocol.Report) bool {
			return q.Deployment == r.Deployment && q.Phase == r.Phase && q.Ended.Equal(r.Ended)
		})
	})
}

// move takes the attempt to another phase, together with what else changes with it, and tells.
func (e *Engine) move(a *attempt, to protocol.Phase, change func()) error {
	if !mayMove(a.Phase, to) {
		return errors.New("illegal move from " + string(a.Phase) + " to " + string(to))
	}
	err := e.update(string(to), func(j *journal) {
		if change != nil {
			change()
		}
		a.Phase = to
		j.Attempt = a
		j.stand(a, to, a.Reason)
	})
	e.tell(a.Deployment, to, a.Reason)
	return err
}

// stand says where the node stands. An attempt may be an older one than the newest manifest: what is staged
// goes on after a reboot that was ordered for it and failed.
func (j *journal) stand(a *attempt, phase protocol.Phase, reason string) {
	j.State = State{Serial: j.Seen, Deployment: a.Deployment, Phase: phase, Reason: reason}
}

// note journals progress within a phase.
func (e *Engine) note(step string, change func()) error {
	return e.update(step, func(*journal) { change() })
}

func (e *Engine) tell(deployment string, phase protocol.Phase, reason string) {
	e.o.Log.Info("phase", "deployment", deployment, "phase", phase, "reason", reason)
	e.event(deployment, protocol.Event{Version: protocol.Version, Time: e.now(), Phase: phase, Reason: clip(reason, maxReason)})
	e.changed()
}

// event tells of progress, to the controller and to those who follow the deployment on the node itself.
func (e *Engine) event(deployment string, ev protocol.Event) {
	e.o.Upstream.Event(deployment, ev)
	e.followers.tell(deployment, ev)
}

// end takes the attempt to an end and queues its report. A staged attempt stays in the journal: it goes
// on after the next boot.
func (e *Engine) end(a *attempt, phase protocol.Phase, reason string, generation int, change func(*journal)) {
	reason = clip(reason, maxReason)
	if !mayMove(a.Phase, phase) {
		e.o.Log.Error("illegal end of an attempt", "from", a.Phase, "to", phase)
	}
	// Killed in between, the agent comes to the same end again: recorded twice is better than not at all.
	e.recordEnd(a.by(), a.Deployment, phase, reason)
	_ = e.update(string(phase), func(j *journal) {
		if change != nil {
			change(j)
		}
		a.Phase = phase
		j.Attempt = nil
		switch phase {
		case protocol.Staged:
			j.Attempt = a
		case protocol.FailedPhase:
			j.Attempt = a.Staged // it was not rebooted into yet
		}
		j.stand(a, phase, reason)
		j.Reports = append(j.Reports, a.report(phase, reason, generation, e.now()))
	})
	e.deliverSecrets()
	e.tell(a.Deployment, phase, reason)
	e.Connected()
	if phase != protocol.Staged {
		e.prune()
	}
}

// report is how the attempt ended.
func (a *attempt) report(phase protocol.Phase, reason string, generation int, now time.Time) protocol.Report {
	return protocol.Report{Version: protocol.Version, Deployment: a.Deployment, Serial: a.Serial, Mode: a.Mode,
		Phase: phase, Reason: reason, Before: a.Old, Closure: a.New, Generation: generation, Built: a.Built, Started: a.Started,
		Ended: now, FailedUnits: a.NewUnits, Log: clipTail(a.Log, protocol.MaxReportLog), Checks: a.Checks}
}

// clip makes one line of s, of at most limit bytes.
func clip(s string, limit int) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > limit {
		s = s[:limit]
	}
	return strings.ToValidUTF8(s, "")
}

// clipTail keeps the end of a log, of at most limit bytes, from the start of a line.
func clipTail(s string, limit int) string {
	if len(s) > limit {
		s = s[len(s)-limit:]
		if i := strings.IndexByte(s, '\n'); i >= 0 {
			s = s[i+1:]
		}
	}
	return strings.ToValidUTF8(s, "?")
}
