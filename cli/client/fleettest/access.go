package fleettest

import (
	"fmt"
	"net"
	"time"

	"github.com/nats-io/jwt/v2"
	"github.com/nats-io/nats-server/v2/server"

	"github.com/nix-infra/nix-infra/protocol"
)

// putAccount goes by an account JWT, and has the broker go by it.
func (f *Fleet) putAccount(payload []byte) (any, error) {
	r, err := protocol.Decode[protocol.AccountUpdate](payload)
	if err != nil {
		return nil, err
	}
	if err := f.verifier.Succeeds(r.Account); err != nil {
		return nil, err
	}
	if _, err := f.verifier.SetAccount(r.Account); err != nil {
		return nil, err
	}
	claims, err := jwt.DecodeAccountClaims(r.Account)
	must(f.t, err)
	must(f.t, f.server.AccountResolver().Store(claims.Subject, r.Account))
	account, err := f.server.LookupAccount(claims.Subject)
	must(f.t, err)
	f.server.UpdateAccountClaims(account, claims)
	return protocol.AccountReply{Nodes: len(f.records), External: f.foreign}, nil
}

// Broker starts one more broker of the fleet, which knows accounts as resolver does, and gives its URL. Nobody is there.
func (f *Fleet) Broker(resolver server.AccountResolver) string {
	return fmt.Sprintf("tls://127.0.0.1:%d", f.broker(resolver).Addr().(*net.TCPAddr).Port)
}

// Foreign makes the broker one that is not the controller's own.
func (f *Fleet) Foreign() {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.foreign = true
}

// Account is the account JWT that the fleet goes by.
func (f *Fleet) Account() string { return f.verifier.Account() }

// Write puts what somebody wrote into the record, as the stream of a controller has it.
func (f *Fleet) Write(subject string, data []byte) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.written = append(f.written, protocol.StoredRecord{Number: f.cut + uint64(len(f.written)) + 1, Subject: subject,
		Stored: time.Date(2026, 3, 4, 5, 6, len(f.written), 0, time.UTC), Data: data})
}

// Alter changes the record, as somebody does who has the controller's disk.
func (f *Fleet) Alter(change func([]protocol.StoredRecord) []protocol.StoredRecord) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.written = change(f.written)
}

// CutRecord lets go of the oldest records, as a stream does that is full.
func (f *Fleet) CutRecord(n int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.written, f.cut = f.written[n:], f.cut+uint64(n)
}

// showAudit tells few records at once, so that a test's record has several pages.
func (f *Fleet) showAudit(payload []byte) (any, error) {
	q, err := protocol.Decode[protocol.AuditQuery](payload)
	if err != nil {
		return nil, err
	}
	page := protocol.AuditPage{First: f.cut + 1, Last: f.cut}
	if n := len(f.written); n > 0 {
		page.First, page.Last = f.written[0].Number, f.written[n-1].Number
	}
	if q.From == 0 {
		return page, nil
	}
	for _, s := range f.written {
		if s.Number < q.From || q.To != 0 && s.Number >= q.To {
			continue
		}
		if len(page.Records) == pageSize {
			page.Next = s.Number
			break
		}
		if page.Since.IsZero() {
			page.Since = s.Stored
		}
		if r, err := protocol.Decode[protocol.AuditRecord](s.Data); err != nil || q.Matches(&r) {
			page.Records = append(page.Records, s)
		}
	}
	return page, nil
}
