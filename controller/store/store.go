// Package store is what the controller remembers in etcd: nodes, desired state, deployments and who is
// alive. The etcd is embedded in this process or an external one; the keys are the same.
//
//	/nix-infra/leader/…                     the election
//	/nix-infra/nodes/<node>                 protocol.NodeRecord
//	/nix-infra/desired/<node>               protocol.Desired
//	/nix-infra/heartbeats/<node>            Sighting, under a shared lease: gone means lost
//	/nix-infra/tracked/<number>             empty, under the shared lease of that number: gone means that nobody kept track
//	/nix-infra/last/<node>                  Sighting, of a node that is lost or was when the controller stopped
//	/nix-infra/deployments/<id>             Deployment
//	/nix-infra/deployments/<id>/nodes/<node>  Entry, held back or released
//	/nix-infra/rollouts/<id>                rollout.Rollout: where the release of a deployment stands
//	/nix-infra/account                      the newest account JWT, which says who was revoked
//	/nix-infra/joinings/<key>               protocol.Joining of a token, under a lease until the token has ended
//	/nix-infra/seen/<id>                    requests that must not run twice, under a lease until they expire
//
// Everybody may read; only the elected leader writes, through its Term, and each of its writes holds
// only while it is the leader.
package store

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	"go.etcd.io/etcd/api/v3/mvccpb"
	clientv3 "go.etcd.io/etcd/client/v3"
	"go.etcd.io/etcd/server/v3/embed"
	"go.uber.org/zap"

	"github.com/nix-infra/nix-infra/protocol"
)

const (
	root        = "/nix-infra/"
	leaderKey   = root + "leader"
	nodes       = root + "nodes/"
	desired     = root + "desired/"
	heartbeats  = root + "heartbeats/"
	tracked     = root + "tracked/"
	last        = root + "last/"
	deployments = root + "deployments/"
	rollouts    = root + "rollouts/"
	account     = root + "account"
	joinings    = root + "joinings/"
	seen        = root + "seen/"
)

// pageSize is how many keys are read at once.
const pageSize = 1000

// Config says which etcd to use.
type Config struct {
	Dir       string   // where the embedded one keeps its data
	Endpoints []string // of an external one; then nothing is embedded
	CA        string   // file names, PEM; for the external one
	Cert      string
	Key       string
}

// Store is the connection to etcd.
type Store struct {
	client *clientv3.Client
	etcd   *embed.Etcd // nil: external
}

// Open starts or reaches etcd.
func Open(ctx context.Context, cfg Config, log *slog.Logger) (*Store, error) {
	logger := zap.New(bridge{log: log.With("part", "etcd")})
	if len(cfg.Endpoints) == 0 {
		return openEmbedded(ctx, cfg.Dir, logger)
	}
	tlsConfig, err := cfg.tls()
	if err != nil {
		return nil, err
	}
	c, err := clientv3.New(clientv3.Config{
		Endpoints: cfg.Endpoints, TLS: tlsConfig, Logger: logger,
		DialTimeout: 5 * time.Second, DialKeepAliveTime: 10 * time.Second, DialKeepAliveTimeout: 5 * time.Second,
	})
	if err != nil {
		return nil, fmt.Errorf("can't use the etcd of etcd.external: %w", err)
	}
	s := &Store{client: c}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	if err := s.Healthy(ctx); err != nil {
		s.Close()
		return nil, fmt.Errorf("etcd at %s does not answer; check etcd.external: %w", strings.Join(cfg.Endpoints, ", "), err)
	}
	return s, nil
}

func (cfg Config) tls() (*tls.Config, error) {
	if cfg.CA == "" && cfg.Cert == "" && cfg.Key == "" {
		return nil, nil
	}
	c := &tls.Config{MinVersion: tls.VersionTLS12}
	if cfg.CA != "" {
		pem, err := os.ReadFile(cfg.CA)
		if err != nil {
			return nil, fmt.Errorf("etcd.external.ca: %w", err)
		}
		c.RootCAs = x509.NewCertPool()
		if !c.RootCAs.AppendCertsFromPEM(pem) {
			return nil, fmt.Errorf("etcd.external.ca: %s holds no PEM certificate", cfg.CA)
		}
	}
	if cfg.Cert != "" || cfg.Key != "" {
		pair, err := tls.LoadX509KeyPair(cfg.Cert, cfg.Key)
		if err != nil {
			return nil, fmt.Errorf("etcd.external.cert and key: %w", err)
		}
		c.Certificates = []tls.Certificate{pair}
	}
	return c, nil
}

// Client is the etcd client, for packages that keep keys of their own.
func (s *Store) Client() *clientv3.Client { return s.client }

// Embedded tells whether etcd runs in this process: then nobody else can be the leader.
func (s *Store) Embedded() bool { return s.etcd != nil }

// Failed reports that the embedded etcd stopped by itself. It is nil, and never ready, for an external one.
func (s *Store) Failed() <-chan error {
	if s.etcd == nil {
		return nil
	}
	return s.etcd.Err()
}

// Healthy is nil while etcd answers, by a read that a quorum confirms.
func (s *Store) Healthy(ctx context.Context) error {
	_, err := s.client.Get(ctx, root+"health")
	return err
}

// Close ends the client and the embedded etcd.
func (s *Store) Close() {
	// The error is that of a context that we ended.
	_ = s.client.Close()
	if s.etcd != nil {
		s.etcd.Close()
	}
}

// scan calls each for all keys below prefix, as of one revision, in order.
func (s *Store) scan(ctx context.Context, prefix string, each func(*mvccpb.KeyValue) error) error {
	end := clientv3.GetPrefixRangeEnd(prefix)
	from, revision := prefix, int64(0)
	for {
		r, err := s.client.Get(ctx, from, clientv3.WithRange(end), clientv3.WithLimit(pageSize), clientv3.WithRev(revision))
		if err != nil {
			return fmt.Errorf("can't read %s from etcd: %w", prefix, err)
		}
		for _, kv := range r.Kvs {
			if err := each(kv); err != nil {
				return err
			}
		}
		if !r.More {
			return nil
		}
		from, revision = string(r.Kvs[len(r.Kvs)-1].Key)+"\x00", r.Header.Revision
	}
}

// load reads all values of a type below prefix, by the rest of the key.
func load[T any](ctx context.Context, s *Store, prefix string) (map[string]T, error) {
	all := map[string]T{}
	err := s.scan(ctx, prefix, func(kv *mvccpb.KeyValue) error {
		v, err := decode[T](kv)
		all[strings.TrimPrefix(string(kv.Key), prefix)] = v
		return err
	})
	return all, err
}

func decode[T any](kv *mvccpb.KeyValue) (T, error) {
	var v T
	if err := json.Unmarshal(kv.Value, &v); err != nil {
		return v, fmt.Errorf("the value of %s in etcd is damaged: %w", kv.Key, err)
	}
	return v, nil
}

func put(key string, value any, opts ...clientv3.OpOption) clientv3.Op {
	return clientv3.OpPut(key, string(protocol.Encode(value)), opts...)
}

// Nodes are all enrolled nodes, by name.
func (s *Store) Nodes(ctx context.Context) (map[string]protocol.NodeRecord, error) {
	return load[protocol.NodeRecord](ctx, s, nodes)
}

// Desired is what each node should have, by name.
func (s *Store) Desired(ctx context.Context) (map[string]protocol.Desired, error) {
	return load[protocol.Desired](ctx, s, desired)
}

// PutNode adds or changes a node's record.
func (t *Term) PutNode(ctx context.Context, r protocol.NodeRecord) error {
	return t.write(ctx, put(nodes+r.Name, r))
}

// RemoveNode forgets a node; what it did in deployments stays in their records.
func (t *Term) RemoveNode(ctx context.Context, node string) error {
	return t.write(ctx, clientv3.OpDelete(nodes+node), clientv3.OpDelete(desired+node),
		clientv3.OpDelete(heartbeats+node), clientv3.OpDelete(last+node))
}

// Remember keeps a request's id until a time. It does not matter if it is kept for a little longer.
func (t *Term) Remember(ctx context.Context, id string, until time.Time) error {
	lease, err := t.store.client.Grant(ctx, max(1, int64(time.Until(until)/time.Second)+1))
	if err != nil {
		return fmt.Errorf("can't write to etcd: %w", err)
	}
	return t.write(ctx, put(seen+id, until, clientv3.WithLease(lease.ID)))
}

// Remembered are the ids of Remember that are still kept, with their times.
func (s *Store) Remembered(ctx context.Context) (map[string]time.Time, error) {
	return load[time.Time](ctx, s, seen)
}

// ErrNotLeader says that a write was not made, because another controller leads by now.
var ErrNotLeader = errors.New("this controller is not the leader any more")
