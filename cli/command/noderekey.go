package command

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// rekeyAtOnce is how many nodes get other keys at the same time.
const rekeyAtOnce = 32

type rekeyOptions struct {
	timeout, wait time.Duration
}

// rekeyDocument is a node in `node rekey --json`.
type rekeyDocument struct {
	Node    string `json:"node"`
	State   string `json:"state"`   // rekeyed, failed or silent
	Key     string `json:"key"`     // the new public nkey, "" where it may have none
	Pending bool   `json:"pending"` // a deployment that it has not accepted is sealed to the old key
	Reason  string `json:"reason"`
}

func (a *app) nodeRekeyCommand() *cobra.Command {
	var o rekeyOptions
	c := &cobra.Command{
		Use:   "rekey SELECTOR...",
		Short: "Give nodes other keys, in place of those that they have",
		Long: `Give nodes other keys: the one by which a node proves who it is, and the one to which its secrets are sealed. A node
makes them itself, and they never leave it. It seals all that it holds to the new key and connects again with it; then the
old keys are revoked, so that whoever has a copy can't be that node, nor open what comes from now on.

The agent restarts for it: tunnels and what is run on the node at that moment end, services go on. A node that is at a
deployment refuses. The command can be interrupted at any time, and run again. It needs the fleet's keys, as enroll does.`,
		Example: `  nix-infra node rekey web1
  nix-infra node rekey @db
  nix-infra node rekey all --json | jq -r 'select(.state != "rekeyed") | .node'`,
		Args: someNodes("give other keys to which nodes?", "node rekey"),
		RunE: func(c *cobra.Command, args []string) error { return a.rekey(c.Context(), args, o) },
	}
	f := c.Flags()
	f.DurationVar(&o.timeout, "timeout", 30*time.Second, "how long a node may take for an answer")
	f.DurationVar(&o.wait, "wait", time.Minute, "how long to wait for the node's first sign of life with its new keys")
	return c
}

// rekeying is a node that gets other keys.
type rekeying struct {
	*rekeyRun
	node    *protocol.NodeState
	old     string                 // public nkey that it proved to have
	request *protocol.EnrolRequest // for the new keys
	taken   bool                   // the node proved that it has them
	err     error
}

// rekeyRun is all of them.
type rekeyRun struct {
	*app
	e    *enrolment
	s    *session
	o    rekeyOptions
	live *ui.Live
	all  []*rekeying
}

func (a *app) rekey(ctx context.Context, selectors []string, o rekeyOptions) error {
	e, err := a.openEnrolment()
	if err != nil {
		return err
	}
	if err := protocol.CheckControllers(e.Controllers); err != nil {
		return err
	}
	s, err := a.connectAs(ctx, e.me)
	if err != nil {
		return err
	}
	defer s.Close()
	nodes, err := a.selected(ctx, s.Client, selectors)
	if err != nil {
		return err
	}
	r := &rekeyRun{app: a, e: e, s: s, o: o}
	for i := range nodes {
		r.all = append(r.all, &rekeying{rekeyRun: r, node: &nodes[i]})
	}
	if !a.json {
		r.live = a.out.Live("new keys")
		defer r.live.Close()
	}
	if err := r.run(ctx); err != nil {
		return err
	}
	if r.live != nil {
		r.live.Close()
	}
	return r.end()
}

// run has all nodes make their keys, then take them, and then revokes the old ones at once: an account JWT is made at most
// once in a second. Which keys those are is on the project's record before any node takes others: whatever is broken off,
// the next run revokes them.
func (r *rekeyRun) run(ctx context.Context) error {
	r.each(ctx, "make new keys", (*rekeying).offer)
	var offered []grant
	for _, n := range r.all {
		if n.err == nil {
			offered = append(offered, grant{Name: n.node.Name, Role: protocol.Node, Key: n.old})
		}
	}
	if len(offered) > 0 {
		err := r.changeAccess(func(record *accessRecord) error {
			for _, g := range offered {
				record.note(g)
			}
			return nil
		})
		if err != nil {
			return err
		}
	}
	record, err := r.readAccess()
	if err != nil {
		return err
	}
	r.each(ctx, "take the new keys", (*rekeying).take)
	var void []grant
	for _, n := range r.all {
		for _, g := range record.Grants {
			if n.taken && g.Role == protocol.Node && g.Name == n.node.Name && g.Key != n.request.Key && g.Revoked == nil {
				void = append(void, g)
			}
		}
	}
	if len(void) > 0 {
		if err := r.revoke(context.WithoutCancel(ctx), r.e, void...); err != nil {
			return err
		}
	}
	r.each(ctx, "wait for its first sign of life", (*rekeying).back)
	return ctx.Err()
}

// each does a step with all nodes with which none failed before.
func (r *rekeyRun) each(ctx context.Context, step string, do func(*rekeying, context.Context) error) {
	var g errgroup.Group
	g.SetLimit(rekeyAtOnce)
	for _, n := range r.all {
		if n.err != nil {
			continue
		}
		g.Go(func() error {
			n.shows(step, ui.Active)
			if n.err = do(n, ctx); n.err != nil {
				n.shows(n.err.Error(), ui.Bad)
			}
			return nil
		})
	}
	_ = g.Wait()
}

func (n *rekeying) shows(what string, kind ui.Kind) {
	if n.live != nil {
		n.live.Set(n.node.Name, what, kind)
	}
}

// offer has the node make its new keys, and proves that they are its own.
func (n *rekeying) offer(ctx context.Context) error {
	reply, id, err := n.ask(ctx, "")
	if err != nil {
		return err
	}
	if reply.Request == nil {
		return errors.New("it has no new keys to offer")
	}
	n.old, n.request = id.Key, reply.Request
	return nil
}

// take has the node take its new keys, and the controller know them. Once the node was asked, that is not broken off
// halfway.
func (n *rekeying) take(ctx context.Context) error {
	if ctx.Err() != nil {
		return ctx.Err()
	}
	ctx = context.WithoutCancel(ctx)
	answer, err := n.e.Sign(n.request, nil, time.Now())
	if err != nil {
		return err
	}
	_, id, err := n.ask(ctx, answer.User)
	var refusal *protocol.Refusal
	if errors.As(err, &refusal) {
		return err
	} else if err != nil {
		return fmt.Errorf("it may have its new keys or not: %w; run it again", err)
	}
	if id.Key != n.request.Key {
		return errors.New("it says that it has other keys than it made")
	}
	n.taken = true
	record := n.node.NodeRecord
	record.Replaces = record.Key
	record.Key, record.XKey, record.JWT = n.request.Key, n.request.XKey, answer.User
	ctx, cancel := context.WithTimeout(ctx, n.o.timeout)
	defer cancel()
	if err := n.s.Controller(ctx, protocol.PutNode, record, nil); err != nil {
		return fmt.Errorf("it has its new keys, and the controller does not know them: %w; run it again", err)
	}
	return keepNode(n.e.me.project.Dir, record.Name, record.JWT)
}

// ask gives the node an order, with the JWT for its new keys or "", and proves the answer.
func (n *rekeying) ask(ctx context.Context, user string) (*protocol.RekeyReply, protocol.Identity, error) {
	ctx, cancel := context.WithTimeout(ctx, n.o.timeout)
	defer cancel()
	order := protocol.RekeyOrder{Nonce: make([]byte, 32), User: user}
	rand.Read(order.Nonce) // never fails
	answer, err := n.s.Ask(ctx, n.node.Name, protocol.Rekey, order)
	if err != nil {
		return nil, protocol.Identity{}, err
	}
	var reply protocol.RekeyReply
	if err := json.Unmarshal(answer.Body, &reply); err != nil {
		return nil, protocol.Identity{}, fmt.Errorf("its answer can't be read: %w", err)
	}
	id, err := n.e.me.verifier.ProveRekey(n.node.Name, &order, &reply, time.Now())
	return &reply, id, err
}

// pingTime is how long a node that is expected back may take for an answer.
const pingTime = 2 * time.Second

// back waits until the node is there with its new keys: nobody is there with the old ones any more.
func (n *rekeying) back(ctx context.Context) error {
	err := n.await(ctx, n.o.wait, func(ctx context.Context) bool {
		ctx, cancel := context.WithTimeout(ctx, pingTime)
		defer cancel()
		_, err := n.s.Ask(ctx, n.node.Name, protocol.Ping, struct{}{})
		return err == nil
	})
	if err != nil && ctx.Err() == nil {
		err = fmt.Errorf("it has its new keys, and in %s nothing was heard of it: %w", n.o.wait, client.ErrNoAnswer)
	}
	if err == nil {
		n.shows("has new keys", ui.Good)
	}
	return err
}

// pending tells whether the node has not accepted a deployment yet, whose secrets only its old key opens.
func (n *rekeying) pending() bool {
	return n.taken && n.node.Desired != nil && (n.node.Beat == nil || n.node.Desired.Serial > n.node.Beat.Serial)
}

// end says how it went with each node.
func (r *rekeyRun) end() error {
	var failed, silent []error
	for _, n := range r.all {
		d := rekeyDocument{Node: n.node.Name, State: "rekeyed", Pending: n.pending()}
		if n.taken {
			d.Key = n.request.Key
		}
		if n.err != nil {
			d.Reason = n.err.Error()
			err := fmt.Errorf("%s: %w", d.Node, n.err)
			if d.State = "failed"; errors.Is(n.err, client.ErrNoAnswer) {
				d.State, silent = "silent", append(silent, err)
			} else {
				failed = append(failed, err)
			}
		}
		if r.json {
			r.document(d)
		}
		if d.Pending {
			r.note("%s has not accepted deployment %s, which is sealed to its old key: deploy again", d.Node, n.node.Desired.Deployment)
		}
	}
	const what = "are not done"
	switch {
	case len(failed) > 0:
		return &outcome{SomeFailed, several(what, append(failed, silent...))}
	case len(silent) > 0:
		return &outcome{Unanswered, several(what, silent)}
	}
	return nil
}
