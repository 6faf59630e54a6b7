package controller

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/nats-io/nats.go"

	"github.com/nix-infra/nix-infra/protocol"
)

// TestKillInTheMiddle kills the controller at some moment of a deploy: afterwards all nodes are on it or
// none, and all are if it was acknowledged.
func TestKillInTheMiddle(t *testing.T) {
	t.Parallel()
	r := enrolled(t)
	process, _ := r.spawn()
	admin := r.person("anna", protocol.Admin)
	const count = 150 // more than one transaction takes
	enrolledNodes := make([]*machineNode, 0, 2)
	var names []string
	for i := range count {
		name := fmt.Sprintf("n%03d", i)
		names = append(names, name)
		s := r.signer(name, protocol.Node)
		asked[protocol.NodeRecord](t, admin, protocol.PutNode, r.record(name, s))
		if i == 0 || i == count-1 {
			enrolledNodes = append(enrolledNodes, &machineNode{name, s, nil})
		}
	}
	last := uint64(0)
	for i, wait := range []time.Duration{40 * time.Millisecond, 120 * time.Millisecond, 250 * time.Millisecond, patience} {
		round := i + 1
		id, serial := fmt.Sprintf("d%d", round), uint64(round)
		var items []protocol.DeployItem
		for _, n := range names {
			item, _ := admin.signedManifest(t, n, id, serial, protocol.Switch, "the same for all")
			items = append(items, item)
		}
		signed, request, err := admin.Request(protocol.Deploy, protocol.ControllerName, protocol.DeployRequest{Deployment: id, Mode: protocol.Switch, Items: items}, time.Now())
		must(t, err)
		reply := protocol.ReplySubject("anna", request, protocol.ControllerName)
		sub := value[*nats.Subscription](t)(admin.nc.SubscribeSync(reply))
		must(t, admin.nc.PublishRequest(protocol.RequestSubject(protocol.ControllerName, protocol.Deploy), reply, protocol.Encode(signed)))
		must(t, admin.nc.FlushTimeout(patience))
		m, err := sub.NextMsg(wait)
		acknowledged := err == nil && !strings.Contains(string(m.Data), "refused")
		must(t, process.Process.Kill())
		_ = process.Wait() // it was killed
		process, _ = r.spawn()
		admin = &person{admin.Signer, r, "anna", r.dial(admin.Signer, "ni.v1.reply.anna")}
		var page protocol.Page
		serials := map[uint64]int{}
		for {
			list := asked[protocol.NodeList](t, admin, protocol.ListNodes, page)
			for _, n := range list.Nodes {
				serials[n.Serial]++
			}
			if page.After = list.Next; page.After == "" {
				break
			}
		}
		t.Logf("round %d: acknowledged %v, serials %v", round, acknowledged, serials)
		if !(serials[serial] == count || (!acknowledged && serials[last] == count)) {
			t.Fatalf("round %d, acknowledged %v: nodes by serial %v", round, acknowledged, serials)
		}
		if serials[serial] == count {
			last = serial
		}
		if last == 0 {
			continue
		}
		for _, n := range enrolledNodes {
			n.nc = r.dial(n.signer, protocol.InboxPrefix(n.name))
			n.beat(t, protocol.Beat{Interval: 120})
		}
		for _, n := range enrolledNodes {
			eventually(t, n.name+" is served the last one", func() bool {
				_, err := n.manifest(t, "")
				must(t, err)
				d := r.state(t, admin, n.name).Desired
				return d != nil && d.Serial == last
			})
		}
	}
}

// The leader is killed in the middle of a wave: another controller goes on from there within seconds, and no node is told
// before its turn, or twice.
func TestLeaderKilledMidWave(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	endpoint := externalEtcd(t)
	// The embedding controller only lends its broker from here on.
	r.c.current.Load().stop()
	launch := func(name string) (*exec.Cmd, <-chan string) {
		dir := t.TempDir()
		r.enrol(dir, name)
		return r.launch(dir, fmt.Sprintf("broker: {external: ['%s']}\netcd: {external: {endpoints: ['%s']}}\n", r.url, endpoint))
	}
	serves := func(name string, serving <-chan string) {
		t.Helper()
		select {
		case _, ok := <-serving:
			if !ok {
				t.Fatalf("%s ended", name)
			}
		case <-time.After(patience):
			t.Fatalf("%s does not lead after %s", name, patience)
		}
	}
	first, serving := launch("ctl2")
	serves("ctl2", serving)
	_, standby := launch("ctl3")
	admin := r.person("anna", protocol.Admin)
	all := names(1, 8)
	s := r.squad(admin, all...)
	admin.roll(t, "d1", 1, protocol.Strategy{Batch: "2", MaxUnavailable: "2"}, all...)
	s.await("d1", names(1, 2)...)
	s.finish("n01", "d1", 1, protocol.Confirmed)
	s.finish("n02", "d1", 1, protocol.Confirmed)
	s.await("d1", names(1, 4)...)
	s.finish("n03", "d1", 1, protocol.Confirmed)
	must(t, first.Process.Kill())
	_ = first.Wait() // it was killed
	serves("ctl3", standby)
	for _, n := range s.nodes {
		n.beat(t, protocol.Beat{Interval: 120}) // shows that it is behind, so that who was told is told again
	}
	if d := admin.show(t, "d1"); d.Rollout.Wave != 2 || d.Rollout.State != protocol.RolloutRunning || d.Rollout.Released != 4 {
		t.Errorf("taken over as %+v", d.Rollout)
	}
	if got := s.got("d1"); len(got) != 4 {
		t.Errorf("before wave 2 was through, %v were told", got)
	}
	s.end(always(protocol.Confirmed))
	s.finish("n04", "d1", 1, protocol.Confirmed)
	d := admin.stands(t, "d1", protocol.RolloutDone)
	s.await("d1", all...)
	if d.Count[protocol.Confirmed] != len(all) {
		t.Errorf("%+v", d.Count)
	}
}
