package testfleet

import (
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// Token makes a token for a node; no urls means URLs.
func (f *Fleet) Token(node string, ends time.Time, urls ...string) *protocol.Token {
	f.TB.Helper()
	if len(urls) == 0 {
		urls = f.URLs()
	}
	t, _, err := f.Keys.NewToken(node, ends, f.Public.Operator, f.CA, urls)
	f.must(err)
	return t
}

// Joins answers machines that come with a token, whose requests are proven: what answer says.
func (f *Fleet) Joins(answer func(*protocol.EnrolRequest) (protocol.JoinState, error)) {
	f.TB.Helper()
	v, err := protocol.NewVerifier(f.Public.Operator, f.Public.AccountJWT)
	f.must(err)
	f.Serve(f.Controller(), protocol.UpJoin, func(node string, data []byte) (any, error) {
		request, err := protocol.Decode[protocol.JoinRequest](data)
		if err != nil {
			return nil, err
		}
		_, r, err := v.ProveJoin(&request, node, time.Now())
		if err != nil {
			return nil, err
		}
		return answer(r)
	})
}

// LetIn is the answer that makes a machine a node.
func (f *Fleet) LetIn(r *protocol.EnrolRequest) (protocol.JoinState, error) {
	user, err := f.Keys.IssueNode(r.Name, r.Key, r.XKey)
	return protocol.JoinState{User: user, Account: f.Public.AccountJWT}, err
}
