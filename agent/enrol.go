package agent

import (
	"errors"
	"fmt"
	"path/filepath"
	"slices"

	"github.com/nix-infra/nix-infra/agent/reconcile"
	"github.com/nix-infra/nix-infra/nix"
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

	Closure    string                   `json:"closure"`    // store path that runs, as the next ones; "": not known, as on a machine that is not NixOS
	Booted     string                   `json:"booted"`     // what was booted
	Profile    string                   `json:"profile"`    // what boots next: the system profile's
	Generation int                      `json:"generation"` // of the system profile; 0: not known
	Confirmed  string                   `json:"confirmed"`  // what the last confirmed deployment left, "": none was confirmed
	Drift      string                   `json:"drift"`      // why another system runs than was deployed, "": it doesn't
	Quarantine []Quarantined            `json:"quarantine"` // the newest first
	History    []reconcile.Confirmation `json:"history"`    // what was confirmed, the newest first
}

// Quarantined is a closure that was rolled back from.
type Quarantined struct {
	Closure string `json:"closure"`
	reconcile.Quarantine
}

// ReadStatus reads an agent's folder and changes nothing. Not enrolled is machine.ErrNotEnrolled.
func ReadStatus(dir string) (*Status, error) {
	m, err := Home(dir).Open()
	if err != nil {
		return nil, explain(err, dir)
	}
	s := &Status{Node: m.Name, Operator: m.Answer.Fleet.Operator, Controllers: m.Answer.Controllers,
		Running: locked(filepath.Join(dir, lockFile))}
	record, err := reconcile.ReadRecord(filepath.Join(dir, deployDir))
	if err != nil {
		return nil, err
	}
	s.Deploy, s.History = record.State, append([]reconcile.Confirmation{}, record.History...)
	if len(s.History) > 0 {
		s.Confirmed = s.History[0].Closure
	}
	s.Quarantine = []Quarantined{}
	for closure, q := range record.Quarantine {
		s.Quarantine = append(s.Quarantine, Quarantined{closure, q})
	}
	slices.SortFunc(s.Quarantine, func(a, b Quarantined) int { return b.Time.Compare(a.Time) })
	s.lookAround()
	return s, nil
}

// lookAround adds what the machine itself tells. What can't be read is left out.
func (s *Status) lookAround() {
	s.Closure, _ = nix.RunningSystem()
	s.Booted, _ = nix.BootedSystem()
	s.Profile, _ = nix.ProfileTarget()
	s.Generation, _ = nix.CurrentGeneration()
	if s.Closure != "" {
		s.Drift = (&protocol.NodeState{Beat: &protocol.Beat{Deployment: s.Deploy.Deployment, Phase: s.Deploy.Phase, Reason: s.Deploy.Reason,
			Closure: s.Closure, Booted: s.Booted, Profile: s.Profile, Generation: s.Generation, Confirmed: s.Confirmed}}).Drift()
	}
}

// explain says to a person what to do about a missing identity.
func explain(err error, dir string) error {
	if errors.Is(err, machine.ErrNotEnrolled) {
		flag := ""
		if dir != DefaultDir {
			flag = " --dir " + dir
		}
		return fmt.Errorf("%w; run: nix-infra-agent request --name NAME%s, have the operator answer (nix-infra enroll --request FILE), then: nix-infra-agent load FILE%s; or, with a token: nix-infra-agent join FILE%s", err, flag, flag, flag)
	}
	return err
}
