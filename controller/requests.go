package controller

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// What people ask and order. Nothing is believed that their own key did not sign.

// actions are what the controller does for people.
func (t *term) actions() map[protocol.Action]func(context.Context, *protocol.Verified) (any, error) {
	return map[protocol.Action]func(context.Context, *protocol.Verified) (any, error){
		protocol.ListNodes:       t.listNodes,
		protocol.ListDeployments: t.listDeployments,
		protocol.ShowDeployment:  t.showDeployment,
		protocol.MissingBlobs:    t.missingBlobs,
		protocol.PutBlobs:        t.putBlobs,
		protocol.Deploy:          t.deploy,
		protocol.PutNode:         t.putNode,
		protocol.RemoveNode:      t.removeNode,
		protocol.TagNode:         t.tagNode,
		protocol.LockNode:        t.lockNode,
		protocol.SteerRollout:    t.steer,
		protocol.ShowManifest:    t.showManifest,
		protocol.ShowBlob:        t.showBlob,
		protocol.PutAccount:      t.putAccount,
		protocol.ShowAudit:       t.showAudit,
		protocol.ShowHealth:      t.showHealth,
		protocol.ListJoinings:    t.listJoinings,
		protocol.AnswerJoining:   t.answerJoining,
	}
}

// request serves one message on ctl.req.*: verify, record, run, record, answer. Refused ones that nobody
// is proven to have sent are recorded and answered a few times a second; more are counted into the next
// record, so that nobody without a key can fill the disk.
func (t *term) request(ctx context.Context, m *nats.Msg) {
	signed, claimed, err := t.decode(m)
	var order *protocol.Verified
	var sender protocol.Identity
	if err == nil {
		memory := seenFor{seen: t.seen, ctx: ctx, durable: !repeatable(claimed.Action)}
		expect := protocol.Expect{Kind: protocol.KindRequest, Targets: []string{protocol.ControllerName}, Now: time.Now()}
		order, sender, err = t.c.verifier.Verify(signed, expect, memory)
	}
	record := protocol.AuditRecord{User: sender.Name, Role: sender.Role, Request: short(claimed.ID, 64),
		Action: protocol.Action(short(string(claimed.Action), 64)), Target: short(claimed.Target, 64), Payload: short(claimed.Payload, 64)}
	if sender.Name != "" && !errors.Is(err, &protocol.Refusal{Code: protocol.Tampered}) {
		record.Detail = protocol.Detail(claimed.Action, signed.Payload) // its sender signed it, whatever else is wrong
	}
	to := m.Reply
	switch {
	case sender.Name != "":
		to = protocol.ReplySubject(sender.Name, claimed.ID, protocol.ControllerName)
	case !protocol.OwnReply(protocol.ControllerName, m.Reply):
		to = ""
	}
	if sender.Name == "" {
		ok, held := t.unproven.allow(time.Now())
		if !ok {
			return // it is counted
		}
		if held > 0 {
			record.Reason = fmt.Sprintf("(%d more that nobody is proven to have sent were ignored) ", held)
		}
	}
	var body any
	if err == nil {
		body, err = t.run(ctx, order, record)
	}
	record.Outcome = "ok"
	if err != nil {
		var refusal *protocol.Refusal
		if !errors.As(err, &refusal) {
			refusal = protocol.Refuse(protocol.Failed, "%v", err)
		}
		record.Outcome, record.Reason = string(refusal.Code), record.Reason+short(refusal.Reason, 1000)
		err = refusal
	}
	if failed := t.audit.record(ctx, record); failed != nil {
		t.log.Error("a request is not on record", "request", record.Request, "error", failed)
	}
	if to != "" {
		t.answer(to, body, err)
	}
}

// decode reads what can be read without believing any of it.
func (t *term) decode(m *nats.Msg) (*protocol.Signed, protocol.Header, error) {
	if v := protocol.SubjectVersion(m.Subject); v != ownVersion() {
		return nil, protocol.Header{}, otherVersion(v)
	}
	signed, err := protocol.Decode[protocol.Signed](m.Data)
	if err != nil {
		return nil, protocol.Header{}, protocol.Refuse(protocol.Malformed, "%v", err)
	}
	var h protocol.Header
	if err := json.Unmarshal(signed.Header, &h); err != nil {
		h = protocol.Header{} // the verifier says what is wrong with it
	}
	return &signed, h, nil
}

// run carries out an order that was found good. What can't be recorded is not done.
func (t *term) run(ctx context.Context, order *protocol.Verified, record protocol.AuditRecord) (any, error) {
	if err := t.audit.record(ctx, record); err != nil {
		return nil, err
	}
	act, ok := t.actions()[order.Action]
	if !ok {
		return nil, protocol.Refuse(protocol.Unknown, "the controller knows no action %q; is it older than this program?", order.Action)
	}
	return act(ctx, order)
}

// payload decodes what an order is about.
func payload[T any](order *protocol.Verified) (T, error) {
	data := order.Payload
	if len(data) == 0 {
		data = []byte("{}")
	}
	v, err := protocol.Decode[T](data)
	if err != nil {
		return v, protocol.Refuse(protocol.Invalid, "%s: %v", order.Action, err)
	}
	return v, nil
}

func short(s string, n int) string {
	if len(s) > n {
		return strings.ToValidUTF8(s[:n], "") + "…"
	}
	return s
}
