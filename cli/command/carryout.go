package command

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/nix-infra/nix-infra/cli/client"
	"github.com/nix-infra/nix-infra/cli/ui"
	"github.com/nix-infra/nix-infra/protocol"
)

// choose finds whom a deployment is for. A locked node refuses it before anything is signed or uploaded.
func (a *app) choose(ctx context.Context, s *session, targets []string, mode protocol.Mode) (chosen, all []protocol.NodeState, err error) {
	if all, err = s.ListNodes(ctx); err != nil {
		return nil, nil, err
	}
	if chosen, err = selectFrom(all, targets); err != nil {
		return nil, nil, err
	}
	if len(chosen) == 0 {
		return nil, nil, errors.New("the targets name no node; nix-infra nodes lists them")
	}
	if mode == protocol.DryActivate {
		return chosen, all, nil
	}
	return chosen, all, refuseLocked(chosen)
}

// refuseLocked is an error where a node is locked: it names each, why and by whom.
func refuseLocked(chosen []protocol.NodeState) error {
	var locked []error
	for i := range chosen {
		if l := chosen[i].Lock; l != nil {
			locked = append(locked, fmt.Errorf("%s is locked by %s since %s: %s (nix-infra node unlock %s)",
				chosen[i].Name, l.By, l.At.Local().Format(time.DateTime), l.Reason, chosen[i].Name))
		}
	}
	if len(locked) == 0 {
		return nil
	}
	return several("are locked; nothing was deployed", locked)
}

// deploymentStart is the first document of a deployment in --json.
type deploymentStart struct {
	Event      string        `json:"event"` // deployment
	Deployment string        `json:"deployment"`
	Mode       protocol.Mode `json:"mode"`
	Nodes      []string      `json:"nodes"`
	Offline    []string      `json:"offline"`
	Uploaded   int           `json:"uploaded_blobs"`
	Bytes      int64         `json:"uploaded_bytes"`
}

// carryOut uploads a plan, hands it over and, unless the flags say otherwise, watches it to its end. The error has the
// status to exit with.
func (a *app) carryOut(ctx context.Context, s *session, p *plan, r *rolloutFlags) error {
	for _, w := range p.warnings {
		a.note("warning: %s", ui.Clean(w))
	}
	uploaded, err := s.Upload(ctx, p.blobs)
	if err != nil {
		return err
	}
	id := p.request.Deployment
	a.log.Debug("uploaded", "blobs", uploaded.Blobs, "bytes", uploaded.Bytes, "of", len(p.blobs))
	if r.detach {
		if err := a.handOver(ctx, s, p, uploaded); err != nil {
			return err
		}
		a.say("deployment %s to %s; nix-infra rollout watch %s follows it\n", id, nodes(len(p.items)), id)
		return nil
	}
	w, err := newWatch(a, s, id, p.names(), r.verbose)
	if err != nil {
		return err
	}
	defer w.close()
	if err := a.handOver(ctx, s, p, uploaded); err != nil {
		return err
	}
	return w.run(ctx)
}

// handOver makes the plan wanted. Up to here, nothing was wanted of anybody.
func (a *app) handOver(ctx context.Context, s *session, p *plan, uploaded client.Uploaded) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if err := s.Deploy(ctx, p.request); err != nil {
		return p.explain(ctx, err)
	}
	if a.json {
		a.document(deploymentStart{"deployment", p.request.Deployment, p.request.Mode, p.names(), list(p.offline()), uploaded.Blobs, uploaded.Bytes})
	}
	return nil
}

// nodes is "1 node" or "2 nodes".
func nodes(n int) string {
	if n == 1 {
		return "1 node"
	}
	return fmt.Sprintf("%d nodes", n)
}
