package agent_test

import (
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/agent/testfleet"
	"github.com/nix-infra/nix-infra/protocol"
)

// TestABeatGoesAhead: when a report comes, the controller has heard from the node's beats where the node stands.
func TestABeatGoesAhead(t *testing.T) {
	f := testfleet.New(t)
	s := control(t, f)
	dir := enrolled(t, f)
	start(t, dir)
	testfleet.Eventually(t, "a beat", func() bool { _, n := s.lastBeat(); return n > 0 })
	heard, err := s.nc.SubscribeSync(protocol.UpSubject(node, "*"))
	if err != nil {
		t.Fatal(err)
	}
	ann := f.User("ann", protocol.Deployer)
	for serial := uint64(1); serial <= 3; serial++ {
		s.look(t, manifest(t, s, ann, node, serial, nil), serial, "")
		var stands protocol.Beat
		for {
			m, err := heard.NextMsg(30 * time.Second)
			if err != nil {
				t.Fatal(err)
			}
			_, what, _ := protocol.UpSender(m.Subject)
			if what == protocol.UpBeat {
				if stands, err = protocol.Decode[protocol.Beat](m.Data); err != nil {
					t.Fatal(err)
				}
			}
			if what != protocol.UpReport {
				continue
			}
			r, err := protocol.Decode[protocol.Report](m.Data)
			if err != nil {
				t.Fatal(err)
			}
			if stands.Serial != serial || stands.Deployment != r.Deployment || stands.Phase != r.Phase {
				t.Errorf("the report of %s as %s came after a beat that says %s is %s", r.Deployment, r.Phase, stands.Deployment, stands.Phase)
			}
			break
		}
	}
}
