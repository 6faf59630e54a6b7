package store

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nix-infra/nix-infra/protocol"
)

// Joining is a token's, by its public key; false: nobody has come with it, or it has ended.
func (s *Store) Joining(ctx context.Context, token string) (protocol.Joining, bool, error) {
	r, err := s.client.Get(ctx, joinings+token)
	if err != nil {
		return protocol.Joining{}, false, fmt.Errorf("can't read a token's request from etcd: %w", err)
	}
	for _, kv := range r.Kvs {
		j, err := decode[protocol.Joining](kv)
		return j, true, err
	}
	return protocol.Joining{}, false, nil
}

// Joinings hands all of them to each, in order of their tokens.
func (s *Store) Joinings(ctx context.Context, each func(protocol.Joining) error) error {
	return s.scan(ctx, joinings, func(kv *mvccpb.KeyValue) error {
		j, err := decode[protocol.Joining](kv)
		if err != nil {
			return err
		}
		return each(j)
	})
}

// PutJoining keeps a token's request, with a lease until the token has ended everywhere.
func (t *Term) PutJoining(ctx context.Context, j protocol.Joining) error {
	left := time.Until(j.Ends.Add(2 * protocol.ClockSkew))
	if left <= 0 || left > protocol.MaxTokenLife+time.Hour {
		return errors.New("the token has ended, or never does")
	}
	lease, err := t.store.client.Grant(ctx, int64(left/time.Second)+1)
	if err != nil {
		return fmt.Errorf("can't write to etcd: %w", err)
	}
	return t.write(ctx, put(joinings+j.Token, j, clientv3.WithLease(lease.ID)))
}
