package protocol

import (
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// Identity is who signed something, as far as the chain of signatures proves it.
type Identity struct {
	Name string `json:"name"`
	Role Role   `json:"role"`
	Key  string `json:"key"` // public nkey

	// Targets are the only nodes that it may reach, names and globs; none: all.
	Targets []string `json:"targets,omitempty"`

	XKey string `json:"xkey,omitempty"` // of a node: its public curve key, "X…"

	expires int64  // Unix seconds, 0: never
	token   string // the user JWT
}

// Ends is when the identity expires; zero: never.
func (id Identity) Ends() time.Time {
	if id.expires == 0 {
		return time.Time{}
	}
	return time.Unix(id.expires, 0)
}

// Verified is an order whose signature, addressee, time and role were found good.
type Verified struct {
	Header
	Sender  Identity
	Payload []byte
}

// Expect is what a receiver demands of an order.
type Expect struct {
	Kind    Kind
	Targets []string // the names that it answers to; the first is its own
	Now     time.Time
}

// Seen remembers request ids for as long as they could be replayed.
type Seen interface {
	// Add remembers id until the given time and tells whether it was known already.
	Add(id string, until time.Time) (known bool, err error)
}

// Verifier follows operator → account → signing key (role) → user → signature from the pinned
// operator's public key. It is safe for concurrent use.
type Verifier struct {
	operator string

	mu      sync.Mutex
	account *jwt.AccountClaims
	token   string
	users   map[string]Identity // proven user JWTs; following the chain costs two ed25519 verifications
}

const maxCachedUsers = 4096

// NewVerifier pins an operator (its public key, "O…") and starts from an account JWT that it signed.
func NewVerifier(operator, account string) (*Verifier, error) {
	if !nkeys.IsValidPublicOperatorKey(operator) {
		return nil, fmt.Errorf("%q is not an operator's public key", operator)
	}
	v := &Verifier{operator: operator}
	if _, err := v.SetAccount(account); err != nil {
		return nil, err
	}
	return v, nil
}

// Account is the newest account JWT that the verifier knows.
func (v *Verifier) Account() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.token
}

// SetAccount takes over a newer account JWT (new signing keys, revocations) that the pinned operator
// signed, from whoever brings it. An older one is ignored, so that nobody can undo a revocation.
func (v *Verifier) SetAccount(token string) (changed bool, err error) {
	if token == v.Account() {
		return false, nil // as most often
	}
	c, err := v.decodeAccount(token)
	if err != nil {
		return false, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.account != nil && c.IssuedAt < v.account.IssuedAt {
		return false, nil
	}
	v.account, v.token, v.users = c, token, map[string]Identity{}
	return true, nil
}

// decodeAccount reads an account JWT that the pinned operator signed, of this fleet's account.
func (v *Verifier) decodeAccount(token string) (*jwt.AccountClaims, error) {
	c, err := jwt.DecodeAccountClaims(token)
	if err != nil {
		return nil, fmt.Errorf("not an account JWT: %w", err)
	}
	if c.Issuer != v.operator {
		return nil, fmt.Errorf("the account JWT was signed by %s, not by the pinned operator %s", c.Issuer, v.operator)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.account != nil && c.Subject != v.account.Subject {
		return nil, fmt.Errorf("the account JWT is of account %s, this fleet's is %s", c.Subject, v.account.Subject)
	}
	return c, nil
}

// Identify proves who a user JWT is about.
func (v *Verifier) Identify(token string, now time.Time) (Identity, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	id, ok := v.users[token]
	if !ok {
		var err error
		if id, err = v.follow(token); err != nil {
			return Identity{}, err
		}
		if len(v.users) >= maxCachedUsers {
			clear(v.users)
		}
		v.users[token] = id
	}
	if id.expires != 0 && now.Unix() > id.expires {
		return Identity{}, Refuse(Expired, "the credentials of %s expired on %s; ask for new ones", id.Name, time.Unix(id.expires, 0).UTC().Format(time.RFC3339))
	}
	return id, nil
}

// Still tells whether an identity that was proven before would be proven now: an error says that it expired, or was
// revoked meanwhile.
func (v *Verifier) Still(id Identity, now time.Time) error {
	_, err := v.Identify(id.token, now)
	return err
}

func (v *Verifier) follow(token string) (Identity, error) {
	c, err := jwt.DecodeUserClaims(token)
	if err != nil {
		return Identity{}, Refuse(Untrusted, "not a user JWT, or its signature is wrong: %v", err)
	}
	if c.IssuerAccount != v.account.Subject {
		return Identity{}, Refuse(Untrusted, "the user JWT is of another account than this fleet's")
	}
	scope, ok := v.account.SigningKeys.GetScope(c.Issuer)
	if !ok {
		return Identity{}, Refuse(Untrusted, "the user JWT was signed by %s, which is no signing key of this fleet", c.Issuer)
	}
	s, ok := scope.(*jwt.UserScope)
	if !ok || !slices.Contains(Roles, Role(s.Role)) {
		return Identity{}, Refuse(Untrusted, "the user JWT's signing key has no role")
	}
	if err := CheckName(c.Name); err != nil {
		return Identity{}, Refuse(Untrusted, "the user JWT's name: %v", err)
	}
	if v.account.IsClaimRevoked(c) {
		return Identity{}, Refuse(Revoked, "the credentials of %s were revoked", c.Name)
	}
	targets, err := targetsOf(c, Role(s.Role))
	if err != nil {
		return Identity{}, Refuse(Untrusted, "the user JWT's tags: %v", err)
	}
	return Identity{Name: c.Name, Role: Role(s.Role), Key: c.Subject, Targets: targets, XKey: xkeyOf(c), expires: c.Expires, token: token}, nil
}

// Verify checks an order against what the receiver expects. The order of the checks is from what
// needs no key to what does, and ids are remembered only of orders that were otherwise good: nobody
// without a key can fill the memory. seen may be nil for manifests, whose serial does that work.
//
// The identity that comes back with an error is the proven sender, if it could be proven.
func (v *Verifier) Verify(s *Signed, e Expect, seen Seen) (*Verified, Identity, error) {
	h, err := s.checkForm(e)
	if err != nil {
		return nil, Identity{}, err
	}
	id, err := v.Identify(s.User, e.Now)
	if err != nil {
		return nil, Identity{}, err
	}
	key, err := nkeys.FromPublicKey(id.Key)
	if err != nil {
		return nil, Identity{}, Refuse(Untrusted, "the user JWT's subject: %v", err)
	}
	if err := key.Verify(append([]byte(signingContext), s.Header...), s.Signature); err != nil {
		return nil, Identity{}, Refuse(Forged, "the signature is not that of %s", id.Name)
	}
	if Digest(s.Payload) != h.Payload {
		return nil, id, Refuse(Tampered, "the payload is not the one that %s signed", id.Name)
	}
	if !slices.Contains(e.Targets, h.Target) {
		return nil, id, Refuse(Misaddressed, "signed for %s, not for %s", h.Target, e.Targets[0])
	}
	if !id.Role.AtLeast(LeastRole(h.Action)) {
		return nil, id, Refuse(OverRole, "%s is %s; %s needs %s", id.Name, id.Role, h.Action, LeastRole(h.Action))
	}
	// What is said to the controller may be about any node: it asks of each.
	if own := e.Targets[0]; own != ControllerName {
		if err := id.Reach(own); err != nil {
			return nil, id, err
		}
	}
	if err := h.checkTime(e.Now); err != nil {
		return nil, id, err
	}
	if seen != nil {
		// To the end of the second in which it expires here.
		known, err := seen.Add(h.ID, time.Unix(h.Expires+1, 0).Add(ClockSkew))
		if err != nil {
			return nil, id, Refuse(Failed, "can't remember the request's id, so it is not run: %v", err)
		}
		if known {
			return nil, id, Refuse(Replayed, "request %s was seen before", h.ID)
		}
	}
	return &Verified{Header: *h, Sender: id, Payload: s.Payload}, id, nil
}

// checkForm is what can be said about an order without any key.
func (s *Signed) checkForm(e Expect) (*Header, error) {
	if s.User == "" || len(s.Signature) == 0 {
		return nil, Refuse(Unsigned, "not signed: a user JWT and a signature are needed")
	}
	var h Header
	if err := decode(s.Header, &h); err != nil {
		var other struct {
			Version int `json:"v"`
		}
		if jsonLoose(s.Header, &other) != nil || other.Version == Version {
			return nil, Refuse(Malformed, "the header: %v", err)
		}
		h.Version = other.Version // whatever else another version has in it
	}
	if h.Version != Version {
		return nil, Refuse(OtherVersion, "it speaks version %d of the protocol, this side version %d; upgrade the older one", h.Version, Version)
	}
	if h.Kind != e.Kind {
		return nil, Refuse(Malformed, "a %s where a %s belongs", h.Kind, e.Kind)
	}
	switch {
	case !isToken(h.ID): // it becomes part of subjects
		return nil, Refuse(Malformed, "the header's id is not one of lower-case letters, digits and hyphens, at most 64")
	case h.Action == "" || len(h.Action) > 64:
		return nil, Refuse(Malformed, "the header's action is missing or longer than 64 bytes")
	case h.Target != Everyone && h.Target != ControllerName && !label.MatchString(h.Target):
		return nil, Refuse(Malformed, "the header's target is no node's name, %q or %q", Everyone, ControllerName)
	}
	return &h, nil
}

func (h *Header) checkTime(now time.Time) error {
	if now.Add(ClockSkew).Unix() < h.NotBefore {
		return Refuse(NotYet, "not valid before %s, and it is %s here; check both clocks", stamp(h.NotBefore), stamp(now.Unix()))
	}
	switch {
	case h.Kind == KindManifest && h.Expires == 0:
		return nil
	case now.Add(-ClockSkew).Unix() > h.Expires:
		return Refuse(Expired, "expired at %s, and it is %s here; check both clocks", stamp(h.Expires), stamp(now.Unix()))
	case h.Kind == KindRequest && h.Expires > now.Add(2*RequestLifetime+ClockSkew).Unix():
		return Refuse(Invalid, "valid until %s, longer than a request may be", stamp(h.Expires))
	}
	return nil
}

func stamp(unix int64) string { return time.Unix(unix, 0).UTC().Format(time.RFC3339) }
