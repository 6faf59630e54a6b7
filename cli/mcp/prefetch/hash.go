package prefetch

import (
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"strings"
)

// Hash is a SHA-256.
type Hash [sha256.Size]byte

// The forms of a hash.
const (
	Nix32 = "nix32" // 52 characters of Nix's base 32
	SRI   = "sri"   // sha256- and base 64
	Hex   = "hex"   // 64 digits
)

// Form gives the hash in a form.
func (h Hash) Form(form string) string {
	switch form {
	case SRI:
		return "sha256-" + base64.StdEncoding.EncodeToString(h[:])
	case Hex:
		return hex.EncodeToString(h[:])
	}
	return h.nix32()
}

const (
	nix32Letters = "0123456789abcdfghijklmnpqrsvwxyz"
	nix32Length  = (sha256.Size*8 + 4) / 5
)

func (h Hash) nix32() string {
	s := make([]byte, nix32Length)
	for n := range nix32Length {
		bit := (nix32Length - 1 - n) * 5
		i, shift := bit/8, bit%8
		group := int(h[i]) >> shift
		if i+1 < len(h) {
			group |= int(h[i+1]) << (8 - shift)
		}
		s[n] = nix32Letters[group&31]
	}
	return string(s)
}

// ParseHash reads a hash in any of the forms. from says which; "" tells by the length.
func ParseHash(s, from string) (Hash, error) {
	text := strings.TrimSpace(s)
	bare, isSRI := strings.CutPrefix(text, "sha256-")
	bare, _ = strings.CutPrefix(bare, "sha256:")
	if from == "" {
		switch {
		case isSRI || len(bare) == base64.StdEncoding.EncodedLen(sha256.Size):
			from = SRI
		case len(bare) == nix32Length:
			from = Nix32
		default:
			from = Hex
		}
	}
	var h Hash
	var data []byte
	var err error
	switch from {
	case Nix32:
		return parseNix32(bare)
	case SRI:
		data, err = base64.StdEncoding.Strict().DecodeString(bare)
	case Hex:
		data, err = hex.DecodeString(strings.ToLower(bare))
	default:
		return h, fmt.Errorf("%.40q is no form of a hash; use nix32, sri or hex", from)
	}
	if err != nil || len(data) != len(h) {
		return h, fmt.Errorf("%.100q is no SHA-256 as %s", s, from)
	}
	return Hash(data), nil
}

func parseNix32(s string) (Hash, error) {
	var h Hash
	wrong := fmt.Errorf("%.100q is no SHA-256 as nix32: expected %d characters of %s", s, nix32Length, nix32Letters)
	if len(s) != nix32Length {
		return h, wrong
	}
	for n := range len(s) {
		digit := strings.IndexByte(nix32Letters, s[len(s)-1-n])
		if digit < 0 {
			return h, wrong
		}
		i, shift := n*5/8, n*5%8
		h[i] |= byte(digit << shift)
		if over := digit >> (8 - shift); i+1 < len(h) {
			h[i+1] |= byte(over)
		} else if over != 0 {
			return h, wrong // bits that no SHA-256 has
		}
	}
	return h, nil
}
