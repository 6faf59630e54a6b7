package command

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"runtime"
	"slices"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/nix-infra/nix-infra/cli/project"
	"github.com/nix-infra/nix-infra/protocol"
)

// plan is a deployment before anybody was told: composed, hashed and signed.
type plan struct {
	request  protocol.DeployRequest
	items    []planned
	blobs    map[string][]byte // files and manifests, by digest
	warnings []string
}

// planned is one node's part.
type planned struct {
	node     protocol.NodeState
	manifest *protocol.Manifest
}

// order is what the manifests of a plan have in common, and how they reach their nodes.
type order struct {
	mode                   protocol.Mode
	timeout, build, settle time.Duration
	strategy               protocol.Strategy
}

// source says where a node's system comes from: it completes the node's manifest, and adds the blobs that it names to the
// node's part of the plan. It is called for several nodes at a time.
type source func(p *plan, m *protocol.Manifest) error

// rollbackTo is a source of systems that the nodes have.
func rollbackTo(r protocol.Rollback) source {
	return func(_ *plan, m *protocol.Manifest) error {
		m.Rollback = &r
		return nil
	}
}

// noSource leaves manifests without a system, as a reboot has them.
func noSource(*plan, *protocol.Manifest) error { return nil }

func (p *plan) names() []string {
	names := make([]string, len(p.items))
	for i := range p.items {
		names[i] = p.items[i].node.Name
	}
	return names
}

func (p *plan) offline() []string {
	var names []string
	for i := range p.items {
		if !p.items[i].node.Online {
			names = append(names, p.items[i].node.Name)
		}
	}
	return names
}

// makePlan signs a manifest for each chosen node and, where the strategy takes back what failed, the way back.
// Files that nodes share are one blob.
func makePlan(signer *protocol.Signer, o order, chosen []protocol.NodeState, from source, now time.Time) (*plan, error) {
	p := newPlan(protocol.DeployRequest{Deployment: protocol.NewDeploymentID(now), Mode: o.mode, Strategy: o.strategy})
	parts, wrong := make([]*plan, len(chosen)), make([]error, len(chosen))
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, n := range chosen {
		g.Go(func() error {
			m := &protocol.Manifest{
				Version: protocol.Version, Node: n.Name, Deployment: p.request.Deployment,
				Created: now.UTC().Truncate(time.Second), Mode: o.mode, Attr: protocol.SystemAttr(n.Name),
				Timeout: int(o.timeout.Seconds()), BuildTimeout: int(o.build.Seconds()), Settle: int(o.settle.Seconds()),
			}
			parts[i] = newPlan(p.request)
			var err error
			if m.Serial, err = nextSerial(&n, o.mode, now); err == nil {
				err = from(parts[i], m)
			}
			if err != nil {
				wrong[i] = fmt.Errorf("%s: %w", n.Name, err)
				return nil // what is wrong is told of all nodes together
			}
			return parts[i].add(signer, n, m)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	if broken := slices.DeleteFunc(wrong, func(err error) bool { return err == nil }); len(broken) > 0 {
		return nil, several("can't be composed; nothing was deployed", broken)
	}
	for _, one := range parts {
		p.items = append(p.items, one.items...)
		p.request.Items = append(p.request.Items, one.request.Items...)
		maps.Copy(p.blobs, one.blobs)
		p.warn(one.warnings...)
	}
	return p, nil
}

func newPlan(r protocol.DeployRequest) *plan { return &plan{request: r, blobs: map[string][]byte{}} }

// several is one error, or the first of many, a line each. Of each, the node is told.
func several(what string, errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	return &errorList{nodes(len(errs)) + " " + what + ":", errs}
}

// add signs a node's part.
func (p *plan) add(signer *protocol.Signer, n protocol.NodeState, m *protocol.Manifest) error {
	item := protocol.DeployItem{Node: n.Name, Serial: m.Serial}
	var err error
	if item.Digest, err = p.sign(signer, m); err != nil {
		return err
	}
	if p.request.Strategy.OnFailure == protocol.RollbackOnFailure {
		if item.Back, err = p.sign(signer, wayBack(m)); err != nil {
			return err
		}
	}
	p.items = append(p.items, planned{n, m})
	p.request.Items = append(p.request.Items, item)
	return nil
}

// sign makes a blob of a manifest.
func (p *plan) sign(signer *protocol.Signer, m *protocol.Manifest) (digest string, err error) {
	doc, err := signer.Manifest(m)
	if err != nil {
		return "", err
	}
	digest = protocol.Digest(doc)
	p.blobs[digest] = doc
	return digest, nil
}

// wayBack is the manifest that takes m back, for the controller to release if too many nodes fail.
func wayBack(m *protocol.Manifest) *protocol.Manifest {
	back := *m
	back.Serial, back.Deployment, back.Mode = m.Serial+1, protocol.BackID(m.Deployment), protocol.Switch
	back.Files, back.Impure, back.Closure, back.Rollback = nil, false, nil, &protocol.Rollback{Before: m.Deployment}
	back.Secrets = nil // the system that it goes back to has its own
	return &back
}

// addTree makes a tree the files of a manifest.
func (p *plan) addTree(m *protocol.Manifest, tree *project.Tree) {
	m.Files = filesOf(tree)
	for i, f := range m.Files {
		p.blobs[f.SHA256] = tree.Files[i].Data
	}
	sortFiles(m.Files)
	p.warn(tree.Warnings...)
}

// filesOf are the files of a tree, in its order, as a manifest has them.
func filesOf(tree *project.Tree) []protocol.File {
	files := make([]protocol.File, len(tree.Files))
	for i, f := range tree.Files {
		files[i] = protocol.File{Path: f.Path, SHA256: f.Digest(), Size: int64(len(f.Data)), Exec: f.Mode&0o111 != 0}
	}
	return files
}

func sortFiles(files []protocol.File) {
	slices.SortFunc(files, func(a, b protocol.File) int { return strings.Compare(a.Path, b.Path) })
}

// warn adds warnings, those that are there already once.
func (p *plan) warn(warnings ...string) {
	for _, w := range warnings {
		if !slices.Contains(p.warnings, w) {
			p.warnings = append(p.warnings, w)
		}
	}
}

// plausibleSerial is above every serial that deployments can have led to by now: nobody makes one each millisecond. Who claims
// a higher one, such as the highest number that there is, would leave none above it, and a node that once took a
// manifest with that could get no other. The bound moves on, so that whoever claims just less bars nothing.
func plausibleSerial(now time.Time) uint64 { return uint64(max(0, now.UnixMilli())) }

// nextSerial is above all that the controller holds for a node and all that the node says it accepted: the two
// differ where a controller lost its state.
func nextSerial(n *protocol.NodeState, mode protocol.Mode, now time.Time) (uint64, error) {
	if mode == protocol.DryActivate {
		return 0, nil
	}
	last, bound := n.Serial, plausibleSerial(now)
	if n.Desired != nil {
		last = max(last, n.Desired.Serial)
	}
	if last >= bound {
		return 0, fmt.Errorf("the controller holds serial %d for it, which no number of deployments leads to: either the controller, or this machine's clock, is not right", last)
	}
	if n.Beat != nil && n.Beat.Serial < bound {
		last = max(last, n.Beat.Serial)
	}
	return last + 1, nil
}

// explain turns what the controller says to a deployment into what to do about it.
func (p *plan) explain(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, &protocol.Refusal{Code: protocol.Conflict}):
		return fmt.Errorf("the fleet changed meanwhile, nothing was deployed; run it again: %w", err)
	case ctx.Err() != nil:
		return fmt.Errorf("interrupted while the deployment was handed over; nix-infra deployment show %s tells whether it was", p.request.Deployment)
	}
	return err
}
