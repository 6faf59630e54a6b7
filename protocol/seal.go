package protocol

import (
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// What only one machine may read is sealed to its curve key (an xkey of nkeys: X25519, and a box of NaCl). The public
// half is in the node's user JWT, so that no controller can put another one in its place.

const (
	xkeyTag  = "xkey:" // before a curve key, in a node's JWT's tags, which jwt makes lower-case
	xkeySize = 56      // bytes, of a public curve key as text
)

func xkeyOf(c *jwt.UserClaims) string {
	for _, tag := range c.Tags {
		if key, ok := strings.CutPrefix(tag, xkeyTag); ok && nkeys.IsValidPublicCurveKey(strings.ToUpper(key)) {
			return strings.ToUpper(key)
		}
	}
	return ""
}

// ProveNode checks that a record's JWT is of this fleet and about the record's node, and gives what it proves: the
// node's keys. A node that was enrolled before there were curve keys in JWTs is refused.
func (v *Verifier) ProveNode(n *NodeRecord, now time.Time) (Identity, error) {
	if n.JWT == "" {
		return Identity{}, Refuse(Untrusted, "nothing proves the keys of %s; enroll it again", n.Name)
	}
	id, err := v.Identify(n.JWT, now)
	switch {
	case err != nil:
		return Identity{}, fmt.Errorf("the keys that the controller has of %s: %w", n.Name, err)
	case id.Role != Node || id.Name != n.Name:
		return Identity{}, Refuse(Untrusted, "the controller has keys of %s (%s) for %s", id.Name, id.Role, n.Name)
	case id.XKey == "":
		return Identity{}, Refuse(Untrusted, "the JWT of %s has no curve key; enroll it again", n.Name)
	}
	return id, nil
}

// Seal encrypts for the holder of a public curve key. It does not tell who did it: what is sealed travels in what is
// signed.
func Seal(plaintext []byte, to string) ([]byte, error) {
	once, err := nkeys.CreateCurveKeys()
	if err != nil {
		return nil, err
	}
	defer once.Wipe()
	public, err := once.PublicKey()
	if err != nil {
		return nil, err
	}
	box, err := once.Seal(plaintext, to)
	if err != nil {
		return nil, fmt.Errorf("can't seal to %.60q: %w", to, err)
	}
	return append([]byte(public), box...), nil
}

// Unseal opens what Seal made for the holder of key.
func Unseal(sealed []byte, key nkeys.KeyPair) ([]byte, error) {
	if len(sealed) <= xkeySize || !nkeys.IsValidPublicCurveKey(string(sealed[:xkeySize])) {
		return nil, fmt.Errorf("this was not sealed")
	}
	plaintext, err := key.Open(sealed[xkeySize:], string(sealed[:xkeySize]))
	if err != nil {
		return nil, fmt.Errorf("it is sealed to another key, or damaged")
	}
	return plaintext, nil
}
