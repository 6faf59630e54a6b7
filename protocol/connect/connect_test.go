package connect

import (
	"crypto/ed25519"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"math/big"
	"strings"
	"testing"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// Logs and the command line print it on one line, and nats.go's errors can still be told apart.
func TestDialFailsOnOneLine(t *testing.T) {
	_, key, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1)}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	to := To{URLs: []string{"tls://127.0.0.1:1", "wss://127.0.0.1:1"}, Signer: &protocol.Signer{}, InboxPrefix: "x",
		CA: pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})}
	_, err = to.Dial()
	if err == nil || strings.Contains(err.Error(), "\n") || !errors.Is(err, nats.ErrNoServers) {
		t.Fatalf("%q", err)
	}
	for _, u := range to.URLs {
		if !strings.Contains(err.Error(), u) {
			t.Errorf("it does not name %s: %v", u, err)
		}
	}
}
