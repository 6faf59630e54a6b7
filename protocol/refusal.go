package protocol

import "fmt"

// Code says in one word why a request was refused, for programs; Refusal.Reason says it for people.
type Code string

const (
	Malformed    Code = "malformed"     // it could not be decoded
	OtherVersion Code = "other-version" // it speaks another version of the protocol
	Unsigned     Code = "unsigned"      // no signature or no user JWT
	Forged       Code = "forged"        // the signature is not the user's
	Tampered     Code = "tampered"      // the payload is not the one that was signed
	Untrusted    Code = "untrusted"     // the user JWT does not lead back to the pinned operator
	Revoked      Code = "revoked"       // the user was revoked
	Expired      Code = "expired"       // the request, or the user JWT
	NotYet       Code = "not-yet"       // not valid before a time that has not come
	Replayed     Code = "replayed"      // seen before
	Misaddressed Code = "misaddressed"  // for somebody else
	OverRole     Code = "over-role"     // the sender's role does not reach
	OffTarget    Code = "off-target"    // the sender's grant does not cover the node
	Denied       Code = "denied"        // the node's policy does not allow it
	Outdated     Code = "outdated"      // a serial lower than one that was seen
	Unknown      Code = "unknown"       // no such action, node, deployment, …
	Invalid      Code = "invalid"       // understood, and wrong
	Conflict     Code = "conflict"      // somebody else was first
	Failed       Code = "failed"        // accepted and tried, and it did not work
)

// Refusal is an answer that says no. It is an error on both ends.
type Refusal struct {
	Code   Code   `json:"code"`
	Reason string `json:"reason"`
}

func (r *Refusal) Error() string { return r.Reason }

// Is makes errors.Is(err, &Refusal{Code: Expired}) ask for the code alone.
func (r *Refusal) Is(target error) bool {
	t, ok := target.(*Refusal)
	return ok && t.Code == r.Code && t.Reason == ""
}

// Refuse makes a Refusal with a formatted reason.
func Refuse(c Code, format string, args ...any) *Refusal {
	return &Refusal{Code: c, Reason: fmt.Sprintf(format, args...)}
}
