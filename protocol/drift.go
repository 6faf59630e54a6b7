package protocol

import "fmt"

// Drift says in a line for people why a node does not run what was deployed to it, "" where it does. A node that has
// not ended its last deployment yet is not drifting, and of one that is away the last that was heard counts.
func (n *NodeState) Drift() string {
	b := n.Beat
	if b == nil || b.Phase == "" || !b.Phase.Ended() || b.Phase == Staged {
		return ""
	}
	profile, booted, confirmed := firstNonEmpty(b.Profile, b.Closure), firstNonEmpty(b.Booted, b.Closure), firstNonEmpty(b.Confirmed, b.Closure)
	switch {
	case confirmed == b.Closure && n.Desired != nil && n.Desired.Serial == b.Serial && n.Desired.Deployment != b.Deployment:
		return fmt.Sprintf("rolled back on the node itself (%s): %s", b.Deployment, b.Reason)
	case confirmed == b.Closure && b.Phase == RolledBack:
		return fmt.Sprintf("deployment %s rolled back: %s", b.Deployment, b.Reason)
	case confirmed == b.Closure && b.Phase == FailedPhase:
		return fmt.Sprintf("deployment %s failed: %s", b.Deployment, b.Reason)
	case confirmed == b.Closure && profile != confirmed && n.Desired != nil && n.Desired.Mode != Test:
		return fmt.Sprintf("what was deployed runs, but %s boots: somebody set the system profile by hand", profile)
	case confirmed == b.Closure:
		return ""
	case booted == b.Closure && profile == confirmed:
		return fmt.Sprintf("%s was booted, an older generation than %s, which was deployed", b.Closure, confirmed)
	case profile == b.Closure:
		return fmt.Sprintf("somebody switched to %s by hand (generation %d); %s was deployed", b.Closure, b.Generation, confirmed)
	}
	return fmt.Sprintf("somebody activated %s by hand, without making it the boot default; %s was deployed", b.Closure, confirmed)
}

func firstNonEmpty(a, b string) string {
	if a != "" {
		return a
	}
	return b
}
