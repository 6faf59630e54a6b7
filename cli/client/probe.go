package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"sync/atomic"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

// Probe connects by one of the controllers' URLs and leaves again. It tells when the certificate ends that is shown
// there; the zero time where none was shown that is good.
func Probe(ctx context.Context, config Config, url string) (certificateEnds time.Time, err error) {
	config.URLs = []string{url}
	to := connect.To{URLs: config.URLs, CA: config.CA, Signer: config.Signer, Timeout: config.Timeout, Name: "nix-infra " + config.Name,
		InboxPrefix: protocol.ReplySubject(config.Name, "probe", "x")}
	var ends atomic.Pointer[time.Time]
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(config.CA) // To's own options refuse it where it is none
	nc, err := dial(ctx, to, nats.NoReconnect(), nats.Secure(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13,
		VerifyConnection: func(s tls.ConnectionState) error { // comes after all that TLS verifies by itself
			ends.Store(&s.PeerCertificates[0].NotAfter)
			return nil
		}}))
	switch {
	case err == nil:
		nc.Close()
	case ctx.Err() != nil:
		return time.Time{}, ctx.Err()
	default:
		err = explain(err, config)
	}
	if shown := ends.Load(); shown != nil {
		certificateEnds = *shown
	}
	return certificateEnds, err
}
