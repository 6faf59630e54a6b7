package command

import (
	"errors"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

// With on-failure rollback each node's way back is signed beforehand, and means nothing but the way back.
func TestWaysBack(t *testing.T) {
	f := fleettest.New(t)
	v, err := protocol.NewVerifier(f.Authority.Public.Operator, f.Authority.Public.AccountJWT)
	if err != nil {
		t.Fatal(err)
	}
	o := order{mode: protocol.Switch, timeout: time.Minute, build: time.Hour, settle: time.Second, strategy: protocol.Strategy{OnFailure: protocol.RollbackOnFailure}}
	chosen := []protocol.NodeState{{NodeRecord: protocol.NodeRecord{Name: "web1"}, Serial: 6}, {NodeRecord: protocol.NodeRecord{Name: "web2"}}}
	closure := &protocol.Closure{Path: system("web1")}
	p, err := makePlan(f.Signer("alice", protocol.Deployer), o, chosen, func(_ *plan, m *protocol.Manifest) error {
		m.Files, m.Closure, m.Impure = []protocol.File{{Path: "flake.nix", SHA256: protocol.Digest(nil)}}, closure, true
		return nil
	}, time.Now())
	if err != nil {
		t.Fatal(err)
	}
	if err := p.request.Validate(); err != nil {
		t.Error(err)
	}
	for i, serial := range []uint64{7, 1} {
		item := p.request.Items[i]
		m, _, err := v.Manifest(p.blobs[item.Digest], chosen[i].Name, time.Now())
		if err != nil || m.Serial != serial || item.Serial != serial || m.Closure == nil || len(m.Files) != 1 {
			t.Errorf("%s: %+v, %v", item.Node, m, err)
		}
		back, _, err := v.Manifest(p.blobs[item.Back], chosen[i].Name, time.Now())
		if err != nil {
			t.Fatalf("the way back of %s: %v", item.Node, err)
		}
		if back.Serial != serial+1 || back.Deployment != protocol.BackID(p.request.Deployment) || back.Mode != protocol.Switch || len(back.Files) != 0 ||
			back.Closure != nil || back.Rollback == nil || *back.Rollback != (protocol.Rollback{Before: p.request.Deployment}) {
			t.Errorf("the way back of %s: %+v", item.Node, back)
		}
	}
	o.strategy.OnFailure = protocol.StopOnFailure
	if p, err = makePlan(f.Signer("alice", protocol.Deployer), o, chosen, rollbackTo(protocol.Rollback{}), time.Now()); err != nil || p.request.Items[0].Back != "" || len(p.blobs) != 2 {
		t.Errorf("without it: %+v, %v", p, err)
	}
}

// What the controller holds back, or held, counts as well as what is desired.
func TestSerialIsAboveWhatIsHeld(t *testing.T) {
	n := &protocol.NodeState{Serial: 9, Desired: &protocol.Desired{Serial: 4}, Beat: &protocol.Beat{Serial: 5}}
	if got, err := nextSerial(n, protocol.Reboot, time.Now()); got != 10 || err != nil {
		t.Errorf("serial %d, %v", got, err)
	}
}

// One node that can't be planned keeps all others from being signed.
func TestPlanOfBrokenNodes(t *testing.T) {
	f := fleettest.New(t)
	chosen := []protocol.NodeState{{NodeRecord: protocol.NodeRecord{Name: "web1"}}, {NodeRecord: protocol.NodeRecord{Name: "web2"}}}
	_, err := makePlan(f.Signer("alice", protocol.Deployer), order{mode: protocol.Switch}, chosen, func(*plan, *protocol.Manifest) error { return errors.New("broken") }, time.Now())
	if got := message(err); got != "2 nodes can't be composed; nothing was deployed:\n  web1: broken\n  web2: broken" {
		t.Errorf("%q", got)
	}
}
