package protocol

import (
	"fmt"
	"regexp"
)

// A node's secrets: sealed to it where they come from, and put onto its disk by systemd-creds. See Seal.

// Limits of secrets.
const (
	MaxSecrets    = 256      // of one node
	MaxSecretSize = 64 << 10 // bytes, of one value
	maxSealedSize = MaxSecretSize + 256
	maxAllSecrets = 512 << 10 // bytes, of all of a manifest, sealed
)

// secretName is what can be a credential's name (systemd: a file name), a secret's file, and is never hidden or an option.
var secretName = regexp.MustCompile(`^[A-Za-z0-9_][A-Za-z0-9._@+-]{0,127}$`)

// SealedSecret is a secret that a manifest brings: the unit that needs it loads /root/secrets/NAME as a credential.
type SealedSecret struct {
	Name     string `json:"name"`
	Sealed   []byte `json:"sealed"`              // the value, to the node
	PreBuild bool   `json:"pre_build,omitempty"` // also /run/keys/NAME, in clear, on a tmpfs: builds need it
}

// CheckSecretName tells whether a secret can be called that.
func CheckSecretName(name string) error {
	if !secretName.MatchString(name) {
		return fmt.Errorf("%.140q can't be the name of a secret: use letters, digits and . _ @ + -, at most 128 characters, the first a letter, digit or _", name)
	}
	return nil
}

// checkSecrets checks a manifest's secrets.
func checkSecrets(secrets []SealedSecret) error {
	if len(secrets) > MaxSecrets {
		return fmt.Errorf("%d secrets; %d are possible", len(secrets), MaxSecrets)
	}
	total := 0
	for i, s := range secrets {
		if err := s.Validate(); err != nil {
			return err
		}
		if i > 0 && s.Name <= secrets[i-1].Name {
			return fmt.Errorf("secret %q is listed twice or out of order", s.Name)
		}
		total += len(s.Sealed)
	}
	if total > maxAllSecrets {
		return fmt.Errorf("the secrets have %d bytes together, the limit is %d", total, maxAllSecrets)
	}
	return nil
}

// Validate checks the secret's form.
func (s *SealedSecret) Validate() error {
	if err := CheckSecretName(s.Name); err != nil {
		return err
	}
	if len(s.Sealed) <= xkeySize || len(s.Sealed) > maxSealedSize {
		return fmt.Errorf("secret %q has %d bytes sealed; %d to %d are possible", s.Name, len(s.Sealed), xkeySize+1, maxSealedSize)
	}
	return nil
}

// RotateOrder is RotateSecret's: a secret that the node has gets another value, and the units that load it get it.
type RotateOrder struct {
	Secret  SealedSecret `json:"secret"`
	Timeout int          `json:"timeout"` // seconds, for the units to be right again
	Settle  int          `json:"settle"`  // seconds, for which they have to stay so
}

// Validate checks the order's form.
func (o *RotateOrder) Validate() error {
	if err := o.Secret.Validate(); err != nil {
		return err
	}
	if o.Timeout < 1 || o.Timeout > 3600 || o.Settle < 0 || o.Settle >= o.Timeout {
		return fmt.Errorf("a timeout of %d s with %d s to settle; up to 3600 are possible, and less to settle than that", o.Timeout, o.Settle)
	}
	return nil
}

// Rotated answers RotateSecret: the value is in place, and the units that load it hold with it. Otherwise the old value is
// back, and the answer a refusal that says why.
type Rotated struct {
	Same  bool     `json:"same,omitempty"` // it had that value: nothing was done
	Units []string `json:"units"`          // that were restarted or reloaded
}

// HeldSecret is one that a node holds, without its value.
type HeldSecret struct {
	Name     string `json:"name"`
	PreBuild bool   `json:"pre_build,omitempty"`
	Written  int64  `json:"written"` // Unix seconds, when the node got this value
}

// SecretList answers ListSecrets, in order of name.
type SecretList struct {
	Secrets []HeldSecret `json:"secrets"`
}
