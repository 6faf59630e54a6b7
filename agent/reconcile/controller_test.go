package reconcile

import (
	"context"
	"errors"
	"sync"

	"github.com/nix-infra/nix-infra/protocol"
)

// controller is a fake Upstream over a machine's network.
type controller struct {
	m *machine

	mu        sync.Mutex
	manifests map[string][]byte // by digest
	newest    string
	blobs     map[string][]byte // zstd
	reports   []protocol.Report
	lines     []string
	asked     int // manifests
	fetched   int // blobs
	account   string
}

func (c *controller) online() error {
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	if behaviour(c.m.running) == cutNetwork || c.m.offline {
		return errors.New("no route to host")
	}
	return nil
}

func (c *controller) Manifest(_ context.Context, digest string) (protocol.ManifestReply, error) {
	if err := c.online(); err != nil {
		return protocol.ManifestReply{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.asked++
	if digest == "" {
		digest = c.newest
	}
	doc, ok := c.manifests[digest]
	if !ok {
		return protocol.ManifestReply{}, protocol.Refuse(protocol.Unknown, "no such manifest")
	}
	return protocol.ManifestReply{Digest: digest, Manifest: doc, Account: c.account}, nil
}

func (c *controller) Blob(_ context.Context, _, blob string) ([]byte, error) {
	if err := c.online(); err != nil {
		return nil, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.fetched++
	data, ok := c.blobs[blob]
	if !ok {
		return nil, protocol.Refuse(protocol.Unknown, "no such blob")
	}
	return data, nil
}

func (c *controller) Probe(context.Context) error {
	if err := c.online(); err != nil {
		return err
	}
	c.m.mu.Lock()
	defer c.m.mu.Unlock()
	c.m.proven[c.m.running] = true
	return nil
}

func (c *controller) Event(_ string, e protocol.Event) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.lines = append(c.lines, e.Lines...)
}

func (c *controller) Report(_ context.Context, r protocol.Report) error {
	if err := c.online(); err != nil {
		return err
	}
	if err := r.Validate(); err != nil {
		c.m.t.Errorf("invalid report: %v", err)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.reports = append(c.reports, r)
	return nil
}

func (c *controller) last() protocol.Report {
	c.mu.Lock()
	defer c.mu.Unlock()
	if len(c.reports) == 0 {
		return protocol.Report{}
	}
	return c.reports[len(c.reports)-1]
}

func (c *controller) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.reports)
}
