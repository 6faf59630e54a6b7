package agent_test

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"

	"github.com/nix-infra/nix-infra/agent"
	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

func manifest(t *testing.T, s *side, by *protocol.Signer, target string, serial uint64, change func(*protocol.Manifest)) []byte {
	t.Helper()
	content := []byte("{ }")
	e, err := zstd.NewWriter(nil)
	if err != nil {
		t.Fatal(err)
	}
	defer e.Close()
	digest := protocol.Digest(content)
	s.mu.Lock()
	s.blobs[digest] = e.EncodeAll(content, nil)
	s.mu.Unlock()
	m := &protocol.Manifest{Version: protocol.Version, Node: target, Serial: serial, Deployment: fmt.Sprintf("d-%d", serial), Created: time.Now().UTC(),
		Mode: protocol.Switch, Files: []protocol.File{{Path: "flake.nix", SHA256: digest, Size: int64(len(content))}},
		Attr: protocol.SystemAttr(target), Timeout: 60, BuildTimeout: 60}
	if change != nil {
		change(m)
	}
	doc, err := by.Manifest(m)
	if err != nil {
		t.Fatal(err)
	}
	return doc
}

// TestManifestsAreRecorded: orders that are refused leave a reason, one that is tried leaves its end.
func TestManifestsAreRecorded(t *testing.T) {
	f := testfleet.New(t)
	s := control(t, f)
	dir := enrolled(t, f)
	r := start(t, dir)
	testfleet.Eventually(t, "a beat", func() bool { _, n := s.lastBeat(); return n > 0 })
	ann, eve := f.User("ann", protocol.Deployer), f.User("eve", protocol.Operator)
	edit := func(doc []byte, change func(*protocol.Signed)) []byte {
		signed, err := protocol.Decode[protocol.Signed](doc)
		if err != nil {
			t.Fatal(err)
		}
		change(&signed)
		return protocol.Encode(signed)
	}
	honest := manifest(t, s, ann, node, 5, nil)
	records := 0
	for _, hostile := range []struct {
		code protocol.Code
		doc  []byte
	}{
		{protocol.Malformed, []byte("{")},
		{protocol.Unsigned, edit(honest, func(s *protocol.Signed) { s.Signature = nil })},
		{protocol.Forged, edit(honest, func(s *protocol.Signed) { s.Signature[3] ^= 1 })},
		{protocol.Tampered, edit(honest, func(s *protocol.Signed) { s.Payload = append(s.Payload[:len(s.Payload)-1], ' ', '}') })},
		{protocol.Misaddressed, manifest(t, s, ann, "web-2", 5, nil)},
		{protocol.OverRole, manifest(t, s, eve, node, 5, nil)},
	} {
		s.look(t, hostile.doc, 5, "")
		records++
		testfleet.Eventually(t, string(hostile.code), func() bool { return len(s.audited(t)) == records })
		if a := s.audited(t)[records-1]; a.Outcome != string(hostile.code) || a.Action != protocol.Deploy || a.Payload != protocol.Digest(hostile.doc) {
			t.Errorf("%s: %+v", hostile.code, a)
		}
	}
	if r.host.built != 0 || len(r.host.acted) != 0 {
		t.Fatalf("hostile manifests had the host build %d times and %v", r.host.built, r.host.acted)
	}
	s.look(t, honest, 5, "")
	testfleet.Eventually(t, "the report", func() bool {
		s.mu.Lock()
		defer s.mu.Unlock()
		return slices.ContainsFunc(s.reports, func(r protocol.Report) bool {
			return r.Deployment == "d-5" && r.Started != r.Ended || strings.Contains(r.Reason, "nothing can be built")
		})
	})
	testfleet.Eventually(t, "both records", func() bool { return len(s.audited(t)) == records+2 })
	all := s.audited(t)
	begin, end := all[records], all[records+1]
	if begin.User != "ann" || begin.Role != protocol.Deployer || begin.Request != "d-5" || begin.Outcome != "" {
		t.Errorf("begins: %+v", begin)
	}
	if end.User != "ann" || end.Request != "d-5" || end.Outcome != string(protocol.Failed) || !strings.Contains(end.Reason, "nothing can be built") {
		t.Errorf("ends: %+v", end)
	}
	// An older order, rightly signed, from a controller that would go back.
	s.look(t, manifest(t, s, ann, node, 4, nil), 6, "")
	testfleet.Eventually(t, "outdated", func() bool { return len(s.audited(t)) == records+3 })
	if a := s.audited(t)[records+2]; a.Outcome != string(protocol.Outdated) {
		t.Errorf("outdated: %+v", a)
	}
	if st, err := agent.ReadStatus(dir); err != nil || st.Deploy.Deployment != "d-5" || st.Deploy.Phase != protocol.FailedPhase {
		t.Errorf("status %+v, %v", st, err)
	}
}
