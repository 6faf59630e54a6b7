package protocol

import (
	"fmt"
	"net/netip"
	"net/url"
	"strings"
	"time"
	"unicode"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// EnrolRequest is what a machine says of itself to become a node or a controller: the public halves of
// keys that it made and keeps. It travels over SSH or in the operator's hands.
type EnrolRequest struct {
	Version  int       `json:"v"`
	Role     Role      `json:"role"` // Node or Controller
	Name     string    `json:"name"`
	Key      string    `json:"key"`            // public nkey, "U…"
	XKey     string    `json:"xkey,omitempty"` // nodes: public curve key, "X…"
	CSR      []byte    `json:"csr,omitempty"`  // controllers: certificate request (DER) for their TLS key
	Hostname string    `json:"hostname"`
	System   string    `json:"system"` // such as x86_64-linux
	IPv4     string    `json:"ipv4,omitempty"`
	Created  time.Time `json:"created"`
	Proof    []byte    `json:"proof"` // signature of the rest by Key
}

const enrolContext = "nix-infra enrolment\x00"

func (r EnrolRequest) proven() []byte {
	r.Proof = nil
	return append([]byte(enrolContext), Encode(r)...)
}

// Prove signs the request with the key that it names.
func (r *EnrolRequest) Prove(key nkeys.KeyPair) (err error) {
	r.Proof, err = key.Sign(r.proven())
	return err
}

// Validate checks the form and the proof that the sender holds the key.
func (r *EnrolRequest) Validate() error {
	if r.Version != Version {
		return Refuse(OtherVersion, "the enrolment request is of version %d, this side speaks version %d; upgrade the older one", r.Version, Version)
	}
	if r.Role != Node && r.Role != Controller {
		return fmt.Errorf("role %q can't be enrolled", r.Role)
	}
	if err := CheckName(r.Name); err != nil {
		return err
	}
	if r.Role == Node && !nkeys.IsValidPublicCurveKey(r.XKey) {
		return fmt.Errorf("%q is not a public curve key", r.XKey)
	}
	if err := r.checkClaims(); err != nil {
		return err
	}
	key, err := nkeys.FromPublicKey(r.Key)
	if err != nil || !nkeys.IsValidPublicUserKey(r.Key) {
		return fmt.Errorf("%q is not a user's public key", r.Key)
	}
	if err := key.Verify(r.proven(), r.Proof); err != nil {
		return fmt.Errorf("the request is not signed by the key that it names")
	}
	return nil
}

// checkClaims is about what a machine only says: it is shown to people, and kept.
func (r *EnrolRequest) checkClaims() error {
	if len(r.Hostname) > 255 || strings.ContainsFunc(r.Hostname, unicode.IsControl) {
		return fmt.Errorf("hostname %.80q: expected one line of at most 255 bytes", r.Hostname)
	}
	if len(r.System) > 64 || strings.Trim(r.System, "abcdefghijklmnopqrstuvwxyz0123456789_-") != "" {
		return fmt.Errorf("system %.80q: expected such as x86_64-linux", r.System)
	}
	if ip, err := netip.ParseAddr(r.IPv4); r.IPv4 != "" && (err != nil || !ip.Is4()) {
		return fmt.Errorf("%.80q is no IPv4 address", r.IPv4)
	}
	return nil
}

// EnrolAnswer is what the operator sends back: the machine's JWT and what it has to pin.
type EnrolAnswer struct {
	Version     int      `json:"v"`
	Role        Role     `json:"role"`
	Name        string   `json:"name"`
	User        string   `json:"user"` // user JWT of the machine's key
	Fleet       Public   `json:"fleet"`
	CA          []byte   `json:"ca"`                    // PEM; the only CA that the machine trusts for brokers
	Controllers []string `json:"controllers"`           // tls:// and wss:// URLs, in order of preference
	Certificate []byte   `json:"certificate,omitempty"` // controllers: PEM for the CSR
}

// Validate checks that the answer hangs together: the JWT leads to the operator that it brings, and is
// about the name and role that it says.
func (a *EnrolAnswer) Validate() error {
	if a.Version != Version {
		return Refuse(OtherVersion, "the answer is of version %d, this side speaks version %d; upgrade the older one", a.Version, Version)
	}
	if err := CheckName(a.Name); err != nil {
		return err
	}
	v, err := NewVerifier(a.Fleet.Operator, a.Fleet.AccountJWT)
	if err != nil {
		return err
	}
	id, err := v.Identify(a.User, time.Now())
	if err != nil {
		return err
	}
	if id.Name != a.Name || id.Role != a.Role {
		return fmt.Errorf("the JWT is about %s (%s), the answer about %s (%s)", id.Name, id.Role, a.Name, a.Role)
	}
	return CheckControllers(a.Controllers)
}

// For tells whether the answer is for the holder of a key.
func (a *EnrolAnswer) For(key nkeys.KeyPair) error {
	pub, err := key.PublicKey()
	if err != nil {
		return err
	}
	c, err := jwt.DecodeUserClaims(a.User)
	if err != nil {
		return err
	}
	if c.Subject != pub {
		return fmt.Errorf("the answer is for another machine's key (%s, this one's is %s); make a new request here", c.Subject, pub)
	}
	return nil
}

// CheckControllers checks a list of controller URLs.
func CheckControllers(urls []string) error {
	if len(urls) == 0 {
		return fmt.Errorf("no controller URL; expected such as tls://host:4222 or wss://host:443")
	}
	for _, s := range urls {
		u, err := url.Parse(s)
		if err != nil || (u.Scheme != "tls" && u.Scheme != "wss") || u.Hostname() == "" || u.Port() == "" || u.User != nil {
			return fmt.Errorf("controller URL %q: expected such as tls://host:4222 or wss://host:443", s)
		}
	}
	return nil
}
