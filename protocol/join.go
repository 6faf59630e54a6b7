package protocol

import (
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nkeys"
)

const joinContext = "nix-infra join\x00"

// JoinRequest is what a machine with a token says to the controller on UpJoin, again and again until it has its answer.
// The controller answers with a JoinState.
type JoinRequest struct {
	Version int    `json:"v"`
	User    string `json:"user"`    // the token's user JWT
	Request []byte `json:"request"` // an EnrolRequest, as the bytes that are signed
	Proof   []byte `json:"proof"`   // signature of Request by the token's key
}

// MaxJoinRequest is the most that a JoinRequest has, in bytes.
const MaxJoinRequest = 8 << 10

// Join signs an enrolment request with the token.
func (t *Token) Join(r *EnrolRequest) (*JoinRequest, error) {
	signer, _, err := t.Signer()
	if err != nil {
		return nil, err
	}
	j := &JoinRequest{Version: Version, User: t.User, Request: Encode(r)}
	j.Proof, err = signer.Key.Sign(append([]byte(joinContext), j.Request...))
	return j, err
}

// JoinState is what became of a token's request.
type JoinState struct {
	User    string `json:"user,omitempty"`    // the node's user JWT; "": the operator has not answered yet
	Account string `json:"account,omitempty"` // the newest account JWT
}

// ProveJoin checks a request that came for a node: the token is this fleet's and still good, the request is signed by it,
// and is about the node that the token names. It gives the token, whose public key it is known by, and the request.
func (v *Verifier) ProveJoin(j *JoinRequest, node string, now time.Time) (Identity, *EnrolRequest, error) {
	if j.Version != Version {
		return Identity{}, nil, Refuse(OtherVersion, "the request is of version %d, this side speaks version %d; upgrade the older one", j.Version, Version)
	}
	id, err := v.Identify(j.User, now)
	if errors.Is(err, &Refusal{Code: Expired}) {
		return Identity{}, nil, Refuse(Expired, "the token for %s has ended; make another: nix-infra enroll --token %s", node, node)
	} else if err != nil {
		return Identity{}, nil, err
	}
	switch {
	case id.Role != Joiner:
		return id, nil, Refuse(Untrusted, "the credentials of %s are no token, but those of a %s", id.Name, id.Role)
	case id.Ends().IsZero() || id.Ends().After(now.Add(MaxTokenLife+ClockSkew)):
		return id, nil, Refuse(Untrusted, "the token of %s is good for longer than a token may be", id.Name)
	case id.Name != node:
		return id, nil, Refuse(Misaddressed, "the token is for %s, not for %s", id.Name, node)
	}
	key, err := nkeys.FromPublicKey(id.Key)
	if err != nil {
		return Identity{}, nil, Refuse(Untrusted, "the token's key: %v", err)
	}
	if key.Verify(append([]byte(joinContext), j.Request...), j.Proof) != nil {
		return Identity{}, nil, Refuse(Forged, "the request is not signed by the token that it comes with")
	}
	r, err := Decode[EnrolRequest](j.Request)
	switch {
	case err != nil:
		return id, nil, Refuse(Malformed, "the enrolment request: %v", err)
	case r.Role != Node:
		return id, nil, Refuse(Invalid, "a token is for nodes, not for a %s", r.Role)
	case r.Name != node:
		return id, nil, Refuse(Misaddressed, "the token is for %s, and the machine wants to be %s", node, r.Name)
	}
	return id, &r, nil
}

// Joining is a token's first request, as the controller keeps it until the token ends.
type Joining struct {
	Token   string      `json:"token"` // public key of the token
	Node    string      `json:"node"`
	Request JoinRequest `json:"request,omitzero"` // none where the token was taken back before anybody came
	Came    time.Time   `json:"came"`
	From    string      `json:"from,omitempty"` // IP addresses from where the broker saw the token, "" where it is not the controller's own
	Ends    time.Time   `json:"ends"`

	User string `json:"user,omitempty"` // the node's user JWT: the operator has answered
	Void bool   `json:"void,omitempty"` // the operator has taken the token back

	// Rival is the key of another machine that came with the same token and was refused: one of the two has stolen it.
	Rival string `json:"rival,omitempty"`
}

// Pending tells whether a machine waits for the operator.
func (j *Joining) Pending() bool { return j.User == "" && !j.Void }

// JoiningList answers ListJoinings, in order of the tokens' keys, one of which Next is.
type JoiningList struct {
	Joinings []Joining `json:"joinings"`
	Next     string    `json:"next,omitempty"`
}

// JoinAnswer is AnswerJoining's: the node's user JWT or, without one, that the token is void.
type JoinAnswer struct {
	Token string    `json:"token"` // public key of the token
	Node  string    `json:"node"`
	User  string    `json:"user,omitempty"`
	Ends  time.Time `json:"ends"` // of the token: until when it has to be remembered that it is void
}

// Validate checks the answer's form.
func (a *JoinAnswer) Validate() error {
	if !nkeys.IsValidPublicUserKey(a.Token) {
		return fmt.Errorf("%.64q is not a token's public key", a.Token)
	}
	if len(a.User) > maxUserJWT {
		return fmt.Errorf("a user JWT of %d bytes, the limit is %d", len(a.User), maxUserJWT)
	}
	return CheckName(a.Node)
}

// Same tells whether two requests are of one machine: whoever comes again has the same keys.
func (r *EnrolRequest) Same(other *EnrolRequest) bool {
	return r.Key == other.Key && r.XKey == other.XKey
}
