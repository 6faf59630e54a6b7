package store

import (
	"context"
	"errors"
	"fmt"
	"hash/fnv"
	"strconv"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	"go.etcd.io/etcd/api/v3/v3rpc/rpctypes"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nix-infra/nix-infra/protocol"
)

// Heartbeats share a few leases: one each would be 10,000 keepalives instead of 16, and etcd ends
// leases at 1,000 a second at most.
const (
	leaseCount = 16
	leaseTTL   = 60 // seconds
	// RenewEvery is how often Renew has to be called.
	RenewEvery = leaseTTL / 3 * time.Second
)

// Sighting is the last that was heard of a node. The beat's vitals are always zero: they change all
// the time.
type Sighting struct {
	Node   string        `json:"-"`
	Online bool          `json:"-"`
	Unsure bool          `json:"-"`    // not online because nobody kept track of it lately
	Seen   time.Time     `json:"seen"` // of an online node: when the beat changed
	Beat   protocol.Beat `json:"beat"`
}

// Sightings reads what is known of all nodes, and takes over the leases that hold it.
func (t *Term) Sightings(ctx context.Context) (map[string]Sighting, error) {
	err := t.store.scan(ctx, tracked, func(kv *mvccpb.KeyValue) error {
		i, err := strconv.Atoi(strings.TrimPrefix(string(kv.Key), tracked))
		if err != nil || i < 0 || i >= leaseCount {
			return fmt.Errorf("the key %s in etcd is damaged", kv.Key)
		}
		t.leases[i] = clientv3.LeaseID(kv.Lease)
		return nil
	})
	if err != nil {
		return nil, err
	}
	all, err := load[Sighting](ctx, t.store, last)
	if err != nil {
		return nil, err
	}
	err = t.store.scan(ctx, heartbeats, func(kv *mvccpb.KeyValue) error {
		s, err := decode[Sighting](kv)
		if err != nil {
			return err
		}
		node := strings.TrimPrefix(string(kv.Key), heartbeats)
		s.Online = true
		if before, ok := all[node]; ok && before.Seen.After(s.Seen) {
			s.Seen = before.Seen
		}
		all[node] = s
		return nil
	})
	if err != nil {
		return nil, err
	}
	for node, s := range all {
		s.Node, s.Unsure = node, !s.Online && t.leases[LeaseOf(node)] == clientv3.NoLease
		all[node] = s
	}
	_, err = t.Renew(ctx)
	return all, err
}

// LeaseOf is the number of the lease that a node's heartbeat is under.
func LeaseOf(node string) int {
	h := fnv.New32a()
	_, _ = h.Write([]byte(node)) // never fails
	return int(h.Sum32() % leaseCount)
}

// Renew keeps the leases alive. It tells which were gone and had to be made anew: their nodes'
// heartbeats must be saved again.
func (t *Term) Renew(ctx context.Context) (lost []int, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	for i, lease := range t.leases {
		if lease != clientv3.NoLease {
			_, err := t.store.client.KeepAliveOnce(ctx, lease)
			if err == nil {
				continue
			}
			if !isLeaseGone(err) {
				return lost, fmt.Errorf("can't renew a lease in etcd: %w", err)
			}
		}
		r, err := t.store.client.Grant(ctx, leaseTTL)
		if err != nil {
			return lost, fmt.Errorf("can't make a lease in etcd: %w", err)
		}
		if err := t.write(ctx, clientv3.OpPut(tracked+strconv.Itoa(i), "", clientv3.WithLease(r.ID))); err != nil {
			return lost, err
		}
		t.leases[i] = r.ID
		lost = append(lost, i)
	}
	return lost, nil
}

// Save writes sightings. A node that is online gets a heartbeat; one that is not loses it.
func (t *Term) Save(ctx context.Context, changed []Sighting) error {
	ops := make([]clientv3.Op, 0, 2*len(changed))
	for _, s := range changed {
		s.Beat.Vitals = protocol.Vitals{}
		if s.Online {
			ops = append(ops, put(heartbeats+s.Node, s, clientv3.WithLease(t.leases[LeaseOf(s.Node)])))
		} else {
			ops = append(ops, clientv3.OpDelete(heartbeats+s.Node), put(last+s.Node, s))
		}
	}
	return t.writeAll(ctx, ops)
}

// SaveLast keeps when nodes were last seen, for the controller that comes next.
func (t *Term) SaveLast(ctx context.Context, all []Sighting) error {
	ops := make([]clientv3.Op, 0, len(all))
	for _, s := range all {
		s.Beat.Vitals = protocol.Vitals{}
		ops = append(ops, put(last+s.Node, s))
	}
	return t.writeAll(ctx, ops)
}

// isLeaseGone knows the error of both ways to etcd: gRPC and the in-process client.
func isLeaseGone(err error) bool {
	return errors.Is(err, rpctypes.ErrLeaseNotFound) || (err != nil && strings.Contains(err.Error(), "requested lease not found"))
}
