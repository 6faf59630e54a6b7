package hetzner

import (
	"context"
	"fmt"
	"strconv"
	"time"

	"github.com/hetznercloud/hcloud-go/v2/hcloud"

	"github.com/nix-infra/nix-infra/cli/provision"
)

// destroyTime bounds the deletion of a server, with the end of what is being done with it.
const destroyTime = 5 * time.Minute

// Destroy deletes a server. Of another fleet's it deletes none.
func (h *Hetzner) Destroy(ctx context.Context, s provision.Server, step func(what string)) error {
	ctx, cancel := context.WithTimeout(ctx, destroyTime)
	defer cancel()
	id, err := strconv.ParseInt(s.ID, 10, 64)
	if err != nil {
		return fmt.Errorf("hetzner: %s: id %q is no number", s.Name, s.ID)
	}
	there, _, err := h.api.Server.GetByID(ctx, id)
	if err != nil {
		return explain("look up "+s.Name, err)
	}
	if there == nil {
		return nil
	}
	if err := h.foreign(there); err != nil {
		return err
	}
	for tries := 0; ; tries++ {
		deleted, _, err := h.api.Server.DeleteWithResult(ctx, there)
		switch {
		case hcloud.IsError(err, hcloud.ErrorCodeNotFound):
			return nil
		case hcloud.IsError(err, hcloud.ErrorCodeLocked):
			step("waiting for what is being done with it")
			select {
			case <-ctx.Done():
				return explain("delete "+s.Name, err)
			case <-time.After(h.pace(tries)):
			}
		case err != nil:
			return explain("delete "+s.Name, err)
		default:
			step("deleting")
			if err := h.api.Action.WaitFor(ctx, deleted.Action); err != nil {
				return explain("delete "+s.Name, err)
			}
			return nil
		}
	}
}
