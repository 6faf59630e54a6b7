//go:build linux

package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/health"
	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/protocol"
)

// node is a real agent on a machine of which only the parts that a deploy asks for are there, in memory.
type node struct {
	reconcile.Host // nil: there are no binary caches, generations and garbage here

	dir, name string
	boot      string
	started   time.Time

	mu         sync.Mutex
	running    string // store path
	profile    string // store path
	generation int
	builds     int
}

func newNode(dir, name string) *node {
	n := &node{dir: dir, name: name, boot: protocol.NewID(), started: time.Now(), generation: 1}
	n.running = n.closure()
	n.profile = n.running
	return n
}

// closure is a store path like no other of this node.
func (n *node) closure() string { return closureOf(n.name, n.builds) }

func closureOf(name string, builds int) string {
	return fmt.Sprintf("/nix/store/%032d-nixos-system-%s", builds, name)
}

// run is the agent until ctx ends.
func (n *node) run(ctx context.Context) error {
	etc := filepath.Join(n.dir, "etc")
	if err := os.MkdirAll(etc, 0o755); err != nil {
		return err
	}
	for _, file := range protocol.NodeFiles {
		if err := os.WriteFile(filepath.Join(etc, file), []byte("{ }\n"), 0o644); err != nil {
			return err
		}
	}
	err := agent.Run(ctx, agent.Options{
		Dir: n.dir, Log: slog.New(slog.DiscardHandler), Journal: func(string, map[string]string) {}, Host: n, Facts: n,
		Deploy: func(o *reconcile.Options) {
			o.Etc, o.Roots, o.Links = etc, filepath.Join(n.dir, "roots"), filepath.Join(n.dir, "secrets")
		},
	})
	if err != nil {
		return fmt.Errorf("%s: %w", n.name, err)
	}
	return nil
}

// Facts implements heartbeat.Source.
func (n *node) Facts(context.Context) protocol.Beat {
	n.mu.Lock()
	defer n.mu.Unlock()
	return protocol.Beat{Closure: n.running, Generation: n.generation, Kernel: "6.12.0", NixOS: "25.11.swarm", System: "x86_64-linux", BootID: n.boot,
		Vitals: protocol.Vitals{Uptime: int64(time.Since(n.started).Seconds()), MemTotal: 1 << 30, MemAvailable: 1 << 29, DiskTotal: 1 << 40, DiskFree: 1 << 39}}
}

// Observe implements reconcile.Host, as do the methods below.
func (n *node) Observe(context.Context) (reconcile.Observation, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	return reconcile.Observation{Running: n.running, Profile: n.profile, Generation: n.generation, BootID: n.boot, Uptime: time.Since(n.started)}, nil
}

func (n *node) Build(context.Context, reconcile.Build) (string, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.builds++
	return n.closure(), nil
}

func (n *node) SetProfile(_ context.Context, closure string) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.profile != closure {
		n.profile = closure
		n.generation++
	}
	return nil
}

func (n *node) Run(_ context.Context, j reconcile.Job) (reconcile.Outcome, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if j.Action == "test" {
		n.running = j.Closure
	}
	return reconcile.Outcome{Found: true, Result: "success"}, nil
}

func (*node) Check(string) error                                     { return nil }
func (*node) Declared(string) ([]health.Declaration, error)          { return nil, nil }
func (*node) Arm(context.Context, reconcile.Revert) error            { return nil }
func (*node) Disarm(context.Context, reconcile.Revert) (bool, error) { return false, nil }
func (*node) Journal(context.Context, string, int) (string, error)   { return "", nil }
func (*node) Renew(context.Context) (bool, error)                    { return false, nil }
