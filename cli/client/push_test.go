package client

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

// A broker as somebody else runs it is told who was revoked, where it can be told.
func TestPushAccount(t *testing.T) {
	t.Parallel()
	f := fleettest.New(t)
	keys := f.Authority.Keys
	system := func() *protocol.Signer {
		s, err := keys.SystemUser(time.Now())
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	resolver, err := server.NewDirAccResolver(t.TempDir(), 0, time.Hour, server.NoDelete)
	if err != nil {
		t.Fatal(err)
	}
	for _, token := range []string{f.Authority.Public.AccountJWT, f.Authority.Public.SystemJWT} {
		c, err := jwt.DecodeAccountClaims(token)
		if err != nil {
			t.Fatal(err)
		}
		if err := resolver.Store(c.Subject, token); err != nil {
			t.Fatal(err)
		}
	}
	own := f.Broker(resolver)
	bob := f.Signer("bob", protocol.Viewer)
	to := connect.To{URLs: []string{own}, CA: f.Authority.CA.Public(), Signer: bob, Name: "bob", InboxPrefix: "unused", Timeout: time.Minute}
	closed := make(chan struct{})
	nc, err := to.Dial(nats.NoReconnect(), nats.ClosedHandler(func(*nats.Conn) { close(closed) }), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	if err != nil {
		t.Fatal(err)
	}
	defer nc.Close()
	key, err := bob.Key.PublicKey()
	if err != nil {
		t.Fatal(err)
	}
	for s := time.Now().Unix(); time.Now().Unix() == s; { // which is the newest is told by the second
		time.Sleep(10 * time.Millisecond)
	}
	public, err := keys.Publish(map[string]time.Time{key: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	config := Config{URLs: []string{own}, CA: f.Authority.CA.Public(), Signer: system()}
	if err := PushAccount(t.Context(), config, public.AccountJWT); err != nil {
		t.Fatal(err)
	}
	select {
	case <-closed:
	case <-time.After(time.Minute):
		t.Fatal("bob is still connected")
	}
	if _, err := to.Dial(); !errors.Is(err, nats.ErrAuthRevoked) && !errors.Is(err, nats.ErrAuthorization) {
		t.Errorf("bob came in again: %v", err)
	}
	if err := PushAccount(t.Context(), config, "x"); err == nil || !strings.Contains(err.Error(), "it refuses") {
		t.Errorf("nonsense: %v", err)
	}
	config.URLs = []string{f.URL}
	if err := PushAccount(t.Context(), config, public.AccountJWT); err == nil || !strings.Contains(err.Error(), "can't be told") {
		t.Errorf("a broker with a list in its configuration: %v", err)
	}
}
