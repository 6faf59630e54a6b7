package machine

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// operator is the other side of an enrolment: fleet keys and a CA.
type operator struct {
	keys  *protocol.FleetKeys
	ca    *x509.Certificate
	caKey *ecdsa.PrivateKey
}

func newOperator(t *testing.T) *operator {
	t.Helper()
	keys, err := protocol.NewFleet("test")
	must(t, err)
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	must(t, err)
	template := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "CA"}, NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	must(t, err)
	ca, err := x509.ParseCertificate(der)
	must(t, err)
	return &operator{keys, ca, key}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func pemOf(der []byte) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
}

func (o *operator) answer(t *testing.T, r *protocol.EnrolRequest) *protocol.EnrolAnswer {
	t.Helper()
	must(t, r.Validate())
	public, err := o.keys.Publish(nil)
	must(t, err)
	token, err := o.keys.Issue(r.Name, r.Role, r.Key, time.Time{})
	must(t, err)
	a := &protocol.EnrolAnswer{Version: 1, Role: r.Role, Name: r.Name, User: token, Fleet: *public, CA: pemOf(o.ca.Raw), Controllers: []string{"tls://c:4222"}}
	if r.Role == protocol.Controller {
		csr, err := x509.ParseCertificateRequest(r.CSR)
		must(t, err)
		der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{SerialNumber: big.NewInt(2), Subject: csr.Subject, NotAfter: time.Now().Add(time.Hour)}, o.ca, csr.PublicKey, o.caKey)
		must(t, err)
		a.Certificate = pemOf(der)
	}
	return a
}

func TestEnrolment(t *testing.T) {
	o := newOperator(t)
	for _, role := range []protocol.Role{protocol.Node, protocol.Controller} {
		h := Home{Dir: filepath.Join(t.TempDir(), "id"), Role: role}
		if _, err := h.Open(); !errors.Is(err, ErrNotEnrolled) {
			t.Fatalf("%s: %v", role, err)
		}
		first, err := h.Request("m1")
		must(t, err)
		again, err := h.Request("m1")
		must(t, err)
		if first.Key != again.Key || first.XKey != again.XKey {
			t.Errorf("%s: a second request made other keys", role)
		}
		_, err = h.Load(protocol.Encode(o.answer(t, again)))
		must(t, err)
		m, err := h.Open()
		must(t, err)
		if m.Name != "m1" || (m.XKey != nil) != (role == protocol.Node) || (m.Certificate != nil) != (role == protocol.Controller) {
			t.Errorf("%s: opened %+v", role, m)
		}
		if _, err := h.Load(protocol.Encode(newOperator(t).answer(t, again))); err == nil {
			t.Errorf("%s: changed its operator", role)
		}
		entries, err := os.ReadDir(h.Dir)
		must(t, err)
		for _, e := range entries {
			info, err := e.Info()
			must(t, err)
			if info.Mode().Perm() != 0o600 {
				t.Errorf("%s has mode %v", e.Name(), info.Mode())
			}
		}
	}
}

func TestLoadRefuses(t *testing.T) {
	o := newOperator(t)
	h := Home{Dir: t.TempDir(), Role: protocol.Node}
	if _, err := h.Load([]byte(`{}`)); err == nil {
		t.Error("loaded an empty answer")
	}
	r, err := h.Request("m1")
	must(t, err)
	good := o.answer(t, r)
	other := Home{Dir: t.TempDir(), Role: protocol.Node}
	theirs, err := other.Request("m1")
	must(t, err)
	for name, change := range map[string]func(*protocol.EnrolAnswer){
		"another machine's": func(a *protocol.EnrolAnswer) { *a = *o.answer(t, theirs) },
		"another role":      func(a *protocol.EnrolAnswer) { a.Role = protocol.Controller },
		"no CA":             func(a *protocol.EnrolAnswer) { a.CA = []byte("x") },
		"another name":      func(a *protocol.EnrolAnswer) { a.Name = "m2" },
	} {
		bad := *good
		change(&bad)
		if _, err := h.Load(protocol.Encode(bad)); err == nil {
			t.Errorf("%s was loaded", name)
		}
		if _, err := h.Open(); !errors.Is(err, ErrNotEnrolled) {
			t.Fatalf("%s left something behind: %v", name, err)
		}
	}
}

func TestAccountSurvivesRestart(t *testing.T) {
	o := newOperator(t)
	h := Home{Dir: t.TempDir(), Role: protocol.Node}
	r, err := h.Request("m1")
	must(t, err)
	_, err = h.Load(protocol.Encode(o.answer(t, r)))
	must(t, err)
	m, err := h.Open()
	must(t, err)
	newer, err := o.keys.Publish(map[string]time.Time{r.Key: time.Unix(1, 0)})
	must(t, err)
	must(t, m.SaveAccount(newer.AccountJWT))
	m, err = h.Open()
	must(t, err)
	if m.Answer.Fleet.AccountJWT != newer.AccountJWT {
		t.Error("the newer account JWT was forgotten")
	}
	foreign, err := newOperator(t).keys.Publish(nil)
	must(t, err)
	must(t, m.SaveAccount(foreign.AccountJWT))
	if _, err := h.Open(); err == nil {
		t.Error("another operator's account JWT was taken over from the disk")
	}
}
