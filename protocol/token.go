package protocol

import (
	"crypto/x509"
	"encoding/base64"
	"encoding/pem"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// Token is a one-use way in for a machine that nobody can reach, or whose SSH nobody wants to open: it connects with the
// token, and asks to become the node that the token names. Whoever holds it can do that and nothing else.
//
// As text it is one line of "nix-infra-token-1.", base64 (URL alphabet, no padding) of its JSON, "." and the first 8
// digits of the JSON's SHA-256, so that one which was cut off on its way is told from one that is wrong.
type Token struct {
	Version     int      `json:"v"`
	Node        string   `json:"node"`
	Seed        string   `json:"seed"` // nkey seed of User's key: the secret
	User        string   `json:"user"` // user JWT of role Joiner, which ends
	Operator    string   `json:"operator"`
	CA          []byte   `json:"ca"` // DER
	Controllers []string `json:"controllers"`
}

const (
	tokenPrefix = "nix-infra-token-"
	tokenSum    = 8

	// MaxToken is the most that a token has, in bytes of its text.
	MaxToken = 16 << 10

	// MaxTokenLife is the longest that a token may be good for: a way in that nobody uses has to close by itself.
	MaxTokenLife = 7 * 24 * time.Hour
)

// NewToken makes a token for a node, good until ends. Of the key it gives the public half, by which it is known.
func (k *FleetKeys) NewToken(node string, ends time.Time, operator string, ca []byte, controllers []string) (t *Token, key string, err error) {
	block, _ := pem.Decode(ca)
	if block == nil {
		return nil, "", fmt.Errorf("the CA is not a PEM certificate")
	}
	pair, err := nkeys.CreateUser()
	if err != nil {
		return nil, "", err
	}
	seed, err := pair.Seed()
	if err != nil {
		return nil, "", err
	}
	if key, err = pair.PublicKey(); err != nil {
		return nil, "", err
	}
	user, err := k.Issue(node, Joiner, key, ends)
	if err != nil {
		return nil, "", err
	}
	t = &Token{Version: Version, Node: node, Seed: string(seed), User: user, Operator: operator, CA: block.Bytes, Controllers: controllers}
	return t, key, t.Validate()
}

// String is the token as text, on one line.
func (t *Token) String() string {
	data := Encode(t)
	return fmt.Sprintf("%s%d.%s.%s", tokenPrefix, t.Version, base64.RawURLEncoding.EncodeToString(data), Digest(data)[:tokenSum])
}

// LooksLikeToken tells whether a word is meant to be a token, and not the name of a file.
func LooksLikeToken(word string) bool { return strings.HasPrefix(word, tokenPrefix) }

// ParseToken reads a token's text. What is wrong with it is told from what comes first to what comes last.
func ParseToken(text string) (*Token, error) {
	text = strings.TrimSpace(text)
	if len(text) > MaxToken {
		return nil, fmt.Errorf("%d bytes are no token, which has at most %d", len(text), MaxToken)
	}
	rest, ok := strings.CutPrefix(text, tokenPrefix)
	if !ok {
		return nil, fmt.Errorf("this is no token: one begins with %q; make it with nix-infra enroll --token NAME", tokenPrefix)
	}
	version, rest, _ := strings.Cut(rest, ".")
	if version != fmt.Sprint(Version) {
		return nil, fmt.Errorf("the token is of version %.16q, this program speaks version %d; upgrade the older one", version, Version)
	}
	body, sum, _ := strings.Cut(rest, ".")
	data, err := base64.RawURLEncoding.DecodeString(body)
	if err != nil || Digest(data)[:tokenSum] != sum {
		return nil, fmt.Errorf("the token is damaged: it was cut off, or changed on its way; copy it whole, on one line")
	}
	t, err := Decode[Token](data)
	if err != nil {
		return nil, fmt.Errorf("the token: %w", err)
	}
	return &t, nil
}

// Validate checks that the token hangs together. Whether its signature leads to the operator is for the fleet to say.
func (t *Token) Validate() error {
	if t.Version != Version {
		return Refuse(OtherVersion, "the token is of version %d, this side speaks version %d; upgrade the older one", t.Version, Version)
	}
	if err := CheckName(t.Node); err != nil {
		return err
	}
	claims, err := jwt.DecodeUserClaims(t.User)
	if err != nil {
		return fmt.Errorf("its user JWT: %w", err)
	}
	pair, err := nkeys.FromSeed([]byte(t.Seed))
	if err != nil {
		return fmt.Errorf("its seed is none: %w", err)
	}
	switch key, err := pair.PublicKey(); {
	case err != nil:
		return err
	case key != claims.Subject:
		return fmt.Errorf("its seed and its user JWT don't belong together")
	case claims.Name != t.Node:
		return fmt.Errorf("its user JWT is about %.64q, not about %s", claims.Name, t.Node)
	case claims.Expires == 0:
		return fmt.Errorf("it never ends, which no token may")
	case !nkeys.IsValidPublicOperatorKey(t.Operator):
		return fmt.Errorf("%.64q is not an operator's public key", t.Operator)
	}
	if _, err := x509.ParseCertificate(t.CA); err != nil {
		return fmt.Errorf("its CA: %w", err)
	}
	return CheckControllers(t.Controllers)
}

// Ends is when the token stops to be good.
func (t *Token) Ends() time.Time {
	claims, err := jwt.DecodeUserClaims(t.User)
	if err != nil {
		return time.Time{}
	}
	return time.Unix(claims.Expires, 0)
}

// Life is for how long the token is good from when it was made: a machine can go by that whatever its clock says.
func (t *Token) Life() time.Duration {
	claims, err := jwt.DecodeUserClaims(t.User)
	if err != nil {
		return 0
	}
	return time.Duration(claims.Expires-claims.IssuedAt) * time.Second
}

// CAPEM is the CA as connections and enrolments want it.
func (t *Token) CAPEM() []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: t.CA})
}

// Signer is the token's identity towards the broker.
func (t *Token) Signer() (*Signer, string, error) {
	pair, err := nkeys.FromSeed([]byte(t.Seed))
	if err != nil {
		return nil, "", err
	}
	key, err := pair.PublicKey()
	return &Signer{User: t.User, Key: pair}, key, err
}

// Enrolment is what a machine with this token takes for the operator's answer. Whom it trusts is what came with the
// token; of the controller, which is trusted in nothing, it takes what the operator signed.
func (t *Token) Enrolment(state *JoinState, r *EnrolRequest) (*EnrolAnswer, error) {
	a := &EnrolAnswer{Version: Version, Role: Node, Name: t.Node, User: state.User, CA: t.CAPEM(), Controllers: t.Controllers,
		Fleet: Public{Operator: t.Operator, AccountJWT: state.Account}}
	if err := a.Validate(); err != nil {
		return nil, err
	}
	claims, err := jwt.DecodeUserClaims(a.User)
	if err != nil {
		return nil, err
	}
	if claims.Subject != r.Key || xkeyOf(claims) != r.XKey {
		return nil, Refuse(Forged, "the answer is for other keys than this machine's")
	}
	return a, nil
}
