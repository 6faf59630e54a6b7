package fleettest

import (
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// joins answers machines that come with a token: the first one of each token is kept.
func (f *Fleet) joins(nc *nats.Conn) {
	_, err := nc.Subscribe(protocol.UpSubject("*", protocol.UpJoin), func(m *nats.Msg) {
		node, _, ok := protocol.UpSender(m.Subject)
		if !ok || !protocol.OwnJoinInbox(node, "", m.Reply) {
			return
		}
		state, err := f.join(node, m.Data)
		m.Respond(protocol.Encode(protocol.Answer(protocol.ControllerName, state, err)))
	})
	must(f.t, err)
}

func (f *Fleet) join(node string, data []byte) (state protocol.JoinState, err error) {
	request, err := protocol.Decode[protocol.JoinRequest](data)
	if err != nil {
		return state, err
	}
	id, machine, err := f.verifier.ProveJoin(&request, node, time.Now())
	if err != nil {
		return state, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	j := f.joining[id.Key]
	if j == nil {
		j = &protocol.Joining{Token: id.Key, Node: node, Request: request, Came: time.Now().UTC(), From: "192.0.2.7", Ends: id.Ends().UTC()}
		f.joining[id.Key] = j
	}
	first, err := protocol.Decode[protocol.EnrolRequest](j.Request.Request)
	switch {
	case j.Void:
		return state, protocol.Refuse(protocol.Revoked, "the token was taken back")
	case err != nil:
		return state, err
	case !first.Same(machine):
		j.Rival = machine.Key
		return state, protocol.Refuse(protocol.Conflict, "the token was used by another machine")
	case j.User != "":
		state = protocol.JoinState{User: j.User, Account: f.verifier.Account()}
	}
	return state, nil
}

func (f *Fleet) listJoinings(payload []byte) (any, error) {
	page, err := protocol.Decode[protocol.Page](payload)
	if err != nil {
		return nil, err
	}
	list := protocol.JoiningList{}
	for _, j := range f.joining {
		if len(page.Names) == 0 || page.Names[0] == j.Node {
			list.Joinings = append(list.Joinings, *j)
		}
	}
	return list, nil
}

func (f *Fleet) answerJoining(payload []byte) (any, error) {
	a, err := protocol.Decode[protocol.JoinAnswer](payload)
	if err != nil {
		return nil, err
	}
	j := f.joining[a.Token]
	if j == nil && a.User == "" {
		j = &protocol.Joining{Token: a.Token, Node: a.Node, Ends: a.Ends}
		f.joining[a.Token] = j
	} else if j == nil {
		return nil, protocol.Refuse(protocol.Unknown, "nobody has come with the token")
	}
	j.User, j.Void = a.User, a.User == ""
	return nil, nil
}

// AlterJoining changes what the controller tells of the machine that came with a token, as one does that was broken into.
func (f *Fleet) AlterJoining(node string, change func(*protocol.Joining)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, j := range f.joining {
		if j.Node == node {
			change(j)
		}
	}
}
