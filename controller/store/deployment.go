package store

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nix-infra/nix-infra/controller/rollout"
	"github.com/nix-infra/nix-infra/protocol"
)

// Stage is how far a deployment was taken over. A fleet does not fit into one transaction of etcd, so
// that the all-or-none is in the one write that makes it committed:
//
//	prepared   its entries are being written; a controller that starts and finds it removes it
//	committed  taken over, and its rollout begins
type Stage string

const (
	prepared  Stage = "prepared"
	committed Stage = "committed"
)

// Deployment is a deployment's record.
type Deployment struct {
	ID       string            `json:"id"`
	By       string            `json:"by"`
	Created  time.Time         `json:"created"`
	Mode     protocol.Mode     `json:"mode"`
	Strategy protocol.Strategy `json:"strategy"`
	Undoes   string            `json:"undoes,omitempty"` // the deployment that this one takes back
	Stage    Stage             `json:"stage"`
}

// Entry is one node's part of a deployment. It is held back, known to nobody but the controller, until it
// is released.
type Entry struct {
	Digest   string           `json:"digest"` // of the signed manifest
	Serial   uint64           `json:"serial"`
	Wave     int              `json:"wave"`              // from 1
	Released time.Time        `json:"released,omitzero"` // zero: it is held back
	Back     string           `json:"back,omitempty"`    // digest of the way back, which has serial Serial+1
	Closure  string           `json:"closure,omitempty"` // store path that the manifest names
	Timeout  int              `json:"timeout"`           // seconds from the start of activation to the end, for the way back too
	Build    int              `json:"build"`             // seconds until activation starts, at most
	Report   *protocol.Report `json:"report,omitempty"`
}

func entries(id string) string { return deployments + id + "/nodes/" }

// ErrUnsettled says that etcd failed at a moment after which only Recover can tell whether a
// deployment was taken over. The leader must end its term, so that the next one recovers.
var ErrUnsettled = errors.New("it is not settled whether the deployment was taken over; look at `deployments` in a moment")

// Accept takes over a deployment and its rollout (nil: it has none), all of it or none: when it returns
// nil nothing of it can be lost any more; when it returns an error other than ErrUnsettled there is
// nothing of it. The caller has checked the serials, and accepts one deployment at a time.
func (t *Term) Accept(ctx context.Context, d Deployment, items map[string]Entry, r *rollout.Rollout) error {
	d.Stage = prepared
	if err := t.write(ctx, put(deployments+d.ID, d)); err != nil {
		return err
	}
	ops := make([]clientv3.Op, 0, len(items))
	for node, e := range items {
		ops = append(ops, put(entries(d.ID)+node, e))
	}
	err := t.writeAll(ctx, ops)
	if err != nil {
		return t.abandon(d.ID, err)
	}
	d.Stage = committed
	ops = []clientv3.Op{put(deployments+d.ID, d)}
	if r != nil {
		ops = append(ops, put(rollouts+d.ID, r))
	}
	if err := t.write(ctx, ops...); err != nil {
		// Whether this one write was made is not known. Removing it settles that.
		return t.abandon(d.ID, err)
	}
	return nil
}

// abandon removes a deployment that is not committed. The time of whoever asked may be over by now.
func (t *Term) abandon(id string, why error) error {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	if err := t.RemoveDeployment(ctx, id); err != nil {
		return fmt.Errorf("%w: %w, then %w", ErrUnsettled, why, err)
	}
	return why
}

// Recover removes what a controller that was killed left half taken over. It must be called before
// anything is read for serving.
func (t *Term) Recover(ctx context.Context) error {
	var half []string
	err := t.store.Deployments(ctx, func(d Deployment) {
		if d.Stage == prepared {
			half = append(half, d.ID)
		}
	}, nil)
	if err != nil {
		return err
	}
	for _, id := range half {
		if err := t.RemoveDeployment(ctx, id); err != nil {
			return err
		}
	}
	return nil
}

// MaxRelease is how many nodes are released by one transaction.
const MaxRelease = 50

// Release lets up to MaxRelease nodes have their entries, all of them or none: from here on these are desired.
func (t *Term) Release(ctx context.Context, d Deployment, items map[string]Entry) error {
	ops := make([]clientv3.Op, 0, 2*len(items))
	for node, e := range items {
		ops = append(ops, put(entries(d.ID)+node, e), put(desired+node, e.Desired(d)))
	}
	return t.write(ctx, ops...)
}

// Desired is what the node of an entry should have once it is released.
func (e Entry) Desired(d Deployment) protocol.Desired {
	return protocol.Desired{Serial: e.Serial, Digest: e.Digest, Deployment: d.ID, Mode: d.Mode}
}

// PutRollout remembers where a deployment's rollout stands.
func (t *Term) PutRollout(ctx context.Context, id string, r rollout.Rollout) error {
	return t.write(ctx, put(rollouts+id, r))
}

// Rollouts are where the rollouts of all deployments stand, by id.
func (s *Store) Rollouts(ctx context.Context) (map[string]rollout.Rollout, error) {
	return load[rollout.Rollout](ctx, s, rollouts)
}

// Deployments reads all deployments, and with a second function also all their entries, with the
// bytes that each takes. An entry may come before its deployment's record.
func (s *Store) Deployments(ctx context.Context, each func(Deployment), entry func(id, node string, e Entry, size int)) error {
	return s.scan(ctx, deployments, func(kv *mvccpb.KeyValue) error {
		id, node, isEntry := strings.Cut(strings.TrimPrefix(string(kv.Key), deployments), "/nodes/")
		if !isEntry {
			d, err := decode[Deployment](kv)
			if err == nil {
				each(d)
			}
			return err
		}
		if entry == nil {
			return nil
		}
		e, err := decode[Entry](kv)
		if err == nil {
			entry(id, node, e, len(kv.Value))
		}
		return err
	})
}

// Entries are a deployment's nodes, by name.
func (s *Store) Entries(ctx context.Context, id string) (map[string]Entry, error) {
	return load[Entry](ctx, s, entries(id))
}

// Entry is one node's part of a deployment; false: it has none.
func (s *Store) Entry(ctx context.Context, id, node string) (Entry, bool, error) {
	r, err := s.client.Get(ctx, entries(id)+node)
	if err != nil {
		return Entry{}, false, fmt.Errorf("can't read from etcd: %w", err)
	}
	if len(r.Kvs) == 0 {
		return Entry{}, false, nil
	}
	e, err := decode[Entry](r.Kvs[0])
	return e, err == nil, err
}

// PutEntry changes one node's part of a deployment. One that was removed meanwhile stays so: an entry without its record
// would be a deployment without a name to the next controller.
func (t *Term) PutEntry(ctx context.Context, id, node string, e Entry) error {
	exists := clientv3.Compare(clientv3.CreateRevision(deployments+id), ">", 0)
	done, err := t.writeIf(ctx, []clientv3.Cmp{exists}, put(entries(id)+node, e))
	if err == nil && !done {
		err = fmt.Errorf("deployment %s was just removed, or another controller leads", id)
	}
	return err
}

// RemoveDeployment removes a deployment with all its entries and its rollout.
func (t *Term) RemoveDeployment(ctx context.Context, id string) error {
	return t.write(ctx, clientv3.OpDelete(entries(id), clientv3.WithPrefix()), clientv3.OpDelete(deployments+id), clientv3.OpDelete(rollouts+id))
}
