package client

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/connect"
)

const pushTimeout = 10 * time.Second

// PushAccount hands an account JWT to a broker that is not the controller's own, as a SystemUser, so that it ends the
// connections of who was revoked. Only a broker with a resolver that can be told (nats-server's resolver type full) takes it.
func PushAccount(ctx context.Context, config Config, account string) error {
	to := connect.To{URLs: config.URLs, CA: config.CA, Signer: config.Signer, Timeout: config.Timeout, Name: "nix-infra", InboxPrefix: protocol.SystemInbox}
	nc, err := dial(ctx, to, nats.NoReconnect())
	if err != nil {
		return err
	}
	defer nc.Close()
	ctx, cancel := context.WithTimeout(ctx, pushTimeout)
	defer cancel()
	m, err := nc.RequestWithContext(ctx, protocol.AccountClaimsSubject, []byte(account))
	if errors.Is(err, nats.ErrNoResponders) {
		return errors.New("its resolver can't be told")
	} else if err != nil {
		return err
	}
	var answer struct {
		Error *struct {
			Description string `json:"description"`
		} `json:"error"`
	}
	if err := json.Unmarshal(m.Data, &answer); err != nil {
		return fmt.Errorf("its answer: %w", err)
	}
	if answer.Error != nil {
		return fmt.Errorf("it refuses: %s", answer.Error.Description)
	}
	return nil
}
