package rule

import "github.com/nix-infra/nix-infra/protocol"

// Match finds the first rule that allows a command to somebody of a role. Its error is a *protocol.Refusal: OverRole
// where nothing but the role is missing, and Denied otherwise, with the rule that was nearest and what of it was missed.
func Match(rules []Rule, argv []string, role protocol.Role) (*Allowed, error) {
	return nil, protocol.Refuse(protocol.Denied, "not yet")
}
