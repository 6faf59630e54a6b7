package reconcile

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/bundle"
)

// How a rollback that root orders on the node itself is proven, in seconds: what `nix-infra deploy` asks for
// where nothing else is said.
const (
	localTimeout = 300
	localSettle  = 5
)

const (
	localPrefix = "local-"
	localUser   = "root"
	reachTime   = 10 * time.Second
	eventsAhead = 256 // events that a follower may be behind
)

// isLocal tells whether a deployment was ordered on the node itself, by a rollback that nobody signed.
func isLocal(deployment string) bool { return strings.HasPrefix(deployment, localPrefix) }

// Apply takes over a bundle, which root gives on the node itself, and says which deployment it is. The
// manifest must be signed as ever, and its serial new; a refusal is a *protocol.Refusal.
func (e *Engine) Apply(r io.Reader) (deployment string, err error) {
	o := &order{local: true}
	var sizes map[string]int64
	err = bundle.Read(r, func(doc []byte) ([]string, error) {
		if err := e.judge(o, doc); err != nil {
			return nil, err
		}
		var total int64
		if sizes, err = blobSizes(o.m); err != nil {
			return nil, err
		}
		for _, size := range sizes {
			total += size
		}
		if total > e.o.Cache {
			return nil, fmt.Errorf("its files have %d bytes, and the node keeps %d", total, e.o.Cache)
		}
		return o.m.Blobs(), nil
	}, func(blob string, packed []byte) error {
		if _, ok := e.cache.get(blob); ok {
			return nil
		}
		data, err := openBlob(packed, blob, sizes[blob])
		if err != nil {
			return err
		}
		if err := e.cache.put(blob, data, e.write); err != nil {
			return fmt.Errorf("can't keep a blob: %w", err)
		}
		return nil
	})
	if o.m == nil {
		return "", err
	}
	if err == nil {
		err = e.give(o, "from a bundle, given by root on the node itself")
	}
	if err != nil {
		e.record(o.by, o.m.Deployment, o.digest, code(err), err.Error())
		return "", err
	}
	return o.m.Deployment, nil
}

// give leaves an order for Run. It is on record before Run can take it up.
func (e *Engine) give(o *order, how string) error {
	e.record(o.by, o.m.Deployment, o.digest, "", how)
	if !e.box.give(o) {
		return protocol.Refuse(protocol.Conflict, "another order that was given here waits to be taken up; see nix-infra-agent status")
	}
	return nil
}

// judge makes the order of a signed manifest.
func (e *Engine) judge(o *order, doc []byte) error {
	m, by, err := e.verify(doc)
	if err == nil && m.Mode == protocol.DryActivate {
		err = protocol.Refuse(protocol.Invalid, "a dry run is of no use on the node itself: its result goes to the controller")
	}
	if err == nil {
		if seen := e.seen(); m.Serial <= seen {
			err = outdated(m.Serial, seen)
		}
	}
	o.digest, o.doc, o.m, o.by = protocol.Digest(doc), doc, m, by
	return err
}

// RollBack orders a rollback on the node itself, by root, and says under which name it goes: it has no
// signature, and uses up no serial. What can't be gone back to is an error at once.
func (e *Engine) RollBack(ctx context.Context, r protocol.Rollback) (deployment string, err error) {
	now := time.Now().UTC()
	m := &protocol.Manifest{Version: protocol.Version, Node: e.o.Node, Serial: max(1, e.seen()),
		Deployment: localPrefix + strings.ReplaceAll(now.Format("20060102-150405.000"), ".", "-"), Created: now.Truncate(time.Second),
		Mode: protocol.Switch, Attr: protocol.SystemAttr(e.o.Node), Rollback: &r, Timeout: localTimeout, BuildTimeout: localTimeout, Settle: localSettle}
	doc := protocol.Encode(protocol.Signed{Payload: protocol.Encode(m)})
	o := &order{digest: protocol.Digest(doc), doc: doc, m: m, by: protocol.Identity{Name: localUser}, local: true, unsigned: true}
	if err = m.Validate(); err == nil {
		err = e.possible(ctx, r)
	}
	if err == nil {
		err = e.give(o, "a rollback, ordered by root on the node itself")
	}
	if err != nil {
		e.record(o.by, m.Deployment, o.digest, code(err), err.Error())
		return "", err
	}
	return m.Deployment, nil
}

// possible tells whether a rollback could be carried out as things are.
func (e *Engine) possible(ctx context.Context, r protocol.Rollback) error {
	obs, err := e.observe(ctx)
	if err != nil {
		return err
	}
	to, err := e.resolve(ctx, &r, obs)
	if err == nil && to.closure != obs.Running {
		err = e.tryable(to.closure)
	}
	return err
}

// reached tells whether a controller can be reached now.
func (e *Engine) reached(ctx context.Context) bool {
	ctx, cancel := context.WithTimeout(ctx, reachTime)
	defer cancel()
	return e.o.Upstream.Probe(ctx) == nil
}

// probe is the attempt's proof of the connection: none where there was none to begin with.
func (e *Engine) probe(a *attempt) func(context.Context) error {
	if a.Offline {
		return func(context.Context) error { return nil }
	}
	return e.o.Upstream.Probe
}

// ErrSlow ends the following of one who doesn't take the events. Following again goes on with it.
var ErrSlow = errors.New("the events were not taken in time")

// Follow tells of a deployment from where it stands to its end, which is nil. It returns what tell returns,
// too, and an Unknown refusal for a deployment that the node knows nothing of.
func (e *Engine) Follow(ctx context.Context, deployment string, tell func(protocol.Event) error) error {
	events, ev, err := e.follow(deployment)
	defer e.followers.remove(events)
	for err == nil {
		if ev.Phase != "" {
			err = tell(ev)
		}
		if err != nil || ev.Phase.Ended() {
			break
		}
		var ok bool
		select {
		case <-ctx.Done():
			err = ctx.Err()
		case ev, ok = <-events:
			if !ok {
				err = ErrSlow
			}
		}
	}
	return err
}

// follow begins to collect the events of a deployment, and says where it stands: without a phase while it
// waits to be taken up. Both in one moment of the journal, which is written before an event is told of: else
// phases would be collected that were over already where it stands.
func (e *Engine) follow(deployment string) (events chan protocol.Event, ev protocol.Event, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	events = e.followers.add(deployment)
	given, failed := e.box.wasGiven(deployment) // what fails afterwards is told of
	ev = protocol.Event{Version: protocol.Version, Time: e.now()}
	if s := e.j.State; s.Deployment == deployment {
		ev.Phase, ev.Reason = s.Phase, s.Reason
		return events, ev, nil
	}
	for _, r := range e.j.Reports { // the newest counts
		if r.Deployment == deployment {
			ev.Phase, ev.Reason = r.Phase, r.Reason
		}
	}
	if failed != "" && given && ev.Phase == "" {
		ev.Phase, ev.Reason = protocol.FailedPhase, failed
	}
	if given || ev.Phase != "" {
		return events, ev, nil
	}
	if _, found := e.j.newest(func(c Confirmation) bool { return c.Deployment == deployment }); found {
		ev.Phase = protocol.Confirmed
		return events, ev, nil
	}
	return events, ev, protocol.Refuse(protocol.Unknown, "%s knows nothing of deployment %s any more", e.o.Node, deployment)
}

// followers are those who follow deployments, by the channels that they read.
type followers struct {
	mu  sync.Mutex
	all map[chan protocol.Event]string // deployment
}

func (f *followers) add(deployment string) chan protocol.Event {
	c := make(chan protocol.Event, eventsAhead)
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.all == nil {
		f.all = map[chan protocol.Event]string{}
	}
	f.all[c] = deployment
	return c
}

func (f *followers) remove(c chan protocol.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.all, c)
}

// tell hands an event on. Who is too far behind is cut off: an event left out could be the end.
func (f *followers) tell(deployment string, ev protocol.Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for c, of := range f.all {
		if of != deployment {
			continue
		}
		select {
		case c <- ev:
		default:
			close(c)
			delete(f.all, c)
		}
	}
}
