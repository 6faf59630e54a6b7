package agent_test

import (
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

// TestQuestions: what needs no systemd is answered by a whole agent, and nothing else than its query is taken.
func TestQuestions(t *testing.T) {
	f := testfleet.New(t)
	c := control(t, f)
	dir := enrolled(t, f)
	start(t, dir)
	testfleet.Eventually(t, "a beat", func() bool { _, n := c.lastBeat(); return n > 0 })
	ann := f.User("ann", protocol.Viewer)
	s := answer[protocol.Stats](t, f, ann, protocol.ReadStats, protocol.StatsQuery{Operations: []string{protocol.StatsMemory}})
	if s.Memory == nil || s.Memory.Total <= 0 || s.Health != nil {
		t.Errorf("%+v", s)
	}
	for _, path := range []string{dir + "/identity.json", "/etc/shadow", "/root", "/"} {
		if reply := ask(t, f, ann, "ann", protocol.ReadFiles, protocol.FilesQuery{Path: path}); reply.Refused == nil || reply.Refused.Code != protocol.Invalid || !strings.Contains(reply.Refused.Reason, "/etc/nixos") {
			t.Errorf("%s: %+v", path, reply)
		}
	}
	for _, a := range []protocol.Action{protocol.ListUnits, protocol.ShowUnit, protocol.ReadJournal, protocol.FollowJournal, protocol.ReadStats, protocol.ReadFiles, protocol.Stream} {
		for _, payload := range []any{"all", map[string]any{"shell": "id"}} {
			if reply := ask(t, f, ann, "ann", a, payload); reply.Refused == nil || reply.Refused.Code != protocol.Malformed {
				t.Errorf("%s %v: %+v", a, payload, reply)
			}
		}
	}
}
