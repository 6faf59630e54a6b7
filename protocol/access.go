package protocol

import (
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/nats-io/jwt/v2"
)

// What a grant reaches, and how it is taken back.
//
// A grant may be restricted to some nodes, its targets: names and globs. They travel as tags in the user JWT, signed
// with the rest of it. A node judges by its own name alone, which it has from its enrolment: its tags and facts are what
// a controller says that they are, so that a controller which was broken into could stretch a grant that went by them.

const (
	targetTag     = "target:" // before a target, in a user JWT's tags
	maxTargets    = 32
	maxTargetSize = 64 // bytes
)

// ParseTargets reads what a grant is to be restricted to: names and globs (the rules of path.Match), in one text or in
// several, separated by commas or spaces. With all among them there is no restriction, and no target.
func ParseTargets(exprs []string) ([]string, error) {
	var targets []string
	everything := false
	for _, word := range strings.FieldsFunc(strings.Join(exprs, " "), func(r rune) bool { return strings.ContainsRune(", \t\r\n", r) }) {
		switch {
		case word == "all":
			everything = true
			continue
		case word == "not" || word[0] == '@' || strings.Contains(word, "="):
			return nil, fmt.Errorf("target %.64q: a grant names nodes by names, globs or all; a node judges a grant by its own name, since tags and facts are what a controller says of it", word)
		}
		if err := checkTarget(word); err != nil {
			return nil, err
		}
		targets = append(targets, word)
	}
	slices.Sort(targets)
	targets = slices.Compact(targets)
	switch {
	case everything:
		return nil, nil
	case len(targets) > maxTargets:
		return nil, fmt.Errorf("%d targets, a grant can carry %d; use globs", len(targets), maxTargets)
	case len(targets) == 0 && len(exprs) > 0:
		return nil, fmt.Errorf("no target is named; expected such as web1, web* or all")
	}
	return targets, nil
}

func checkTarget(t string) error {
	if t == "" || len(t) > maxTargetSize || strings.Trim(t, "abcdefghijklmnopqrstuvwxyz0123456789-*?[]^") != "" {
		return fmt.Errorf("target %.64q: expected a node's name or a glob of lower-case letters, digits, hyphens, *, ? and [abc], at most %d characters", t, maxTargetSize)
	}
	if _, err := path.Match(t, ""); err != nil {
		return fmt.Errorf("target %.64q: a bad pattern; * is any text, ? one character, [abc] one of those", t)
	}
	return nil
}

// checkRestriction tells whether a grant of a role can have these targets. An admin has the whole fleet, since access
// itself knows no nodes.
func checkRestriction(r Role, targets []string) error {
	if len(targets) > 0 && (r == Admin || !slices.Contains(people, r)) {
		return fmt.Errorf("%s can't be restricted to some nodes; %s, %s and %s can", r, Viewer, Operator, Deployer)
	}
	for _, t := range targets {
		if err := checkTarget(t); err != nil {
			return err
		}
	}
	return nil
}

// targetsOf reads a user JWT's targets.
func targetsOf(c *jwt.UserClaims, r Role) ([]string, error) {
	var targets []string
	for _, tag := range c.Tags {
		if t, ok := strings.CutPrefix(tag, targetTag); ok {
			targets = append(targets, t)
		}
	}
	return targets, checkRestriction(r, targets)
}

// Covers tells whether what the identity may do, it may do to this node.
func (id Identity) Covers(node string) bool {
	if len(id.Targets) == 0 {
		return true
	}
	return slices.ContainsFunc(id.Targets, func(t string) bool {
		ok, err := path.Match(t, node)
		return err == nil && ok
	})
}

// Reach refuses what is about a node that the identity's grant does not cover.
func (id Identity) Reach(node string) error {
	if id.Covers(node) {
		return nil
	}
	return Refuse(OffTarget, "%s may reach %s, not %.63s", id.Name, strings.Join(id.Targets, " "), node)
}

// AccountUpdate is PutAccount's: the account JWT that is in force from here on, such as one with a new revocation.
type AccountUpdate struct {
	Account string `json:"account"`
}

// AccountReply answers PutAccount.
type AccountReply struct {
	Nodes    int  `json:"nodes"`    // that were told; those that are away are when they return
	External bool `json:"external"` // the broker is not the controller's own, which can't change what it knows
}

// Revocations are what an account JWT says of whose JWTs are void, and up to which time of issue, by public user key.
func Revocations(account string) (map[string]time.Time, error) {
	c, err := jwt.DecodeAccountClaims(account)
	if err != nil {
		return nil, fmt.Errorf("not an account JWT: %w", err)
	}
	revoked := make(map[string]time.Time, len(c.Revocations))
	for key, at := range c.Revocations {
		revoked[key] = time.Unix(at, 0).UTC()
	}
	return revoked, nil
}

// Issued is when the account JWT that the verifier knows was issued, in Unix seconds.
func (v *Verifier) Issued() int64 {
	v.mu.Lock()
	defer v.mu.Unlock()
	return v.account.IssuedAt
}

// Succeeds tells whether an account JWT may take the place of the one that the verifier knows. SetAccount asks for the
// operator's signature and an age; this, for whoever hands the JWT out, asks in addition that no revocation gets lost:
// of two copies of a project folder, one does not know what the other revoked.
func (v *Verifier) Succeeds(token string) error {
	c, err := v.decodeAccount(token)
	if err != nil {
		return Refuse(Untrusted, "%v", err)
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	switch {
	case token == v.token:
		return nil
	case c.IssuedAt <= v.account.IssuedAt:
		return Refuse(Conflict, "the account JWT is of %s, the one in force of %s; bring the project folder up to date", stamp(c.IssuedAt), stamp(v.account.IssuedAt))
	}
	for key, at := range v.account.Revocations {
		if c.Revocations[key] < at {
			return Refuse(Conflict, "the account JWT does not know that %s was revoked; bring the project folder up to date", key)
		}
	}
	return nil
}
