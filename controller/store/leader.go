package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/client/v3/concurrency"
)

// maxOps is the most that etcd takes in one transaction unless told otherwise.
const maxOps = 128

// Session TTLs in seconds. Where etcd is embedded nobody waits for the lead, so that a short one would
// only lose it for nothing when the disk is slow.
const (
	ttlShared = 5
	ttlAlone  = 60
)

// Term is the time for which this controller leads. All writes go through it.
type Term struct {
	store    *Store
	session  *concurrency.Session
	election *concurrency.Election
	leases   [leaseCount]clientv3.LeaseID
}

// Campaign waits until the controller called name leads. A session that the same controller left
// behind when it was killed is ended first, so that it need not wait for itself.
func (s *Store) Campaign(ctx context.Context, name string) (*Term, error) {
	r, err := s.client.Get(ctx, leaderKey+"/", clientv3.WithPrefix())
	if err != nil {
		return nil, fmt.Errorf("can't read the election from etcd: %w", err)
	}
	for _, kv := range r.Kvs {
		if string(kv.Value) != name {
			continue
		}
		if _, err := s.client.Revoke(ctx, clientv3.LeaseID(kv.Lease)); err != nil && !isLeaseGone(err) {
			return nil, fmt.Errorf("can't end this controller's earlier term: %w", err)
		}
	}
	ttl := ttlShared
	if s.Embedded() {
		ttl = ttlAlone
	}
	// The session outlives ctx: what is left to write when the controller stops is still written as the leader.
	session, err := concurrency.NewSession(s.client, concurrency.WithTTL(ttl), concurrency.WithContext(context.WithoutCancel(ctx)))
	if err != nil {
		return nil, fmt.Errorf("can't open a session with etcd: %w", err)
	}
	election := concurrency.NewElection(session, leaderKey)
	if err := election.Campaign(ctx, name); err != nil {
		_ = session.Close() // at worst it expires
		return nil, fmt.Errorf("can't take part in the election: %w", err)
	}
	return &Term{store: s, session: session, election: election}, nil
}

// Done is closed when the lead is lost.
func (t *Term) Done() <-chan struct{} { return t.session.Done() }

// Resign gives the lead to whoever is next.
func (t *Term) Resign(ctx context.Context) error {
	err := t.election.Resign(ctx)
	t.session.Orphan()
	if _, revokeErr := t.store.client.Revoke(ctx, t.session.Lease()); revokeErr != nil && !isLeaseGone(revokeErr) {
		err = errors.Join(err, revokeErr)
	}
	return err
}

// write makes one transaction of up to maxOps operations, which holds only if this controller leads.
func (t *Term) write(ctx context.Context, ops ...clientv3.Op) error {
	done, err := t.writeIf(ctx, nil, ops...)
	if err == nil && !done {
		err = ErrNotLeader
	}
	return err
}

// writeIf is write on conditions; false: one of them does not hold, or another controller leads.
func (t *Term) writeIf(ctx context.Context, conditions []clientv3.Cmp, ops ...clientv3.Op) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	leading := clientv3.Compare(clientv3.CreateRevision(t.election.Key()), "=", t.election.Rev())
	r, err := t.store.client.Txn(ctx).If(append(conditions, leading)...).Then(ops...).Commit()
	if err != nil {
		return false, fmt.Errorf("can't write to etcd: %w", err)
	}
	return r.Succeeded, nil
}

// writeAll writes any number of operations, in order, in as few transactions as possible.
func (t *Term) writeAll(ctx context.Context, ops []clientv3.Op) error {
	for len(ops) > 0 {
		n := min(maxOps, len(ops))
		if err := t.write(ctx, ops[:n]...); err != nil {
			return err
		}
		ops = ops[n:]
	}
	return nil
}
