package command

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

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

// planDeployment composes a tree for each chosen node and signs its manifest. Files that nodes share
// are one blob.
func planDeployment(me *identity, o deployOptions, chosen, all []protocol.NodeState, now time.Time) (*plan, error) {
	p := &plan{blobs: map[string][]byte{}}
	p.request = protocol.DeployRequest{Deployment: protocol.NewDeploymentID(now), Mode: protocol.Mode(o.mode)}
	known := nodeFacts(all)
	control := me.project.ControlNodes()
	secrets, warned := map[string]bool{}, map[string]bool{}
	var broken []error
	for _, n := range chosen {
		tree, err := me.project.Tree(project.TreeRequest{
			Node: n.Name, NodeModule: o.nodeModule, NixOSVersion: o.nixosVersion, TestDir: o.testDir,
			Control: slices.Contains(control, n.Name), ControlNodes: pick(known, control), ClusterUUID: me.project.Env.Get("CLUSTER_UUID"),
			Nodes: known, AllowUnknownPlaceholders: o.allowUnknownPlaceholders,
		})
		if err != nil {
			broken = append(broken, fmt.Errorf("%s: %w", n.Name, err))
			continue
		}
		if len(broken) > 0 {
			continue // nothing is signed of what can't be deployed
		}
		for _, w := range tree.Warnings {
			if !warned[w] {
				warned[w] = true
				p.warnings = append(p.warnings, w)
			}
		}
		for _, s := range append(tree.Secrets, tree.PreBuildSecrets...) {
			secrets[s] = true
		}
		if err := p.add(me.signer, n, tree, o, now); err != nil {
			return nil, err
		}
	}
	if len(broken) > 0 {
		return nil, several(broken)
	}
	if len(secrets) > 0 {
		p.warnings = append(p.warnings, fmt.Sprintf("delivering secrets is not part of this version; the nodes have to have these already: %s",
			strings.Join(slices.Sorted(maps.Keys(secrets)), ", ")))
	}
	return p, nil
}

// several is one error, or the first of many, a line each.
func several(errs []error) error {
	if len(errs) == 1 {
		return errs[0]
	}
	return &errorList{fmt.Sprintf("%s can't be composed; nothing was deployed:", nodes(len(errs))), errs}
}

func (p *plan) add(signer *protocol.Signer, n protocol.NodeState, tree *project.Tree, o deployOptions, now time.Time) error {
	m := &protocol.Manifest{
		Version: protocol.Version, Node: n.Name, Serial: nextSerial(&n, p.request.Mode), Deployment: p.request.Deployment,
		Created: now.UTC().Truncate(time.Second), Mode: p.request.Mode, Attr: protocol.SystemAttr(n.Name), Impure: o.impure,
		Timeout: int(o.timeout.Seconds()), BuildTimeout: int(o.build.Seconds()), Settle: int(o.settle.Seconds()),
	}
	for _, f := range tree.Files {
		digest := protocol.Digest(f.Data)
		p.blobs[digest] = f.Data
		m.Files = append(m.Files, protocol.File{Path: f.Path, SHA256: digest, Size: int64(len(f.Data)), Exec: f.Mode&0o111 != 0})
	}
	slices.SortFunc(m.Files, func(a, b protocol.File) int { return strings.Compare(a.Path, b.Path) })
	doc, err := signer.Manifest(m)
	if err != nil {
		return err
	}
	digest := protocol.Digest(doc)
	p.blobs[digest] = doc
	p.items = append(p.items, planned{n, m})
	p.request.Items = append(p.request.Items, protocol.DeployItem{Node: n.Name, Serial: m.Serial, Digest: digest})
	return nil
}

// plausibleSerial bounds what a node is believed about its own serial: one that claims the highest number
// there is would leave none above it, and so keep every deployment that names it from being signed.
const plausibleSerial = 1 << 48

// nextSerial is above all that the controller wanted of a node and all that the node says it accepted:
// the two differ where a controller lost its state.
func nextSerial(n *protocol.NodeState, mode protocol.Mode) uint64 {
	if mode == protocol.DryActivate {
		return 0
	}
	last := uint64(0)
	if n.Desired != nil {
		last = n.Desired.Serial
	}
	if n.Beat != nil && n.Beat.Serial < plausibleSerial {
		last = max(last, n.Beat.Serial)
	}
	return last + 1
}

// nodeFacts are what placeholders may ask of every node of the fleet.
func nodeFacts(all []protocol.NodeState) []project.NodeFacts {
	known := make([]project.NodeFacts, len(all))
	for i := range all {
		d := documentOf(&all[i])
		known[i] = project.NodeFacts{Name: d.Node, IPv4: d.IPv4, Arch: d.System}
	}
	return known
}

// pick gives the facts of the named nodes, in the names' order; of one that nobody knows, the name.
func pick(known []project.NodeFacts, names []string) []project.NodeFacts {
	var some []project.NodeFacts
	for _, name := range names {
		i := slices.IndexFunc(known, func(f project.NodeFacts) bool { return f.Name == name })
		if i < 0 {
			some = append(some, project.NodeFacts{Name: name})
			continue
		}
		some = append(some, known[i])
	}
	return some
}

// explain turns what the controller says to a deployment into what to do about it.
func (p *plan) explain(ctx context.Context, err error) error {
	switch {
	case errors.Is(err, &protocol.Refusal{Code: protocol.Conflict}):
		return fmt.Errorf("somebody else deployed at the same time, nothing was changed; run it again: %w", err)
	case ctx.Err() != nil:
		return fmt.Errorf("interrupted while the deployment was handed over; nix-infra deployment show %s tells whether it was", p.request.Deployment)
	}
	return err
}
