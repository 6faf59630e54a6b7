//go:build linux

package e2e

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/e2e/lab"
)

// away is the time for which a node was down, by its own journal: from its last word before the boot to its agent's
// first one after, in microseconds of the clock that all nodes share.
func (f *fleet) away(n *lab.Node) (from, to uint64) {
	f.t.Helper()
	at := func(args ...string) uint64 {
		f.t.Helper()
		out := f.exec(n, append([]string{"journalctl", "--no-pager", "-o", "json", "--output-fields=MESSAGE"}, args...)...)
		var entry struct {
			Realtime uint64 `json:"__REALTIME_TIMESTAMP,string"`
		}
		if err := json.Unmarshal([]byte(strings.Split(out, "\n")[0]), &entry); err != nil {
			f.t.Fatalf("%s: %q: %v", n.Name, out, err)
		}
		return entry.Realtime
	}
	return at("-b", "-1", "-n", "1"), at("-b", "0", "-u", "nix-infra-agent.service")
}

// TestCoordinatedReboot: four nodes reboot, one at a time, and a system that was staged on one of them comes up with it.
func TestCoordinatedReboot(t *testing.T) {
	names := []string{"n1", "n2", "n3", "n4"}
	f := newFleet(t, names...)
	old := f.proven(names...)
	f.write("nodes/n1.nix", service("from the next boot on", ""))
	f.must("deploy", "n1", "--mode", "boot", "--timeout", "60s", "--settle", "1s")
	staged := f.bootDefault(f.nodes["n1"])
	if s := f.status()["n1"]; s.State != "staged" || staged == old["n1"] || f.running(f.nodes["n1"]) != old["n1"] {
		t.Fatalf("%+v; boots %s", s, staged)
	}
	before := map[string]string{}
	for n, node := range f.nodes {
		before[n] = f.exec(node, "cat", "/proc/sys/kernel/random/boot_id")
	}
	f.must("reboot", "all", "--max-unavailable=1", "--timeout", "60s", "--settle", "1s")
	id := f.latest()
	if got := f.rollout(id); got.State != "done" || got.Released != 4 {
		t.Errorf("%+v", got)
	}
	type span struct {
		node     string
		from, to uint64
	}
	var spans []span
	for n, node := range f.nodes {
		if now := f.exec(node, "cat", "/proc/sys/kernel/random/boot_id"); now == before[n] {
			t.Errorf("%s has not rebooted", n)
		}
		want := old[n]
		if n == "n1" {
			want = staged
		}
		s := f.waitState(n, soon, "confirmed", func(s status) bool { return s.Online && s.State == "confirmed" })
		if f.running(node) != want || f.bootDefault(node) != want || s.Deployment != id {
			t.Errorf("%s runs %s, want %s: %+v", n, f.running(node), want, s)
		}
		if boots := f.exec(node, "journalctl", "--list-boots", "--no-pager", "-q"); strings.Count(boots, "\n") != 1 {
			t.Errorf("%s should have booted twice:\n%s", n, boots)
		}
		from, to := f.away(node)
		spans = append(spans, span{n, from, to})
	}
	for _, a := range spans {
		for _, b := range spans {
			if a.node != b.node && a.from <= b.from && b.from < a.to {
				t.Errorf("%s and %s were down at the same time", a.node, b.node)
			}
		}
	}
}
