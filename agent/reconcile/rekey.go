package reconcile

import (
	"github.com/nats-io/nkeys"

	"github.com/nix-infra/nix-infra/protocol"
)

// Rekey seals all secrets that the node holds to another curve key, and then calls take, which makes that key the
// node's. From there on the engine begins nothing any more: it is to be ended, and opened with the new key. Where take was
// not called, or failed, either key opens what the node holds, also for the next engine, if Options.Next is the new one.
//
// A deployment that is under way is a Conflict, and what is staged or only tested, too: then some secrets can't be seen.
func (e *Engine) Rekey(next nkeys.KeyPair, take func() error) (err error) {
	if err := e.claim(); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			<-e.busy
		}
	}()
	if _, err := e.steadySecrets(); err != nil {
		return err
	}
	if err := e.secrets.Reseal(next); err != nil {
		return protocol.Refuse(protocol.Failed, "the secrets of %s can't be sealed to its new key, and it keeps the old one: %v", e.o.Node, err)
	}
	if err := take(); err != nil {
		return protocol.Refuse(protocol.Failed, "%s can't take its new keys: %v", e.o.Node, err)
	}
	return nil
}
