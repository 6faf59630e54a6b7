//go:build linux

package main

import "testing"

// TestSwarm: a small one does all that the large one measures. That every node confirmed is what the CLI's exit status
// says, and what the nodes' own memory shows.
func TestSwarm(t *testing.T) {
	f, err := newFleet(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer f.close()
	if err := f.populate(t.Context(), 12); err != nil {
		t.Fatal(err)
	}
	if err := f.start(t.Context()); err != nil {
		t.Fatal(err)
	}
	for i, s := range scenarios {
		m, err := f.measure(t.Context(), append([]string{"deploy", "all", "--settle", "1s"}, s.args...)...)
		if err != nil {
			t.Fatalf("%s: %v", s.name, err)
		}
		if m.took == 0 || m.controller == 0 || m.cli == 0 || m.peak == 0 || m.revisions < 12 {
			t.Errorf("%s: %+v", s.name, m)
		}
		for _, n := range f.nodes {
			n.mu.Lock()
			if n.builds != 1 || n.running != n.closure() || n.profile != n.running {
				t.Errorf("%s, after deploy %d: %d builds; %s runs, %s boots", n.name, i, n.builds, n.running, n.profile)
			}
			n.mu.Unlock()
		}
	}
}
