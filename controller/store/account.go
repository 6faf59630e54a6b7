package store

import (
	"context"
	"fmt"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"
)

// PutAccount keeps the account JWT that every controller starts from.
func (t *Term) PutAccount(ctx context.Context, token string) error {
	return t.write(ctx, clientv3.OpPut(account, token))
}

// Account is the one that is kept, "" where there is none.
func (s *Store) Account(ctx context.Context) (string, error) {
	token, _, err := s.account(ctx)
	return token, err
}

func (s *Store) account(ctx context.Context) (token string, revision int64, err error) {
	r, err := s.client.Get(ctx, account)
	if err != nil {
		return "", 0, fmt.Errorf("can't read the account JWT from etcd: %w", err)
	}
	for _, kv := range r.Kvs {
		token = string(kv.Value)
	}
	return token, r.Header.Revision, nil
}

// WatchAccount hands the account JWT to each, now and whenever it changes, until ctx ends.
func (s *Store) WatchAccount(ctx context.Context, each func(token string)) {
	for ctx.Err() == nil {
		token, revision, err := s.account(ctx)
		if err == nil {
			if token != "" {
				each(token)
			}
			for r := range s.client.Watch(clientv3.WithRequireLeader(ctx), account, clientv3.WithRev(revision+1)) {
				for _, e := range r.Events {
					if e.Type == clientv3.EventTypePut {
						each(string(e.Kv.Value))
					}
				}
			}
		}
		// Out of reach, or without a quorum: it is read again, so that nothing is missed.
		select {
		case <-ctx.Done():
		case <-time.After(time.Second):
		}
	}
}
