package project

import (
	"maps"
	"slices"
)

// StateVersion is what system.stateVersion keeps on a node: what was pinned when it was first upgraded, else the
// version that it has; "" where the settings don't say.
func (s Settings) StateVersion(node string) string {
	n := s.Node(node)
	return firstOf(n.StateVersion, n.NixOSVersion)
}

// Upgrade is s with another NixOS version for some nodes: as the default, in place of what they say themselves,
// where these are all, else for each of them. No node's StateVersion changes by it, of those that the settings name
// and of those that are upgraded; runs tells the version that a node runs, for those of which the settings say none.
func (s Settings) Upgrade(version string, nodes []string, all bool, runs map[string]string) Settings {
	before := map[string]string{}
	for _, name := range slices.Concat(nodes, slices.Collect(maps.Keys(s.Nodes))) {
		before[name] = firstOf(s.StateVersion(name), runs[name])
	}
	after := s
	after.Nodes = maps.Clone(s.Nodes)
	if after.Nodes == nil {
		after.Nodes = map[string]NodeSettings{}
	}
	own := version
	if all {
		own = ""
		after.Defaults.NixOSVersion = version
		if s.Defaults.NixOSVersion != version {
			after.Defaults.StateVersion = firstOf(s.Defaults.StateVersion, s.Defaults.NixOSVersion)
		}
	}
	for _, name := range nodes {
		if n := after.Nodes[name]; n.NixOSVersion != own {
			n.NixOSVersion = own
			after.Nodes[name] = n
		}
	}
	for name, was := range before {
		if was != "" && after.StateVersion(name) != was {
			n := after.Nodes[name]
			n.StateVersion = was
			after.Nodes[name] = n
		}
	}
	return after
}
