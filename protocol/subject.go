package protocol

import (
	"fmt"
	"strings"
)

// The subjects, all below ni.v1 ("v1" is the protocol's version, a wildcard in permissions so that a
// receiver can tell a sender of another version why it is refused):
//
//	node.<node>.req.<role>            a signed request to one node; <role> is the least role of its action
//	all.req.<role>                    a signed request to every node
//	ctl.req.<role>                    a signed request to the controller
//	reply.<user>.<request>.<sender>   an answer to a user; <sender> is a node's name or ControllerName
//	node.<node>.up.<what>             a node to the controller: beat, manifest, blob, report, ping, audit
//	node.<node>.up.join               a machine with a token for a node to the controller
//	node.<node>.down.>                the controller to a node: look, and the inbox for answers to up.*
//	node.<node>.down.join.<token>.>   the controller to a machine with a token, whose public key <token> is
//	node.<node>.tunnel.<user>.<id>    frames of a tunnel, from the user to the node; back they go as reply.<user>.<id>.<node>
//	node.<node>.event.<deployment>    progress and build log of a deployment, for whoever watches
//	controller.<name>.>               a controller's own inbox and audit records
//
// Subjects carry the sender where it matters, and the broker enforces them (Permissions in role.go).

// ControllerName stands for the controller as the sender of an answer and as the target of a request.
// It is not a DNS label, so that no node can be called that.
const ControllerName = "_controller"

// Everyone is the target of a request to every node.
const Everyone = "*"

// What a node tells or asks the controller on node.<node>.up.<what>.
const (
	UpBeat     = "beat"
	UpManifest = "manifest"
	UpBlob     = "blob"
	UpReport   = "report"
	UpPing     = "ping"
	UpAudit    = "audit"
	UpJoin     = "join" // not the node itself, but a machine that is to become it
)

// subject joins tokens below the protocol's prefix.
func subject(tokens ...string) string {
	return fmt.Sprintf("ni.v%d.%s", Version, strings.Join(tokens, "."))
}

// RequestSubject is where a request for an action is published: target is a node's name, Everyone or
// ControllerName.
func RequestSubject(target string, a Action) string {
	role := string(LeastRole(a))
	switch target {
	case ControllerName:
		return subject("ctl", "req", role)
	case Everyone:
		return subject("all", "req", role)
	}
	return subject("node", target, "req", role)
}

// NodeRequests are what a node listens to for requests, in any version of the protocol.
func NodeRequests(node string) []string {
	return []string{"ni.*.node." + node + ".req.*", "ni.*.all.req.*"}
}

// ControllerRequests is what the controller listens to for requests, in any version of the protocol.
const ControllerRequests = controllerRequests + "*"

const controllerRequests = "ni.*.ctl.req."

// ControllerRequestsOf are those of them that need a role.
func ControllerRequestsOf(least Role) string { return controllerRequests + string(least) }

// ReplySubject is where sender answers a user's request.
func ReplySubject(user, request, sender string) string {
	return subject("reply", user, request, sender)
}

// TunnelSubject is where a user sends the frames of a tunnel, whose id is that of the request that opened it.
func TunnelSubject(node, user, id string) string { return subject("node", node, "tunnel", user, id) }

// NodeTunnels is what a node listens to for the frames of all tunnels.
func NodeTunnels(node string) string { return TunnelSubject(node, "*", "*") }

// TunnelSender tells whose frame it is that came on a TunnelSubject, as the broker enforced it, and of which tunnel.
func TunnelSender(s string) (user, id string, ok bool) {
	t := strings.Split(s, ".")
	if len(t) != 7 || t[0] != "ni" || t[2] != "node" || t[4] != "tunnel" {
		return "", "", false
	}
	return t[5], t[6], CheckName(t[5]) == nil && isToken(t[6])
}

// UpSubject is where a node speaks to the controller; node may be "*" for the listener.
func UpSubject(node, what string) string { return subject("node", node, "up", what) }

// InboxPrefix is under which a node receives what the controller answers.
func InboxPrefix(node string) string { return subject("node", node, "down") }

// LookSubject is where the controller tells a node to look at its desired state.
func LookSubject(node string) string { return subject("node", node, "down", "look") }

// JoinInbox is under which a machine with a token receives what the controller answers.
func JoinInbox(node, token string) string { return subject("node", node, "down", UpJoin, token) }

// JoinNudge is where the controller tells a machine with a token to ask again.
func JoinNudge(node, token string) string { return JoinInbox(node, token) + ".look" }

// EventSubject is where a node publishes the progress of a deployment; node may be "*".
func EventSubject(node, deployment string) string {
	return subject("node", node, "event", deployment)
}

// ControllerInbox is under which a controller receives answers (of JetStream).
func ControllerInbox(name string) string { return subject("controller", name, "inbox") }

// ControllerAudit is where a controller records the requests that it served.
func ControllerAudit(name string) string { return subject("controller", name, "audit") }

// AuditSubjects are what the audit stream captures.
var AuditSubjects = []string{UpSubject("*", UpAudit), ControllerAudit("*")}

// SubjectVersion is the version token of a subject, such as "v1".
func SubjectVersion(s string) string {
	if t := strings.SplitN(s, ".", 3); len(t) == 3 && t[0] == "ni" {
		return t[1]
	}
	return ""
}

// UpSender tells which node published on an up.* subject, as the broker enforced it.
func UpSender(s string) (node, what string, ok bool) {
	t := strings.Split(s, ".")
	if len(t) != 6 || t[0] != "ni" || t[2] != "node" || t[4] != "up" {
		return "", "", false
	}
	return t[3], t[5], CheckName(t[3]) == nil
}

// EventSender tells which node published on an event subject.
func EventSender(s string) (node, deployment string, ok bool) {
	t := strings.Split(s, ".")
	if len(t) != 6 || t[0] != "ni" || t[2] != "node" || t[4] != "event" {
		return "", "", false
	}
	return t[3], t[5], CheckName(t[3]) == nil
}

// ReplySender tells who answered on a reply subject.
func ReplySender(s string) (sender string, ok bool) {
	t := strings.Split(s, ".")
	if len(t) != 6 || t[0] != "ni" || t[2] != "reply" {
		return "", false
	}
	return t[5], true
}

// OwnInbox tells whether an answer to a node may go to this subject, in any version of the protocol.
// Without the check a node could have the controller speak to another node for it.
func OwnInbox(node, reply string) bool {
	t := strings.Split(reply, ".")
	return isSubject(t) && len(t) > 5 && t[0] == "ni" && t[2] == "node" && t[3] == node && t[4] == "down"
}

// OwnJoinInbox tells whether an answer to a machine with a token may go to this subject. With the token "" it may be any
// one's for that node, as for whom nothing is proven of yet.
func OwnJoinInbox(node, token, reply string) bool {
	t := strings.Split(reply, ".")
	return OwnInbox(node, reply) && len(t) > 7 && t[5] == UpJoin && (token == "" || t[6] == token)
}

// OwnReply tells whether sender may answer there when the requester could not be identified: any
// user's reply subject, as long as the answer is marked as the sender's own.
func OwnReply(sender, reply string) bool {
	s, ok := ReplySender(reply)
	return ok && s == sender && isSubject(strings.Split(reply, "."))
}

// isSubject tells whether tokens make a subject that can be published on: somebody else chose it, and
// it becomes part of a line of the broker's protocol.
func isSubject(tokens []string) bool {
	for _, t := range tokens {
		if t == "" || strings.ContainsFunc(t, func(c rune) bool { return c <= ' ' || c > '~' || c == '*' || c == '>' }) {
			return false
		}
	}
	return true
}
