// Package testfleet is a fleet inside a test: real keys, a real broker in operator mode with TLS and
// WebSocket, and the controller's side of the conversation, which a test plays by hand.
//
// Only tests import it. Start with New.
package testfleet

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// Fleet is a fleet with one broker.
type Fleet struct {
	TB     testing.TB
	Keys   *protocol.FleetKeys
	Public *protocol.Public
	CA     []byte // PEM
	Ports  struct{ TLS, WSS int }

	tls *tls.Config
	dir string // of JetStream

	mu     sync.Mutex
	broker *server.Server
}

// New makes a fleet's keys and starts its broker, which ends with the test.
func New(tb testing.TB) *Fleet {
	tb.Helper()
	f := &Fleet{TB: tb, dir: tb.TempDir()}
	var err error
	f.Keys, err = protocol.NewFleet("test")
	f.must(err)
	f.Public, err = f.Keys.Publish(nil)
	f.must(err)
	f.certificates()
	f.Ports.TLS, f.Ports.WSS = Port(tb), Port(tb)
	f.Start()
	tb.Cleanup(f.Stop)
	return f
}

// Start starts the broker, on the same ports each time.
func (f *Fleet) Start() {
	f.TB.Helper()
	oc, err := jwt.DecodeOperatorClaims(f.Public.OperatorJWT)
	f.must(err)
	resolver := &server.MemAccResolver{}
	for _, token := range []string{f.Public.AccountJWT, f.Public.SystemJWT} {
		c, err := jwt.DecodeAccountClaims(token)
		f.must(err)
		f.must(resolver.Store(c.Subject, token))
	}
	o := &server.Options{
		ServerName: "test", Host: "127.0.0.1", Port: f.Ports.TLS, TLSConfig: f.tls, TLSTimeout: patience.Seconds(), AuthTimeout: patience.Seconds(),
		Websocket:        server.WebsocketOpts{Host: "127.0.0.1", Port: f.Ports.WSS, TLSConfig: f.tls, HandshakeTimeout: patience, AuthTimeout: patience.Seconds()},
		TrustedOperators: []*jwt.OperatorClaims{oc}, SystemAccount: oc.SystemAccount, AccountResolver: resolver,
		MaxPayload: protocol.MaxMessage, NoSigs: true, NoLog: true, JetStream: true, StoreDir: f.dir,
	}
	s, err := server.NewServer(o)
	f.must(err)
	s.Start()
	if !s.ReadyForConnections(patience) {
		f.TB.Fatal("the broker does not start")
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	f.broker = s
}

// Stop stops the broker, cutting everybody off.
func (f *Fleet) Stop() {
	f.mu.Lock()
	s := f.broker
	f.broker = nil
	f.mu.Unlock()
	if s != nil {
		s.Shutdown()
		s.WaitForShutdown()
	}
}

// Revoke makes a new account JWT in which a user's key is void and hands it to the broker.
func (f *Fleet) Revoke(key string) {
	f.TB.Helper()
	p, err := f.Keys.Publish(map[string]time.Time{key: time.Now()})
	f.must(err)
	f.Public = p
	c, err := jwt.DecodeAccountClaims(p.AccountJWT)
	f.must(err)
	f.mu.Lock()
	defer f.mu.Unlock()
	f.must(f.broker.AccountResolver().Store(c.Subject, p.AccountJWT))
	account, err := f.broker.LookupAccount(c.Subject)
	f.must(err)
	f.broker.UpdateAccountClaims(account, c)
}

// URLs are the broker's, tls first.
func (f *Fleet) URLs() []string {
	return []string{fmt.Sprintf("tls://127.0.0.1:%d", f.Ports.TLS), fmt.Sprintf("wss://127.0.0.1:%d", f.Ports.WSS)}
}

// Enrol makes a node below a new folder, as a machine and its operator do; no urls means URLs.
func (f *Fleet) Enrol(name string, urls ...string) *machine.Machine {
	f.TB.Helper()
	home := machine.Home{Dir: f.TB.TempDir(), Role: protocol.Node}
	f.EnrolAt(home, name, urls...)
	m, err := home.Open()
	f.must(err)
	return m
}

// EnrolAt enrols a node in a folder.
func (f *Fleet) EnrolAt(home machine.Home, name string, urls ...string) {
	f.TB.Helper()
	r, err := home.Request(name)
	f.must(err)
	_, err = home.Load(f.Answer(r, urls...))
	f.must(err)
}

// Answer is what the operator says to an enrolment request.
func (f *Fleet) Answer(r *protocol.EnrolRequest, urls ...string) []byte {
	f.TB.Helper()
	if len(urls) == 0 {
		urls = f.URLs()
	}
	token, err := f.Keys.IssueNode(r.Name, r.Key, r.XKey)
	f.must(err)
	return protocol.Encode(protocol.EnrolAnswer{Version: protocol.Version, Role: r.Role, Name: r.Name, User: token,
		Fleet: *f.Public, CA: f.CA, Controllers: urls})
}

// User makes an identity of a role.
func (f *Fleet) User(name string, role protocol.Role) *protocol.Signer {
	f.TB.Helper()
	key, err := nkeys.CreateUser()
	f.must(err)
	pub, err := key.PublicKey()
	f.must(err)
	token, err := f.Keys.Issue(name, role, pub, time.Time{})
	f.must(err)
	return &protocol.Signer{User: token, Key: key}
}

// Connect connects somebody to the broker; inbox may be "".
func (f *Fleet) Connect(s *protocol.Signer, inbox string, extra ...nats.Option) *nats.Conn {
	f.TB.Helper()
	if inbox == "" {
		inbox = "_INBOX"
	}
	nc, err := connect.To{URLs: f.URLs()[:1], CA: f.CA, Signer: s, Name: "test", InboxPrefix: inbox, Timeout: patience}.Dial(
		append([]nats.Option{nats.ReconnectWait(20 * time.Millisecond), nats.MaxReconnects(-1), nats.ReconnectJitter(0, 0)}, extra...)...)
	f.must(err)
	f.TB.Cleanup(nc.Close)
	return nc
}

// Controller connects as a controller.
func (f *Fleet) Controller() *nats.Conn {
	f.TB.Helper()
	return f.Connect(f.User("ctl", protocol.Controller), protocol.ControllerInbox("ctl"))
}

// Serve answers what nodes say on up.<what> by what handle returns.
func (f *Fleet) Serve(nc *nats.Conn, what string, handle func(node string, data []byte) (any, error)) {
	f.TB.Helper()
	_, err := nc.Subscribe(protocol.UpSubject("*", what), func(m *nats.Msg) {
		node, _, ok := protocol.UpSender(m.Subject)
		if !ok {
			return
		}
		body, err := handle(node, m.Data)
		if m.Reply != "" && protocol.OwnInbox(node, m.Reply) {
			_ = m.Respond(protocol.Encode(protocol.Answer(protocol.ControllerName, body, err))) // the broker may be going down
		}
	})
	f.must(err)
	f.must(nc.FlushTimeout(patience))
}

func (f *Fleet) certificates() {
	f.TB.Helper()
	caKey, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	f.must(err)
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, ca, ca, caKey.Public(), caKey)
	f.must(err)
	f.CA = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	f.must(err)
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: pkix.Name{CommonName: "localhost"}, NotBefore: time.Now().Add(-time.Hour),
		NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	leafDER, err := x509.CreateCertificate(rand.Reader, leaf, ca, key.Public(), caKey)
	f.must(err)
	f.tls = &tls.Config{Certificates: []tls.Certificate{{Certificate: [][]byte{leafDER}, PrivateKey: key}}, MinVersion: tls.VersionTLS13}
}

func (f *Fleet) must(err error) {
	f.TB.Helper()
	if err != nil {
		f.TB.Fatal(err)
	}
}

// patience is how long something is waited for that comes by itself: on a busy machine little is at once.
const patience = 5 * time.Minute

// Eventually waits until ok says so, for some minutes at most.
func Eventually(tb testing.TB, what string, ok func() bool) {
	tb.Helper()
	for deadline := time.Now().Add(patience); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			tb.Fatalf("not within %v: %s", patience, what)
		}
	}
}
