package agent

import (
	"context"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// rekey makes other keys for the node and says their public halves, or takes them, with the JWT that the operator made
// for them. The agent ends then, and the next one has them: nothing of this one is to speak or open anything by the old
// ones. Until the JWT is there the node has the old keys, and the new ones stay what they are, so that either order can be
// given again.
func (a *agent) rekey(_ context.Context, r *protocol.Verified) (any, error) {
	o, err := protocol.Decode[protocol.RekeyOrder](r.Payload)
	if err == nil {
		err = o.Validate()
	}
	if err != nil {
		return nil, protocol.Refuse(protocol.Malformed, "%v", err)
	}
	a.rekeying.Lock()
	defer a.rekeying.Unlock()
	next, err := Home(a.o.Dir).Replacement()
	if err != nil {
		return nil, err
	}
	if o.User == "" {
		reply := &protocol.RekeyReply{Nonce: o.Nonce, User: a.machine.Answer.User, Request: next.Request}
		return reply, reply.Prove(a.machine.Key)
	}
	id, err := a.verifier.Identify(o.User, time.Now())
	if err != nil {
		return nil, err
	}
	if id.Role != protocol.Node || id.Name != a.machine.Name || id.Key != next.Request.Key || id.XKey != next.Request.XKey {
		return nil, protocol.Refuse(protocol.Invalid, "the JWT is not for the keys that %s made; begin again", a.machine.Name)
	}
	reply := &protocol.RekeyReply{Nonce: o.Nonce, User: o.User}
	if err := reply.Prove(next.Key); err != nil {
		return nil, err
	}
	if err := a.engine.Rekey(next.XKey, func() error { return Home(a.o.Dir).Replace(o.User) }); err != nil {
		return nil, err
	}
	a.o.Log.Warn("the node has new keys; the agent ends, the next one has them", "key", id.Key, "by", r.Sender.Name)
	a.leave()
	return reply, nil
}
