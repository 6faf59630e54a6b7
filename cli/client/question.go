package client

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// Question is what is asked of each of some nodes. It costs one signature a node, and reaches nobody else.
type Question struct {
	Nodes   []string
	Action  protocol.Action
	Payload any
	// PayloadOf is in Payload's place where what is asked differs from node to node.
	PayloadOf func(node string) any

	Concurrency int           // nodes that are at work at the same time; 0: all
	Patience    time.Duration // how long a node may take for its answer, or the first part of it; 0: until ctx ends
	// End has nodes that are still at work when ctx ends, or their time is over, told to stop. It is for questions:
	// what changes something is not ended halfway.
	End bool
	// Linger is how long those that were told to stop because ctx ended are still heard; 0: not at all.
	Linger time.Duration
	// Enough names nodes that are told to stop, because who asked has all that it wanted of them. It may be nil.
	Enough <-chan string
	// Gone is told, from the same goroutine as each, of a node that does not answer or broke off; it may be nil.
	Gone func(node string)
}

// AskMany signs a request to each of some nodes and collects like Broadcast.
func (c *Client) AskMany(ctx context.Context, nodes []string, action protocol.Action, payload any, each Each) (silent []string, err error) {
	return c.Put(ctx, Question{Nodes: nodes, Action: action, Payload: payload}, each)
}

// Put asks the question and hands the answers to each, as they come, until all are there or ctx ends. An answer in
// parts comes part by part, and is renewed for as long as it goes on. It returns who did not answer, or
// broke off.
func (c *Client) Put(ctx context.Context, q Question, each Each) (silent []string, err error) {
	if len(q.Nodes) == 0 {
		return nil, nil
	}
	collecting := &collection{
		client: c, each: each, replies: protocol.ReplySubject(c.config.Name, "*", "*"), denied: protocol.RequestSubject(q.Nodes[0], q.Action),
		order: q.Nodes, concurrency: q.Concurrency, patience: q.Patience, linger: q.Linger, enough: q.Enough, tell: q.Gone,
		ask: func(node string) (string, error) { return c.publish(node, q.Action, q.payload(node)) },
	}
	if q.End {
		collecting.end = func(node, id string) {
			_, _ = c.publish(node, protocol.Stream, protocol.StreamOrder{Request: id, End: true}) // it ends by itself, later
		}
	}
	return collecting.run(ctx)
}

func (q *Question) payload(node string) any {
	if q.PayloadOf != nil {
		return q.PayloadOf(node)
	}
	return q.Payload
}

// publish signs a request to a node and sends it.
func (c *Client) publish(node string, action protocol.Action, payload any) (id string, err error) {
	signed, id, err := c.config.Signer.Request(action, node, payload, time.Now())
	if err != nil {
		return "", err
	}
	message := protocol.Encode(signed)
	if len(message) > protocol.MaxMessage {
		return "", fmt.Errorf("the request %s has %d bytes, the limit is %d", action, len(message), protocol.MaxMessage)
	}
	return id, c.nc.PublishRequest(protocol.RequestSubject(node, action), protocol.ReplySubject(c.config.Name, id, node), message)
}

// collection is answers that are waited for.
type collection struct {
	client      *Client
	each        Each
	replies     string // subject of all answers
	denied      string // a subject that is published on: the broker denies all or none
	order       []string
	concurrency int
	patience    time.Duration
	linger      time.Duration
	enough      <-chan string
	ask         func(node string) (id string, err error)
	end         func(node, id string) // nil: nothing is ended
	tell        func(node string)     // of who is gone; nil: nobody is told

	next    int                   // of order, who is asked next
	waiting map[string]*answering // who was asked and is not done
	gone    map[string]bool       // who is done without an answer
}

// answering is a node that was asked.
type answering struct {
	id      string
	since   time.Time
	parts   int
	renewed time.Time
	order   string    // id of the last order that renewed it
	heard   time.Time // the last part, or answer to such an order
}

// maxBuffered is how many answers may wait for each to be done with the ones before: two for each of
// 10,000 nodes.
const maxBuffered = 20_000

// lookAfter is how often it is looked for who takes too long, and what has to be renewed.
const lookAfter = 250 * time.Millisecond

func (w *collection) run(ctx context.Context) ([]string, error) {
	w.waiting, w.gone = map[string]*answering{}, map[string]bool{}
	answers := make(chan *nats.Msg, maxBuffered)
	sub, err := w.client.nc.ChanSubscribe(w.replies, answers)
	if err != nil {
		return nil, err
	}
	defer sub.Unsubscribe()
	denied, done := w.client.listenDenied(w.denied)
	defer done()
	look := time.NewTicker(lookAfter)
	defer look.Stop()
	ended, over := ctx.Done(), make(<-chan time.Time)
	for {
		for w.next < len(w.order) && (w.concurrency == 0 || len(w.waiting) < w.concurrency) && ctx.Err() == nil {
			node := w.order[w.next]
			w.next++
			id, err := w.ask(node)
			if err != nil {
				return nil, err
			}
			w.waiting[node] = &answering{id: id, since: time.Now()}
		}
		if len(w.waiting) == 0 && (w.next == len(w.order) || ended == nil) {
			return w.silent(), nil
		}
		select {
		case m := <-answers:
			w.take(m)
		case err := <-denied:
			return nil, err
		case now := <-look.C:
			w.lookAfter(now, len(answers) == 0)
		case node := <-w.enough:
			if a := w.waiting[node]; a != nil && w.end != nil {
				w.end(node, a.id)
			}
		case <-ended:
			if errors.Is(ctx.Err(), context.DeadlineExceeded) {
				w.takeThere(answers) // they came in time
			}
			w.endAll()
			if w.linger == 0 {
				return w.silent(), nil
			}
			ended, over = nil, time.After(w.linger)
		case <-over:
			return w.silent(), nil
		}
	}
}

// takeThere takes the answers that are there already, and waits for no others.
func (w *collection) takeThere(answers <-chan *nats.Msg) {
	for range len(answers) {
		w.take(<-answers)
	}
}

func (w *collection) take(m *nats.Msg) {
	node, ok := protocol.ReplySender(m.Subject)
	a, asked := w.waiting[node]
	if !ok || !asked {
		return // somebody who was not asked
	}
	switch m.Subject {
	case protocol.ReplySubject(w.client.config.Name, a.id, node):
	case protocol.ReplySubject(w.client.config.Name, a.order, node):
		w.takeRenewed(node, a, m)
		return
	default:
		return // an answer to something else
	}
	if noResponders(m) {
		w.drop(node)
		return
	}
	r, err := parse(m.Data, node)
	if err == nil && r.Part > 0 && r.Part <= a.parts {
		return // a part that was there already
	}
	if err == nil && r.More {
		if a.parts == 0 {
			a.renewed = a.since
		}
		a.parts, a.heard = max(r.Part, 1), time.Now()
	} else {
		delete(w.waiting, node)
	}
	w.each(node, r, err)
}

// takeRenewed hears what a node says to a renewal.
func (w *collection) takeRenewed(node string, a *answering, m *nats.Msg) {
	if noResponders(m) {
		w.drop(node)
		return
	}
	if _, err := parse(m.Data, node); err != nil {
		delete(w.waiting, node)
		w.each(node, nil, fmt.Errorf("its answer broke off: %w", err))
		return
	}
	a.heard = time.Now()
}

// drop gives up on a node.
func (w *collection) drop(node string) {
	delete(w.waiting, node)
	w.gone[node] = true
	if w.tell != nil {
		w.tell(node)
	}
}

// lookAfter renews what goes on, and gives up on who takes too long. heard tells that no answer waits to be looked at:
// where each took its time, as with a full pipe behind it, nobody else is late.
func (w *collection) lookAfter(now time.Time, heard bool) {
	for node, a := range w.waiting {
		late := a.parts == 0 && w.patience > 0 && now.Sub(a.since) > w.patience || a.parts > 0 && now.Sub(a.heard) > protocol.StreamLifetime
		switch {
		case late && heard:
			if w.end != nil {
				w.end(node, a.id)
			}
			w.drop(node)
		case a.parts > 0 && now.Sub(a.renewed) >= protocol.StreamRenewal:
			a.renewed = now
			if id, err := w.client.publish(node, protocol.Stream, protocol.StreamOrder{Request: a.id}); err == nil {
				a.order = id // what can't be published now is heard of no more, and given up on later
			}
		}
	}
}

// endTime bounds how long the end of a collection waits for its orders to have left.
const endTime = time.Second

// endAll has those stop who are still at work.
func (w *collection) endAll() {
	if w.end == nil || len(w.waiting) == 0 {
		return
	}
	for node, a := range w.waiting {
		w.end(node, a.id)
	}
	_ = w.client.nc.FlushTimeout(endTime) // without it, they end later by themselves
}

func (w *collection) silent() []string {
	var names []string
	for i, node := range w.order {
		if _, still := w.waiting[node]; still || w.gone[node] || i >= w.next {
			names = append(names, node)
		}
	}
	return names
}
