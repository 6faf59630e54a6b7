// Package protocol is what the CLI, the controller and the agents say to each other: subjects,
// messages, roles and the signatures that make a message an order.
//
// Start here, then read subject.go (where things are said), signed.go (how an order is signed),
// verify.go (what a receiver demands of it) and role.go (who may order what).
//
// Nothing that arrives is believed because of where it arrived: the broker keeps nodes apart, and
// the signatures keep the broker honest.
package protocol

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"runtime/debug"
	"sync"
)

// Version is the protocol's version: the second token of every subject and the "v" of every message.
const Version = 1

// MaxMessage is the largest message that the broker carries, in bytes. Whatever may grow past it
// (blobs, manifests of a large fleet) is sent in pieces of at most ChunkSize, and small pieces together,
// up to MaxPieces of them with at most PackSize bytes: in a signed request that is about twice as much.
const (
	MaxMessage = 4 << 20
	ChunkSize  = 512 << 10
	PackSize   = 1 << 20
	MaxPieces  = 2048
	MaxDigests = 5000 // in one DigestList of a request
)

// build is stamped by the linker: -X github.com/nix-infra/nix-infra/protocol.build=v1.2.3.
var build string

// Build is the version of this program, as `version` prints it and agents report it.
func Build() string { return version() }

var version = sync.OnceValue(func() string { // every beat tells it, and reading it from the program takes a while
	if build != "" {
		return build
	}
	if info, ok := debug.ReadBuildInfo(); ok && info.Main.Version != "" && info.Main.Version != "(devel)" {
		return info.Main.Version
	}
	return "dev"
})

// ErrMalformed marks a message that could not be decoded at all.
var ErrMalformed = errors.New("malformed message")

var label = regexp.MustCompile(`^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$`)

// CheckName tells whether a node, user or controller may carry this name. It is one subject token, a
// host name and a file name at once, hence a DNS label (RFC 1123): lower-case letters, digits, inner
// hyphens, at most 63 characters. Words that selectors use are not names.
func CheckName(name string) error {
	switch {
	case !label.MatchString(name):
		return fmt.Errorf("%q is not a valid name: use lower-case letters, digits and inner hyphens, at most 63 characters", name)
	case name == "all" || name == "not" || name == "localhost":
		return fmt.Errorf("%q can't be a name: it means something else in targets and placeholders", name)
	}
	return nil
}

// decode reads exactly one JSON document with known fields only: a field that a receiver would ignore
// is one that the sender relied on.
func decode(data []byte, into any) error {
	if len(data) > MaxMessage {
		return fmt.Errorf("%w: %d bytes, the limit is %d", ErrMalformed, len(data), MaxMessage)
	}
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(into); err != nil {
		return fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	if len(bytes.Trim(data[d.InputOffset():], " \t\r\n")) > 0 { // what JSON has for white space
		return fmt.Errorf("%w: more than one document", ErrMalformed)
	}
	return nil
}

// Encode is the one way in which messages become bytes. It panics on types that JSON can't carry,
// which only a programming error produces.
func Encode(message any) []byte {
	b, err := json.Marshal(message)
	if err != nil {
		panic(fmt.Sprintf("protocol: can't encode %T: %v", message, err))
	}
	return b
}

// Decode reads a message of a type of this package and, where the type has rules, checks them.
func Decode[T any](data []byte) (T, error) {
	var m T
	if err := decode(data, &m); err != nil {
		return m, err
	}
	if v, ok := any(&m).(interface{ Validate() error }); ok {
		if err := v.Validate(); err != nil {
			return m, fmt.Errorf("%w: %w", ErrMalformed, err)
		}
	}
	return m, nil
}

// jsonLoose reads some fields of a document whose others are not known yet.
func jsonLoose(data []byte, into any) error {
	if err := json.Unmarshal(data, into); err != nil {
		return fmt.Errorf("%w: %v", ErrMalformed, err)
	}
	return nil
}
