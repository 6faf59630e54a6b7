package reconcile

import (
	"context"
	"fmt"

	"github.com/nix-infra/nix-infra/protocol"
)

// makeDefault is mode boot's activation: the closure becomes what boots next, and is proven then.
func (e *Engine) makeDefault(ctx context.Context, a *attempt) {
	obs, err := e.observe(ctx)
	if err == nil && obs.Profile != a.New {
		err = e.o.Host.SetProfile(ctx, a.New)
	}
	if err == nil {
		_ = e.note("profile", func() {})
		err = e.runBoot(ctx, a.bootJob())
	}
	if err == nil {
		err = e.bootFinds(ctx, a.Secrets)
	}
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		e.toRollback(ctx, a, err.Error(), nil)
		return
	}
	e.disarmQuietly(ctx, a) // only clears the unit away
	e.end(a, protocol.Staged, "", obs.Generation, func(*journal) { a.BootSet = true })
}

// resumeBoot brings an attempt of mode boot or reboot to a phase that can be driven on. The package comment has
// the table.
func (e *Engine) resumeBoot(ctx context.Context, a *attempt, obs Observation) {
	if obs.BootID == a.BootID {
		return
	}
	switch a.Phase {
	case protocol.Activating:
		// The power went while the boot default was being written: it may be either. Written again, it is
		// the new one for certain; what was booted meanwhile does not matter.
		_ = e.note("", func() { a.BootID = obs.BootID })
	case protocol.Staged, protocol.Rebooting, protocol.Checking:
		if obs.Running != a.New {
			e.toRollback(ctx, a, fmt.Sprintf("the machine booted %s instead", obs.Running), nil)
			return
		}
		if a.Phase != protocol.Checking {
			_ = e.move(a, protocol.Checking, func() { e.setDeadline(a, obs) })
			return
		}
		_ = e.note("", func() { e.setDeadline(a, obs) })
	}
}

// unstage takes a staged system back before a newer manifest goes on: the boot default never names a
// system that nobody waits for. A reboot is what it waits for, and takes it over. false: ctx ended first.
func (e *Engine) unstage(ctx context.Context, o *order) bool {
	e.mu.Lock()
	a := e.j.Attempt
	e.mu.Unlock()
	if a == nil || a.Phase != protocol.Staged || o.m.Mode == protocol.Reboot {
		return true
	}
	e.spare(a)
	e.toRollback(ctx, a, superseded{o.m.Deployment}.Error()+" before it was booted", nil)
	e.drive(ctx, a, nil)
	return ctx.Err() == nil
}
