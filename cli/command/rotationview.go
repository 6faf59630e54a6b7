package command

import (
	"strings"

	"github.com/nix-infra/nix-infra/cli/ui"
)

// rotationDocument is what became of a node, in `secrets rotate --json`.
type rotationDocument struct {
	Event  string   `json:"event"` // node
	Secret string   `json:"secret"`
	Node   string   `json:"node"`
	State  string   `json:"state"` // rotated, same, failed, silent, restored, not-restored, offline or later
	Units  []string `json:"units"`
	Reason string   `json:"reason"`
}

// rotationEnd ends a rotation, in `secrets rotate --json`.
type rotationEnd struct {
	Event   string   `json:"event"` // end
	Secret  string   `json:"secret"`
	Outcome string   `json:"outcome"` // rotated, restored, unfinished or stored
	Rotated []string `json:"rotated"`
	Failed  []string `json:"failed"`
	Offline []string `json:"offline"`
}

func (r *rotation) begin(title string) {
	if r.json {
		return
	}
	r.live = r.out.Live(title)
	for _, n := range r.nodes {
		r.step(n, "waiting", ui.Waiting)
	}
}

// step shows what a node is about, where it is seen for as long as it lasts.
func (r *rotation) step(n *rotating, status string, kind ui.Kind) {
	if r.live != nil && r.out.Interactive() {
		r.live.Set(n.Name, status, kind)
	}
}

func (r *rotation) close() {
	if r.live != nil {
		r.live.Close()
	}
}

// tell shows what became of a node.
func (r *rotation) tell(node, state string, units []string, reason string, kind ui.Kind) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.json {
		r.document(rotationDocument{"node", r.name, node, state, list(units), reason})
		return
	}
	switch {
	case reason != "":
		state += ": " + reason
	case len(units) > 0:
		state += ": " + strings.Join(units, " ")
	case kind == ui.Good:
		state += ": no unit that runs loads it"
	}
	r.live.Set(node, state, kind)
}

func (r *rotation) end(outcome string) {
	if !r.json {
		return
	}
	failed := []string{}
	for _, n := range r.nodes {
		if n.err != nil {
			failed = append(failed, n.Name)
		}
	}
	r.document(rotationEnd{"end", r.name, outcome, namesOfRotating(r.having(hasNew)), failed, list(r.offline)})
}
