package tunnel

import (
	"crypto/cipher"
	"crypto/ecdh"
	"crypto/hkdf"
	"crypto/rand"
	"crypto/sha256"
	"encoding/binary"
	"fmt"

	"github.com/nats-io/nkeys"
	"golang.org/x/crypto/chacha20poly1305"

	"github.com/nix-infra/nix-infra/protocol"
)

// Agreed is what both ends of a tunnel know before they have keys. All of it goes into the keys: where somebody
// between them changed any of it, neither end can read the other.
type Agreed struct {
	User  string
	Node  string
	ID    string // of the request that opens the tunnel
	XKey  string // the node's public curve key: at the user's end the proven one, never one that was told
	Order protocol.TunnelOrder
	Reply protocol.TunnelReply
}

// Keys are one end's, for one tunnel: New uses them up.
type Keys struct {
	send, receive cipher.AEAD
}

// PrivateKey is the key that one end uses for one tunnel; its public half is in the order or the reply.
type PrivateKey = ecdh.PrivateKey

// NewKey makes a PrivateKey.
func NewKey() (*PrivateKey, error) { return ecdh.X25519().GenerateKey(rand.Reader) }

// UserKeys agrees on keys at the user's end. Only who holds the node's curve key gets the same ones; that the user's
// end is who it says is what the signature over the order proves to the node.
func UserKeys(once *PrivateKey, a Agreed) (Keys, error) {
	static, err := curveKey(a.XKey)
	if err != nil {
		return Keys{}, err
	}
	peer, err := ecdh.X25519().NewPublicKey(a.Reply.Public)
	if err != nil {
		return Keys{}, fmt.Errorf("the node's key for the tunnel: %w", err)
	}
	toNode, toUser, err := agree(a, once, peer, once, static)
	return Keys{send: toNode, receive: toUser}, err
}

// NodeKeys agrees on keys at the node's end; xkey is the node's curve key, whose public half a.XKey is set to.
func NodeKeys(once *PrivateKey, xkey nkeys.KeyPair, a Agreed) (Keys, error) {
	var err error
	if a.XKey, err = xkey.PublicKey(); err != nil {
		return Keys{}, err
	}
	seed, err := xkey.Seed()
	if err != nil {
		return Keys{}, err
	}
	_, raw, err := nkeys.DecodeSeed(seed)
	if err != nil {
		return Keys{}, fmt.Errorf("the node's curve key: %w", err)
	}
	static, err := ecdh.X25519().NewPrivateKey(raw)
	if err != nil {
		return Keys{}, fmt.Errorf("the node's curve key: %w", err)
	}
	peer, err := ecdh.X25519().NewPublicKey(a.Order.Public)
	if err != nil {
		return Keys{}, fmt.Errorf("the user's key for the tunnel: %w", err)
	}
	toNode, toUser, err := agree(a, once, peer, static, peer)
	return Keys{send: toUser, receive: toNode}, err
}

// agree makes the keys of both directions from the secret of the two keys that are for this tunnel alone, which are
// gone when it ends, and the secret that only the node can have.
func agree(a Agreed, once *ecdh.PrivateKey, peer *ecdh.PublicKey, private *ecdh.PrivateKey, public *ecdh.PublicKey) (toNode, toUser cipher.AEAD, err error) {
	fleeting, err := once.ECDH(peer)
	if err != nil {
		return nil, nil, fmt.Errorf("the keys of the tunnel: %w", err)
	}
	lasting, err := private.ECDH(public)
	if err != nil {
		return nil, nil, fmt.Errorf("the keys of the tunnel: %w", err)
	}
	both, err := hkdf.Key(sha256.New, append(fleeting, lasting...), nil, string(a.encode()), 2*chacha20poly1305.KeySize)
	if err != nil {
		return nil, nil, err
	}
	if toNode, err = chacha20poly1305.New(both[:chacha20poly1305.KeySize]); err != nil {
		return nil, nil, err
	}
	toUser, err = chacha20poly1305.New(both[chacha20poly1305.KeySize:])
	return toNode, toUser, err
}

// encode puts all that is agreed on into bytes that nothing else is encoded to.
func (a Agreed) encode() []byte {
	var b []byte
	for _, field := range [][]byte{
		[]byte("nix-infra tunnel 1"), []byte(a.User), []byte(a.Node), []byte(a.ID), []byte(a.XKey),
		[]byte(a.Order.To), a.Order.Public, binary.BigEndian.AppendUint64(nil, uint64(a.Order.Window)),
		a.Reply.Public, binary.BigEndian.AppendUint64(nil, uint64(a.Reply.Window)), []byte(a.Reply.Rule),
	} {
		b = binary.BigEndian.AppendUint32(b, uint32(len(field)))
		b = append(b, field...)
	}
	return b
}

// curveKey is the X25519 key in a public curve key of nkeys.
func curveKey(xkey string) (*ecdh.PublicKey, error) {
	raw, err := nkeys.Decode(nkeys.PrefixByteCurve, []byte(xkey))
	if err != nil {
		return nil, fmt.Errorf("%.80q is not a public curve key", xkey)
	}
	return ecdh.X25519().NewPublicKey(raw)
}
