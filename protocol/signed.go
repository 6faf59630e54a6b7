package protocol

import (
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// Kind keeps a signature made for one purpose from serving another.
type Kind string

const (
	KindRequest  Kind = "request"
	KindManifest Kind = "manifest"
)

// Header is what a signature covers, together with the payload by its hash.
type Header struct {
	Version   int    `json:"v"`
	Kind      Kind   `json:"kind"`
	ID        string `json:"id"`
	Action    Action `json:"action"`
	Target    string `json:"target"`  // a node's name, Everyone or ControllerName
	NotBefore int64  `json:"nbf"`     // Unix seconds
	Expires   int64  `json:"exp"`     // Unix seconds; 0, for manifests only: never
	Payload   string `json:"payload"` // SHA-256 of the payload, hex
}

// Signed is an order as it travels. The header stays the bytes that were signed, so that nobody has to
// agree on a canonical form.
type Signed struct {
	Header    []byte `json:"header"`
	Payload   []byte `json:"body,omitempty"`
	User      string `json:"user"` // the sender's user JWT
	Signature []byte `json:"sig"`  // ed25519, by the key that the JWT is about
}

// signingContext separates our signatures from the nonces that the same key signs for the broker.
const signingContext = "nix-infra signed header\x00"

// RequestLifetime is how long a request is good for after it was signed, and with ClockSkew the time
// for which a receiver remembers its id.
const (
	RequestLifetime = 60 * time.Second
	ClockSkew       = 30 * time.Second
)

// Signer is somebody's identity: a user JWT and the private key that belongs to it.
type Signer struct {
	User string
	Key  nkeys.KeyPair
}

// ParseCredentials reads a credentials file (the creds format of nats-io/jwt: a decorated user JWT and
// its seed) and checks that the two belong together.
func ParseCredentials(contents []byte) (*Signer, *jwt.UserClaims, error) {
	token, err := jwt.ParseDecoratedJWT(contents)
	if err != nil {
		return nil, nil, fmt.Errorf("no user JWT in the credentials: %w", err)
	}
	key, err := jwt.ParseDecoratedUserNKey(contents)
	if err != nil {
		return nil, nil, fmt.Errorf("no user seed in the credentials: %w", err)
	}
	claims, err := jwt.DecodeUserClaims(token)
	if err != nil {
		return nil, nil, fmt.Errorf("the JWT in the credentials is not a user's: %w", err)
	}
	pub, err := key.PublicKey()
	if err != nil {
		return nil, nil, err
	}
	if pub != claims.Subject {
		return nil, nil, fmt.Errorf("the seed in the credentials is not that of user %s", claims.Name)
	}
	if err := CheckName(claims.Name); err != nil {
		return nil, nil, err
	}
	return &Signer{User: token, Key: key}, claims, nil
}

// NewID makes an id for a request: 128 random bits, one subject token.
func NewID() string {
	var b [16]byte
	if _, err := rand.Read(b[:]); err != nil {
		panic(err) // crypto/rand does not fail on the systems that we run on
	}
	return strings.ToLower(base32.StdEncoding.WithPadding(base32.NoPadding).EncodeToString(b[:]))
}

// NewDeploymentID makes an id for a deployment: sortable by time, short enough to be typed.
func NewDeploymentID(now time.Time) string {
	return now.UTC().Format("20060102-150405-") + NewID()[:4]
}

// Request signs a request to target. The payload may be nil.
func (s *Signer) Request(a Action, target string, payload any, now time.Time) (*Signed, string, error) {
	var body []byte
	if payload != nil {
		body = Encode(payload)
	}
	h := Header{Version: Version, Kind: KindRequest, ID: NewID(), Action: a, Target: target,
		NotBefore: now.Unix(), Expires: now.Add(RequestLifetime).Unix()}
	signed, err := s.Sign(h, body)
	return signed, h.ID, err
}

// Sign completes the header with the payload's hash and signs it.
func (s *Signer) Sign(h Header, payload []byte) (*Signed, error) {
	h.Payload = Digest(payload)
	header := Encode(h)
	sig, err := s.Key.Sign(append([]byte(signingContext), header...))
	if err != nil {
		return nil, fmt.Errorf("can't sign: %w", err)
	}
	return &Signed{Header: header, Payload: payload, User: s.User, Signature: sig}, nil
}

// Digest is the SHA-256 of data in lower-case hex: how blobs, manifests and payloads are named.
func Digest(data []byte) string {
	sum := sha256.Sum256(data)
	return hex.EncodeToString(sum[:])
}

// IsDigest tells whether s has the form of a Digest.
func IsDigest(s string) bool {
	if len(s) != 64 {
		return false
	}
	for _, c := range s {
		if !(c >= '0' && c <= '9' || c >= 'a' && c <= 'f') {
			return false
		}
	}
	return true
}
