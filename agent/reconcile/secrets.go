package reconcile

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/agent/credential"
	"github.com/nix-infra/nix-infra/agent/health"
	"github.com/nix-infra/nix-infra/protocol"
)

// loadTime is how long services may take to be up again that were restarted on a way back.
const loadTime = 2 * time.Minute

// asked is the set of secrets that a manifest asks for, and those in place that it is held against.
type asked struct {
	set   credential.Set // not staged yet
	live  credential.Set
	boots int  // the set that a boot finds
	same  bool // set has what live has
}

func (e *Engine) askSecrets(m *protocol.Manifest) (asked, error) {
	var a asked
	var err error
	a.live, a.boots = e.secrets.Standing()
	if a.set, err = e.secrets.Asked(m.Secrets, a.live); err != nil {
		return a, err
	}
	_, a.same = e.secrets.Changed(a.live, a.set)
	_, err = e.secrets.Netrc(m.Secrets)
	return a, err
}

// stageSecrets makes the set and says which one it is: the one in place, where that has the same.
func (e *Engine) stageSecrets(ctx context.Context, a asked) (int, error) {
	if a.same {
		return a.live.Number, nil
	}
	set, err := e.secrets.Stage(ctx, a.set, a.live)
	return set.Number, err
}

// provenWith is the set that a system was last proven with, 0 where none is known any more.
func (e *Engine) provenWith(s system) int {
	if s.secrets == 0 {
		e.mu.Lock()
		c, _ := e.j.newest(func(c Confirmation) bool { return c.Closure == s.closure && c.Secrets != 0 })
		e.mu.Unlock()
		s.secrets = c.Secrets
	}
	if _, err := e.secrets.Get(s.secrets); err != nil {
		return 0
	}
	return s.secrets
}

// different says which secrets are others in a set, and which units load those.
func (e *Engine) different(ctx context.Context, live credential.Set, set int) (changed, units []string, err error) {
	if set == live.Number {
		return nil, nil, nil
	}
	other, err := e.secrets.Get(set)
	if err != nil {
		return nil, nil, fmt.Errorf("the system's secrets can't be read: %w", err)
	}
	changed, _ = e.secrets.Changed(live, other)
	units, err = e.loaders(ctx, changed, always)
	return changed, units, err
}

// always wants units whenever they were started.
func always(time.Duration) bool { return true }

// loaders are the units that load one of the secrets, of those that were started at a time that is wanted: they run, or
// have failed, perhaps for want of the right one.
func (e *Engine) loaders(ctx context.Context, names []string, wanted func(since time.Duration) bool) ([]string, error) {
	files := make([]string, 0, len(names))
	for _, name := range names {
		files = append(files, e.secrets.File(name))
	}
	if len(files) == 0 {
		return nil, nil
	}
	all, err := e.o.Host.Loaders(ctx, files)
	if err != nil {
		return nil, fmt.Errorf("which units load the secrets can't be told: %w", err)
	}
	var units []string
	for _, l := range all {
		if wanted(l.Since) {
			units = append(units, l.Unit)
		}
	}
	slices.Sort(units)
	return units, nil
}

// showSecrets puts sets in place, and says which secrets are others to see than before.
func (e *Engine) showSecrets(ctx context.Context, live, boots int) (changed []string, err error) {
	before, _ := e.secrets.Standing()
	if err := e.secrets.Show(ctx, live, boots); err != nil {
		return nil, err
	}
	now, _ := e.secrets.Standing()
	changed, _ = e.secrets.Changed(before, now)
	return changed, nil
}

// readySecrets sees to it that the old secrets are what can be gone back to by taking others away: what was only tested
// stays from here on, too, until the attempt has ended.
func (e *Engine) readySecrets(ctx context.Context, a *attempt) error {
	if a.Secrets == a.OldSecrets || a.OldSecrets == a.BootSecrets {
		return nil
	}
	return e.secrets.Show(ctx, a.OldSecrets, a.OldSecrets)
}

func (e *Engine) unreadySecrets(ctx context.Context, a *attempt) {
	if err := e.secretsBefore(ctx, a); err != nil {
		e.o.Log.Error("the secrets that a boot finds can't be set back", "error", err)
	}
}

// newSecrets lets the new system's secrets be seen, until the next boot.
func (e *Engine) newSecrets(ctx context.Context, a *attempt) error {
	if a.Secrets == a.OldSecrets {
		return nil
	}
	if err := e.secrets.Show(ctx, a.Secrets, a.OldSecrets); err != nil {
		return err
	}
	obs, err := e.observe(ctx)
	if err != nil {
		return err
	}
	return e.note("secrets", func() { a.Shown = max(1, obs.Uptime.Milliseconds()) })
}

// saw wants units that may have loaded the new secrets: started in the boot in which those were in place, while they were,
// or at any time of another boot, until the observation.
func (a *attempt) saw(obs Observation) func(since time.Duration) bool {
	return func(since time.Duration) bool {
		return since <= obs.Uptime && (obs.BootID != a.BootID || since.Milliseconds() >= a.Shown)
	}
}

// loadSecrets restarts what loads a secret that changed and was started before, so that the activation was no reason
// to start it again.
func (e *Engine) loadSecrets(ctx context.Context, a *attempt) (failed []string, err error) {
	if a.Secrets == a.OldSecrets {
		return nil, nil
	}
	units, err := e.loaders(ctx, a.Changed, func(since time.Duration) bool { return since.Milliseconds() <= a.Shown })
	if err != nil || len(units) == 0 {
		return nil, err
	}
	e.o.Log.Info("restarting what loads other secrets now", "units", units)
	failed, err = e.o.Host.Restart(ctx, units)
	return health.NewlyFailed(a.Failed, failed), err
}

// hasSecrets tells whether the new system's secrets are in place.
func (e *Engine) hasSecrets(a *attempt) bool {
	live, _ := e.secrets.Standing()
	return a.Secrets == 0 || a.Secrets == live.Number
}

// keepSecrets makes the proven system's secrets those that a boot finds.
func (e *Engine) keepSecrets(ctx context.Context, a *attempt) error {
	if a.Secrets == 0 {
		return nil
	}
	boots := a.Secrets
	if a.Mode == protocol.Test {
		boots = a.BootSecrets
	}
	changed, err := e.showSecrets(ctx, a.Secrets, boots)
	if err != nil {
		return err
	}
	// They are in place already, but for a loss of power since the boot default was set.
	e.loadAgain(ctx, changed, always)
	if a.Secrets != a.OldSecrets {
		_ = e.note("secrets-kept", func() {})
	}
	return nil
}

// oldSecrets takes the new ones away, and says which those are.
func (e *Engine) oldSecrets(ctx context.Context, a *attempt) (changed []string, err error) {
	if a.Secrets == a.OldSecrets {
		return nil, nil
	}
	return e.showSecrets(ctx, a.OldSecrets, a.OldSecrets)
}

// secretsBefore puts in place what was so before the attempt.
func (e *Engine) secretsBefore(ctx context.Context, a *attempt) error {
	if a.Secrets == 0 {
		return nil
	}
	return e.secrets.Show(ctx, a.OldSecrets, a.BootSecrets)
}

// bootFinds lets the next boot find a set.
func (e *Engine) bootFinds(ctx context.Context, set int) error {
	if set == 0 {
		return nil
	}
	live, _ := e.secrets.Standing()
	return e.secrets.Show(ctx, live.Number, set)
}

// bootSecretsBefore is secretsBefore for what is proven after a boot: where that boot has been, what would have booted
// is what runs now, or is about to.
func (e *Engine) bootSecretsBefore(ctx context.Context, a *attempt) error {
	if a.Secrets == 0 {
		return nil
	}
	wanted := a.BootSecrets
	if live, _ := e.secrets.Standing(); live.Number == a.OldSecrets {
		wanted = a.OldSecrets
	}
	changed, err := e.showSecrets(ctx, wanted, a.BootSecrets)
	if err == nil {
		e.loadAgain(ctx, changed, always)
	}
	return err
}

// loadAgain restarts what loads the secrets and was started at a time that is wanted, at best effort: the system is one
// that was proven. What is named besides is restarted in any case.
func (e *Engine) loadAgain(ctx context.Context, names []string, wanted func(since time.Duration) bool, besides ...string) {
	if len(names) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, loadTime)
	defer cancel()
	units, err := e.loaders(ctx, names, wanted)
	units = slices.Compact(slices.Sorted(slices.Values(append(units, besides...))))
	var failed []string
	if err == nil {
		failed, err = e.o.Host.Restart(ctx, units)
	}
	if err != nil || len(failed) > 0 {
		e.o.Log.Error("what loads the secrets that are in place again could not be restarted", "failed", failed, "error", err)
	}
}

// deliverSecrets brings builds the secrets in clear that belong to what is in place.
func (e *Engine) deliverSecrets() {
	live, _ := e.secrets.Standing()
	if err := e.secrets.Deliver(live); err != nil {
		e.o.Log.Error("the secrets for builds can't be brought", "error", err)
	}
}

// pruneSecrets removes the sets that no system is gone back to with.
func (e *Engine) pruneSecrets() {
	e.mu.Lock()
	var keep []int
	for _, c := range e.j.History {
		keep = append(keep, c.Secrets, c.BeforeSecrets)
	}
	for a := e.j.Attempt; a != nil; a = a.Staged {
		keep = append(keep, a.Secrets, a.OldSecrets, a.BootSecrets)
	}
	if r := e.j.Rotation; r != nil {
		keep = append(keep, r.From, r.To)
	}
	e.mu.Unlock()
	if err := e.secrets.Prune(keep); err != nil {
		e.o.Log.Warn("sets of secrets that nobody needs can't be removed", "error", err)
	}
}

// Secrets are what the node holds, by name, without the values.
func (e *Engine) Secrets() []protocol.HeldSecret {
	live, _ := e.secrets.Standing()
	held := []protocol.HeldSecret{}
	for _, c := range live.Secrets {
		if !c.Found {
			held = append(held, protocol.HeldSecret{Name: c.Name, PreBuild: c.PreBuild, Written: c.Written})
		}
	}
	return held
}
