package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/cli/vault"
	"github.com/nix-infra/nix-infra/protocol"
)

// rotation is one secret's way to its nodes. While it is under way the project has both values: the old one as the
// secret's, the new one pending.
type rotation struct {
	*app
	session *session
	store   *vault.Secrets
	o       *rotateOptions
	name    string
	waves   [][]*rotating
	nodes   []*rotating // of all waves
	offline []string
	later   []string // that have not been given the secret yet
	users   int      // nodes whose files name the secret
	failing int      // that many may
	live    *ui.Live

	mu sync.Mutex // of printing
}

// rotating is a node that is online.
type rotating struct {
	protocol.NodeState
	old, value protocol.SealedSecret
	state      rotatingState
	err        error
}

type rotatingState int

const (
	hasOld    rotatingState = iota
	hasNew                  // and proved that its units hold with it
	hasEither               // it did not answer
)

// newRotation finds the nodes that use a secret, and seals both values to those that are online: what can't be sealed
// stops it before anything happened.
func (a *app) newRotation(ctx context.Context, s *session, store *vault.Secrets, o *rotateOptions, name string, old, value []byte) (*rotation, error) {
	all, err := s.ListNodes(ctx)
	if err != nil {
		return nil, err
	}
	p := s.me.project
	sealing := newSealer(s.me, a.newTrees(p, treeFlags{}, all))
	r := &rotation{app: a, session: s, store: store, o: o, name: name}
	for i := range all {
		n := &all[i]
		uses, err := p.Secrets(n.Name, "")
		if err != nil {
			return nil, err
		}
		at := slices.IndexFunc(uses, func(u project.SecretUse) bool { return u.Name == name })
		if at < 0 {
			continue
		}
		r.users++
		if !n.Online {
			r.offline = append(r.offline, n.Name)
			continue
		}
		node := &rotating{NodeState: *n}
		key, err := sealing.key(n)
		if err == nil {
			node.old, err = sealing.seal(n.Name, key, uses[at], old)
		}
		if err == nil {
			node.value, err = sealing.seal(n.Name, key, uses[at], value)
		}
		if err != nil {
			return nil, fmt.Errorf("%s: %w", n.Name, err)
		}
		r.nodes = append(r.nodes, node)
	}
	words := o.waves.Over(p.Settings.Rollout).Over(project.Rollout{Canary: "1"})
	strategy, err := project.Rollout{Canary: words.Canary, Batch: words.Batch, Order: words.Order, MaxFailures: o.waves.MaxFailures}.Strategy(time.Now())
	if err != nil {
		return nil, err
	}
	r.failing = strategy.MaxFailures.Floor(len(r.nodes))
	r.waves = wavesOf(r.nodes, strategy)
	return r, nil
}

// wavesOf puts nodes into waves as a rollout does: by the order of tags, each wave of nodes of one tag.
func wavesOf(nodes []*rotating, s protocol.Strategy) (waves [][]*rotating) {
	rank := func(n *rotating) int {
		i := slices.IndexFunc(s.Order, func(tag string) bool { return slices.Contains(n.Tags, tag) })
		if i < 0 {
			return len(s.Order)
		}
		return i
	}
	sorted := slices.SortedStableFunc(slices.Values(nodes), func(x, y *rotating) int { return rank(x) - rank(y) })
	for len(sorted) > 0 {
		alike := slices.IndexFunc(sorted, func(n *rotating) bool { return rank(n) != rank(sorted[0]) })
		if alike < 0 {
			alike = len(sorted)
		}
		size := s.Batch.Ceil(len(nodes))
		if canary := s.Canary.Ceil(len(nodes)); len(waves) == 0 && canary > 0 {
			size = canary
		}
		if size == 0 || size > alike {
			size = alike
		}
		waves = append(waves, sorted[:size])
		sorted = sorted[size:]
	}
	return waves
}

// rotatedAtOnce bounds the nodes of a wave that are at work at the same time.
const rotatedAtOnce = 64

// run brings the new value to the nodes, wave after wave.
func (r *rotation) run(ctx context.Context) error {
	r.begin(fmt.Sprintf("rotating %s on %s", r.name, nodes(len(r.nodes))))
	defer r.close()
	for _, name := range r.offline {
		r.tell(name, "offline", nil, "gets it by the next deploy", ui.Waiting)
	}
	for _, wave := range r.waves {
		r.each(ctx, wave, func(n *rotating) protocol.SealedSecret { return n.value })
		if ctx.Err() != nil {
			return r.interrupted(ctx)
		}
		if len(r.failed()) > r.failing {
			return r.restore(ctx)
		}
	}
	if len(r.having(hasNew)) == 0 && len(r.failed()) > 0 {
		return r.restore(ctx) // all may fail, but then nobody has it
	}
	if err := r.store.ConfirmPending(r.name); err != nil {
		return err
	}
	r.end("rotated")
	r.close()
	failed := r.failed()
	r.say("secret %s has its new value, on %s\n", r.name, nodes(len(r.having(hasNew))))
	switch {
	case len(failed) > 0:
		return &outcome{SomeFailed, &errorList{fmt.Sprintf("%s kept the old value of %s, until the next deploy:", nodes(len(failed)), r.name), failed}}
	case len(r.offline) > 0:
		return &outcome{Unanswered, fmt.Errorf("these are offline, and get %s by the next deploy: %s", r.name, some(r.offline))}
	}
	return nil
}

// each has nodes take a value, and waits for all.
func (r *rotation) each(ctx context.Context, some []*rotating, which func(*rotating) protocol.SealedSecret) {
	var wg sync.WaitGroup
	slots := make(chan struct{}, rotatedAtOnce)
	for _, n := range some {
		wg.Go(func() {
			slots <- struct{}{}
			defer func() { <-slots }()
			r.one(ctx, n, which(n))
		})
	}
	wg.Wait()
}

// wayBackTime is what a node may take beyond the time that its units have: to put the old value back, and have them right
// again.
const wayBackTime = 8 * time.Minute

func (r *rotation) one(ctx context.Context, n *rotating, secret protocol.SealedSecret) {
	restoring := n.state != hasOld
	r.step(n, "at work", ui.Active)
	waiting, cancel := context.WithTimeout(ctx, r.o.timeout+wayBackTime)
	defer cancel()
	var done protocol.Rotated
	reply, err := r.session.Ask(waiting, n.Name, protocol.RotateSecret, protocol.RotateOrder{Secret: secret, Timeout: int(r.o.timeout / time.Second), Settle: int(r.o.settle / time.Second)})
	if err == nil {
		err = json.Unmarshal(reply.Body, &done) // a newer agent may say more
	}
	var refused *protocol.Refusal
	switch n.err = err; {
	case err == nil && restoring:
		n.state = hasOld
		r.tell(n.Name, "restored", done.Units, "", ui.Good)
	case restoring:
		r.tell(n.Name, "not-restored", nil, err.Error(), ui.Bad)
	case err == nil:
		n.state = hasNew
		state := "rotated"
		if done.Same {
			state = "same"
		}
		r.tell(n.Name, state, done.Units, "", ui.Good)
	case errors.As(err, &refused) && refused.Code == protocol.Unknown:
		r.mu.Lock()
		r.later = append(r.later, n.Name)
		r.mu.Unlock()
		n.err = nil
		r.tell(n.Name, "later", nil, "it has not been given this secret yet, and gets it by the next deploy", ui.Waiting)
	case errors.As(err, &refused):
		r.tell(n.Name, "failed", nil, refused.Reason, ui.Bad)
	default:
		n.state = hasEither
		if ctx.Err() == nil {
			r.tell(n.Name, "silent", nil, err.Error(), ui.Bad)
		}
	}
}

// failed are the nodes that did not take the new value, or may not have.
func (r *rotation) failed() []error {
	var failed []error
	for _, n := range r.nodes {
		if n.err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", n.Name, n.err))
		}
	}
	return failed
}

func (r *rotation) having(state rotatingState) []*rotating {
	return slices.DeleteFunc(slices.Clone(r.nodes), func(n *rotating) bool { return n.state != state })
}

// restore brings the old value back to the nodes that have the new one, or may have it.
func (r *rotation) restore(ctx context.Context) error {
	why := r.failed()
	affected := append(r.having(hasNew), r.having(hasEither)...)
	r.each(ctx, affected, func(n *rotating) protocol.SealedSecret { return n.old })
	if ctx.Err() != nil {
		return r.interrupted(ctx)
	}
	left := append(r.having(hasNew), r.having(hasEither)...)
	if len(left) > 0 {
		r.end("unfinished")
		return &outcome{SomeFailed, &errorList{fmt.Sprintf("%s was not rotated, and these may have the new value still; nix-infra secrets rotate %s --undo tries again, or deploy to them: %s", r.name, r.name, some(namesOfRotating(left))), why}}
	}
	if err := r.store.DropPending(r.name); err != nil {
		return err
	}
	r.end("restored")
	return &outcome{SomeFailed, &errorList{fmt.Sprintf("%s was not rotated: its old value is back everywhere, and stays in the project", r.name), why}}
}

// undo takes back a rotation that was interrupted.
func (r *rotation) undo(ctx context.Context) error {
	r.begin(fmt.Sprintf("bringing the old value of %s back on %s", r.name, nodes(len(r.nodes))))
	defer r.close()
	for _, n := range r.nodes {
		n.state = hasEither
	}
	r.each(ctx, r.nodes, func(n *rotating) protocol.SealedSecret { return n.old })
	if ctx.Err() != nil {
		return r.interrupted(ctx)
	}
	if left := r.having(hasEither); len(left) > 0 {
		r.end("unfinished")
		return &outcome{SomeFailed, &errorList{nodes(len(left)) + " may have the new value still; run this again, or deploy to them:", r.failed()}}
	}
	if err := r.store.DropPending(r.name); err != nil {
		return err
	}
	r.end("restored")
	r.close()
	r.say("secret %s has its old value, on %s\n", r.name, nodes(len(r.nodes)))
	if len(r.offline) > 0 {
		return &outcome{Unanswered, fmt.Errorf("these are offline; a deploy makes sure of them: %s", some(r.offline))}
	}
	return nil
}

func (r *rotation) interrupted(ctx context.Context) error {
	r.end("unfinished")
	r.close()
	r.note("the rotation of %s is unfinished: --resume goes on with it, --undo brings the old value back; nodes that are at work end it by themselves", r.name)
	return ctx.Err()
}

func namesOfRotating(some []*rotating) []string {
	names := []string{}
	for _, n := range some {
		names = append(names, n.Name)
	}
	return names
}
