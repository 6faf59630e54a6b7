package command

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// accessFile, beside fleet.json, is the project's record of who was given access, and whose was taken back. It
// holds no secrets.
const accessFile = "access.json"

// grant is credentials that were handed out, or, where they were revoked, also a machine's.
type grant struct {
	Name      string        `json:"name"`
	Role      protocol.Role `json:"role"`
	Key       string        `json:"key"`
	Targets   []string      `json:"targets,omitempty"` // none: all nodes
	Expires   *time.Time    `json:"expires,omitempty"` // nil: never
	By        string        `json:"by,omitempty"`
	At        time.Time     `json:"at,omitzero"` // when it was made; unknown of machines
	Revoked   *time.Time    `json:"revoked,omitempty"`
	RevokedBy string        `json:"revoked_by,omitempty"`
}

// state of a grant in a word: valid, expired or revoked.
func (g *grant) state(now time.Time) string {
	switch {
	case g.Revoked != nil:
		return "revoked"
	case g.Expires != nil && now.After(*g.Expires):
		return "expired"
	}
	return "valid"
}

// accessRecord is access.json, the oldest grant first.
type accessRecord struct {
	Version int     `json:"v"`
	Grants  []grant `json:"grants"`
}

func (a *app) readAccess() (*accessRecord, error) {
	r := &accessRecord{Version: protocol.Version}
	return r, a.readRecord(accessFile, r, &r.Version)
}

// changeAccess changes the record, with no other run of this program in between.
func (a *app) changeAccess(change func(*accessRecord) error) error {
	return a.alone(func() error {
		r, err := a.readAccess()
		if err != nil {
			return err
		}
		if err := change(r); err != nil {
			return err
		}
		return a.writeRecord(accessFile, r)
	})
}

// forgetGrant takes a grant off the record whose credentials nobody got.
func (a *app) forgetGrant(key string) error {
	return a.changeAccess(func(r *accessRecord) error {
		r.Grants = slices.DeleteFunc(r.Grants, func(g grant) bool { return g.Key == key })
		return nil
	})
}

// find is the grant of that name that was not revoked, nil if there is none.
func (r *accessRecord) find(name string) *grant {
	for i := range r.Grants {
		if g := &r.Grants[i]; g.Name == name && g.Revoked == nil {
			return g
		}
	}
	return nil
}

// revocations are the keys of all that were ever revoked, with the time up to which their JWTs are void.
func (r *accessRecord) revocations() map[string]time.Time {
	void := map[string]time.Time{}
	for _, g := range r.Grants {
		if g.Revoked != nil {
			void[g.Key] = *g.Revoked
		}
	}
	return void
}

// note puts a grant on the record, unless its key is there and was not revoked.
func (r *accessRecord) note(named grant) *grant {
	i := slices.IndexFunc(r.Grants, func(g grant) bool { return g.Key == named.Key && g.Revoked == nil })
	if i < 0 {
		i, r.Grants = len(r.Grants), append(r.Grants, named)
	}
	return &r.Grants[i]
}

// revoke takes back what the keys of grants may do: in the project first, whose next account JWT would otherwise know
// nothing of it, then in the fleet. Where one was revoked before, the fleet is told again.
func (a *app) revoke(ctx context.Context, e *enrolment, grants ...grant) error {
	err := a.changeAccess(func(r *accessRecord) error {
		now := time.Now().UTC().Truncate(time.Second)
		for _, named := range grants {
			g := r.note(named)
			g.Revoked, g.RevokedBy = &now, e.me.Name
		}
		return nil
	})
	if err != nil {
		return err
	}
	return a.putInForce(ctx, e)
}

// putInForce makes an account JWT of what the project knows, and has the fleet go by it.
func (a *app) putInForce(ctx context.Context, e *enrolment) error {
	if err := a.republish(ctx, e); err != nil {
		return err
	}
	if err := a.sendAccount(ctx, e); err != nil {
		return &outcome{Unanswered, fmt.Errorf("it is revoked in the project, and the fleet does not know it yet: %w; run the same command again when the controller can be reached", err)}
	}
	return nil
}

// sendAccount has the fleet go by the account JWT of the project.
func (a *app) sendAccount(ctx context.Context, e *enrolment) error {
	s, err := a.connectAs(ctx, e.me)
	if err != nil {
		return err
	}
	defer s.Close()
	var reply protocol.AccountReply
	for {
		err := s.Controller(ctx, protocol.PutAccount, protocol.AccountUpdate{Account: e.Public.AccountJWT}, &reply)
		if err == nil {
			break
		}
		// Another run may have made and sent a newer one meanwhile, which has all of this one.
		newest, readErr := a.readFleet()
		if !errors.Is(err, &protocol.Refusal{Code: protocol.Conflict}) || readErr != nil || newest.Public.AccountJWT == e.Public.AccountJWT {
			return err
		}
		e.Public, e.me.fleet.Public = newest.Public, newest.Public
	}
	if !reply.External {
		return nil
	}
	// The broker is not the controller's own, which can't tell it. Whoever has the keys can, if its resolver takes it.
	system, err := e.Keys.SystemUser(time.Now())
	if err != nil {
		return err
	}
	err = client.PushAccount(ctx, client.Config{URLs: e.me.project.Settings.Controllers, CA: []byte(e.me.fleet.CA), Signer: system}, e.Public.AccountJWT)
	if err != nil {
		a.note("the broker is not the controller's own, and was not told (%v): nodes and controllers refuse what is revoked, but it can still connect, until the broker has the new account_jwt of %s (such as by resolver_preload and a reload)", err, a.own(fleetFile))
	}
	return nil
}

// republish makes a new account JWT, unless the one there is says the same, and keeps it in fleet.json.
func (a *app) republish(ctx context.Context, e *enrolment) error {
	return a.alone(func() error {
		newest, err := a.readFleet()
		if err != nil {
			return err
		}
		r, err := a.readAccess()
		if err != nil {
			return err
		}
		e.Public = newest.Public // another run may have made one since this one began
		err = a.republishAlone(ctx, e.Authority, r)
		e.me.fleet.Public = e.Public
		return err
	})
}

func (a *app) republishAlone(ctx context.Context, authority *provision.Authority, r *accessRecord) error {
	known, err := protocol.Revocations(authority.Public.AccountJWT)
	if err != nil {
		return err
	}
	void := maps.Clone(known)
	for key, at := range r.revocations() {
		if at.After(void[key]) {
			void[key] = at
		}
	}
	complete, err := authority.Keys.Published(authority.Public.AccountJWT)
	if err != nil || complete && maps.Equal(void, known) {
		return err
	}
	// The newest is told by its second. A clock that went back would make one that nobody takes.
	v, err := protocol.NewVerifier(authority.Public.Operator, authority.Public.AccountJWT)
	if err != nil {
		return err
	}
	next := time.Unix(v.Issued()+1, 0)
	if wait := time.Until(next); wait > time.Minute {
		return fmt.Errorf("the account JWT in %s was made at %s, which is ahead of this machine's clock; check it", a.own(fleetFile), next.UTC().Format(time.RFC3339))
	} else if wait > 0 {
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	public, err := authority.Keys.Publish(void)
	if err != nil {
		return err
	}
	authority.Public = *public
	return a.writeFleet(public, authority.CA)
}

// writeFleet writes fleet.json.
func (a *app) writeFleet(public *protocol.Public, ca *provision.CA) error {
	data, err := json.MarshalIndent(fleet{Version: protocol.Version, Public: *public, CA: string(ca.Public())}, "", "  ")
	if err != nil {
		return err
	}
	return atomicfile.Write(a.own(fleetFile), append(data, '\n'), 0o644)
}

// ends says when credentials end.
func ends(expires *time.Time) string {
	if expires == nil {
		return "never"
	}
	return expires.UTC().Format(time.RFC3339)
}

// reaches says which nodes a grant reaches.
func reaches(targets []string) string { return first(strings.Join(targets, " "), "all") }
