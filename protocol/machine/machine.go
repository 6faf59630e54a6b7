// Package machine keeps the identity of a node or a controller: keys that are made on the machine and
// never leave it, and the operator's answer, which says who the machine is and whom it trusts.
package machine

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/atomicfile"
)

// ErrNotEnrolled says that there is no identity yet.
var ErrNotEnrolled = errors.New("this machine is not enrolled")

// Files below Home.Dir.
const (
	keyFile     = "user.nk"        // nkey seed
	xkeyFile    = "curve.nk"       // curve nkey seed, nodes only
	tlsFile     = "tls.key"        // PEM, controllers only
	answerFile  = "enrolment.json" // protocol.EnrolAnswer
	accountFile = "account.jwt"    // a newer account JWT than the answer's

	nextSuffix = ".new" // of keyFile and xkeyFile: keys that are to replace them; see replace.go
)

// Home is where an identity is kept.
type Home struct {
	Dir  string
	Role protocol.Role
}

// Machine is an enrolled identity.
type Machine struct {
	Name        string
	Dir         string
	Answer      protocol.EnrolAnswer
	Key         nkeys.KeyPair
	XKey        nkeys.KeyPair    // nodes
	NextXKey    nkeys.KeyPair    // nodes: the one that is to replace XKey; nil: none was made
	Certificate *tls.Certificate // controllers
}

// Request makes the keys, where there are none yet, and says their public halves.
func (h Home) Request(name string) (*protocol.EnrolRequest, error) {
	if err := protocol.CheckName(name); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(h.Dir, 0o700); err != nil {
		return nil, err
	}
	if err := h.settle(); err != nil {
		return nil, err
	}
	r, _, _, err := h.request(name, "")
	return r, err
}

// request makes the keys in the files of a suffix, where there are none yet.
func (h Home) request(name, suffix string) (r *protocol.EnrolRequest, key, xkey nkeys.KeyPair, err error) {
	if key, err = h.seed(keyFile+suffix, nkeys.CreateUser); err != nil {
		return nil, nil, nil, err
	}
	r = &protocol.EnrolRequest{Version: protocol.Version, Role: h.Role, Name: name, System: system(), IPv4: address(), Created: time.Now().UTC()}
	if r.Hostname, err = os.Hostname(); err != nil {
		return nil, nil, nil, err
	}
	if r.Key, err = key.PublicKey(); err != nil {
		return nil, nil, nil, err
	}
	if h.Role == protocol.Node {
		if xkey, err = h.seed(xkeyFile+suffix, nkeys.CreateCurveKeys); err == nil {
			r.XKey, err = xkey.PublicKey()
		}
	} else {
		r.CSR, err = h.csr(name)
	}
	if err != nil {
		return nil, nil, nil, err
	}
	return r, key, xkey, r.Prove(key)
}

// Load takes over the operator's answer. A machine that has an operator takes no other one's.
func (h Home) Load(answer []byte) (*protocol.EnrolAnswer, error) {
	a, err := protocol.Decode[protocol.EnrolAnswer](answer)
	if err != nil {
		return nil, fmt.Errorf("the enrolment answer: %w", err)
	}
	if a.Role != h.Role {
		return nil, fmt.Errorf("the answer enrols a %s, this program is a %s", a.Role, h.Role)
	}
	if err := h.settle(); err != nil {
		return nil, err
	}
	key, err := readSeed(filepath.Join(h.Dir, keyFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("there are no keys in %s; make a request first", h.Dir)
	} else if err != nil {
		return nil, err
	}
	if err := a.For(key); err != nil {
		return nil, err
	}
	if !x509.NewCertPool().AppendCertsFromPEM(a.CA) {
		return nil, errors.New("the answer's CA is not a PEM certificate")
	}
	if h.Role == protocol.Controller {
		if _, err := h.certificate(&a); err != nil {
			return nil, err
		}
	}
	old, err := h.answer()
	if err == nil && old.Fleet.Operator != a.Fleet.Operator {
		return nil, fmt.Errorf("this machine belongs to another operator (%s); remove %s to give it away", old.Fleet.Operator, h.Dir)
	} else if err != nil && !errors.Is(err, ErrNotEnrolled) {
		return nil, err
	}
	return &a, atomicfile.Write(filepath.Join(h.Dir, answerFile), protocol.Encode(a), 0o600)
}

// Open gives the identity, or ErrNotEnrolled.
func (h Home) Open() (*Machine, error) {
	a, err := h.answer()
	if err != nil {
		return nil, err
	}
	m := &Machine{Name: a.Name, Dir: h.Dir, Answer: *a}
	replaced := false
	if m.Key, replaced, err = h.key(a); err != nil {
		return nil, err
	}
	if h.Role == protocol.Node {
		err = h.xkeys(m, replaced)
	} else {
		m.Certificate, err = h.certificate(a)
	}
	if err != nil {
		return nil, err
	}
	account, err := os.ReadFile(filepath.Join(h.Dir, accountFile))
	if errors.Is(err, fs.ErrNotExist) {
		return m, nil
	} else if err != nil {
		return nil, err
	}
	v, err := protocol.NewVerifier(a.Fleet.Operator, a.Fleet.AccountJWT)
	if err != nil {
		return nil, err
	}
	if _, err := v.SetAccount(string(account)); err != nil {
		return nil, fmt.Errorf("%s: %w", filepath.Join(h.Dir, accountFile), err)
	}
	m.Answer.Fleet.AccountJWT = v.Account()
	return m, nil
}

// Signer is the machine's identity towards the broker.
func (m *Machine) Signer() *protocol.Signer {
	return &protocol.Signer{User: m.Answer.User, Key: m.Key}
}

// SaveAccount keeps an account JWT that a Verifier took over, so that a restart does not forget a
// revocation.
func (m *Machine) SaveAccount(token string) error {
	return atomicfile.Write(filepath.Join(m.Dir, accountFile), []byte(token), 0o600)
}

func (h Home) answer() (*protocol.EnrolAnswer, error) {
	path := filepath.Join(h.Dir, answerFile)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: there is no %s", ErrNotEnrolled, path)
	} else if err != nil {
		return nil, err
	}
	a, err := protocol.Decode[protocol.EnrolAnswer](data)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	if a.Role != h.Role {
		return nil, fmt.Errorf("%s enrols a %s, this program is a %s", path, a.Role, h.Role)
	}
	return &a, nil
}

// seed reads a key or makes it.
func (h Home) seed(file string, create func() (nkeys.KeyPair, error)) (nkeys.KeyPair, error) {
	path := filepath.Join(h.Dir, file)
	key, err := readSeed(path)
	if !errors.Is(err, fs.ErrNotExist) {
		return key, err
	}
	if key, err = create(); err != nil {
		return nil, err
	}
	s, err := key.Seed()
	if err != nil {
		return nil, err
	}
	return key, atomicfile.Write(path, s, 0o600)
}

func readSeed(path string) (nkeys.KeyPair, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	key, err := nkeys.FromSeed([]byte(strings.TrimSpace(string(data))))
	if err != nil {
		return nil, fmt.Errorf("%s does not hold a key: %w", path, err)
	}
	return key, nil
}

func (h Home) csr(name string) ([]byte, error) {
	path := filepath.Join(h.Dir, tlsFile)
	key, err := readTLSKey(path)
	if errors.Is(err, fs.ErrNotExist) {
		if key, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			return nil, err
		}
		der, err := x509.MarshalPKCS8PrivateKey(key)
		if err != nil {
			return nil, err
		}
		if err := atomicfile.Write(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), 0o600); err != nil {
			return nil, err
		}
	} else if err != nil {
		return nil, err
	}
	return x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: pkix.Name{CommonName: name}, DNSNames: []string{name}}, key)
}

func readTLSKey(path string) (*ecdsa.PrivateKey, error) {
	data, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(data)
	if block == nil {
		return nil, fmt.Errorf("%s is not PEM", path)
	}
	key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("%s is not an ECDSA key", path)
	}
	return ec, nil
}

func (h Home) certificate(a *protocol.EnrolAnswer) (*tls.Certificate, error) {
	path := filepath.Join(h.Dir, tlsFile)
	key, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	c, err := tls.X509KeyPair(a.Certificate, key)
	if err != nil {
		return nil, fmt.Errorf("the certificate in the answer does not fit %s: %w", path, err)
	}
	return &c, nil
}

// system is the machine's Nix system.
func system() string {
	cpu := map[string]string{"amd64": "x86_64", "arm64": "aarch64"}[runtime.GOARCH]
	if cpu == "" {
		cpu = runtime.GOARCH
	}
	return cpu + "-" + runtime.GOOS
}

// address is the machine's first global IPv4 address, "" where it has none.
func address() string {
	addrs, err := net.InterfaceAddrs()
	if err != nil {
		return ""
	}
	for _, a := range addrs {
		if n, ok := a.(*net.IPNet); ok && n.IP.To4() != nil && n.IP.IsGlobalUnicast() {
			return n.IP.String()
		}
	}
	return ""
}
