package command

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/cli/provision"
)

// controllerOf is the machine that becomes the controller: the named one, or one that an ended run chose, or the first where
// the project has no controller; "" for none.
func (a *app) controllerOf(me *identity, o *provisionOptions) (string, error) {
	settings := me.project.Settings
	switch {
	case o.controller != "" && o.controller != noController:
		return o.controller, nil
	case o.controller == noController && len(settings.Controllers) == 0:
		return "", fmt.Errorf("the project has no controller yet: leave out --controller %s, or set one up first (nix-infra enroll NAME --controller --ssh …)", noController)
	case o.controller == noController:
		return "", nil
	}
	for _, name := range o.names {
		j, err := provision.OpenJournal(a.own(journalDir), name)
		if err != nil {
			return "", err
		}
		if j.Controller {
			return name, nil
		}
	}
	if len(settings.Controllers) > 0 {
		return "", nil
	}
	for _, name := range me.project.ControlNodes() {
		if slices.Contains(o.names, name) {
			return name, nil
		}
	}
	return o.names[0], nil
}

// answeredTime is how long a controller that should be there may take to answer.
const answeredTime = 5 * time.Second

// answersAlready tells whether the project has a controller that answers.
func (b *bringIn) answersAlready(ctx context.Context) bool {
	if len(b.e.Controllers) == 0 {
		return false
	}
	ctx, cancel := context.WithTimeout(ctx, answeredTime)
	defer cancel()
	c, err := b.connectAs(ctx, b.e.me)
	if err != nil {
		return false
	}
	c.Close()
	return true
}

// makeController has a machine that runs NixOS be the controller, too.
func (b *bringIn) makeController(ctx context.Context, m *incoming, n *newcomer) error {
	a := m.arrival
	if err := a.Begin(provision.PhaseController, "make it the controller"); err != nil {
		return err
	}
	n.binary = b.o.controllerBinary
	n.step = func(what string) { b.step(m, provision.PhaseController, what) }
	if _, err := n.becomeController(ctx, b.app, b.e, nil); err != nil {
		return a.Fail(ctx, err, nil)
	}
	n.step("wait until it answers")
	if err := b.awaitController(ctx, b.e.me, b.o.wait); err != nil {
		return a.Fail(ctx, fmt.Errorf("it does not answer: %w", err), provision.Log(ctx, n.machine, provision.Controller))
	}
	return nil
}
