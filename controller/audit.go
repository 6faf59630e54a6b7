package controller

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/nix-infra/nix-infra/protocol"
)

const auditTimeout = 5 * time.Second

// auditor writes this controller's chain of audit records: each names the digest of the one before it,
// over restarts too.
type auditor struct {
	name   string
	js     jetstream.JetStream
	stream jetstream.Stream
	log    *slog.Logger

	mu    sync.Mutex
	known bool // seq and prev are those of the last record in the stream
	seq   uint64
	prev  string
}

// record adds a record to the chain, and to the log. The caller fills in what the record is about.
func (a *auditor) record(ctx context.Context, r protocol.AuditRecord) error {
	a.log.Info("audit", "user", r.User, "role", r.Role, "request", r.Request, "action", r.Action,
		"target", r.Target, "payload", r.Payload, "detail", r.Detail, "outcome", r.Outcome, "reason", r.Reason)
	// A request that was cut off is recorded all the same.
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), auditTimeout)
	defer cancel()
	a.mu.Lock()
	defer a.mu.Unlock()
	if !a.known {
		if err := a.resume(ctx); err != nil {
			return err
		}
	}
	r.Version, r.Seq, r.Prev, r.Time, r.At = protocol.Version, a.seq+1, a.prev, time.Now().UTC(), a.name
	data := protocol.Encode(r)
	if _, err := a.js.Publish(ctx, protocol.ControllerAudit(a.name), data); err != nil {
		// It may have been stored or not; the stream knows.
		a.known = false
		return fmt.Errorf("can't write the audit record (is the disk full?): %w", err)
	}
	a.seq, a.prev = r.Seq, protocol.Digest(data)
	return nil
}

// resume finds the end of the chain.
func (a *auditor) resume(ctx context.Context) error {
	m, err := a.stream.GetLastMsgForSubject(ctx, protocol.ControllerAudit(a.name))
	switch {
	case errors.Is(err, jetstream.ErrMsgNotFound):
		a.seq, a.prev = 0, ""
	case err != nil:
		return fmt.Errorf("can't read the audit stream: %w", err)
	default:
		last, err := protocol.Decode[protocol.AuditRecord](m.Data)
		if err != nil {
			return fmt.Errorf("the last audit record is damaged: %w", err)
		}
		a.seq, a.prev = last.Seq, protocol.Digest(m.Data)
	}
	a.known = true
	return nil
}
