// Package reconcile brings a machine to the state that a signed manifest describes, and proves it or
// goes back.
//
// Start here, then read phase.go (the legal moves), journal.go and history.go (what survives), deploy.go
// (from a manifest to a closure), source.go (where that comes from), activate.go (from a closure to a
// proof), revert.go (back), resume.go (after a restart), boot.go and reboot.go (the modes that need a boot) and
// local.go (orders given on the node itself). dryrun.go only says what would change, garbage.go deletes what was.
// secrets.go puts the system's secrets in place, rotate.go changes one of them without a deployment, rekey.go is for another key of the node's.
// host.go is what the engine asks of the machine, host_systemd.go, host_system.go and host_secrets.go do it.
//
// # Switch and test
//
// The revert is armed before the activation starts and does not need the agent: a transient systemd
// timer whose service runs the old system's switch-to-configuration. The agent disarms it after the
// proof. Everything that can go wrong (a failed unit, a lost network, a hung activation, a dead agent)
// ends with that one service, started by the timer or, earlier, by the agent.
//
// # Boot
//
// Mode boot has no timer: the machine is off in between. It is a second table:
//
//	where                          what                                          then
//	ordered                        built, profile and boot default set           staged
//	staged, newer manifest         profile and boot default set back             rolled-back, the newer one goes on
//	next boot runs the new system  the checks, the deadline from the agent's start  confirmed, or the row below
//	… and the checks fail          profile and boot default set back, one reboot  rolling-back
//	… and that boot runs the old   quarantine                                    rolled-back
//	… and it runs the new again    the revert service, as in mode switch         rolled-back
//	next boot runs something else  profile and boot default set back             rolled-back
//
// A system that boots and never starts its agent is not proven and not reverted: choosing an older
// entry is the boot loader's work then.
//
// # Reboot
//
// Mode reboot brings no system. It boots what is staged, whose attempt it takes over, or else what runs:
//
//	where                          what                                          then
//	ordered                        what would boot is what is expected           rebooting
//	… or it isn't                  nothing                                       failed
//	rebooting, the same boot       the reboot is ordered (again)                 after five minutes: failed, what is staged stays so
//	rebooting, another boot        as in the table of mode boot; where nothing   confirmed, rolled-back or failed
//	                               was staged there is nothing to go back to
//
// # Rollbacks
//
// A rollback's system is one that the node has: nothing is fetched. It is proven like any other, and from
// there on it is what was deployed. The history of what was confirmed says where to.
//
// # Secrets
//
// A system's secrets belong to it: package credential has them as numbered sets. An attempt knows the set of its system,
// the one that was seen before and the one that a boot would have found:
//
//	where                       is seen    a boot finds
//	until the revert is armed   old        old
//	from then to confirming     new        old, so that a loss of power needs nothing put back
//	the revert service, by whomever it was started, begins by taking the new set away and ends by restarting what loads it
//	confirmed                   new        new, or after mode test what a boot had found before
//	staged                      old        new
//
// After the activation, and before the checks, the services are restarted that load a secret that changed and have not
// been started since. A set whose secrets have the same values is the same set. Without any other change it goes the
// whole way nevertheless: armed, proven, gone back from. The boot default and the set that a boot finds can't change at
// one moment: where the power is lost in between, the agent mends it after the boot, and restarts what loaded the others.
//
// # Dry runs
//
// A dry-activate manifest changes neither the journal's current state nor what State tells. It is not
// journalled: a restart of the agent forgets it.
package reconcile

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/agent/credential"
	"github.com/nix-infra/nix-infra/nix"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// Upstream is the way to the controller.
type Upstream interface {
	// Manifest asks for a manifest by its digest; "" is the one that this node should have.
	Manifest(ctx context.Context, digest string) (protocol.ManifestReply, error)
	// Blob gives the whole zstd form of a blob that the manifest (by digest) lists.
	Blob(ctx context.Context, manifest, blob string) ([]byte, error)
	// Probe makes a new connection to the controller and is answered.
	Probe(ctx context.Context) error
	// Event tells of progress, at best effort; it never blocks.
	Event(deployment string, e protocol.Event)
	// Report returns once the controller has acknowledged the report.
	Report(ctx context.Context, r protocol.Report) error
}

// DefaultEtc is where NixOS has a machine's source tree.
const DefaultEtc = "/etc/nixos"

// DefaultCache bounds the blob cache, in bytes.
const DefaultCache = 256 << 20

// Options are what an Engine works with.
type Options struct {
	Dir      string // state: journal, manifests, blobs, staged trees
	Node     string
	Verifier *protocol.Verifier
	Upstream Upstream
	Host     Host
	Log      *slog.Logger

	Changed func()           // the phase or its reason changed: beat now; may be nil
	Step    func(string)     // after each journal write, before the act that it announces; may be nil
	Account func(jwt string) // a newer account JWT came with a manifest: keep it; may be nil
	// Audit is given a record of each manifest that was accepted (no outcome yet), that was refused (its
	// outcome is the refusal's code), and that ended ("ok" or protocol.Failed); may be nil.
	Audit  func(protocol.AuditRecord)
	Settle func()        // a job is over, what it left behind may go, such as memory; may be nil
	Key    nkeys.KeyPair // the node's curve key, to which secrets are sealed; nil: none can be opened
	Next   nkeys.KeyPair // the one that is to replace Key, to which some may be sealed already; nil: none
	Links  string        // where units load secrets from; "": credential.DefaultLinks
	Keys   string        // where builds find theirs; "": credential.DefaultKeys
	Etc    string        // the node's source tree; "": DefaultEtc
	Roots  string        // gc roots; "": nix.RootsDir
	Cache  int64         // bytes; 0: DefaultCache
	// Facts makes protocol.FactsFile, for trees that have protocol.ModuleFile; nil: they get none.
	Facts func(context.Context) ([]byte, error)
}

// State is what the heartbeat tells: the newest manifest that the node accepted, and where it stands.
type State struct {
	Serial     uint64         `json:"serial"`
	Deployment string         `json:"deployment,omitempty"`
	Phase      protocol.Phase `json:"phase,omitempty"`
	Reason     string         `json:"reason,omitempty"`
}

// Engine is the deploy state machine of one node. Its exported methods are safe for concurrent use;
// Run is called once.
type Engine struct {
	o      Options
	box    *mailbox
	cache  *cache
	kick   chan struct{} // there may be reports to deliver
	busy   chan struct{} // holds something while an attempt is under way, or what must not meet one
	refuse refused
	pulse  pulse
	write  writer

	secrets *credential.Store

	followers followers
	roots     sync.Mutex // guards the gc roots of what is in quarantine

	mu      sync.Mutex // guards what follows
	j       journal
	notice  string // why the last manifest was not accepted, or the journal was set aside
	trouble string // why the journal could not be written
}

// writer replaces a file. Tests let it fail.
type writer func(path string, data []byte, mode os.FileMode) error

// New opens the state in o.Dir, making it where it is missing. A damaged journal is set aside and
// logged; it is no error, because a node without an engine could never be repaired by a deploy.
func New(o Options) (*Engine, error) {
	if err := protocol.CheckName(o.Node); err != nil {
		return nil, err
	}
	if o.Verifier == nil || o.Upstream == nil || o.Host == nil || o.Log == nil || !filepath.IsAbs(o.Dir) {
		return nil, errors.New("the engine needs a folder (absolute), a verifier, an upstream, a host and a log")
	}
	if o.Etc == "" {
		o.Etc = DefaultEtc
	}
	if o.Roots == "" {
		o.Roots = nix.RootsDir
	}
	if o.Cache == 0 {
		o.Cache = DefaultCache
	}
	for _, dir := range []string{o.Dir, filepath.Join(o.Dir, manifestsDir), filepath.Join(o.Dir, treesDir), filepath.Join(o.Dir, blobsDir)} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, fmt.Errorf("can't make the agent's state folder: %w", err)
		}
	}
	e := &Engine{o: o, box: newMailbox(), kick: make(chan struct{}, 1), busy: make(chan struct{}, 1), write: atomicfile.Write}
	e.busy <- struct{}{} // until Run has resumed what was under way
	var err error
	if e.cache, err = openCache(filepath.Join(o.Dir, blobsDir), o.Cache); err != nil {
		return nil, err
	}
	if e.secrets, err = credential.Open(credential.Options{Dir: filepath.Join(o.Dir, secretsDir), Links: o.Links, Keys: o.Keys, Key: o.Key, Next: o.Next, System: o.Host, Log: o.Log,
		Write: func(path string, data []byte, mode os.FileMode) error { return e.write(path, data, mode) }}); err != nil {
		return nil, err
	}
	e.j, e.notice, err = openJournal(o.Dir, o.Node)
	if e.notice != "" {
		o.Log.Error("the journal was set aside", "reason", e.notice)
	}
	return e, err
}

// Run resumes what the journal tells of, then works on looks until ctx ends, which is no error.
func (e *Engine) Run(ctx context.Context) error {
	var reports sync.WaitGroup
	ctx, cancel := context.WithCancel(ctx)
	defer reports.Wait()
	defer cancel()
	reports.Go(func() { e.deliver(ctx) })

	e.pulse.beat("resuming", resumeTime)
	next := e.resume(ctx)
	for ctx.Err() == nil {
		if next == nil {
			<-e.busy
			if next = e.await(ctx); next == nil {
				break
			}
		}
		if next.m.Mode == protocol.DryActivate {
			e.pulse.beat("a dry run", fetchTimeout+buildLimit(next.m)+dryTimeout+slack)
			next = e.dryRun(ctx, next)
		} else {
			next = e.deploy(ctx, next)
		}
	}
	return nil
}

// await waits for the next order, and until nothing is in its way; nil: ctx ended.
func (e *Engine) await(ctx context.Context) *order {
	for {
		if e.o.Settle != nil {
			e.o.Settle()
		}
		e.pulse.rest()
		l, ok := e.box.wait(ctx)
		if !ok {
			return nil
		}
		e.pulse.beat("obtaining a manifest", obtainTime)
		o := e.obtain(ctx, l)
		if o == nil {
			continue
		}
		e.pulse.rest()
		select {
		case e.busy <- struct{}{}:
			e.pulse.beat("taking up deployment "+o.m.Deployment, obtainTime)
			return o
		case <-ctx.Done():
			return nil
		}
	}
}

// Idle runs what must not meet an attempt, such as collecting garbage: none begins until it has returned.
// Where one is under way, that is a Conflict.
func (e *Engine) Idle(ctx context.Context, run func(context.Context) error) error {
	if err := e.claim(); err != nil {
		return err
	}
	defer func() { <-e.busy }()
	return run(ctx)
}

// claim keeps attempts from beginning, until something is taken out of busy.
func (e *Engine) claim() error {
	select {
	case e.busy <- struct{}{}:
		return nil
	default:
		s := e.State()
		return protocol.Refuse(protocol.Conflict, "%s is busy with deployment %s (%s), with a secret or with garbage; try again later", e.o.Node, s.Deployment, s.Phase)
	}
}

// Look tells of another desired state. It never blocks; of two that wait, the newest wins.
func (e *Engine) Look(l protocol.Look) {
	if l.Version != protocol.Version || l.Digest != "" && !protocol.IsDigest(l.Digest) {
		return
	}
	e.box.put(l)
	e.Connected()
}

// Connected tells that the controller can be reached again: reports that wait are tried at once.
func (e *Engine) Connected() {
	select {
	case e.kick <- struct{}{}:
	default:
	}
}

// Check is for a watchdog: an error means that Run hangs. One that waits for work, or that goes on trying
// what fails, does not.
func (e *Engine) Check() error { return e.pulse.check() }

// State is where the node stands.
func (e *Engine) State() State {
	e.mu.Lock()
	defer e.mu.Unlock()
	s := e.j.State
	switch {
	case e.trouble != "":
		s.Reason = e.trouble
	case e.notice != "":
		s.Reason = e.notice
	}
	return s
}

// Quarantined is which closures were rolled back from, and why.
func (e *Engine) Quarantined() map[string]Quarantine {
	e.mu.Lock()
	defer e.mu.Unlock()
	all := make(map[string]Quarantine, len(e.j.Quarantine))
	for closure, q := range e.j.Quarantine {
		all[closure] = q
	}
	return all
}

// Release lets a quarantined closure be tried again; "" is all of them. A closure that is not in
// quarantine is an Unknown refusal.
func (e *Engine) Release(closure string) error {
	e.mu.Lock()
	_, known := e.j.Quarantine[closure]
	e.mu.Unlock()
	if closure != "" && !known {
		return protocol.Refuse(protocol.Unknown, "%s is not in quarantine here", closure)
	}
	err := e.update("released", func(j *journal) {
		if closure == "" {
			clear(j.Quarantine)
		}
		delete(j.Quarantine, closure)
	})
	if err != nil {
		return protocol.Refuse(protocol.Failed, "%v", err)
	}
	e.keepQuarantined()
	return nil
}

// update changes the journal and writes it. On error the change stays in memory: what the machine did
// is true even where it can't be written down, and the next write carries it.
func (e *Engine) update(step string, change func(*journal)) error {
	e.mu.Lock()
	change(&e.j)
	err := e.j.save(e.o.Dir, e.write)
	e.trouble = ""
	if err != nil {
		e.trouble = fmt.Sprintf("the journal can't be written: %v; free space in %s", err, e.o.Dir)
		err = errors.New(e.trouble)
	}
	e.mu.Unlock()
	if err != nil {
		e.o.Log.Error("the journal can't be written", "step", step, "error", err)
	} else if e.o.Step != nil && step != "" {
		e.o.Step(step)
	}
	return err
}

func (e *Engine) changed() {
	if e.o.Changed != nil {
		e.o.Changed()
	}
}

func (e *Engine) setNotice(notice string) {
	e.mu.Lock()
	same := e.notice == notice
	e.notice = notice
	e.mu.Unlock()
	if !same {
		e.changed()
	}
}

func (e *Engine) now() time.Time { return time.Now().UTC().Truncate(time.Second) }
