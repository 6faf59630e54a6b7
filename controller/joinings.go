package controller

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// Machines that come with a token. The controller can't let anybody in: it keeps what the first one says until the
// operator has answered, tells the answer, and turns away whoever else comes with the same token. Nothing of that is in
// memory, so that another leader goes on where this one ended.

const (
	joinWorkers = 4    // requests that are served at once; they must not hold up nodes
	maxPending  = 1000 // machines that wait for their operator
)

// join serves one message on up.join.
func (t *term) join(ctx context.Context, m *nats.Msg) {
	node, _, ok := protocol.UpSender(m.Subject)
	if !ok || !protocol.OwnJoinInbox(node, "", m.Reply) {
		t.ignore(m, "the answer would not go to the sender")
		return
	}
	if v := protocol.SubjectVersion(m.Subject); v != ownVersion() {
		t.answer(m.Reply, nil, otherVersion(v))
		return
	}
	request, err := decodeSmall[protocol.JoinRequest](m.Data, protocol.MaxJoinRequest)
	var token protocol.Identity
	var machine *protocol.EnrolRequest
	if err == nil {
		token, machine, err = t.c.verifier.ProveJoin(&request, node, time.Now())
	}
	if err == nil && !protocol.OwnJoinInbox(node, token.Key, m.Reply) {
		t.ignore(m, "the answer would go to another token's machine")
		return
	}
	news := err != nil
	var state protocol.JoinState
	if err == nil {
		news, err = t.joining(ctx, token, machine, &request)
	}
	if err == nil {
		state, err = t.joinState(ctx, token.Key)
	}
	var refusal *protocol.Refusal
	if err != nil && !errors.As(err, &refusal) {
		t.log.Warn("can't serve a machine with a token; it asks again", "node", node, "error", err)
	} else if news {
		t.recordJoin(ctx, node, &request, machine, refusal)
	}
	t.answer(m.Reply, state, err)
}

// joining keeps a token's first request, and refuses what is not that one's again. news tells that it has to be on record.
func (t *term) joining(ctx context.Context, token protocol.Identity, machine *protocol.EnrolRequest, request *protocol.JoinRequest) (news bool, err error) {
	t.changing.Lock()
	defer t.changing.Unlock()
	j, known, err := t.c.store.Joining(ctx, token.Key)
	if err != nil {
		return false, err
	}
	if !known {
		return t.keepJoining(ctx, token, machine, request)
	}
	if j.Void {
		return true, protocol.Refuse(protocol.Revoked, "the operator has taken the token for %s back", j.Node)
	}
	first, err := protocol.Decode[protocol.EnrolRequest](j.Request.Request)
	if err != nil {
		return false, fmt.Errorf("the request of %s in etcd is damaged: %w", j.Node, err)
	}
	if first.Same(machine) {
		return false, nil
	}
	if j.Rival == "" {
		j.Rival = machine.Key
		if err := t.lead.PutJoining(ctx, j); err != nil {
			return false, err
		}
	}
	return true, protocol.Refuse(protocol.Conflict, "the token for %s was used at %s by another machine (its key is %s), and a token is for one; if that was not yours, somebody has the token: have the operator remove that node and make another token",
		j.Node, j.Came.UTC().Format(time.RFC3339), first.Key)
}

// keepJoining keeps the first request of a token. The caller holds t.changing.
func (t *term) keepJoining(ctx context.Context, token protocol.Identity, machine *protocol.EnrolRequest, request *protocol.JoinRequest) (news bool, err error) {
	if n, ok := t.fleet.node(token.Name); ok && n.Key != machine.Key {
		return true, protocol.Refuse(protocol.Conflict, "a node %s is enrolled with another key (%s); if its machine was set up anew, have the operator remove it first: nix-infra node remove %s", n.Name, n.Key, n.Name)
	}
	pending := 0
	err = t.c.store.Joinings(ctx, func(j protocol.Joining) error {
		if j.Pending() {
			pending++
		}
		return nil
	})
	if err != nil {
		return false, err
	}
	if pending >= maxPending {
		return false, fmt.Errorf("%d machines wait for their operator; this one has to come again", pending)
	}
	return true, t.lead.PutJoining(ctx, protocol.Joining{Token: token.Key, Node: token.Name, Request: *request,
		Came: time.Now().UTC(), From: t.c.broker.Addresses(token.Key), Ends: token.Ends().UTC()})
}

// joinState is what a machine is told.
func (t *term) joinState(ctx context.Context, token string) (protocol.JoinState, error) {
	j, _, err := t.c.store.Joining(ctx, token)
	if err != nil || j.User == "" {
		return protocol.JoinState{}, err
	}
	return protocol.JoinState{User: j.User, Account: t.c.verifier.Account()}, nil
}

// recordJoin puts on record who came with a token, and who was turned away. Of those there can be as many as somebody
// likes who has a token: more than some are counted into the next record.
func (t *term) recordJoin(ctx context.Context, node string, request *protocol.JoinRequest, machine *protocol.EnrolRequest, refusal *protocol.Refusal) {
	record := protocol.AuditRecord{User: node, Role: protocol.Joiner, Action: protocol.Join, Target: protocol.ControllerName,
		Payload: protocol.Digest(request.Request), Outcome: "ok"}
	if machine != nil {
		record.Reason = fmt.Sprintf("a machine %.64q with key %s. ", machine.Hostname, machine.Key)
	}
	if refusal != nil {
		ok, held := t.joiners.allow(time.Now())
		if !ok {
			return
		}
		record.Outcome, record.Reason = string(refusal.Code), record.Reason+short(refusal.Reason, 500)
		if held > 0 {
			record.Reason += fmt.Sprintf(" (%d more were refused)", held)
		}
	}
	if err := t.audit.record(ctx, record); err != nil {
		t.log.Error("a machine with a token is not on record", "node", node, "error", err)
	}
}

func (t *term) listJoinings(ctx context.Context, order *protocol.Verified) (any, error) {
	page, err := payload[protocol.Page](order)
	if err != nil {
		return nil, err
	}
	limit := maxListed
	if page.Limit > 0 {
		limit = min(limit, page.Limit)
	}
	list := protocol.JoiningList{Joinings: []protocol.Joining{}}
	size := 0
	err = t.c.store.Joinings(ctx, func(j protocol.Joining) error {
		switch {
		case j.Token <= page.After || list.Next != "" || len(page.Names) > 0 && !slices.Contains(page.Names, j.Node):
		case len(list.Joinings) >= limit || size > maxListedBytes:
			list.Next = list.Joinings[len(list.Joinings)-1].Token
		default:
			list.Joinings = append(list.Joinings, j)
			size += len(protocol.Encode(j))
		}
		return nil
	})
	return list, err
}

// answerJoining keeps the operator's answer for a machine, or that a token is void. Doing it again is safe.
func (t *term) answerJoining(ctx context.Context, order *protocol.Verified) (any, error) {
	a, err := payload[protocol.JoinAnswer](order)
	if err != nil {
		return nil, err
	}
	t.changing.Lock()
	defer t.changing.Unlock()
	j, known, err := t.c.store.Joining(ctx, a.Token)
	if err != nil {
		return nil, err
	}
	if known && j.Node != a.Node {
		return nil, protocol.Refuse(protocol.Invalid, "the token is for %s, not for %s", j.Node, a.Node)
	}
	if a.User == "" {
		j, err = t.void(a, j, known)
	} else {
		j, err = t.admit(a, j, known)
	}
	if err != nil || !time.Now().Before(j.Ends) {
		return nil, err
	}
	if err := t.lead.PutJoining(ctx, j); err != nil {
		return nil, err
	}
	if err := t.c.broker.Conn.Publish(protocol.JoinNudge(j.Node, j.Token), nil); err != nil {
		t.log.Warn("can't nudge a machine with a token; it asks again", "node", j.Node, "error", err)
	}
	return nil, nil
}

// void makes a token void, also one that nobody has come with.
func (t *term) void(a protocol.JoinAnswer, j protocol.Joining, known bool) (protocol.Joining, error) {
	if a.Ends.After(time.Now().Add(protocol.MaxTokenLife + protocol.ClockSkew)) {
		return j, protocol.Refuse(protocol.Invalid, "the token ends at %s, later than a token may", a.Ends.UTC().Format(time.RFC3339))
	}
	if j.User != "" {
		return j, protocol.Refuse(protocol.Conflict, "the token for %s is used; to throw its machine out: nix-infra node remove %s", j.Node, j.Node)
	}
	if !known {
		j = protocol.Joining{Token: a.Token, Node: a.Node, Came: time.Now().UTC(), Ends: a.Ends.UTC()}
	}
	j.Void = true
	return j, nil
}

// admit takes the JWT that the operator made for the machine that waits.
func (t *term) admit(a protocol.JoinAnswer, j protocol.Joining, known bool) (protocol.Joining, error) {
	switch {
	case !known:
		return j, protocol.Refuse(protocol.Unknown, "nobody has come with the token for %s, or it has ended", a.Node)
	case j.Void:
		return j, protocol.Refuse(protocol.Conflict, "the token for %s was taken back", j.Node)
	}
	r, err := protocol.Decode[protocol.EnrolRequest](j.Request.Request)
	if err != nil {
		return j, err
	}
	proven, err := t.c.verifier.ProveNode(&protocol.NodeRecord{Name: j.Node, JWT: a.User}, time.Now())
	if err != nil {
		return j, err
	}
	if proven.Key != r.Key || proven.XKey != r.XKey {
		return j, protocol.Refuse(protocol.Invalid, "the JWT of %s is about other keys than those of the machine that asked", j.Node)
	}
	j.User = a.User
	return j, nil
}
