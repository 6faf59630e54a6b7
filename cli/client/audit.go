package client

import (
	"context"
	"fmt"
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

// How many messages with records are looked at, from the newest back, before older ones are: at first, and, where what is
// looked for is rare, at most.
const (
	firstWindow = 500
	auditWindow = 10_000
)

// auditPage asks for a page of the record, and checks that what comes is what was asked for.
func (c *Client) auditPage(ctx context.Context, q protocol.AuditQuery) (*protocol.AuditPage, error) {
	page := &protocol.AuditPage{}
	if err := c.Controller(ctx, protocol.ShowAudit, q, page); err != nil {
		return nil, err
	}
	number := q.From
	for _, r := range page.Records {
		if r.Number < number || q.To != 0 && r.Number >= q.To {
			return nil, fmt.Errorf("the controller's answer about the record has number %d out of order", r.Number)
		}
		number = r.Number // a message has many
	}
	if page.Next != 0 && page.Next <= q.From {
		return nil, fmt.Errorf("the controller's answer about the record does not advance past %d", q.From)
	}
	return page, nil
}

// VerifyAudit has the whole record followed by check, from the oldest that is kept to the newest that there is when it
// begins, and tells how many records came and the number that the newest should have.
func (c *Client) VerifyAudit(ctx context.Context, check *ChainCheck) (count int, last uint64, err error) {
	bounds, err := c.auditPage(ctx, protocol.AuditQuery{})
	if err != nil {
		return 0, 0, err
	}
	check.First, last = max(bounds.First, 1), bounds.Last
	if last < check.First {
		return 0, last, nil
	}
	q := protocol.AuditQuery{From: check.First, To: last + 1}
	for q.From != 0 {
		page, err := c.auditPage(ctx, q)
		if err != nil {
			return count, last, err
		}
		for _, r := range page.Records {
			check.Add(r)
		}
		count += len(page.Records)
		q.From = page.Next
	}
	return count, last, nil
}

// Audit gives the newest records that q asks for, at most limit (0: all), the oldest of them first. From and To of q are
// not used.
func (c *Client) Audit(ctx context.Context, q protocol.AuditQuery, limit int) ([]protocol.StoredRecord, error) {
	bounds, err := c.auditPage(ctx, protocol.AuditQuery{})
	if err != nil {
		return nil, err
	}
	var found []protocol.StoredRecord // the newest first
	size := uint64(firstWindow)
	for to := bounds.Last + 1; to > bounds.First; size = min(2*size, auditWindow) {
		from := max(bounds.First, to-min(to, size), 1)
		q.From, q.To = from, to
		var window []protocol.StoredRecord
		reached := false
		for q.From != 0 {
			page, err := c.auditPage(ctx, q)
			if err != nil {
				return nil, err
			}
			window = append(window, page.Records...)
			// The stream gets a record after it was made, so that all that it got before are older, too.
			if q.From == from && !page.Since.IsZero() && page.Since.Before(q.Since) {
				reached = true
			}
			q.From = page.Next
		}
		slices.Reverse(window)
		found = append(found, window...)
		if limit > 0 && len(found) >= limit {
			found = found[:limit]
			break
		}
		if to = from; reached || to == 1 {
			break
		}
	}
	slices.Reverse(found)
	return found, nil
}
