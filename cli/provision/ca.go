package provision

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"slices"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// caLifetime is how long the project's CA is good for.
const caLifetime = 10 * 365 * 24 * time.Hour

// CA is the project's own certificate authority: the only one that its machines trust for brokers.
type CA struct {
	Certificate *x509.Certificate
	key         *ecdsa.PrivateKey
}

// NewCA makes a CA for a fleet. It may sign servers and no further CA.
func NewCA(fleet string, now time.Time) (*CA, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: "nix-infra " + fleet},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(caLifetime),
		IsCA: true, BasicConstraintsValid: true, MaxPathLenZero: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &CA{cert, key}, nil
}

func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// ParseCA reads what (*CA).Private gave.
func ParseCA(bundle []byte) (*CA, error) {
	keyBlock, rest := pem.Decode(bundle)
	certBlock, _ := pem.Decode(rest)
	if keyBlock == nil || certBlock == nil {
		return nil, errors.New("the CA is not a key and a certificate in PEM")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(keyBlock.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the CA's key: %w", err)
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok {
		return nil, errors.New("the CA's key is not an ECDSA key")
	}
	cert, err := x509.ParseCertificate(certBlock.Bytes)
	if err != nil {
		return nil, fmt.Errorf("the CA's certificate: %w", err)
	}
	if !key.PublicKey.Equal(cert.PublicKey) {
		return nil, errors.New("the CA's key and certificate don't belong together")
	}
	return &CA{cert, key}, nil
}

// Private is the CA with its key, in PEM, for the vault.
func (ca *CA) Private() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(ca.key)
	if err != nil {
		return nil, err
	}
	key := pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})
	return append(key, ca.Public()...), nil
}

// Public is the CA's certificate in PEM.
func (ca *CA) Public() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: ca.Certificate.Raw})
}

// SignController makes a controller's TLS certificate (PEM) from its request (DER), for hosts: DNS
// names and IP addresses. Of the request only the key counts. The certificate is good for as long as
// the CA, because one that ends unnoticed would cut off a fleet that has nothing else to listen to.
func (ca *CA) SignController(csr []byte, hosts []string, now time.Time) ([]byte, error) {
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, fmt.Errorf("the certificate request: %w", err)
	}
	if err := request.CheckSignature(); err != nil {
		return nil, fmt.Errorf("the certificate request is not signed by its own key: %w", err)
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber: serial, Subject: pkix.Name{CommonName: hosts[0]},
		NotBefore: now.Add(-time.Hour), NotAfter: ca.Certificate.NotAfter,
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	hosts = slices.Clone(hosts)
	slices.Sort(hosts)
	for _, h := range slices.Compact(hosts) {
		if ip := net.ParseIP(h); ip != nil {
			template.IPAddresses = append(template.IPAddresses, ip)
		} else {
			template.DNSNames = append(template.DNSNames, h)
		}
	}
	der, err := x509.CreateCertificate(rand.Reader, template, ca.Certificate, request.PublicKey, ca.key)
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), nil
}

// Authority is what the operator holds to make a machine part of the fleet.
type Authority struct {
	Keys        *protocol.FleetKeys
	Public      protocol.Public
	CA          *CA
	Controllers []string // URLs that the machines are told
}

// Sign answers an enrolment request. hosts are the names and addresses in a controller's certificate.
func (a *Authority) Sign(r *protocol.EnrolRequest, hosts []string, now time.Time) (*protocol.EnrolAnswer, error) {
	if err := r.Validate(); err != nil {
		return nil, err
	}
	if err := protocol.CheckControllers(a.Controllers); err != nil {
		return nil, err
	}
	void, err := protocol.Revocations(a.Public.AccountJWT)
	if err != nil {
		return nil, err
	}
	// What is issued in the second in which a machine's key was revoked is void, too: it has to be a later one.
	if wait := time.Until(void[r.Key].Add(time.Second)); wait > 0 && wait <= time.Second {
		time.Sleep(wait)
	}
	var user string
	if r.Role == protocol.Node {
		user, err = a.Keys.IssueNode(r.Name, r.Key, r.XKey)
	} else {
		user, err = a.Keys.Issue(r.Name, r.Role, r.Key, time.Time{})
	}
	if err != nil {
		return nil, err
	}
	answer := &protocol.EnrolAnswer{
		Version: protocol.Version, Role: r.Role, Name: r.Name, User: user,
		Fleet: a.Public, CA: a.CA.Public(), Controllers: a.Controllers,
	}
	if r.Role == protocol.Controller {
		if answer.Certificate, err = a.CA.SignController(r.CSR, hosts, now); err != nil {
			return nil, err
		}
	}
	return answer, answer.Validate()
}
