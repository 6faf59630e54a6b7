package reconcile

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/agent/credential"
	"github.com/nix-infra/nix-infra/agent/health"
	"github.com/nix-infra/nix-infra/protocol"
)

// rotation is a secret that gets another value: journalled before the value is put in place, until it is proven or
// taken back.
type rotation struct {
	Secret string   `json:"secret"`
	From   int      `json:"from"` // sets
	To     int      `json:"to"`
	BootID string   `json:"boot_id"`
	Units  []string `json:"units"` // that load it
}

// Rotate gives a secret that the node has another value, and proves that what loads it holds with it: the units that
// load it are restarted, they stay up, no unit newly fails, the health checks pass and a controller can be reached.
// Otherwise the old value is put back. Errors are refusals. No attempt begins meanwhile.
//
// The new value is seen until the next boot only, until it is proven: so a loss of power takes it back, and an agent
// that is killed leaves it to the next one.
func (e *Engine) Rotate(ctx context.Context, o protocol.RotateOrder) (done protocol.Rotated, err error) {
	err = e.Idle(ctx, func(ctx context.Context) error {
		done, err = e.rotate(ctx, o)
		return err
	})
	return done, err
}

func (e *Engine) rotate(ctx context.Context, o protocol.RotateOrder) (protocol.Rotated, error) {
	none := protocol.Rotated{}
	live, set, err := e.rotated(o.Secret)
	if err != nil {
		return none, err
	}
	if changed, _ := e.secrets.Changed(live, set); len(changed) == 0 {
		return protocol.Rotated{Same: true, Units: []string{}}, nil
	}
	ctx, cancel := context.WithTimeout(ctx, time.Duration(o.Timeout)*time.Second+loadTime+slack) // for the way back, too
	defer cancel()
	obs, err := e.observe(ctx)
	if err != nil {
		return none, err
	}
	declared, err := e.o.Host.Declared(obs.Running)
	if err != nil {
		return none, err
	}
	if set, err = e.secrets.Stage(ctx, set, live); err != nil {
		return none, err
	}
	units, err := e.loaders(ctx, []string{o.Secret.Name}, always)
	if err != nil {
		return none, err
	}
	r := &rotation{Secret: o.Secret.Name, From: live.Number, To: set.Number, BootID: obs.BootID, Units: units}
	if err := e.update("rotating", func(j *journal) { j.Rotation = r }); err != nil {
		_ = e.update("", func(j *journal) { j.Rotation = nil })
		e.pruneSecrets()
		return none, err
	}
	checks := health.Checks{Failed: e.failed, Before: obs.Failed, Probe: e.o.Upstream.Probe, Settle: time.Duration(o.Settle) * time.Second,
		Declared: declared, UnitState: e.o.Host.UnitState}
	limited, stop := context.WithTimeout(ctx, time.Duration(o.Timeout)*time.Second)
	defer stop()
	err = e.tryRotation(limited, r, checks)
	if err == nil {
		// Proven. It is to be what a boot finds, or it would be gone with the next one.
		err = e.secrets.Show(ctx, r.To, r.To)
	}
	if ctx.Err() != nil {
		return none, ctx.Err() // the next agent takes it back
	}
	if err != nil {
		return none, e.undone(e.undoRotation(ctx, r), err)
	}
	_ = e.update("rotated", func(j *journal) {
		j.Rotation = nil
		j.rotated(obs.Running, r)
	})
	e.deliverSecrets()
	e.pruneSecrets()
	return protocol.Rotated{Units: append([]string{}, units...)}, nil
}

// rotated is the set in place, and the one that it is to become, not staged yet.
func (e *Engine) rotated(s protocol.SealedSecret) (live, set credential.Set, err error) {
	if live, err = e.steadySecrets(); err != nil {
		return live, set, err
	}
	held, ok := live.Get(s.Name)
	if !ok || held.Found {
		return live, set, protocol.Refuse(protocol.Unknown, "%s has no secret %s; deploy it first", e.o.Node, s.Name)
	}
	set.Secrets = slices.Clone(live.Secrets)
	i := slices.IndexFunc(set.Secrets, func(c credential.Secret) bool { return c.Name == s.Name })
	set.Secrets[i].Sealed = s.Sealed
	if _, err := e.secrets.Open(set.Secrets[i]); err != nil {
		return live, set, protocol.Refuse(protocol.Invalid, "%v", err)
	}
	return live, set, nil
}

// steadySecrets is the set in place, where that is the one that a boot finds, too.
func (e *Engine) steadySecrets() (credential.Set, error) {
	e.mu.Lock()
	staged := e.j.Attempt
	e.mu.Unlock()
	if staged != nil {
		return credential.Set{}, protocol.Refuse(protocol.Conflict, "deployment %s waits on %s for a reboot, with secrets of its own; reboot it, or deploy again", staged.Deployment, e.o.Node)
	}
	live, boots := e.secrets.Standing()
	if live.Number != boots {
		return live, protocol.Refuse(protocol.Conflict, "what %s runs was deployed to be tested, and its secrets go with the next boot; deploy it to stay, or roll back", e.o.Node)
	}
	return live, nil
}

// tryRotation puts the new value in place, restarts what loads it, and proves it. ctx ends with the time for that.
func (e *Engine) tryRotation(ctx context.Context, r *rotation, checks health.Checks) error {
	if err := e.secrets.Show(ctx, r.To, r.From); err != nil {
		return err
	}
	e.deliverSecrets()
	_ = e.update("rotating-shown", func(*journal) {})
	failed, err := e.o.Host.Restart(ctx, r.Units)
	if err != nil {
		return err
	}
	if failed = health.NewlyFailed(checks.Before, failed); len(failed) > 0 {
		return fmt.Errorf("does not start with it: %s", strings.Join(failed, ", "))
	}
	if _, err := health.Check(ctx, checks); err != nil {
		return err
	}
	// One that ended well has not failed, and is not up either.
	up, err := e.loaders(ctx, []string{r.Secret}, always)
	if err != nil {
		return err
	}
	for _, u := range r.Units {
		if !slices.Contains(up, u) {
			return fmt.Errorf("%s did not stay up with it", u)
		}
	}
	return nil
}

// undoRotation puts the old value back and restarts what may have loaded the new one.
func (e *Engine) undoRotation(ctx context.Context, r *rotation) error {
	err := retry(ctx, observeTries, func() error { return e.secrets.Show(ctx, r.From, r.From) })
	if err != nil {
		return err
	}
	e.loadAgain(ctx, []string{r.Secret}, always, r.Units...)
	_ = e.update("rotated-back", func(j *journal) { j.Rotation = nil })
	e.deliverSecrets()
	e.pruneSecrets()
	return nil
}

// undone makes the refusal of a rotation that was not proven.
func (e *Engine) undone(err, why error) error {
	if err != nil {
		return protocol.Refuse(protocol.Failed, "the new value was not proven (%v), and the old one can't be put back: %v; restart the agent of %s, which tries again", why, err, e.o.Node)
	}
	return protocol.Refuse(protocol.Failed, "%v; the old value is back", why)
}

// undoLeftRotation takes back what an agent that was ended had begun. After a boot the old value is there already,
// unless the power went at the very end.
func (e *Engine) undoLeftRotation(ctx context.Context) {
	e.mu.Lock()
	r := e.j.Rotation
	e.mu.Unlock()
	if r == nil {
		return
	}
	e.pulse.beat("taking back the new value of secret "+r.Secret, loadTime+slack)
	obs, err := e.observe(ctx)
	live, boots := e.secrets.Standing()
	if err == nil && obs.BootID != r.BootID && live.Number == r.From && boots == r.From {
		_ = e.update("rotated-back", func(j *journal) { j.Rotation = nil })
		return
	}
	if err := e.undoRotation(ctx, r); err != nil {
		e.o.Log.Error("a new value that was not proven can't be taken back", "secret", r.Secret, "error", err)
	}
}

// rotated gives the system that runs the new set in the history: a rotation is no deployment, and what was there before
// that system goes back to what it was proven with.
func (j *journal) rotated(running string, r *rotation) {
	for i, c := range slices.Backward(j.History) {
		if c.Closure != running || c.Secrets != r.From {
			return
		}
		j.History[i].Secrets = r.To
		if c.Before == c.Closure && c.BeforeSecrets == r.From {
			j.History[i].BeforeSecrets = r.To
		}
	}
}
