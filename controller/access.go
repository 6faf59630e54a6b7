package controller

import (
	"context"
	"errors"
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

// Who may do what is the account JWT's to say: each role's signing key, and whose credentials are void. A new one comes
// from whoever holds the project's keys, goes to etcd, from there to every controller, and to the nodes.

// takeAccount goes by an account JWT that etcd holds or somebody brought, unless this controller knows a newer one. It
// tells whether the broker is its own, and so goes by it too.
func (c *Controller) takeAccount(token string) (embedded bool, err error) {
	c.accounts.Lock()
	defer c.accounts.Unlock()
	if _, err := c.verifier.SetAccount(token); err != nil {
		return false, err
	}
	// Also one that is known: an earlier try may have ended half-way.
	token = c.verifier.Account()
	embedded, err = c.broker.SetAccount(token)
	return embedded, errors.Join(err, c.machine.SaveAccount(token))
}

// startAccount brings the enrolment up to date before the broker is started from it: who was revoked while this
// controller was down must not come in.
func (c *Controller) startAccount(ctx context.Context) error {
	token, err := c.store.Account(ctx)
	if err != nil || token == "" {
		return err
	}
	if _, err := c.verifier.SetAccount(token); err != nil {
		// Whoever writes to etcd can't say who may do what.
		c.log.Error("etcd holds an account JWT that is not this fleet's; it is ignored", "error", err)
		return nil
	}
	c.machine.Answer.Fleet.AccountJWT = c.verifier.Account()
	return c.machine.SaveAccount(c.verifier.Account())
}

// followAccount goes by what the leader writes, whoever leads.
func (c *Controller) followAccount(ctx context.Context) {
	c.store.WatchAccount(ctx, func(token string) {
		if _, err := c.takeAccount(token); err != nil {
			c.log.Error("an account JWT from etcd is not in force here", "error", err)
		}
	})
}

// keepAccount has etcd know what this leader knows: it may have been enrolled with a newer account JWT.
func (t *term) keepAccount(ctx context.Context) error {
	kept, err := t.c.store.Account(ctx)
	if err != nil || kept == t.c.verifier.Account() {
		return err
	}
	if kept != "" {
		if _, err := t.c.takeAccount(kept); err != nil {
			t.log.Error("an account JWT from etcd is not in force here", "error", err)
		}
	}
	if known := t.c.verifier.Account(); kept != known {
		return t.lead.PutAccount(ctx, known)
	}
	return nil
}

// putAccount puts a new account JWT in force: first in etcd, so that no controller can start without it, then here,
// then everywhere. Doing it again with the same one is safe, and tells the nodes again.
func (t *term) putAccount(ctx context.Context, order *protocol.Verified) (any, error) {
	r, err := payload[protocol.AccountUpdate](order)
	if err != nil {
		return nil, err
	}
	t.changing.Lock()
	defer t.changing.Unlock()
	if err := t.c.verifier.Succeeds(r.Account); err != nil {
		return nil, err
	}
	if err := t.lead.PutAccount(ctx, r.Account); err != nil {
		return nil, err
	}
	embedded, err := t.c.takeAccount(r.Account)
	if err != nil {
		return nil, err
	}
	names := t.fleet.names()
	for _, name := range names {
		wanted, _ := t.fleet.wanted(name)
		t.look(name, wanted, true)
	}
	t.log.Info("another account JWT is in force", "by", order.Sender.Name, "nodes", len(names))
	return protocol.AccountReply{Nodes: len(names), External: !embedded}, nil
}

// reaches tells whether somebody may see a deployment: it names a node that they may reach. What is told of it as a whole
// are numbers.
func (f *fleet) reaches(who protocol.Identity, id string) bool {
	if len(who.Targets) == 0 {
		return true
	}
	f.mu.RLock()
	defer f.mu.RUnlock()
	d := f.deployments[id]
	return d != nil && slices.ContainsFunc(d.names, who.Covers)
}
