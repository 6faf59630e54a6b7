package protocol

import (
	"fmt"
	"strconv"
	"strings"
	"unicode"
)

// Detail says in a line what an order asks for, for the record: what was run, with which arguments, what was reached, or
// whom it is about. It is "" for actions whose name says it all, and of what can't be decoded.
func Detail(a Action, payload []byte) string {
	var text string
	switch a {
	case RunCommand:
		text = detail(payload, func(o CommandOrder) string { return quoted(o.Argv) })
	case RunShell:
		text = detail(payload, func(o ShellOrder) string { return o.Text })
	case RunScript:
		text = detail(payload, func(o ScriptOrder) string { return o.Module + ": " + quoted(o.Words) })
	case RotateSecret:
		text = detail(payload, func(o RotateOrder) string { return o.Secret.Name })
	case OpenTunnel:
		text = detail(payload, func(o TunnelOrder) string { return o.To })
	case ReadFiles:
		text = detail(payload, func(q FilesQuery) string { return q.Path })
	case Release, RemoveNode:
		text = detail(payload, func(r NameRequest) string { return r.Name })
	case PutNode:
		text = detail(payload, func(r NodeRecord) string { return r.Name + ": key " + r.Key })
	case TagNode:
		text = detail(payload, func(r TagsRequest) string { return r.Node + ": " + strings.Join(r.Tags, " ") })
	case LockNode:
		text = detail(payload, func(r LockRequest) string {
			if r.Reason == "" {
				return r.Node + ": unlocked"
			}
			return r.Node + ": locked: " + r.Reason
		})
	case AnswerJoining:
		text = detail(payload, func(r JoinAnswer) string {
			if r.User == "" {
				return r.Node + ": the token " + r.Token + " is void"
			}
			return r.Node + ": let in by the token " + r.Token
		})
	case Deploy:
		text = detail(payload, func(r DeployRequest) string {
			var nodes strings.Builder
			for _, item := range r.Items {
				nodes.WriteString(" " + item.Node)
			}
			return r.Deployment + ": " + string(r.Mode) + nodes.String()
		})
	case SteerRollout:
		text = detail(payload, func(o RolloutOrder) string { return o.ID + ": " + string(o.Verb) })
	case PutAccount:
		text = detail(payload, func(r AccountUpdate) string {
			void, err := Revocations(r.Account)
			if err != nil {
				return ""
			}
			return fmt.Sprintf("revoked so far: %d", len(void))
		})
	}
	return oneLine(text, maxDetail)
}

// detail reads one kind of order, and says what is in it.
func detail[T any](payload []byte, say func(T) string) string {
	order, err := Decode[T](payload)
	if err != nil {
		return ""
	}
	return say(order)
}

// maxDetail bounds AuditRecord.Detail, in bytes.
const maxDetail = 1024

// quoted joins words so that it can be seen where each begins and ends.
func quoted(words []string) string {
	quoted := make([]string, len(words))
	for i, w := range words {
		quoted[i] = w
		if w == "" || strings.ContainsFunc(w, func(r rune) bool { return unicode.IsSpace(r) || !unicode.IsPrint(r) || r == '"' || r == '\'' }) {
			quoted[i] = strconv.Quote(w)
		}
	}
	return strings.Join(quoted, " ")
}

func oneLine(s string, limit int) string {
	s = strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, strings.ToValidUTF8(s, "\uFFFD"))
	if len(s) > limit {
		s = strings.ToValidUTF8(s[:limit], "") + "…"
	}
	return s
}
