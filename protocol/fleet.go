package protocol

import (
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nkeys"
)

// FleetKeys are the private keys of a fleet: whoever holds them decides who is what. They stay in the
// operator's vault. The values are nkey seeds.
type FleetKeys struct {
	Name     string          `json:"name"`
	Operator string          `json:"operator"`
	Account  string          `json:"account"` // identity of the account; signs nothing
	System   string          `json:"system"`  // identity of the broker's system account
	Signing  map[Role]string `json:"signing"` // one scoped signing key per role
}

// NewFleet makes all keys of a fleet.
func NewFleet(name string) (*FleetKeys, error) {
	if err := CheckName(name); err != nil {
		return nil, err
	}
	k := &FleetKeys{Name: name, Signing: map[Role]string{}}
	seed := func(make func() (nkeys.KeyPair, error)) (string, error) {
		pair, err := make()
		if err != nil {
			return "", err
		}
		s, err := pair.Seed()
		return string(s), err
	}
	var err error
	if k.Operator, err = seed(nkeys.CreateOperator); err != nil {
		return nil, err
	}
	if k.Account, err = seed(nkeys.CreateAccount); err != nil {
		return nil, err
	}
	if k.System, err = seed(nkeys.CreateAccount); err != nil {
		return nil, err
	}
	_, err = k.Complete()
	return k, err
}

// Complete makes the signing keys of roles that there were not yet when the fleet was made. Then the account JWT has to be
// published again.
func (k *FleetKeys) Complete() (changed bool, err error) {
	for _, r := range Roles {
		if k.Signing[r] != "" {
			continue
		}
		pair, err := nkeys.CreateAccount()
		if err != nil {
			return changed, err
		}
		seed, err := pair.Seed()
		if err != nil {
			return changed, err
		}
		k.Signing[r], changed = string(seed), true
	}
	return changed, nil
}

func pairOf(seed string) (nkeys.KeyPair, string, error) {
	pair, err := nkeys.FromSeed([]byte(seed))
	if err != nil {
		return nil, "", fmt.Errorf("a seed in the fleet's keys: %w", err)
	}
	pub, err := pair.PublicKey()
	return pair, pub, err
}

// Public is what a broker and the agents need of a fleet: nothing secret.
type Public struct {
	Operator    string `json:"operator"`     // public key, what agents pin
	OperatorJWT string `json:"operator_jwt"` //
	AccountJWT  string `json:"account_jwt"`  // roles and revocations, signed by the operator
	SystemJWT   string `json:"system_jwt"`
}

// Publish makes the public half. revoked maps public user keys to the time up to which their
// JWTs are void: all that ever were revoked, since the newest account JWT is the only one that counts. Which one is the
// newest is told by the second in which it was made, so that no two may be made in the same.
func (k *FleetKeys) Publish(revoked map[string]time.Time) (*Public, error) {
	operator, operatorPub, err := pairOf(k.Operator)
	if err != nil {
		return nil, err
	}
	_, systemPub, err := pairOf(k.System)
	if err != nil {
		return nil, err
	}
	oc := jwt.NewOperatorClaims(operatorPub)
	oc.Name = k.Name
	oc.SystemAccount = systemPub
	p := &Public{Operator: operatorPub}
	if p.OperatorJWT, err = oc.Encode(operator); err != nil {
		return nil, err
	}
	sc := jwt.NewAccountClaims(systemPub)
	sc.Name = "system"
	if p.SystemJWT, err = sc.Encode(operator); err != nil {
		return nil, err
	}
	ac, err := k.account(revoked)
	if err != nil {
		return nil, err
	}
	p.AccountJWT, err = ac.Encode(operator)
	return p, err
}

// Published tells whether an account JWT knows all signing keys.
func (k *FleetKeys) Published(account string) (bool, error) {
	c, err := jwt.DecodeAccountClaims(account)
	if err != nil {
		return false, fmt.Errorf("not an account JWT: %w", err)
	}
	for _, seed := range k.Signing {
		_, key, err := pairOf(seed)
		if err != nil {
			return false, err
		}
		if _, ok := c.SigningKeys.GetScope(key); !ok {
			return false, nil
		}
	}
	return true, nil
}

func (k *FleetKeys) account(revoked map[string]time.Time) (*jwt.AccountClaims, error) {
	_, pub, err := pairOf(k.Account)
	if err != nil {
		return nil, err
	}
	ac := jwt.NewAccountClaims(pub)
	ac.Name = k.Name
	ac.Limits.JetStreamLimits = jwt.JetStreamLimits{DiskStorage: -1, MemoryStorage: -1, Streams: -1, Consumer: -1}
	for _, r := range Roles {
		if k.Signing[r] == "" {
			continue // of a fleet that was made before there was the role; see Complete
		}
		_, key, err := pairOf(k.Signing[r])
		if err != nil {
			return nil, err
		}
		permissions, err := Permissions(r)
		if err != nil {
			return nil, err
		}
		scope := jwt.NewUserScope()
		scope.Key, scope.Role = key, string(r)
		scope.Template.Permissions, scope.Template.NatsLimits = permissions, limits(r)
		ac.SigningKeys.AddScopedSigner(scope)
	}
	for key, at := range revoked {
		ac.RevokeAt(key, at)
	}
	return ac, nil
}

// Issue signs a user JWT: public key is called name and has role. expires may be zero: never. With targets it reaches
// only the nodes that they name; see ParseTargets.
func (k *FleetKeys) Issue(name string, r Role, publicKey string, expires time.Time, targets ...string) (string, error) {
	if err := checkRestriction(r, targets); err != nil {
		return "", err
	}
	var tags []string
	for _, t := range targets {
		tags = append(tags, targetTag+t)
	}
	return k.issue(name, r, publicKey, expires, tags...)
}

func (k *FleetKeys) issue(name string, r Role, publicKey string, expires time.Time, tags ...string) (string, error) {
	if err := CheckName(name); err != nil {
		return "", err
	}
	if !nkeys.IsValidPublicUserKey(publicKey) {
		return "", fmt.Errorf("%q is not a user's public key", publicKey)
	}
	seed, ok := k.Signing[r]
	if !ok && slices.Contains(Roles, r) {
		return "", fmt.Errorf("the fleet's keys have none for the role %s", r)
	} else if !ok {
		return "", fmt.Errorf("there is no role %q; the roles are %v", r, Roles)
	}
	signer, _, err := pairOf(seed)
	if err != nil {
		return "", err
	}
	_, account, err := pairOf(k.Account)
	if err != nil {
		return "", err
	}
	uc := jwt.NewUserClaims(publicKey)
	uc.Name = name
	uc.IssuerAccount = account
	uc.SetScoped(true)
	uc.Tags.Add(tags...)
	if !expires.IsZero() {
		uc.Expires = expires.Unix()
	}
	return uc.Encode(signer)
}

// IssueNode signs a node's user JWT, with the public curve key that is the node's in it.
func (k *FleetKeys) IssueNode(name, publicKey, xkey string) (string, error) {
	if !nkeys.IsValidPublicCurveKey(xkey) {
		return "", fmt.Errorf("%q is not a public curve key", xkey)
	}
	return k.issue(name, Node, publicKey, time.Time{}, xkeyTag+xkey)
}

// Credentials makes a new user with a key of its own, as a credentials file (the creds format of
// nats-io/jwt). Only for people and programs on the operator's side: nodes make their own keys.
func (k *FleetKeys) Credentials(name string, r Role, expires time.Time, targets ...string) ([]byte, error) {
	pair, err := nkeys.CreateUser()
	if err != nil {
		return nil, err
	}
	pub, err := pair.PublicKey()
	if err != nil {
		return nil, err
	}
	token, err := k.Issue(name, r, pub, expires, targets...)
	if err != nil {
		return nil, err
	}
	seed, err := pair.Seed()
	if err != nil {
		return nil, err
	}
	return jwt.FormatUserConfig(token, seed)
}

// SystemInbox is where a SystemUser hears the answers.
const SystemInbox = "_SYSTEM_INBOX"

// SystemUser makes an identity that may do one thing for a minute: hand an account JWT to a broker that is not the
// controller's own. It is the broker's system account that takes it.
func (k *FleetKeys) SystemUser(now time.Time) (*Signer, error) {
	system, _, err := pairOf(k.System)
	if err != nil {
		return nil, err
	}
	pair, err := nkeys.CreateUser()
	if err != nil {
		return nil, err
	}
	pub, err := pair.PublicKey()
	if err != nil {
		return nil, err
	}
	uc := jwt.NewUserClaims(pub)
	uc.Name = "nix-infra"
	uc.Expires = now.Add(time.Minute).Unix()
	uc.Pub.Allow.Add(AccountClaimsSubject)
	uc.Sub.Allow.Add(SystemInbox + ".>")
	token, err := uc.Encode(system)
	return &Signer{User: token, Key: pair}, err
}

// AccountClaimsSubject is where a NATS server with a resolver of its own takes an account JWT (its docs: securing_nats/jwt).
const AccountClaimsSubject = "$SYS.REQ.CLAIMS.UPDATE"
