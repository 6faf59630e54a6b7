package store

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"time"

	"go.etcd.io/etcd/server/v3/embed"
	"go.etcd.io/etcd/server/v3/etcdserver/api/v3client"
	"go.uber.org/zap"
)

const (
	quota         = 2 << 30 // bytes
	keepRevisions = "10000"
	startTimeout  = 30 * time.Second
)

// openEmbedded starts a cluster of one. It listens nowhere: the only client lives in this process, and
// an open port or socket would be one more door to the fleet's state. A cluster of several members is
// an external one.
func openEmbedded(ctx context.Context, dir string, logger *zap.Logger) (*Store, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("can't make etcd's folder: %w", err)
	}
	cfg := embed.NewConfig()
	cfg.Name = "controller"
	cfg.Dir = dir
	cfg.ListenPeerUrls, cfg.ListenClientUrls = nil, nil
	// A member needs an address to its name, even if nobody ever dials it.
	nowhere := []url.URL{{Scheme: "http", Host: "127.0.0.1:1"}}
	cfg.AdvertisePeerUrls, cfg.AdvertiseClientUrls = nowhere, nowhere
	cfg.InitialCluster = cfg.Name + "=" + nowhere[0].String()
	cfg.ZapLoggerBuilder = embed.NewZapLoggerBuilder(logger)
	cfg.QuotaBackendBytes = quota
	cfg.AutoCompactionMode = embed.CompactorModeRevision
	cfg.AutoCompactionRetention = keepRevisions
	// Alone it wins every election; the shorter the timeout, the sooner it serves after a restart.
	cfg.TickMs, cfg.ElectionMs = 20, 200

	e, err := embed.StartEtcd(cfg)
	if err != nil {
		return nil, fmt.Errorf("can't start the embedded etcd in %s (is another controller using it, or is it damaged?): %w", dir, err)
	}
	timeout := time.NewTimer(startTimeout)
	defer timeout.Stop()
	select {
	case <-e.Server.ReadyNotify():
		return &Store{client: v3client.New(e.Server), etcd: e}, nil
	case err = <-e.Err():
	case <-ctx.Done():
		err = ctx.Err()
	case <-timeout.C:
		err = fmt.Errorf("not ready after %s", startTimeout)
	}
	e.Close()
	return nil, fmt.Errorf("the embedded etcd in %s does not start: %w", dir, err)
}
