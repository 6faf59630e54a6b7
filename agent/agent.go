// Package agent is nix-infra-agent: it brings its machine to the state that a signed manifest
// describes, answers signed questions, and tells the controllers how the machine is.
//
// Start with Run, which puts the parts together: link (the connection), reconcile (deploying),
// heartbeat (telling), query (answering), run (running what somebody asked for), audit (the record), local (root on the
// machine itself). requests.go is the table of what a node can be asked, questions.go has what viewers ask, commands.go
// what can be run, secrets.go gives a secret another value, generations.go answers what is about the systems that it had, rekey.go gives the node other keys, enrol.go and, by a token, join.go are how a machine becomes a node.
//
// # The service
//
// Many agents can run in one process, each with its own Options; nothing here is global. As a service,
// run by nix-infra-agent/main.go, it needs these settings, which the NixOS module and the bootstrap write:
//
//	Type=notify              READY=1 comes as soon as the journal is read: no network, no end of a deploy is waited for
//	WatchdogSec=60           WATCHDOG=1 comes while engine, link and heartbeat are found alive
//	Restart=always           with RestartSec=1 and, in [Unit], StartLimitIntervalSec=0: it is never given up
//	KillMode=mixed           a build dies with the agent, and is resumed; activation and revert are units of their own
//	TimeoutStopSec=10        it ends within 3 s of SIGTERM, an attempt being resumed by the next one
//	OOMScoreAdjust=-500      whatever fills the memory is not mended by killing the one that can roll it back
//	LimitNOFILE=65536        builds open many files
//
// and, in [Unit], After=dbus.service nix-daemon.socket (never network-online.target: a node without a
// network must still be able to roll back) and X-RestartIfChanged as the NixOS default has it.
package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats.go"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/agent/audit"
	"github.com/nix-infra/nix-infra/agent/facts"
	"github.com/nix-infra/nix-infra/agent/health"
	"github.com/nix-infra/nix-infra/agent/heartbeat"
	"github.com/nix-infra/nix-infra/agent/link"
	"github.com/nix-infra/nix-infra/agent/local"
	"github.com/nix-infra/nix-infra/agent/query"
	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/agent/run"
	"github.com/nix-infra/nix-infra/agent/tunnel"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// DefaultDir is where an agent keeps its identity and its state.
const DefaultDir = "/var/lib/nix-infra-agent"

// Below the agent's folder, beside the identity's files.
const (
	deployDir = "deploy" // reconcile's
	seenFile  = "seen.log"
	lockFile  = "lock"
)

const (
	queuedRequests = 256
	stopWithin     = 3 * time.Second
	lockWithin     = 2 * time.Second
	clearWithin    = 20 * time.Second
)

// Options are an agent's surroundings. Only Dir and Log are needed.
type Options struct {
	Dir string // of a machine that is enrolled
	Log *slog.Logger

	Interval time.Duration // between beats; 0: heartbeat.Interval
	Journal  audit.Journal // where audit records are shown on the node; nil: Log
	Notify   func(string)  // tells the service manager, in sd_notify's words; may be nil
	Watchdog time.Duration // in which it wants WATCHDOG=1; 0: it doesn't

	Settle func() // called when a deploy or, with Notify, a time of questions is over, such as to give memory back; may be nil

	Host    reconcile.Host           // nil: this machine
	Runner  run.Host                 // nil: this machine
	System  string                   // whose policy counts: a store path, or a link to one; "": the one that runs
	Facts   heartbeat.Source         // nil: this machine
	Step    func(string)             // passed to reconcile; may be nil
	Deploy  func(*reconcile.Options) // changes what reconcile works with, such as its folders; may be nil
	Backoff link.Backoff             // zero: link.DefaultBackoff
}

// agent is the parts that Run puts together.
type agent struct {
	o         Options
	machine   *machine.Machine
	verifier  *protocol.Verifier
	seen      *query.Seen
	audit     *audit.Log
	link      *link.Link
	heart     *heartbeat.Heart
	host      reconcile.Host
	etc       string                                // the node's source tree
	factsFile func(context.Context) ([]byte, error) // makes protocol.FactsFile; nil: there is none
	engine    *reconcile.Engine
	runner    run.Host
	system    string // whose policy counts
	server    *query.Server
	tunnels   *tunnel.Server
	questions chan *nats.Msg
	units     *heartbeat.Units // nil where Facts are given
	leave     func()           // ends the agent
	rekeying  sync.Mutex
	saving    sync.Mutex // of the account JWT

	worked atomic.Bool // a deploy ended

	mu     sync.Mutex
	issued accountStamp

	telling sync.Mutex
	status  string // last told to the service manager
}

// Run is an agent until ctx ends, or the node's keys were replaced: the next one has those. A machine that is not enrolled is machine.ErrNotEnrolled.
func Run(ctx context.Context, o Options) error {
	dir, err := filepath.Abs(o.Dir)
	if err != nil {
		return err
	}
	o.Dir = dir
	if _, err := Home(o.Dir).Open(); err != nil {
		return explain(err, o.Dir)
	}
	release, err := lock(filepath.Join(o.Dir, lockFile))
	if err != nil {
		return err
	}
	defer release()
	m, err := Home(o.Dir).Resume() // who had the folder until now may have given it other keys
	if err != nil {
		return err
	}
	a := &agent{o: o, machine: m}
	if err := a.open(); err != nil {
		return err
	}
	return a.run(ctx)
}

// open makes the parts and connects them to each other; nothing runs yet.
func (a *agent) open() error {
	fleet := a.machine.Answer.Fleet
	var err error
	if a.verifier, err = protocol.NewVerifier(fleet.Operator, fleet.AccountJWT); err != nil {
		return fmt.Errorf("the enrolment in %s: %w", a.o.Dir, err)
	}
	requests := make(chan *nats.Msg, queuedRequests)
	a.link = link.New(link.Options{Machine: a.machine, Log: a.o.Log.With("part", "link"), Backoff: a.o.Backoff, Requests: requests,
		Tunnels: func(m *nats.Msg) { a.tunnels.Route(m) }, Look: func(l protocol.Look) { a.engine.Look(l) }, Account: a.takeAccount, Connected: a.connected})
	if a.audit, err = audit.Open(audit.Options{Dir: a.o.Dir, Node: a.machine.Name, Log: a.o.Log.With("part", "audit"),
		Stream: a.link.Audit, Journal: a.o.Journal}); err != nil {
		return err
	}
	if a.seen, err = query.OpenSeen(filepath.Join(a.o.Dir, seenFile), 0, time.Now); err != nil {
		return err
	}
	a.tunnels = a.openTunnels()
	source := a.o.Facts
	if source == nil {
		a.units = heartbeat.NewUnits(a.o.Log.With("part", "units"), func() { a.heart.Changed() })
		source = &heartbeat.Host{Units: a.units, Degraded: a.degraded}
	}
	a.heart = heartbeat.New(heartbeat.Options{Interval: a.o.Interval, Source: source, Complete: a.complete, Send: a.link.Beat, Log: a.o.Log.With("part", "heartbeat")})
	if err := a.openEngine(); err != nil {
		return err
	}
	if a.system = a.o.System; a.system == "" {
		a.system = runningSystem
	}
	if a.runner = a.o.Runner; a.runner == nil {
		a.runner = &run.Systemd{Dir: RunDir(a.o.Dir), Hidden: []string{a.o.Dir}, Log: a.o.Log.With("part", "run")}
	}
	a.server = a.answers()
	a.questions = requests
	return nil
}

func (a *agent) openEngine() error {
	a.host = a.o.Host
	log := a.o.Log.With("part", "deploy")
	if a.host == nil {
		var err error
		if a.host, err = reconcile.NewHost(log); err != nil {
			return err
		}
	}
	o := reconcile.Options{Dir: filepath.Join(a.o.Dir, deployDir), Node: a.machine.Name, Verifier: a.verifier, Key: a.machine.XKey, Next: a.machine.NextXKey, Etc: reconcile.DefaultEtc,
		Upstream: upstream{a.link, a.heart}, Host: a.host, Log: log, Changed: a.changed, Step: a.o.Step, Account: func(string) { a.saveAccount() }, Audit: a.record, Settle: a.settle}
	if a.o.Host == nil {
		own := &facts.Source{Node: a.machine.Name, Dir: a.o.Dir, Controller: facts.DefaultController}
		o.Facts = own.File
	}
	if a.o.Deploy != nil {
		a.o.Deploy(&o)
	}
	a.etc, a.factsFile = o.Etc, o.Facts
	var err error
	a.engine, err = reconcile.New(o)
	return err
}

// upstream has a beat go ahead of each report: whoever hears that a deployment is over finds its nodes to be where it
// has brought them.
type upstream struct {
	*link.Link
	heart *heartbeat.Heart
}

func (u upstream) Report(ctx context.Context, r protocol.Report) error {
	u.heart.Now(ctx)
	return u.Link.Report(ctx, r)
}

// run is the parts at work, until ctx ends or one of them does.
func (a *agent) run(ctx context.Context) error {
	ctx, a.leave = context.WithCancel(ctx)
	defer a.leave()
	all, ctx := errgroup.WithContext(ctx)
	here := &local.Server{Path: Socket(a.o.Dir), Engine: a.engine, Log: a.o.Log.With("part", "local")}
	linked, unlink := context.WithCancel(context.WithoutCancel(ctx)) // until the other ends of tunnels were told, and who asked was answered
	defer unlink()
	var speaking sync.WaitGroup
	speaking.Add(2)
	go func() { speaking.Wait(); unlink() }()
	parts := []func(context.Context) error{a.engine.Run, func(context.Context) error { return a.link.Run(linked) }, a.heart.Run, a.audit.Run, here.Run,
		func(ctx context.Context) error { defer speaking.Done(); return a.serve(ctx) },
		func(ctx context.Context) error { defer speaking.Done(); return a.tunnels.Run(ctx) }}
	if a.units != nil {
		parts = append(parts, a.units.Run)
	}
	if a.o.Notify != nil {
		parts = append(parts, a.tellService)
	}
	for _, part := range parts {
		all.Go(func() error { return part(ctx) })
	}
	a.o.Log.Info("the agent is up", "node", a.machine.Name, "version", protocol.Build(), "serial", a.engine.State().Serial)
	done := make(chan error, 1)
	go func() { done <- all.Wait() }()
	select {
	case err := <-done:
		return errors.Join(err, a.close())
	case <-ctx.Done():
	}
	select {
	case err := <-done:
		return errors.Join(err, a.close())
	case <-time.After(stopWithin):
		// What hangs is an act on the machine: the journal knows of it, the next agent resumes it.
		a.o.Log.Warn("the agent ends although something still runs; the next one goes on with it")
		return nil
	}
}

// serve answers requests, once nothing of an earlier agent's runs is left.
func (a *agent) serve(ctx context.Context) error {
	if machine, ok := a.runner.(*run.Systemd); ok && a.o.Host == nil {
		late, cancel := context.WithTimeout(ctx, clearWithin)
		if err := machine.Clear(late); err != nil && ctx.Err() == nil {
			a.o.Log.Error("what an earlier agent ran can't be ended", "error", err)
		}
		cancel()
	}
	return a.server.Serve(ctx, a.questions)
}

func (a *agent) close() error {
	return errors.Join(a.audit.Close(), a.seen.Close())
}

// complete adds to a beat what the agent knows of itself.
func (a *agent) complete(b *protocol.Beat) {
	s := a.engine.State()
	b.Serial, b.Deployment, b.Phase, b.Reason = s.Serial, s.Deployment, s.Phase, s.Reason
	b.Quarantine = a.engine.InQuarantine()
	if confirmed := a.engine.Confirmed(); confirmed != b.Closure {
		b.Confirmed = confirmed
	}
	b.IPv4 = a.link.LocalIPv4()
	b.Account = a.accountIssued()
}

// degraded picks from failed units those that had not failed before the last confirmed manifest.
func (a *agent) degraded(failed []string) []string {
	baseline, known := a.engine.Baseline()
	if !known {
		return nil
	}
	return slices.DeleteFunc(health.NewlyFailed(baseline, failed), reconcile.OwnUnit)
}

func (a *agent) connected() {
	a.engine.Connected()
	a.audit.Connected()
	a.changed()
}

// changed has the news told. A deployment's phase may be the news, and what runs then has a policy of its own.
func (a *agent) changed() {
	a.tunnels.Recheck(time.Now())
	a.heart.Changed()
	a.tellStatus()
}

// accountStamp is when an account JWT was issued, so that it is decoded once.
type accountStamp struct {
	token string
	at    int64
}

func (a *agent) accountIssued() int64 {
	token := a.verifier.Account()
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.issued.token != token {
		if c, err := jwt.DecodeAccountClaims(token); err == nil {
			a.issued = accountStamp{token, c.IssuedAt}
		}
	}
	return a.issued.at
}

// takeAccount takes over an account JWT as soon as it arrives, also during a deploy: it may say that
// somebody's credentials are void.
func (a *agent) takeAccount(token string) {
	changed, err := a.verifier.SetAccount(token)
	if err != nil {
		a.o.Log.Warn("an account JWT from a controller is not this fleet's", "error", err)
	}
	if changed {
		a.saveAccount()
		a.heart.Changed()
	}
}

// settle gives back what a deploy left behind, and has it done once more when its reports are delivered.
func (a *agent) settle() {
	a.worked.Store(true)
	if a.o.Settle != nil {
		a.o.Settle()
	}
}

// record keeps a record of what the engine did. One that can't be kept says so itself; a rescue must not
// fail for want of it.
func (a *agent) record(r protocol.AuditRecord) { _ = a.audit.Record(r) }

// saveAccount keeps the newest account JWT there is: of two that come at once, the older one must not be written last.
func (a *agent) saveAccount() {
	a.tunnels.Recheck(time.Now())
	a.saving.Lock()
	defer a.saving.Unlock()
	if err := a.machine.SaveAccount(a.verifier.Account()); err != nil {
		a.o.Log.Error("a newer account JWT can't be kept; a restart would forget who was revoked", "error", err)
	}
}

// Socket is where the agent of a folder takes the orders of root on the machine itself.
func Socket(dir string) string {
	if dir == DefaultDir {
		return "/run/nix-infra-agent.sock"
	}
	return filepath.Join(dir, "agent.sock")
}

// lock keeps a second agent out of the folder. The lock ends with the process at the latest. One that
// is on its way out, or a look at the status, is waited for.
func lock(path string) (release func(), err error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("can't lock the agent's folder: %w", err)
	}
	for deadline := time.Now().Add(lockWithin); ; time.Sleep(lockWithin / 20) {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() {
				_ = unix.Flock(int(f.Fd()), unix.LOCK_UN) // a child that is just being started has the file, too
				f.Close()
			}, nil
		}
		if time.Now().After(deadline) {
			f.Close()
			return nil, fmt.Errorf("another agent runs on %s; stop it first (systemctl stop nix-infra-agent)", filepath.Dir(path))
		}
	}
}

// locked tells whether an agent has the folder.
func locked(path string) bool {
	f, err := os.Open(path)
	if err != nil {
		return false
	}
	defer f.Close()
	return unix.Flock(int(f.Fd()), unix.LOCK_SH|unix.LOCK_NB) != nil
}
