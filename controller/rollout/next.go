package rollout

import (
	"errors"
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// New is the rollout of a deployment that was just taken over.
func New(s protocol.Strategy, now time.Time) Rollout {
	return Rollout{Strategy: s, State: protocol.RolloutScheduled, Since: now}
}

// Waves cuts a fleet into waves: by the strategy's order of tags, then by name.
func Waves(members []Member, s protocol.Strategy) [][]string { return nil }

// Next says where a rollout stands now and what is to be released. It is a function of its arguments alone: asked again with
// what it decided carried out, it decides nothing more.
func Next(r Rollout, nodes []Node, now time.Time) Decision { return Decision{Rollout: r} }

// Steer pauses, resumes or aborts. What does not fit the state is an error that says so; what is so already is none.
func Steer(r Rollout, nodes []Node, v protocol.Verb, by string, now time.Time) (Rollout, error) {
	return r, errors.ErrUnsupported
}
