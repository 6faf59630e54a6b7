package reconcile

import (
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

// legal are the moves of the state machine; "" is a node without an attempt.
//
//	accepted → fetching → building → activating → checking → confirming → confirmed
//	                                     └───────────┴───────────┴──▶ rolling-back → rolled-back
//	accepted … activating ──▶ failed (nothing was switched)
//
// Short ways: accepted → confirmed (nothing changed), building → confirming (it runs already). A rollback has
// nothing to fetch or build: accepted → activating or, where it runs already, confirming.
// Mode boot: activating → staged, and after a boot staged → checking or rolling-back.
// Mode reboot: accepted → rebooting, and after the boot as in mode boot. Where nothing was staged there is
// nothing to go back to, and rebooting and checking end as failed.
var legal = map[protocol.Phase][]protocol.Phase{
	"":                   {protocol.Accepted},
	protocol.Accepted:    {protocol.Fetching, protocol.Activating, protocol.Confirming, protocol.Rebooting, protocol.Confirmed, protocol.FailedPhase},
	protocol.Fetching:    {protocol.Building, protocol.FailedPhase},
	protocol.Building:    {protocol.Activating, protocol.Confirming, protocol.FailedPhase},
	protocol.Activating:  {protocol.Checking, protocol.Staged, protocol.RollingBack, protocol.FailedPhase},
	protocol.Staged:      {protocol.Checking, protocol.RollingBack},
	protocol.Rebooting:   {protocol.Checking, protocol.RollingBack, protocol.FailedPhase},
	protocol.Checking:    {protocol.Confirming, protocol.RollingBack, protocol.FailedPhase},
	protocol.Confirming:  {protocol.Confirmed, protocol.RollingBack},
	protocol.RollingBack: {protocol.RolledBack},
}

// startsOver are the phases from which a restarted agent goes back to accepted, because nothing was
// switched. So does activating where the activation was certainly never started.
var startsOver = []protocol.Phase{protocol.Accepted, protocol.Fetching, protocol.Building}

func mayMove(from, to protocol.Phase) bool { return slices.Contains(legal[from], to) }
