package credential

import (
	"fmt"

	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
)

// Reseal seals what all sets hold to the key that is to replace the node's. Since it may be broken off anywhere, either
// key opens what is there from its beginning on. What neither opens, such as what was sealed to the key of an earlier
// enrolment, stays as it is: it was lost before. No set may be mounted over another one.
func (s *Store) Reseal(next nkeys.KeyPair) error {
	public, err := next.PublicKey()
	if err != nil {
		return err
	}
	s.next.Store(&next)
	for _, n := range s.numbers() {
		set, err := s.Get(n)
		if err != nil {
			s.o.Log.Error("a set of secrets can't be told, and keeps the key that it has", "set", n, "error", err)
			continue
		}
		if set.Number != n {
			return fmt.Errorf("set %d of the secrets is mounted over set %d", set.Number, n)
		}
		changed := false
		for i := range set.Secrets {
			done, err := s.reseal(&set.Secrets[i], next, public)
			if err != nil {
				return err
			}
			changed = changed || done
		}
		if !changed {
			continue
		}
		if err := s.save(set); err != nil {
			return err
		}
	}
	return nil
}

// reseal seals a secret to a key, unless it is that already.
func (s *Store) reseal(c *Secret, next nkeys.KeyPair, public string) (changed bool, err error) {
	if c.Found {
		return false, nil
	}
	if value, err := protocol.Unseal(c.Sealed, next); err == nil {
		clear(value)
		return false, nil
	}
	value, err := s.Open(*c)
	if err != nil {
		s.o.Log.Error("a secret keeps the key that it is sealed to", "error", err)
		return false, nil
	}
	defer clear(value)
	c.Sealed, err = protocol.Seal(value, public)
	return err == nil, err
}
