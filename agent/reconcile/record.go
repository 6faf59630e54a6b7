package reconcile

import (
	"errors"

	"github.com/nix-infra/nix-infra/protocol"
)

// record hands on what became of a manifest. by is zero where it does not prove whose it is, deployment
// is "" where it is not known, and digest is "" for an end.
func (e *Engine) record(by protocol.Identity, deployment, digest string, outcome protocol.Code, reason string) {
	if e.o.Audit == nil {
		return
	}
	e.o.Audit(protocol.AuditRecord{User: by.Name, Role: by.Role, Action: protocol.Deploy, Target: e.o.Node,
		Request: deployment, Payload: digest, Outcome: string(outcome), Reason: reason})
}

// recordEnd hands on how a deployment ended.
func (e *Engine) recordEnd(by protocol.Identity, deployment string, phase protocol.Phase, reason string) {
	outcome := outcomeOK
	if !phase.Succeeded() {
		outcome = protocol.Failed
	}
	e.record(by, deployment, "", outcome, because(phase, reason))
}

// outcomeOK is the outcome of what is no refusal.
const outcomeOK protocol.Code = "ok"

func because(phase protocol.Phase, reason string) string {
	if reason == "" {
		return string(phase)
	}
	return string(phase) + ": " + reason
}

// code is the refusal's code of an error.
func code(err error) protocol.Code {
	var refusal *protocol.Refusal
	if errors.As(err, &refusal) {
		return refusal.Code
	}
	return protocol.Failed
}
