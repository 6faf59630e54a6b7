// Package connect opens connections to a fleet's broker: TLS pinned to the project's CA, a user JWT
// whose key signs the broker's nonce, and an inbox that belongs to the user alone.
package connect

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// To says where to connect and as whom.
type To struct {
	URLs        []string // tls:// and wss://, in order of preference
	CA          []byte   // PEM; the only CA that is trusted
	Signer      *protocol.Signer
	Name        string        // shown in the broker's connection list
	InboxPrefix string        // where answers arrive; the user must be allowed to subscribe below it
	Timeout     time.Duration // for one address; 0 means 5 s
}

// Options are the nats.go options for To, all but the URLs.
func (t To) Options() ([]nats.Option, error) {
	pool := x509.NewCertPool()
	if !pool.AppendCertsFromPEM(t.CA) {
		return nil, errors.New("the CA is not a PEM certificate")
	}
	timeout := t.Timeout
	if timeout == 0 {
		timeout = 5 * time.Second
	}
	return []nats.Option{
		nats.Name(t.Name),
		nats.Timeout(timeout),
		nats.Secure(&tls.Config{RootCAs: pool, MinVersion: tls.VersionTLS13}),
		nats.UserJWT(
			func() (string, error) { return t.Signer.User, nil },
			func(nonce []byte) ([]byte, error) { return t.Signer.Key.Sign(nonce) },
		),
		nats.CustomInboxPrefix(t.InboxPrefix),
		// Each synchronous subscription has the whole queue made, half a MiB by default; ours wait for a few answers.
		nats.SyncQueueLen(1024),
	}, nil
}

// Groups splits the URLs by transport, in order of first appearance: nats.go can't have both in one
// connection. Each group is a list for nats.Connect.
func (t To) Groups() []string {
	var order []string
	byScheme := map[string][]string{}
	for _, u := range t.URLs {
		scheme, _, _ := strings.Cut(u, "://")
		if byScheme[scheme] == nil {
			order = append(order, scheme)
		}
		byScheme[scheme] = append(byScheme[scheme], u)
	}
	groups := make([]string, 0, len(order))
	for _, s := range order {
		groups = append(groups, strings.Join(byScheme[s], ","))
	}
	return groups
}

// Dial connects by the first transport that works.
func (t To) Dial(extra ...nats.Option) (*nats.Conn, error) {
	options, err := t.Options()
	if err != nil {
		return nil, err
	}
	var failed []error
	for _, group := range t.Groups() {
		nc, err := nats.Connect(group, append(options, extra...)...)
		if err == nil {
			return nc, nil
		}
		failed = append(failed, fmt.Errorf("%s: %w", group, err))
	}
	if len(failed) == 0 {
		return nil, errors.New("no controller URL is known")
	}
	if len(failed) == 1 {
		return nil, failed[0]
	}
	return nil, &allFailed{failed}
}

// allFailed is errors.Join on one line.
type allFailed struct{ errs []error }

func (f *allFailed) Error() string {
	texts := make([]string, len(f.errs))
	for i, err := range f.errs {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}

func (f *allFailed) Unwrap() []error { return f.errs }
