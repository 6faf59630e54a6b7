// Package local is the way to a running agent on its own machine, for root: break glass, when no controller
// can be reached. The agent serves a unix socket, nix-infra-agent's commands are its clients.
//
// Start here, with what is said: a client sends one line of JSON, and after that of an apply the bundle. The agent answers with lines of JSON: which deployment it is, and each event of it, until
// it ended; or a refusal. Whoever lost the connection, because the deployment replaced the agent, asks
// to follow the deployment again. server.go is the agent's side, client.go the other.
package local

import "github.com/nix-infra/nix-infra/protocol"

// What a client may ask for.
const (
	doApply    = "apply"
	doRollBack = "rollback"
	doFollow   = "follow"
)

// maxLine bounds a line, in bytes: an event has the longest ones.
const maxLine = 1 << 20

// request is a client's line.
type request struct {
	Version    int                `json:"v"`
	Do         string             `json:"do"`
	Rollback   *protocol.Rollback `json:"rollback,omitempty"`
	Deployment string             `json:"deployment,omitempty"` // to follow
	Size       int64              `json:"size,omitempty"`       // bytes, of the bundle that follows
}

// answer is a line of the agent's; one field is set.
type answer struct {
	Deployment string            `json:"deployment,omitempty"`
	Event      *protocol.Event   `json:"event,omitempty"`
	Refused    *protocol.Refusal `json:"refused,omitempty"`
}
