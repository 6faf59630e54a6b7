// Package rollout decides which nodes get a deployment next. It is a pure planner: what was decided and what is
// observed go in, what to release and where the rollout stands come out. Clocks, etcd and the broker are the
// controller's.
//
// Start here: Next is called whenever something may have changed, and by whichever controller leads. Waves cuts a
// fleet into waves, once, when a deployment is taken over.
//
// # Rules
//
//   - A node counts as failed when it failed or rolled back, when it was lost on its way for longer than it may take
//     to come back by itself, when it was confirmed and was lost or has newly failed units before all waves are through,
//     and when it has yet to get a closure that is in quarantine on some node. The last never gets it while that is so.
//   - Nothing is released once more nodes count as failed than may (Strategy.MaxFailures). What was released goes on.
//     Stop and rollback are final, and happen to a paused rollout, too. Pause lasts until somebody resumes it, which
//     forgives the failures that there are; where no node is left that could get it, there is nothing to pause.
//   - Unavailable are the nodes of the rollout that were released and have not ended, those lost on their way, and those
//     that were confirmed and are lost. No release takes their number over Strategy.MaxUnavailable.
//   - A node that is offline, locked, removed, or that a newer deployment took is passed over: it neither holds its wave up nor
//     counts. One that comes back, or is unlocked, before the rollout has ended is released then, as its turn allows:
//     at once, where its wave has begun. A node that was locked when it had been released goes on.
//   - A wave is through when each of its nodes has ended, counts as failed, or is passed over; the next one begins
//     Strategy.Soak later. A failure in that time counts. A wave that no node got does not soak, nor does the last one.
//   - When all waves are through the rollout trails: nodes that were passed over are released when they are back, within the
//     same bounds, except that what becomes of confirmed nodes counts no longer.
//   - It is done when no node is on its way, and none is left that could get it.
//   - Before Strategy.At and outside of Strategy.Windows nothing is released and no wave begins. What was released goes on.
package rollout

import (
	"time"

	"github.com/nix-infra/nix-infra/protocol"
)

// Member is a node that a rollout is about to have.
type Member struct {
	Name    string
	Tags    []string
	Offline bool
}

// Status is what became of a node of a rollout so far.
type Status int

const (
	Held      Status = iota // not released
	Underway                // released, and it has not ended
	Succeeded               // confirmed or staged
	Failed                  // failed or rolled back, whatever became of the node since
	Left                    // not released, and it never will be: removed, or a newer deployment has it
	Taken                   // released and not failed, and a newer deployment has it since, or it was removed
)

// Node is a node of a rollout as it is observed now.
type Node struct {
	Name   string
	Wave   int // from 1
	Status Status

	Online      bool
	Locked      bool
	Lost        bool // underway, and offline for longer than it may take to come back by itself
	Degraded    bool // succeeded, and units failed since that had not before
	Quarantined bool // held, and its closure is in quarantine on some node
}

// Rollout is what has to be remembered of a rollout, beside which nodes were released. Its times are UTC and without a
// monotonic reading, so that it equals what is read back.
type Rollout struct {
	Strategy protocol.Strategy     `json:"strategy"`
	State    protocol.RolloutState `json:"state"`
	Reason   string                `json:"reason,omitempty"`
	Since    time.Time             `json:"since"`              // of the state
	Wave     int                   `json:"wave"`               // that is being released, from 1; 0: none yet
	Settled  time.Time             `json:"settled,omitzero"`   // when that wave was through; zero: it is not
	Forgiven int                   `json:"forgiven,omitempty"` // failures that there were when somebody resumed it after too many, and still are: they count no longer
	By       string                `json:"by,omitempty"`       // who steered it last
}

// Decision is what Next makes of a Rollout.
type Decision struct {
	Rollout Rollout   // to be remembered, where it differs, before anything is released
	Release []string  // to release now, in order
	Next    time.Time // when to ask again even if nothing changes; zero: no need. That a node becomes lost is a change

	Unavailable int // before Release
	Failures    int // nodes that count as failed, without those that were forgiven
	MaxFailures int
	Failing     map[string]string // nodes that count as failed although they did not say so, and why; in a line for people
	Passed      map[string]string // nodes that are passed over, or were when the rollout ended, and why
}
