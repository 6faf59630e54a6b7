package controller

import (
	"context"
	"fmt"
	"time"

	"github.com/nats-io/nats.go/jetstream"

	"github.com/nix-infra/nix-infra/protocol"
)

// Bounds of one answer about the record. What was not looked at is asked for with the next question.
const (
	maxAuditScan  = 10_000  // records that are looked at
	maxAuditBytes = 1 << 20 // of records that are told, with what goes with each
	storedBytes   = 256     // of what goes with a record, at most
	auditBatch    = 500
	auditIdle     = 30 * time.Second // after which the stream forgets who reads it
)

// showAudit reads the record. It judges nothing: whoever asks checks the chains.
func (t *term) showAudit(ctx context.Context, order *protocol.Verified) (any, error) {
	q, err := payload[protocol.AuditQuery](order)
	if err != nil {
		return nil, err
	}
	info, err := t.c.broker.Audit.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("can't read the audit stream: %w", err)
	}
	page := &protocol.AuditPage{First: info.State.FirstSeq, Last: info.State.LastSeq}
	if info.State.Msgs == 0 {
		page.First = page.Last + 1
	}
	if q.From == 0 {
		return page, nil
	}
	from, end := max(q.From, page.First), page.Last+1
	if q.To != 0 {
		end = min(end, q.To)
	}
	to := min(end, from+maxAuditScan)
	if from >= to {
		return page, nil
	}
	if page.Next, err = t.scanAudit(ctx, q, from, to, page); err == nil && page.Next >= end {
		page.Next = 0
	}
	return page, err
}

// scanAudit adds the records between two numbers that are asked for, as far as they fit, and gives the number at which
// it stopped. It never stops within a message.
func (t *term) scanAudit(ctx context.Context, q protocol.AuditQuery, from, to uint64, page *protocol.AuditPage) (uint64, error) {
	cfg := jetstream.ConsumerConfig{DeliverPolicy: jetstream.DeliverByStartSequencePolicy, OptStartSeq: from,
		AckPolicy: jetstream.AckNonePolicy, InactiveThreshold: auditIdle, MemoryStorage: true}
	if q.At != "" {
		cfg.FilterSubjects = []string{protocol.UpSubject(q.At, protocol.UpAudit), protocol.ControllerAudit(q.At)}
	}
	reader, err := t.c.broker.Audit.CreateConsumer(ctx, cfg)
	if err != nil {
		return 0, fmt.Errorf("can't read the audit stream: %w", err)
	}
	defer func() {
		// At worst the stream forgets it after a while by itself.
		_ = t.c.broker.Audit.DeleteConsumer(context.WithoutCancel(ctx), reader.CachedInfo().Name)
	}()
	size, looked := 0, 0
	for left := reader.CachedInfo().NumPending; left > 0; {
		// What is there is asked for by its number: without it, a batch that is late looks like the end of the record.
		wanted := int(min(left, auditBatch))
		batch, err := reader.Fetch(wanted, jetstream.FetchContext(ctx))
		if err != nil {
			return 0, fmt.Errorf("can't read the audit stream: %w", err)
		}
		count := 0
		for m := range batch.Messages() {
			meta, err := m.Metadata()
			if err != nil {
				return 0, err
			}
			number := meta.Sequence.Stream
			if number >= to {
				return to, nil
			}
			count, left = count+1, meta.NumPending
			if page.Since.IsZero() {
				page.Since = meta.Timestamp.UTC()
			}
			records := protocol.SplitRecords(m.Data())
			var found []protocol.StoredRecord
			for _, data := range records {
				// A record that can't be read is one that everybody should see.
				if r, err := protocol.Decode[protocol.AuditRecord](data); err == nil && !q.Matches(&r) {
					continue
				}
				found = append(found, protocol.StoredRecord{Number: number, Subject: m.Subject(), Stored: meta.Timestamp.UTC(), Data: data})
				size += len(data) + storedBytes
			}
			if size > maxAuditBytes && len(page.Records) > 0 {
				return number, nil
			}
			page.Records = append(page.Records, found...)
			if looked += len(records); looked >= maxAuditScan {
				return number + 1, nil
			}
		}
		if err := batch.Error(); err != nil {
			return 0, fmt.Errorf("can't read the audit stream: %w", err)
		}
		if count < wanted {
			return 0, fmt.Errorf("can't read the audit stream: %d of %d records came in time; try again", count, wanted)
		}
	}
	return to, nil
}
