package rollout

import (
	"cmp"
	"slices"

	"github.com/nix-infra/nix-infra/protocol"
)

// Waves cuts a fleet into waves: by the strategy's order of tags, a node counting for the first of them that it has, then
// those that are offline after the others, since a wave that is passed over proves nothing, then by name. A wave has nodes
// of one tag only, or of none, and no wave is empty. Shares are of the whole fleet, rounded up; the canary comes out of the
// first nodes in that order, and is smaller than asked for where the first tag has fewer.
func Waves(members []Member, s protocol.Strategy) [][]string {
	groups := make([][]Member, len(s.Order)+1)
	for _, m := range members {
		g := slices.IndexFunc(s.Order, func(tag string) bool { return slices.Contains(m.Tags, tag) })
		if g < 0 {
			g = len(s.Order)
		}
		groups[g] = append(groups[g], m)
	}
	batch := cmp.Or(s.Batch.Ceil(len(members)), len(members))
	size := cmp.Or(s.Canary.Ceil(len(members)), batch) // of the first wave
	var waves [][]string
	for _, group := range groups {
		slices.SortFunc(group, func(a, b Member) int {
			if a.Offline != b.Offline {
				if a.Offline {
					return 1
				}
				return -1
			}
			return cmp.Compare(a.Name, b.Name)
		})
		names := make([]string, len(group))
		for i, m := range group {
			names[i] = m.Name
		}
		for len(names) > 0 {
			n := min(size, len(names))
			waves, names = append(waves, names[:n:n]), names[n:]
			size = batch
		}
	}
	return waves
}
