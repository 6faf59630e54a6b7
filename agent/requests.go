package agent

import (
	"context"
	"errors"
	"time"

	"github.com/nix-infra/nix-infra/agent/query"
	"github.com/nix-infra/nix-infra/protocol"
)

// answers is the server of what this node can be asked. Who may ask is protocol's table of roles.
func (a *agent) answers() *query.Server {
	return query.New(query.Options{
		Node: a.machine.Name, Log: a.o.Log.With("part", "query"), Verifier: a.verifier, Seen: a.seen,
		Audit: a.audit.Record, Publish: a.link.Publish,
		Handlers: map[protocol.Action]query.Handler{
			protocol.Ping:    a.ping,
			protocol.Facts:   a.facts,
			protocol.Release: a.release,
		},
	})
}

func (a *agent) ping(context.Context, *protocol.Verified) (any, error) {
	return protocol.Pong{Agent: protocol.Build(), Time: time.Now().UTC()}, nil
}

func (a *agent) facts(ctx context.Context, _ *protocol.Verified) (any, error) {
	return a.heart.Beat(ctx), nil
}

func (a *agent) release(_ context.Context, r *protocol.Verified) (any, error) {
	q, err := protocol.Decode[protocol.NameRequest](r.Payload)
	if err != nil {
		return nil, protocol.Refuse(protocol.Malformed, "%v", err)
	}
	if err := a.engine.Release(q.Name); err != nil {
		var refusal *protocol.Refusal
		if errors.As(err, &refusal) {
			return nil, refusal
		}
		return nil, protocol.Refuse(protocol.Failed, "%v", err)
	}
	a.heart.Changed()
	return nil, nil
}
