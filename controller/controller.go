// Package controller is the program nix-infra-controller: it carries the fleet's messages (broker/),
// remembers what was ordered (store/), knows who is alive (liveness/), and hands every node its own
// desired state. It holds no key that could order anything.
//
// Start here, then read term.go (what the leading controller does), requests.go (people), serve.go
// (nodes), deploy.go (taking a deployment over), standing.go (how far its nodes are) and rollouts.go
// (handing it to them; rollout/ decides).
package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/nix-infra/nix-infra/controller/broker"
	"github.com/nix-infra/nix-infra/controller/store"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

const (
	startTimeout = 30 * time.Second
	retryAfter   = time.Second
	minFiles     = 65536 // each agent's connection is an open file
)

// Controller is a running controller.
type Controller struct {
	cfg      Config
	log      *slog.Logger
	machine  *machine.Machine
	verifier *protocol.Verifier
	broker   *broker.Broker
	store    *store.Store
	lock     *os.File
	accounts sync.Mutex // held while another account JWT is put in force

	cancel  context.CancelFunc
	current atomic.Pointer[term] // the last term
	serving chan struct{}        // closed when it leads for the first time
	once    sync.Once
	closing sync.Once
	done    chan struct{} // closed when everything has ended
	err     error         // valid once done is closed
}

// Start starts a controller. With an embedded etcd it serves when Start returns; with an external one
// another controller may be the leader, and this one stands by. It ends when ctx does, or by Stop.
func Start(ctx context.Context, cfg Config, log *slog.Logger) (_ *Controller, err error) {
	if err := cfg.check(); err != nil {
		return nil, err
	}
	c := &Controller{cfg: cfg, log: log, serving: make(chan struct{}), done: make(chan struct{})}
	defer func() {
		if err != nil {
			c.release()
		}
	}()
	home := machine.Home{Dir: cfg.Dir, Role: protocol.Controller}
	c.machine, err = home.Open()
	if errors.Is(err, machine.ErrNotEnrolled) {
		return nil, fmt.Errorf("%w; run `nix-infra-controller request --name NAME --dir %s`, have the operator answer it, and load the answer", err, cfg.Dir)
	} else if err != nil {
		return nil, fmt.Errorf("can't open the controller's identity: %w", err)
	}
	if c.verifier, err = protocol.NewVerifier(c.machine.Answer.Fleet.Operator, c.machine.Answer.Fleet.AccountJWT); err != nil {
		return nil, fmt.Errorf("the enrolment in %s: %w", cfg.Dir, err)
	}
	if c.lock, err = lockDir(cfg.Dir); err != nil {
		return nil, err
	}
	c.warnOfLimits()
	setup, cancelSetup := context.WithTimeout(ctx, startTimeout)
	defer cancelSetup()
	if c.store, err = store.Open(setup, cfg.store(), log); err != nil {
		return nil, err
	}
	if err := c.startAccount(setup); err != nil {
		return nil, err
	}
	if c.broker, err = broker.Start(setup, cfg.broker(), c.machine, log); err != nil {
		return nil, err
	}
	running, cancel := context.WithCancel(ctx)
	c.cancel = cancel
	go c.run(running)
	if !c.store.Embedded() {
		return c, nil
	}
	select {
	case <-c.serving:
		return c, nil
	case <-c.done:
		return nil, errors.Join(c.err, ctx.Err())
	case <-setup.Done():
		c.cancel()
		<-c.done
		return nil, fmt.Errorf("not serving after %s: %w", startTimeout, errors.Join(c.err, setup.Err()))
	}
}

func (cfg Config) store() store.Config {
	e := cfg.Etcd.External
	return store.Config{Dir: filepath.Join(cfg.Dir, "etcd"), Endpoints: e.Endpoints, CA: e.CA, Cert: e.Cert, Key: e.Key}
}

func (cfg Config) broker() broker.Config {
	b := cfg.Broker
	return broker.Config{Dir: cfg.Dir, Listen: b.Listen, Websocket: b.Websocket, MaxConnections: b.MaxConnections,
		External: b.External, MaxBlobs: cfg.Blobs.MaxBytes}
}

// lockDir keeps two controllers from sharing a folder.
func lockDir(dir string) (*os.File, error) {
	path := filepath.Join(dir, "lock")
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("can't use the folder: %w", err)
	}
	if err := syscall.Flock(int(f.Fd()), syscall.LOCK_EX|syscall.LOCK_NB); err != nil {
		f.Close()
		return nil, fmt.Errorf("another controller is running in %s; stop it, or use another --dir", dir)
	}
	return f, nil
}

func (c *Controller) warnOfLimits() {
	var l syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &l); err == nil && l.Cur < minFiles {
		c.log.Warn("few files may be open, and each agent takes one; raise LimitNOFILE of the unit", "limit", l.Cur, "wanted", minFiles)
	}
}

// run leads whenever it may, until ctx ends or something that it needs breaks.
func (c *Controller) run(ctx context.Context) {
	defer close(c.done)
	following, stop := context.WithCancel(ctx)
	var follows sync.WaitGroup
	follows.Go(func() { c.followAccount(following) })
	for ctx.Err() == nil && c.err == nil {
		lead, err := c.store.Campaign(ctx, c.machine.Name)
		if err == nil {
			err = c.lead(ctx, lead)
		}
		if err != nil && ctx.Err() == nil && c.err == nil {
			c.log.Error("not serving, trying again", "error", err)
			select {
			case <-ctx.Done():
			case c.err = <-c.store.Failed():
			case <-time.After(retryAfter):
			}
		}
	}
	stop()
	follows.Wait()
	c.release()
}

// lead serves for one term.
func (c *Controller) lead(ctx context.Context, lead *store.Term) error {
	defer func() {
		resign, cancel := context.WithTimeout(context.Background(), 2*time.Second)
		defer cancel()
		if err := lead.Resign(resign); err != nil {
			c.log.Warn("can't hand over the lead; it expires", "error", err)
		}
	}()
	t, err := c.newTerm(ctx, lead)
	if err != nil {
		return err
	}
	defer t.stop()
	c.current.Store(t)
	c.log.Info("serving", "name", c.machine.Name, "tls", c.ClientURL(), "websocket", c.WebsocketURL())
	c.once.Do(func() { close(c.serving) })
	select {
	case <-ctx.Done():
		return nil
	case <-lead.Done():
		return errors.New("lost the lead")
	case <-t.unsettled:
		return store.ErrUnsettled
	case err := <-c.store.Failed():
		c.err = fmt.Errorf("etcd stopped: %w", err)
		return c.err
	}
}

// release lets go of everything, in reverse order.
func (c *Controller) release() {
	c.closing.Do(c.close)
}

func (c *Controller) close() {
	if c.broker != nil {
		c.broker.Stop()
	}
	if c.store != nil {
		c.store.Close()
	}
	if c.lock != nil {
		// Closing is not enough: a program that is just being started has the file, too, until it runs, and would keep the lock.
		_ = syscall.Flock(int(c.lock.Fd()), syscall.LOCK_UN)
		c.lock.Close()
	}
}

// ClientURL is where agents and the CLI connect, such as tls://127.0.0.1:4222; "" with an external broker.
func (c *Controller) ClientURL() string { return c.broker.ClientURL() }

// WebsocketURL is the same by secure websocket, such as wss://127.0.0.1:443; "" where there is none.
func (c *Controller) WebsocketURL() string { return c.broker.WebsocketURL() }

// Store is what the controller remembers, for tests and tools that look at it.
func (c *Controller) Store() *store.Store { return c.store }

// Serving is closed once this controller has become the leader.
func (c *Controller) Serving() <-chan struct{} { return c.serving }

// Healthy is nil while broker and etcd answer.
func (c *Controller) Healthy(ctx context.Context) error {
	if err := c.store.Healthy(ctx); err != nil {
		return fmt.Errorf("etcd does not answer: %w", err)
	}
	if err := c.broker.Healthy(ctx); err != nil {
		return fmt.Errorf("the broker does not answer: %w", err)
	}
	return nil
}

// Done is closed when the controller has ended.
func (c *Controller) Done() <-chan struct{} { return c.done }

// Wait waits until the controller has ended and tells why, nil after Stop.
func (c *Controller) Wait() error {
	<-c.done
	return c.err
}

// Stop ends the controller cleanly: it stops answering, finishes what it began, writes down what only
// it knows, hands over the lead and closes the broker and etcd.
func (c *Controller) Stop() error {
	c.cancel()
	return c.Wait()
}
