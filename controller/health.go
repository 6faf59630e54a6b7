package controller

import (
	"context"
	"time"

	"golang.org/x/sys/unix"

	"github.com/nix-infra/nix-infra/protocol"
)

// healthTimeout is how long etcd and the record may take each before they count as not answering.
const healthTimeout = 3 * time.Second

// showHealth tells how the controller is. That it answers at all says that the broker and the election are well.
func (t *term) showHealth(ctx context.Context, _ *protocol.Verified) (any, error) {
	h := protocol.ControllerHealth{Version: protocol.Build(), Time: time.Now().UTC()}
	if err := within(ctx, t.c.store.Healthy); err != nil {
		h.Etcd = short(err.Error(), 500)
	}
	err := within(ctx, func(ctx context.Context) error {
		info, err := t.audit.stream.Info(ctx)
		if err == nil {
			h.Records.Messages, h.Records.Bytes = info.State.Msgs, info.State.Bytes
		}
		return err
	})
	if err != nil {
		h.Records.Error = short(err.Error(), 500)
	}
	var disk unix.Statfs_t
	if err := unix.Statfs(t.c.cfg.Dir, &disk); err == nil {
		block := int64(disk.Bsize)
		h.DiskTotal, h.DiskFree = int64(disk.Blocks)*block, int64(disk.Bavail)*block
	}
	return h, nil
}

func within(ctx context.Context, check func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, healthTimeout)
	defer cancel()
	return check(ctx)
}
