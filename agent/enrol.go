package agent

import (
	"errors"
	"fmt"
	"path/filepath"

	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/machine"
)

// Home is where a node's identity is kept: a machine becomes a node by Home.Request, whose result goes
// to the operator, and Home.Load, of what the operator answers.
func Home(dir string) machine.Home { return machine.Home{Dir: dir, Role: protocol.Node} }

// Status is what a node knows of itself without its agent running.
type Status struct {
	Node        string          `json:"node"`
	Operator    string          `json:"operator"` // public key that is pinned
	Controllers []string        `json:"controllers"`
	Running     bool            `json:"running"` // an agent has the folder
	Deploy      reconcile.State `json:"deploy"`
}

// ReadStatus reads an agent's folder and changes nothing. Not enrolled is machine.ErrNotEnrolled.
func ReadStatus(dir string) (*Status, error) {
	m, err := Home(dir).Open()
	if err != nil {
		return nil, explain(err, dir)
	}
	s := &Status{Node: m.Name, Operator: m.Answer.Fleet.Operator, Controllers: m.Answer.Controllers,
		Running: locked(filepath.Join(dir, lockFile))}
	if s.Deploy, err = reconcile.ReadState(filepath.Join(dir, deployDir)); err != nil {
		return nil, err
	}
	return s, nil
}

// explain says to a person what to do about a missing identity.
func explain(err error, dir string) error {
	if errors.Is(err, machine.ErrNotEnrolled) {
		flag := ""
		if dir != DefaultDir {
			flag = " --dir " + dir
		}
		return fmt.Errorf("%w; run: nix-infra-agent request --name NAME%s, have the operator answer (nix-infra enroll --request FILE), then: nix-infra-agent load FILE%s", err, flag, flag)
	}
	return err
}
