package controller

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/nats-io/nats.go"
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func value[V any](t testing.TB) func(V, error) V {
	return func(v V, err error) V {
		t.Helper()
		must(t, err)
		return v
	}
}

// patience is how long tests wait for what has to come: on a busy machine little is at once.
const patience = time.Minute

// eventually polls until ok.
func eventually(t testing.TB, what string, ok func() bool) {
	t.Helper()
	deadline := time.Now().Add(patience)
	for !ok() {
		if time.Now().After(deadline) {
			t.Fatalf("not within %s: %s", patience, what)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// rig is a fleet with its operator's keys and one enrolled controller.
type rig struct {
	t     testing.TB
	keys  *protocol.FleetKeys
	cfg   Config
	ca    []byte
	caKey *ecdsa.PrivateKey
	c     *Controller
	url   string
}

// enrolled makes a fleet and a controller's folder.
func enrolled(t testing.TB) *rig {
	t.Helper()
	r := &rig{t: t, keys: value[*protocol.FleetKeys](t)(protocol.NewFleet("test")), cfg: DefaultConfig(t.TempDir())}
	r.cfg.Broker.Listen, r.cfg.Broker.Websocket = "127.0.0.1:0", "127.0.0.1:0"
	r.enrol(r.cfg.Dir, "ctl1")
	return r
}

func (r *rig) enrol(dir, name string) {
	t := r.t
	t.Helper()
	home := machine.Home{Dir: dir, Role: protocol.Controller}
	req := value[*protocol.EnrolRequest](t)(home.Request(name))
	if r.caKey == nil {
		r.caKey = value[*ecdsa.PrivateKey](t)(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	}
	caKey := r.caKey
	ca := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "test CA"}, IsCA: true, BasicConstraintsValid: true,
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(time.Hour), KeyUsage: x509.KeyUsageCertSign}
	caDER := value[[]byte](t)(x509.CreateCertificate(rand.Reader, ca, ca, &caKey.PublicKey, caKey))
	csr := value[*x509.CertificateRequest](t)(x509.ParseCertificateRequest(req.CSR))
	leaf := &x509.Certificate{SerialNumber: big.NewInt(2), Subject: csr.Subject, DNSNames: []string{name, "localhost"},
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, NotBefore: ca.NotBefore, NotAfter: ca.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}}
	der := value[[]byte](t)(x509.CreateCertificate(rand.Reader, leaf, ca, csr.PublicKey, caKey))
	toPEM := func(der []byte) []byte { return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}) }
	r.ca = toPEM(caDER)
	answer := protocol.EnrolAnswer{Version: protocol.Version, Role: protocol.Controller, Name: name,
		User:  value[string](t)(r.keys.Issue(name, protocol.Controller, req.Key, time.Time{})),
		Fleet: *value[*protocol.Public](t)(r.keys.Publish(nil)), CA: r.ca,
		Controllers: []string{"tls://127.0.0.1:4222"}, Certificate: toPEM(der)}
	_, err := home.Load(protocol.Encode(answer))
	must(t, err)
}

func (r *rig) start() *rig {
	r.t.Helper()
	r.c = value[*Controller](r.t)(Start(context.Background(), r.cfg, testLog()))
	c := r.c
	r.url = c.ClientURL()
	r.t.Cleanup(func() { must(r.t, c.Stop()) })
	return r
}

// starting keeps programs from being started while a controller stops: until they run they have all files of this process,
// and etcd's would stay locked.
var starting sync.RWMutex

// restart stops and starts on the same data.
func (r *rig) restart() {
	r.t.Helper()
	starting.RLock()
	err := r.c.Stop()
	starting.RUnlock()
	must(r.t, err)
	r.start()
}

func startRig(t testing.TB) *rig {
	t.Helper()
	return enrolled(t).start()
}

// testLog is silent unless TEST_LOG is set.
func testLog() *slog.Logger {
	if os.Getenv("TEST_LOG") == "" {
		return slog.New(slog.NewTextHandler(io.Discard, nil))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, nil))
}

func (r *rig) tls() *tls.Config {
	pool := x509.NewCertPool()
	pool.AppendCertsFromPEM(r.ca)
	return &tls.Config{RootCAs: pool}
}

// connect tries to connect by TLS with somebody's own credentials, once.
func (r *rig) connect(s *protocol.Signer, more ...nats.Option) (*nats.Conn, error) {
	options := []nats.Option{nats.Secure(r.tls()), nats.UserJWT(func() (string, error) { return s.User, nil }, s.Key.Sign),
		nats.Timeout(patience), nats.MaxReconnects(0), nats.ErrorHandler(func(*nats.Conn, *nats.Subscription, error) {})}
	return nats.Connect(r.url, append(options, more...)...)
}

// dial connects for as long as the test lasts.
func (r *rig) dial(s *protocol.Signer, inbox string) *nats.Conn {
	r.t.Helper()
	nc := value[*nats.Conn](r.t)(r.connect(s, nats.CustomInboxPrefix(inbox)))
	r.t.Cleanup(nc.Close)
	return nc
}

// person is somebody with a role and a connection.
type person struct {
	*protocol.Signer
	r    *rig
	name string
	nc   *nats.Conn
}

func (r *rig) signer(name string, role protocol.Role) *protocol.Signer {
	r.t.Helper()
	creds := value[[]byte](r.t)(r.keys.Credentials(name, role, time.Time{}))
	s, _, err := protocol.ParseCredentials(creds)
	must(r.t, err)
	return s
}

func (r *rig) person(name string, role protocol.Role) *person {
	r.t.Helper()
	s := r.signer(name, role)
	return &person{s, r, name, r.dial(s, "ni.v1.reply."+name)}
}

// ask sends a request and waits for the answer.
func (p *person) ask(a protocol.Action, payload any) (protocol.Reply, error) {
	signed, id, err := p.Request(a, protocol.ControllerName, payload, time.Now())
	if err != nil {
		return protocol.Reply{}, err
	}
	return p.send(a, signed, id)
}

func (p *person) send(a protocol.Action, signed *protocol.Signed, id string) (protocol.Reply, error) {
	return p.sendRaw(protocol.RequestSubject(protocol.ControllerName, a), protocol.Encode(signed), id)
}

func (p *person) sendRaw(subject string, data []byte, id string) (protocol.Reply, error) {
	reply := protocol.ReplySubject(p.name, id, protocol.ControllerName)
	sub, err := p.nc.SubscribeSync(reply)
	if err != nil {
		return protocol.Reply{}, err
	}
	defer sub.Unsubscribe()
	if err := p.nc.PublishRequest(subject, reply, data); err != nil {
		return protocol.Reply{}, err
	}
	// What the broker does not let through is never answered: it says so before it answers a ping.
	_ = p.nc.FlushTimeout(patience) // whoever has lost the broker waits for it below
	if err := p.nc.LastError(); errors.Is(err, nats.ErrPermissionViolation) && strings.Contains(err.Error(), subject) {
		return protocol.Reply{}, err
	}
	m, err := sub.NextMsg(patience)
	if err != nil {
		return protocol.Reply{}, err
	}
	answer, err := protocol.Decode[protocol.Reply](m.Data)
	if err == nil && answer.Refused != nil {
		err = answer.Refused
	}
	return answer, err
}

func asked[V any](t testing.TB, p *person, a protocol.Action, payload any) V {
	t.Helper()
	r, err := p.ask(a, payload)
	must(t, err)
	var v V
	if len(r.Body) > 0 {
		must(t, json.Unmarshal(r.Body, &v))
	}
	return v
}

func wantCode(t testing.TB, err error, code protocol.Code) {
	t.Helper()
	if !errors.Is(err, &protocol.Refusal{Code: code}) {
		t.Fatalf("got %v, want %s", err, code)
	}
}

// machineNode is a raw node: a connection with a node's credentials and nothing else.
type machineNode struct {
	name   string
	signer *protocol.Signer
	nc     *nats.Conn
}

// node enrols a node with the controller and connects as it.
func (r *rig) node(admin *person, name string) *machineNode {
	r.t.Helper()
	s := r.signer(name, protocol.Node)
	asked[protocol.NodeRecord](r.t, admin, protocol.PutNode, r.record(name, s))
	return &machineNode{name, s, r.dial(s, protocol.InboxPrefix(name))}
}

// online enrols nodes that beat once, which is good for minutes.
func (r *rig) online(admin *person, names ...string) []*machineNode {
	r.t.Helper()
	var nodes []*machineNode
	for _, name := range names {
		n := r.node(admin, name)
		n.beat(r.t, protocol.Beat{Interval: 120})
		nodes = append(nodes, n)
	}
	r.knows(admin, names...)
	return nodes
}

// knows waits until the controller knows that nodes are online.
func (r *rig) knows(viewer *person, names ...string) {
	r.t.Helper()
	for _, name := range names {
		eventually(r.t, name+" is online", func() bool { return r.state(r.t, viewer, name).Online })
	}
}

// show is a deployment with its nodes.
func (p *person) show(t testing.TB, id string) protocol.Deployment {
	t.Helper()
	return asked[protocol.Deployment](t, p, protocol.ShowDeployment, protocol.DeploymentQuery{ID: id})
}

// released waits until nodes were let have their part of a deployment.
func (p *person) released(t testing.TB, id string, nodes ...string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s is released to %v", id, nodes), func() bool {
		d := p.show(t, id)
		return !slices.ContainsFunc(nodes, func(n string) bool { return !d.Nodes[n].Released })
	})
}

func (r *rig) record(name string, s *protocol.Signer) protocol.NodeRecord {
	r.t.Helper()
	curve := value[nkeys.KeyPair](r.t)(nkeys.CreateCurveKeys())
	key, xkey := value[string](r.t)(s.Key.PublicKey()), value[string](r.t)(curve.PublicKey())
	return protocol.NodeRecord{Name: name, Key: key, XKey: xkey, JWT: value[string](r.t)(r.keys.IssueNode(name, key, xkey))}
}

// ask asks the controller and waits for the answer.
func (n *machineNode) ask(what string, payload any) (protocol.Reply, error) {
	m, err := n.nc.Request(protocol.UpSubject(n.name, what), protocol.Encode(payload), patience)
	if err != nil {
		return protocol.Reply{}, err
	}
	r, err := protocol.Decode[protocol.Reply](m.Data)
	if err == nil && r.Refused != nil {
		err = r.Refused
	}
	return r, err
}

func (n *machineNode) manifest(t testing.TB, digest string) (protocol.ManifestReply, error) {
	t.Helper()
	r, err := n.ask(protocol.UpManifest, protocol.ManifestQuery{Digest: digest})
	var m protocol.ManifestReply
	if err == nil {
		must(t, json.Unmarshal(r.Body, &m))
	}
	return m, err
}

func (n *machineNode) blob(t testing.TB, manifest, blob string, offset int64) (protocol.BlobReply, error) {
	t.Helper()
	r, err := n.ask(protocol.UpBlob, protocol.BlobQuery{Manifest: manifest, Blob: blob, Offset: offset})
	var b protocol.BlobReply
	if err == nil {
		must(t, json.Unmarshal(r.Body, &b))
	}
	return b, err
}

func (n *machineNode) beat(t testing.TB, b protocol.Beat) {
	t.Helper()
	b.Version = protocol.Version
	must(t, n.nc.Publish(protocol.UpSubject(n.name, protocol.UpBeat), protocol.Encode(b)))
	must(t, n.nc.FlushTimeout(patience))
}

func compress(t testing.TB, data []byte) []byte {
	t.Helper()
	e := value[*zstd.Encoder](t)(zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1)))
	return e.EncodeAll(data, nil)
}

// upload puts a blob in pieces.
func (p *person) upload(t testing.TB, data []byte) string {
	t.Helper()
	digest, packed := protocol.Digest(data), compress(t, data)
	for offset := 0; ; {
		n := min(protocol.ChunkSize, len(packed)-offset)
		asked[struct{}](t, p, protocol.PutBlobs, onePiece(protocol.BlobPiece{Digest: digest, Size: int64(len(packed)), Offset: int64(offset), Data: packed[offset : offset+n]}))
		if offset += n; offset >= len(packed) {
			return digest
		}
	}
}

func onePiece(p protocol.BlobPiece) protocol.BlobPieces {
	return protocol.BlobPieces{Pieces: []protocol.BlobPiece{p}}
}

// signedManifest uploads one node's tree of one file, and its manifest.
func (p *person) signedManifest(t testing.TB, node, deployment string, serial uint64, mode protocol.Mode, content string) (protocol.DeployItem, string) {
	t.Helper()
	blob := p.upload(t, []byte(content))
	m := &protocol.Manifest{Version: protocol.Version, Node: node, Serial: serial, Deployment: deployment, Created: time.Now(), Mode: mode,
		Files: []protocol.File{{Path: "flake.nix", SHA256: blob, Size: int64(len(content))}}, Attr: protocol.SystemAttr(node),
		Timeout: 60, BuildTimeout: 60, Settle: 1}
	doc := value[[]byte](t)(p.Signer.Manifest(m))
	return protocol.DeployItem{Node: node, Serial: serial, Digest: p.upload(t, doc)}, blob
}

// deploy deploys a tree of one file to each node.
func (p *person) deploy(t testing.TB, deployment string, serial uint64, nodes ...string) []protocol.DeployItem {
	t.Helper()
	var items []protocol.DeployItem
	for _, n := range nodes {
		item, _ := p.signedManifest(t, n, deployment, serial, protocol.Switch, "tree of "+n+" in "+deployment)
		items = append(items, item)
	}
	asked[protocol.Deployment](t, p, protocol.Deploy, protocol.DeployRequest{Deployment: deployment, Mode: protocol.Switch, Items: items})
	return items
}
