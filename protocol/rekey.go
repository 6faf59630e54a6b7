package protocol

import (
	"bytes"
	"fmt"
	"time"

	"github.com/nats-io/nkeys"
)

// A node gets other keys by two orders: it makes them and says their public halves, by its old key; and it takes the JWT
// that the operator made for them, and says so by the new one. Neither answer can be made, or used again, by a broker.

// RekeyOrder is Rekey's.
type RekeyOrder struct {
	Nonce []byte `json:"nonce"`          // 16 to 64 bytes, others for each order: the answer is to this one
	User  string `json:"user,omitempty"` // the user JWT for the keys that the node made; "": it is to make them
}

// RekeyReply answers Rekey.
type RekeyReply struct {
	Nonce   []byte        `json:"nonce"`
	User    string        `json:"user"`              // the user JWT of the keys that are the node's
	Request *EnrolRequest `json:"request,omitempty"` // for those that are to replace them, proven by them; nil: none
	Proof   []byte        `json:"proof"`             // signature of the rest by User's key
}

const (
	rekeyContext = "nix-infra rekey\x00"
	maxUserJWT   = 16 << 10 // bytes
)

// Validate checks the order's form.
func (o *RekeyOrder) Validate() error {
	if len(o.Nonce) < 16 || len(o.Nonce) > 64 {
		return fmt.Errorf("a nonce of %d bytes; 16 to 64 are possible", len(o.Nonce))
	}
	if len(o.User) > maxUserJWT {
		return fmt.Errorf("a user JWT of %d bytes, the limit is %d", len(o.User), maxUserJWT)
	}
	return nil
}

func (r RekeyReply) proven() []byte {
	r.Proof = nil
	return append([]byte(rekeyContext), Encode(r)...)
}

// Prove signs the reply with the key that its User is about.
func (r *RekeyReply) Prove(key nkeys.KeyPair) (err error) {
	r.Proof, err = key.Sign(r.proven())
	return err
}

// ProveRekey checks that a reply is the node's own, to this order, and gives what it proves: the keys that are the
// node's. What it offers in their place is proven, too. It needs nobody's word for the node's keys.
func (v *Verifier) ProveRekey(node string, o *RekeyOrder, r *RekeyReply, now time.Time) (Identity, error) {
	id, err := v.Identify(r.User, now)
	if err != nil {
		return Identity{}, err
	}
	if id.Role != Node || id.Name != node {
		return Identity{}, Refuse(Forged, "%s (%s) answers for %s", id.Name, id.Role, node)
	}
	key, err := nkeys.FromPublicKey(id.Key)
	if err != nil {
		return Identity{}, Refuse(Untrusted, "the user JWT's subject: %v", err)
	}
	if key.Verify(r.proven(), r.Proof) != nil || !bytes.Equal(r.Nonce, o.Nonce) {
		return Identity{}, Refuse(Forged, "the answer about the keys of %s is not its own", node)
	}
	if q := r.Request; q != nil {
		switch err := q.Validate(); {
		case err != nil:
			return Identity{}, Refuse(Forged, "the new keys of %s: %v", node, err)
		case q.Role != Node || q.Name != node:
			return Identity{}, Refuse(Forged, "the new keys of %s are said to be of %s (%s)", node, q.Name, q.Role)
		case q.Key == id.Key || q.XKey == id.XKey:
			return Identity{}, Refuse(Forged, "%s offers the key that it has as a new one", node)
		}
	}
	return id, nil
}
