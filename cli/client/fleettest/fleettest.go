// Package fleettest is a fleet for the tests of the command line: a real broker in operator mode with
// TLS, a controller that keeps everything in maps, and nodes that do as a test tells them.
package fleettest

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/cli/provision"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

// Fleet is a running fleet.
type Fleet struct {
	URL       string
	Authority provision.Authority

	t        testing.TB
	server   *server.Server
	verifier *protocol.Verifier

	mu          sync.Mutex
	nodes       map[string]*Node
	records     map[string]*protocol.NodeState
	joining     map[string]*protocol.Joining // by their tokens
	xkeys       map[string]nkeys.KeyPair
	blobs       map[string][]byte
	pieces      map[string][]byte
	forgets     int
	manifests   map[string]string // digests, by deployment and node
	deployments []*protocol.Deployment
	through     map[string]time.Time // waves, by deployment and number
	requests    []protocol.Action
	uploads     int
	ahead       time.Duration // of the controller's clock
	deaf        bool
	foreign     bool                    // the broker is somebody else's
	written     []protocol.StoredRecord // the record
	cut         uint64                  // how many of it are gone from its beginning
	health      *protocol.ControllerHealth
}

// New makes keys and a CA, for tests that need no project.
func New(t testing.TB) *Fleet {
	keys, err := protocol.NewFleet("testfleet")
	must(t, err)
	public, err := keys.Publish(nil)
	must(t, err)
	ca, err := provision.NewCA("testfleet", time.Now())
	must(t, err)
	return Start(t, provision.Authority{Keys: keys, Public: *public, CA: ca})
}

// Start runs the broker and the controller of a fleet until the test ends.
func Start(t testing.TB, a provision.Authority) *Fleet {
	f := &Fleet{t: t, Authority: a, nodes: map[string]*Node{}, records: map[string]*protocol.NodeState{}, joining: map[string]*protocol.Joining{}, xkeys: map[string]nkeys.KeyPair{}, blobs: map[string][]byte{}, pieces: map[string][]byte{}, manifests: map[string]string{}, through: map[string]time.Time{},
		health: &protocol.ControllerHealth{Version: protocol.Build(), DiskTotal: 1 << 34, DiskFree: 1 << 33}}
	var err error
	f.verifier, err = protocol.NewVerifier(a.Public.Operator, a.Public.AccountJWT)
	must(t, err)
	resolver := &server.MemAccResolver{}
	for _, token := range []string{a.Public.AccountJWT, a.Public.SystemJWT} {
		c, err := jwt.DecodeAccountClaims(token)
		must(t, err)
		must(t, resolver.Store(c.Subject, token))
	}
	f.server = f.broker(resolver)
	f.URL = fmt.Sprintf("tls://127.0.0.1:%d", f.server.Addr().(*net.TCPAddr).Port)
	f.Authority.Controllers = []string{f.URL}
	f.control()
	return f
}

// patience is how long connections may take: the machine may have much else to do.
const patience = time.Minute

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func (f *Fleet) broker(resolver server.AccountResolver) *server.Server {
	operator, err := jwt.DecodeOperatorClaims(f.Authority.Public.OperatorJWT)
	must(f.t, err)
	s, err := server.NewServer(&server.Options{
		Host: "127.0.0.1", Port: server.RANDOM_PORT, NoLog: true, NoSigs: true, MaxPayload: protocol.MaxMessage,
		TrustedOperators: []*jwt.OperatorClaims{operator}, AccountResolver: resolver, SystemAccount: operator.SystemAccount,
		TLS: true, TLSConfig: &tls.Config{Certificates: []tls.Certificate{f.certificate()}}, TLSTimeout: patience.Seconds(), AuthTimeout: patience.Seconds(),
	})
	must(f.t, err)
	s.Start()
	f.t.Cleanup(func() { s.Shutdown(); s.WaitForShutdown() })
	if !s.ReadyForConnections(patience) {
		f.t.Fatal("the broker does not start")
	}
	return s
}

func (f *Fleet) certificate() tls.Certificate {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(f.t, err)
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: "ctl"}}, key)
	must(f.t, err)
	cert, err := f.Authority.CA.SignController(csr, []string{"ctl", "127.0.0.1"}, time.Now())
	must(f.t, err)
	der, err := x509.MarshalPKCS8PrivateKey(key)
	must(f.t, err)
	pair, err := tls.X509KeyPair(cert, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
	must(f.t, err)
	return pair
}

// Stop ends the broker: nothing of the fleet can be reached any more.
func (f *Fleet) Stop() { f.server.Shutdown(); f.server.WaitForShutdown() }

// Deafen makes the controller hear nothing, as if it hung.
func (f *Fleet) Deafen() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.deaf = true
}

// Credentials makes a credentials file.
func (f *Fleet) Credentials(name string, role protocol.Role, expires time.Time) []byte {
	creds, err := f.Authority.Keys.Credentials(name, role, expires)
	must(f.t, err)
	return creds
}

// Signer makes an identity.
func (f *Fleet) Signer(name string, role protocol.Role) *protocol.Signer {
	s, _, err := protocol.ParseCredentials(f.Credentials(name, role, time.Time{}))
	must(f.t, err)
	return s
}

// Connect connects to the broker as anybody, without the client under test.
func (f *Fleet) Connect(name string, role protocol.Role) *nats.Conn {
	nc, err := connect.To{URLs: []string{f.URL}, CA: f.Authority.CA.Public(), Signer: f.Signer(name, role), Name: name, InboxPrefix: "unused", Timeout: patience}.Dial(nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {}))
	must(f.t, err)
	f.t.Cleanup(nc.Close)
	return nc
}

// Requests are the actions that the controller was asked for, in order, and forgets them.
func (f *Fleet) Requests() []protocol.Action {
	f.mu.Lock()
	defer f.mu.Unlock()
	r := f.requests
	f.requests = nil
	return r
}

// Record is what the controller keeps of a node, nil if nothing.
func (f *Fleet) Record(name string) *protocol.NodeState {
	f.mu.Lock()
	defer f.mu.Unlock()
	if r := f.records[name]; r != nil {
		c := *r
		return &c
	}
	return nil
}

// Change changes what the controller keeps of a node.
func (f *Fleet) Change(name string, change func(*protocol.NodeState)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change(f.records[name])
}
