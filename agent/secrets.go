package agent

import (
	"context"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// rotateTime bounds a rotation with its way back; what an order may ask for is an hour.
const rotateTime = 75 * time.Minute

func (a *agent) listSecrets(context.Context, *protocol.Verified) (any, error) {
	return protocol.SecretList{Secrets: a.engine.Secrets()}, nil
}
