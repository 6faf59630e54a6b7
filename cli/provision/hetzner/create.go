package hetzner

import (
	"context"
	"fmt"
	"maps"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud"

	"github.com/nix-infra/nix-infra/cli/provision"
)

// makingTime bounds the making of servers, which takes seconds as a rule.
const makingTime = 15 * time.Minute

// patience is how many looks in a row at a server that does not run, and with which nothing is being done, are enough: about
// a minute.
const patience = 16

// Create makes what is missing. The servers are ordered one after the other, and waited for all together.
func (h *Hetzner) Create(ctx context.Context, o provision.Order, step func(server, what string)) ([]provision.Server, error) {
	ctx, cancel := context.WithTimeout(ctx, makingTime)
	defer cancel()
	r, err := h.resolve(ctx, o)
	if err != nil {
		return nil, err
	}
	for _, name := range o.Names {
		switch s := r.existing[name]; {
		case s == nil || h.server(s).Managed:
		case s.Status == hcloud.ServerStatusOff:
			return nil, fmt.Errorf("hetzner: %s exists, was not made by nix-infra, and is off; start it, or choose another name", name)
		default:
			step(name, "it exists, and was not made by nix-infra for this fleet: taken as it is")
		}
	}
	m := &making{Hetzner: h, step: step, failed: provision.ServerErrors{}, owner: map[int64]string{}}
	if len(r.missing) > 0 {
		if err := m.order(ctx, r); err != nil {
			return nil, err
		}
	}
	for name, s := range r.existing {
		if s.Status != hcloud.ServerStatusRunning {
			actions, err := h.api.Server.Action.AllFor(ctx, s, hcloud.ActionListOpts{Status: []hcloud.ActionStatus{hcloud.ActionStatusRunning}})
			if err != nil {
				return nil, explain("what is done with "+name, err)
			}
			m.await(name, actions...)
		}
	}
	return m.finish(ctx, o.Names)
}

// making is servers that are being made.
type making struct {
	*Hetzner
	step    func(server, what string)
	actions []*hcloud.Action
	owner   map[int64]string // the server that an action is about
	failed  provision.ServerErrors
}

func (m *making) await(name string, actions ...*hcloud.Action) {
	for _, a := range actions {
		if a != nil {
			m.actions = append(m.actions, a)
			m.owner[a.ID] = name
		}
	}
}

// order orders the servers that are missing, and what they need. Each has its labels from its first moment on.
func (m *making) order(ctx context.Context, r *order) error {
	key, _, err := m.ensureKey(ctx, r.SSHKey)
	if err != nil {
		return err
	}
	if r.PlacementGroup != "" && r.group == nil {
		if r.group, err = m.makeGroup(ctx, r.PlacementGroup); err != nil {
			return err
		}
	}
	opts := hcloud.ServerCreateOpts{
		ServerType: r.kind, Location: r.location, Image: r.image, PlacementGroup: r.group, Networks: r.networks,
		SSHKeys: []*hcloud.SSHKey{key}, PublicNet: &hcloud.ServerCreatePublicNet{EnableIPv4: true, EnableIPv6: true},
	}
	for _, f := range r.firewalls {
		opts.Firewalls = append(opts.Firewalls, &hcloud.ServerCreateFirewall{Firewall: *f})
	}
	for _, name := range r.missing {
		opts.Name = name
		opts.Labels = maps.Clone(r.Labels)
		if opts.Labels == nil {
			opts.Labels = map[string]string{}
		}
		opts.Labels[FleetLabel], opts.Labels[NodeLabel] = m.fleet, name
		m.step(name, "ordering "+r.kind.Name+" at "+r.location.Name)
		made, _, err := m.api.Server.Create(ctx, opts)
		switch {
		case err == nil:
			m.await(name, append(made.NextActions, made.Action)...)
		case ctx.Err() != nil:
			return ctx.Err()
		case hcloud.IsError(err, hcloud.ErrorCodeUniquenessError):
			m.step(name, "ordered before") // by a request whose answer was lost; finish finds out whose it is
		default:
			m.failed[name] = explain(name, err)
		}
	}
	return nil
}

func (m *making) makeGroup(ctx context.Context, name string) (*hcloud.PlacementGroup, error) {
	made, _, err := m.api.PlacementGroup.Create(ctx, hcloud.PlacementGroupCreateOpts{
		Name: name, Type: hcloud.PlacementGroupTypeSpread, Labels: map[string]string{FleetLabel: m.fleet},
	})
	if hcloud.IsError(err, hcloud.ErrorCodeUniquenessError) {
		if there, _, lookErr := m.api.PlacementGroup.GetByName(ctx, name); lookErr == nil && there != nil {
			return there, nil
		}
	}
	if err == nil {
		err = m.api.Action.WaitFor(ctx, made.Action)
	}
	if err != nil {
		return nil, explain("make placement group "+name, err)
	}
	return made.PlacementGroup, nil
}

// finish waits until all servers run: first for what is under way, then it looks at them, and starts those that are off,
// as an earlier run may have left them.
func (m *making) finish(ctx context.Context, names []string) ([]provision.Server, error) {
	for idle := 0; ; idle++ {
		if len(m.actions) > 0 {
			idle = 0
		}
		if err := m.wait(ctx); err != nil {
			return nil, err
		}
		there, err := m.look(ctx)
		if err != nil {
			return nil, err
		}
		var servers []provision.Server
		pending := false
		for _, name := range names {
			s := there[name]
			switch {
			case m.failed[name] != nil:
			case s == nil:
				m.failed[name] = fmt.Errorf("hetzner: %s is gone while it was being made; run this again", name)
			case m.foreign(s) != nil:
				m.failed[name] = m.foreign(s)
			case s.Status == hcloud.ServerStatusRunning:
				servers = append(servers, m.server(s))
			case s.Status == hcloud.ServerStatusOff:
				action, _, err := m.api.Server.Poweron(ctx, s)
				if err != nil && !hcloud.IsError(err, hcloud.ErrorCodeLocked) { // then somebody is about it
					m.failed[name] = explain("start "+name, err)
					continue
				}
				m.step(name, "starting")
				m.await(name, action)
				pending = true
			case idle == patience:
				m.failed[name] = fmt.Errorf("hetzner: %s is %q, and nothing is being done with it; delete it with nix-infra destroy %s, and run this again", name, s.Status, name)
			default:
				m.step(name, string(s.Status))
				pending = true
			}
		}
		switch {
		case !pending && len(m.failed) > 0:
			return servers, m.failed
		case !pending:
			return servers, nil
		}
		if len(m.actions) == 0 {
			select {
			case <-ctx.Done():
				return nil, fmt.Errorf("hetzner: waiting for the servers to run: %w", ctx.Err())
			case <-time.After(m.pace(idle)):
			}
		}
	}
}

// wait waits for all actions, whether they succeed or not.
func (m *making) wait(ctx context.Context) error {
	err := m.api.Action.WaitForFunc(ctx, func(a *hcloud.Action) error {
		name := m.owner[a.ID]
		switch {
		case a.Status == hcloud.ActionStatusError && m.failed[name] == nil: // what comes after an action that failed fails, too
			m.failed[name] = fmt.Errorf("hetzner: %s: %s failed: %w; delete it with nix-infra destroy %s, and run this again", name, a.Command, a.Error(), name)
		case a.Status == hcloud.ActionStatusRunning:
			m.step(name, fmt.Sprintf("%s %d%%", a.Command, a.Progress))
		}
		return nil
	}, m.actions...)
	if err != nil {
		return explain("wait for the servers", err)
	}
	m.actions = nil
	return nil
}

func (m *making) look(ctx context.Context) (map[string]*hcloud.Server, error) {
	all, err := m.api.Server.All(ctx)
	if err != nil {
		return nil, explain("list servers", err)
	}
	there := map[string]*hcloud.Server{}
	for _, s := range all {
		there[s.Name] = s
	}
	return there, nil
}
