package command

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// journalDir, beside fleet.json, has what is remembered of machines that are being brought in.
const journalDir = "provision"

// bringIn brings machines into the fleet, many at a time: each one by the phases of provision.Phase.
type bringIn struct {
	*app
	e        *enrolment
	o        *provisionOptions
	provider provision.Provider
	convert  provision.Conversion
	live     *ui.Live // nil with --json
	printing sync.Mutex
	machines []*incoming

	// Where one of them becomes the controller, the others wait for it before they get their agents.
	controller *incoming     // nil: the project has one
	answers    chan struct{} // closed when there is one, or noAnswer says why not
	noAnswer   error

	connecting sync.Once
	fleet      *session
	offline    error // why there is no fleet
}

// incoming is one of the machines.
type incoming struct {
	name    string
	fresh   bool // it was missing before
	server  provision.Server
	arrival *provision.Arrival
	began   time.Time

	phase   provision.Phase // that was shown last
	said    string          // beside it
	already bool            // it was enrolled, and is online
	lasting bool
	err     error
}

func (a *app) newBringIn(me *identity, o *provisionOptions, provider provision.Provider, plan *provision.Plan) (*bringIn, error) {
	convert, err := a.conversion(me.project, o)
	if err != nil {
		return nil, err
	}
	if len(plan.Missing) > 0 && convert.Missing != nil {
		return nil, convert.Missing
	}
	controller, err := a.controllerOf(me, o)
	if err != nil {
		return nil, err
	}
	authority, err := a.authority(me.project, me.fleet)
	if err != nil {
		return nil, err
	}
	b := &bringIn{app: a, e: &enrolment{authority, me}, o: o, provider: provider, convert: convert, answers: make(chan struct{})}
	for _, name := range o.names {
		journal, err := provision.OpenJournal(a.own(journalDir), name)
		if err != nil {
			return nil, err
		}
		m := &incoming{name: name, began: time.Now()}
		m.fresh = slices.ContainsFunc(plan.Missing, func(p provision.PlannedServer) bool { return p.Name == name })
		m.arrival = &provision.Arrival{
			Name: name, Conversion: b.convertTo(name), Journal: journal,
			Step: func(p provision.Phase, what string) { b.step(m, p, what) },
			Log:  func(line string) { b.logged(m, line) },
		}
		b.machines = append(b.machines, m)
		if name == controller {
			b.controller = m
		}
	}
	if b.controller == nil {
		close(b.answers)
		return b, nil
	}
	b.controller.arrival.Journal.Controller = true
	return b, b.controller.arrival.Journal.Save()
}

// convertTo is the conversion of one machine.
func (b *bringIn) convertTo(name string) provision.Conversion {
	c := b.convert
	c.Version = first(b.o.nixosVersion, b.e.me.project.Settings.Node(name).NixOSVersion)
	if c.Missing == nil && c.Version == "" {
		c.Missing = fmt.Errorf("no NixOS version is known for it; give --nixos-version, or set defaults.nixos_version in %s", project.SettingsFile)
	}
	return c
}

// run brings them in, and gives the names of those that are. The error is about the others.
func (b *bringIn) run(ctx context.Context) (in []string, err error) {
	if !b.json {
		b.live = b.out.Live("bringing in " + some(b.o.names))
		defer b.live.Close()
	}
	defer func() {
		if b.fleet != nil {
			b.fleet.Close()
		}
	}()
	began := time.Now()
	if b.controller != nil && b.answersAlready(ctx) {
		b.controller = nil // an earlier run made it, with the same flags
		close(b.answers)
	}
	if b.controller == nil {
		if err := b.passEnrolled(ctx); err != nil {
			return nil, err
		}
	}
	b.create(ctx)
	ways := errgroup.Group{}
	ways.SetLimit(b.o.jobs)
	for _, m := range b.inOrder() {
		ways.Go(func() error {
			switch {
			case m.already: // perhaps since a run that was ended before it could say so
				m.err = m.arrival.Journal.Remove()
			case m.err == nil:
				m.err = b.bring(ctx, m)
			}
			if m == b.controller && m.err != nil {
				b.withoutController(m.err)
			}
			b.settled(ctx, m)
			return nil
		})
	}
	_ = ways.Wait() // how each went is in its incoming
	if b.live != nil {
		b.live.Close()
	}
	return b.tell(ctx, time.Since(began))
}

// inOrder has the controller first: the others wait for it.
func (b *bringIn) inOrder() []*incoming {
	all := slices.Clone(b.machines)
	if i := slices.Index(all, b.controller); i > 0 {
		all = append([]*incoming{all[i]}, slices.Delete(all, i, i+1)...)
	}
	return all
}

// connect connects to the fleet, once for all.
func (b *bringIn) connect(ctx context.Context) (*session, error) {
	b.connecting.Do(func() { b.fleet, b.offline = b.connectAs(ctx, b.e.me) })
	return b.fleet, b.offline
}

// passEnrolled finds those that are in already: what is left for them is the deployment.
func (b *bringIn) passEnrolled(ctx context.Context) error {
	fleet, err := b.connect(ctx)
	if err != nil {
		return fmt.Errorf("%w; to make one of these machines the controller, give --controller NAME", err)
	}
	states, err := fleet.ListNodes(ctx)
	if err != nil {
		return err
	}
	for _, m := range b.machines {
		m.already = slices.ContainsFunc(states, func(n protocol.NodeState) bool { return n.Name == m.name && n.Online })
	}
	return nil
}

// create has the provider make what is missing, and finds how each machine is reached.
func (b *bringIn) create(ctx context.Context) {
	order := b.o.order
	order.Names = nil
	byName := map[string]*incoming{}
	for _, m := range b.machines {
		if !m.already {
			order.Names = append(order.Names, m.name)
			byName[m.name] = m
		}
	}
	if len(order.Names) == 0 {
		return
	}
	var servers []provision.Server
	var err error
	if b.o.create {
		b.forgetPins()
		servers, err = b.provider.Create(ctx, order, func(name, what string) {
			if m := byName[name]; m != nil {
				b.step(m, provision.PhaseCreate, what)
			}
		})
	} else {
		servers, err = b.provider.Servers(ctx, order.Names...)
	}
	for _, s := range servers {
		if m := byName[s.Name]; m != nil {
			m.server = s
			m.arrival.Conversion.Hetzner = s.Provider == "hetzner"
			m.arrival.Fresh = m.fresh || s.Managed
			m.arrival.Ways, m.err = b.waysTo(s, b.o.sshKey, b.e.me.project)
		}
	}
	var each provision.ServerErrors
	errors.As(err, &each)
	for _, m := range byName {
		switch {
		case m.err != nil || m.server.Host != "":
		case each[m.name] != nil:
			m.err = &provision.PhaseError{Phase: provision.PhaseCreate, Err: each[m.name]}
		case err != nil:
			m.err = &provision.PhaseError{Phase: provision.PhaseCreate, Err: err}
		case m.server.Name != "":
			m.err = &provision.PhaseError{Phase: provision.PhaseCreate, Err: errors.New("it has no address yet")}
		default:
			m.err = &provision.PhaseError{Phase: provision.PhaseCreate, Err: fmt.Errorf("%s does not know it; nix-infra provision makes machines", b.provider.Name())}
		}
	}
}

// forgetPins has the host keys forgotten of machines that are missing: those that will be made under their names are others.
func (b *bringIn) forgetPins() {
	for _, m := range b.machines {
		if !m.fresh || m.already { // one that is in was made elsewhere
			continue
		}
		if err := provision.ForgetNode(b.own(knownHostsFile), m.name, ""); err != nil && m.err == nil {
			m.err = err
		}
	}
}

// bring takes one machine through the phases, from its first contact to its first beat.
func (b *bringIn) bring(ctx context.Context, m *incoming) error {
	machine, err := m.arrival.NixOS(ctx)
	if err != nil {
		return err
	}
	defer machine.Close()
	n := &newcomer{name: m.name, machine: machine, host: m.arrival.Ways[0].Host}
	if m == b.controller {
		if err := b.makeController(ctx, m, n); err != nil {
			return err
		}
		close(b.answers)
	}
	return b.makeNode(ctx, m, n)
}

// withoutController tells those who wait for the controller that it is not to be, unless it answered before.
func (b *bringIn) withoutController(why error) {
	select {
	case <-b.answers:
	default:
		b.noAnswer = why
		close(b.answers)
	}
}

func (b *bringIn) makeNode(ctx context.Context, m *incoming, n *newcomer) error {
	a := m.arrival
	if err := a.Begin(provision.PhaseAgent, "wait for the controller"); err != nil {
		return err
	}
	select {
	case <-b.answers:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	if b.noAnswer != nil {
		return a.Fail(ctx, fmt.Errorf("%s did not become the controller", b.controller.name), nil)
	}
	fleet, err := b.connect(ctx)
	if err != nil {
		return a.Fail(ctx, err, nil)
	}
	before, err := known(ctx, fleet, m.name)
	if err != nil {
		return a.Fail(ctx, err, nil)
	}
	n.binary = b.o.agentBinary
	n.step = func(what string) { b.step(m, provision.PhaseAgent, what) }
	if m.lasting, err = n.becomeNode(ctx, b.e, fleet, before, b.o.tags); err == nil {
		err = provision.PinNode(b.own(knownHostsFile), m.name, n.machine.HostKey)
	}
	if err != nil {
		return a.Fail(ctx, err, nil)
	}
	if err := a.Begin(provision.PhaseHeartbeat, "wait for its first sign of life"); err != nil {
		return err
	}
	if err := b.await(ctx, b.o.wait, func(ctx context.Context) bool { return heard(ctx, fleet, m.name, before) }); err != nil {
		return a.Fail(ctx, fmt.Errorf("nothing was heard of it in %s", b.o.wait), provision.Log(ctx, n.machine, provision.Agent))
	}
	return a.Journal.Remove()
}
