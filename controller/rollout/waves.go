package rollout

import (
	"cmp"
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

// Waves cuts a fleet into waves: by the strategy's order of tags, a node counting for the first of them that it has, then
// by name. A wave has nodes of one tag only, or of none, and no wave is empty. Shares are of the whole fleet, rounded up;
// the canary comes out of the first nodes in that order, and is smaller than asked for where the first tag has fewer.
func Waves(members []Member, s protocol.Strategy) [][]string {
	groups := make([][]string, len(s.Order)+1)
	for _, m := range members {
		g := slices.IndexFunc(s.Order, func(tag string) bool { return slices.Contains(m.Tags, tag) })
		if g < 0 {
			g = len(s.Order)
		}
		groups[g] = append(groups[g], m.Name)
	}
	batch := cmp.Or(s.Batch.Ceil(len(members)), len(members))
	size := cmp.Or(s.Canary.Ceil(len(members)), batch) // of the first wave
	var waves [][]string
	for _, names := range groups {
		slices.Sort(names)
		for len(names) > 0 {
			n := min(size, len(names))
			waves, names = append(waves, names[:n:n]), names[n:]
			size = batch
		}
	}
	return waves
}
