package agent_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/local"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
	"github.com/nix-infra/nix-infra/protocol/bundle"
)

// TestOrdersOfRoot: the agent that runs takes bundles and rollbacks over its socket, the controllers see what
// became of them, and the record says who it was.
func TestOrdersOfRoot(t *testing.T) {
	f := testfleet.New(t)
	s := control(t, f)
	dir := enrolled(t, f)
	r := start(t, dir)
	testfleet.Eventually(t, "a beat", func() bool { _, n := s.lastBeat(); return n > 0 })
	doc := manifest(t, s, f.User("ann", protocol.Deployer), node, 3, nil)
	file := filepath.Join(t.TempDir(), "bundle")
	if err := bundle.Write(file, doc, func(digest string) ([]byte, error) { return s.blobs[digest], nil }); err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	clear(s.blobs) // the controllers have nothing of it
	s.mu.Unlock()
	in, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	info, err := in.Stat()
	if err != nil {
		t.Fatal(err)
	}
	c := &local.Client{Path: agent.Socket(dir)}
	deployment, end, err := c.Apply(t.Context(), in, info.Size())
	if err != nil || deployment != "d-3" || end.Phase != protocol.FailedPhase || !strings.Contains(end.Reason, "nothing can be built here") {
		t.Errorf("%s, %+v, %v", deployment, end, err)
	}
	if _, _, err := c.RollBack(t.Context(), protocol.Rollback{}); err == nil || !strings.Contains(err.Error(), "nothing to go back to") {
		t.Error(err)
	}
	testfleet.Eventually(t, "the report", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return slices.ContainsFunc(s.reports, func(r protocol.Report) bool { return r.Deployment == "d-3" && r.Phase == protocol.FailedPhase })
	})
	testfleet.Eventually(t, "the records", func() bool { return len(s.audited(t)) == 3 })
	all := s.audited(t)
	if all[0].User != "ann" || !strings.Contains(all[0].Reason, "by root on the node itself") || all[1].Outcome != string(protocol.Failed) ||
		all[2].User != "root" || all[2].Role != "" || !strings.HasPrefix(all[2].Request, "local-") || all[2].Outcome != string(protocol.Failed) {
		t.Errorf("records %+v", all)
	}
	r.stop()
	if _, _, err := c.RollBack(t.Context(), protocol.Rollback{}); err == nil || errors.As(err, new(*protocol.Refusal)) {
		t.Errorf("without an agent: %v", err)
	}
	st, err := agent.ReadStatus(dir)
	if err != nil || st.Running || st.Deploy.Serial != 3 || st.Deploy.Phase != protocol.FailedPhase || st.History == nil || st.Quarantine == nil {
		t.Errorf("status %+v, %v", st, err)
	}
}
