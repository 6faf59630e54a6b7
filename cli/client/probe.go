package client

import (
	"context"
	"crypto/tls"
	"crypto/x509"
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
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(config.CA) // To's own options refuse it where it is none
	type result struct {
		ends time.Time
		err  error
	}
	done := make(chan result, 1)
	go func() {
		var r result
		nc, err := to.Dial(nats.NoReconnect(), nats.Secure(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13,
			VerifyConnection: func(s tls.ConnectionState) error { // comes after all that TLS verifies by itself
				r.ends = s.PeerCertificates[0].NotAfter
				return nil
			}}))
		if r.err = err; err == nil {
			nc.Close()
		} else {
			r.err = explain(err, config)
		}
		done <- r
	}()
	select {
	case r := <-done:
		return r.ends, r.err
	case <-ctx.Done(): // nats.go can't be interrupted while it dials
		return time.Time{}, ctx.Err()
	}
}
