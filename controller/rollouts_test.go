package controller

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	clientv3 "go.etcd.io/etcd/client/v3"

	"github.com/nix-infra/nix-infra/protocol"
)

// What is held back is known to nobody but the controller.
func TestHeldBack(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, vera := r.person("anna", protocol.Admin), r.person("vera", protocol.Viewer)
	nodes := r.online(admin, "n1", "n2")
	n1, n2 := nodes[0], nodes[1]
	request := admin.rollRequest(t, "d1", 5, protocol.Strategy{Canary: "1"}, "n1", "n2")
	asked[protocol.Deployment](t, admin, protocol.Deploy, request)
	admin.released(t, "d1", "n1")
	held := request.Items[1]
	_, err := n2.manifest(t, held.Digest)
	wantCode(t, err, protocol.Unknown)
	if m, err := n2.manifest(t, ""); err != nil || m.Digest != "" {
		t.Errorf("n2 is given %q, %v", m.Digest, err)
	}
	_, err = n2.blob(t, held.Digest, protocol.Digest([]byte("tree of n2 in d1")), 0)
	wantCode(t, err, protocol.Unknown)
	report := protocol.Report{Version: 1, Deployment: "d1", Serial: 5, Mode: protocol.Switch, Phase: protocol.Confirmed, Ended: time.Now()}
	_, err = n2.ask(protocol.UpReport, report)
	wantCode(t, err, protocol.Unknown)
	if s := r.state(t, vera, "n2"); s.Serial != 5 || s.Desired != nil {
		t.Errorf("n2: %+v", s)
	}
	d := vera.show(t, "d1")
	if a, b := d.Nodes["n1"], d.Nodes["n2"]; !a.Released || a.Wave != 1 || b.Released || b.Wave != 2 || b.Phase != "" || d.Count[""] != 2 {
		t.Errorf("%+v", d)
	}
	if s := d.Rollout; s.State != protocol.RolloutRunning || s.Wave != 1 || !slices.Equal(s.Waves, []int{1, 1}) || s.Released != 1 || s.Unavailable != 1 {
		t.Errorf("%+v", s)
	}
	_, err = n1.ask(protocol.UpReport, report)
	must(t, err)
	admin.released(t, "d1", "n2")
	m, err := n2.manifest(t, "")
	if err != nil || m.Digest != held.Digest {
		t.Errorf("n2 is given %q, %v", m.Digest, err)
	}
}

func TestWaves(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	all := names(1, 12)
	s := r.squad(admin, all...)
	asked[protocol.NodeRecord](t, admin, protocol.TagNode, protocol.TagsRequest{Node: "n09", Tags: []string{"first"}})
	asked[protocol.NodeRecord](t, admin, protocol.TagNode, protocol.TagsRequest{Node: "n11", Tags: []string{"first"}})
	s.end(always(protocol.Confirmed))
	admin.roll(t, "d1", 1, protocol.Strategy{Batch: "5", Order: []string{"first"}, MaxUnavailable: "2"}, all...)
	d := admin.stands(t, "d1", protocol.RolloutDone)
	if d.Count[protocol.Confirmed] != 12 || !slices.Equal(d.Rollout.Waves, []int{2, 5, 5}) || d.Rollout.Released != 12 {
		t.Errorf("%+v", d)
	}
	if n := d.Nodes["n11"]; n.Wave != 1 {
		t.Errorf("n11 is in wave %d", n.Wave)
	}
	underway, wave := 0, 0
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, e := range s.log {
		if e.done {
			underway--
			continue
		}
		if w := d.Nodes[e.node].Wave; w != wave && underway > 0 || w < wave {
			t.Errorf("%s of wave %d was told while %d of wave %d were on their way", e.node, w, underway, wave)
		} else {
			wave = w
		}
		if underway++; underway > 2 {
			t.Errorf("%d nodes were on their way at once", underway)
		}
	}
	var said []string
	for _, a := range r.auditRecords(t) {
		if a.User == "" && a.Request == "d1" {
			said = append(said, a.Reason)
		}
	}
	if len(said) != 4 || !strings.Contains(said[0], "now running") || !strings.Contains(said[0], "wave 1 begins, of 2 nodes") ||
		said[1] != "wave 2 begins, of 5 nodes" || said[2] != "wave 3 begins, of 5 nodes" || !strings.Contains(said[3], "now done") {
		t.Errorf("on record: %q", said)
	}
}

// The next wave begins by itself when the soak is over.
func TestSoak(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	s := r.squad(admin, "n1", "n2")
	s.end(always(protocol.Confirmed))
	began := time.Now()
	admin.roll(t, "d1", 1, protocol.Strategy{Canary: "1", Soak: 1}, "n1", "n2")
	admin.stands(t, "d1", protocol.RolloutDone)
	if took := time.Since(began); took < time.Second {
		t.Errorf("done after %s", took)
	}
	// A unit that fails in that time counts.
	admin.roll(t, "d2", 2, protocol.Strategy{Canary: "1", Soak: 3600}, "n1", "n2")
	s.await("d2", "n1")
	eventually(t, "the soak, and n1's own beat", func() bool {
		b := r.state(t, admin, "n1").Beat
		return !admin.show(t, "d2").Rollout.Next.IsZero() && b != nil && b.Deployment == "d2"
	})
	s.nodes["n1"].beat(t, protocol.Beat{Interval: 120, Serial: 2, Deployment: "d2", Phase: protocol.Confirmed, Degraded: []string{"web.service"}})
	d := admin.stands(t, "d2", protocol.RolloutStopped)
	if n := d.Nodes["n1"]; !n.Failed || n.Note == "" || n.Phase != protocol.Confirmed || d.Nodes["n2"].Released {
		t.Errorf("%+v", d.Nodes)
	}
}

func TestTooManyFailures(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, dora, vera := r.person("anna", protocol.Admin), r.person("dora", protocol.Deployer), r.person("vera", protocol.Viewer)
	all := names(1, 6)
	s := r.squad(admin, all...)
	s.end(func(node, deployment string) protocol.Phase {
		if node == "n01" && !strings.HasSuffix(deployment, "-back") {
			return ""
		}
		return protocol.Confirmed
	})
	// fail has n01 go back by itself once n02 has it.
	fail := func(id string, serial uint64) {
		t.Helper()
		s.await(id, "n01", "n02")
		eventually(t, "n02 has "+id, func() bool { return vera.show(t, id).Count[protocol.Confirmed] == 1 })
		s.finish("n01", id, serial, protocol.RolledBack)
	}

	dora.roll(t, "d1", 1, protocol.Strategy{Batch: "2"}, all...)
	fail("d1", 1)
	d := dora.stands(t, "d1", protocol.RolloutStopped)
	if d.Rollout.Failures != 1 || d.Rollout.Reason == "" || d.Count[""] != 4 || !d.Nodes["n01"].Failed || d.Nodes["n03"].Note == "" {
		t.Errorf("stopped: %+v", d)
	}
	_, err := dora.ask(protocol.SteerRollout, protocol.RolloutOrder{ID: "d1", Verb: protocol.ResumeRollout})
	wantCode(t, err, protocol.Conflict)

	dora.roll(t, "d2", 2, protocol.Strategy{Batch: "2", OnFailure: protocol.PauseOnFailure}, all...)
	fail("d2", 2)
	dora.stands(t, "d2", protocol.RolloutPaused)
	_, err = vera.ask(protocol.SteerRollout, protocol.RolloutOrder{ID: "d2", Verb: protocol.ResumeRollout})
	if err == nil {
		t.Error("a viewer resumed it")
	}
	if d := asked[protocol.Deployment](t, dora, protocol.SteerRollout, protocol.RolloutOrder{ID: "d2", Verb: protocol.ResumeRollout}); d.Rollout.By != "dora" {
		t.Errorf("resumed: %+v", d.Rollout)
	}
	dora.stands(t, "d2", protocol.RolloutDone)
	s.await("d2", all...)

	dora.roll(t, "d3", 3, protocol.Strategy{Batch: "2", OnFailure: protocol.RollbackOnFailure, MaxUnavailable: "50%"}, all...)
	fail("d3", 3)
	dora.stands(t, "d3", protocol.RolloutRolledBack)
	eventually(t, "d3 tells what takes it back", func() bool { return dora.show(t, "d3").Rollout.Back == "d3-back" })
	back := dora.stands(t, "d3-back", protocol.RolloutDone)
	s.await("d3", "n01", "n02")
	s.await("d3-back", "n02")
	if back.By != "dora" || back.Undoes != "d3" || back.Count[protocol.Confirmed] != 1 || len(back.Nodes) != 1 || back.Nodes["n02"].Serial != 4 ||
		back.Strategy.MaxUnavailable != "50%" || back.Strategy.MaxFailures != "100%" || back.Mode != protocol.Switch {
		t.Errorf("%+v", back)
	}
	found := false
	for _, a := range r.auditRecords(t) {
		found = found || a.User == "" && a.Action == protocol.Deploy && a.Request == "d3-back" && strings.Contains(a.Reason, "takes d3 back on 1 nodes")
	}
	if !found {
		t.Error("the way back is not on record")
	}
	if s := r.state(t, vera, "n03"); s.Serial != 4 { // its way back was never used, and counts
		t.Errorf("n03 has serial %d", s.Serial)
	}
	_, err = dora.ask(protocol.Deploy, dora.rollRequest(t, "d4", 4, protocol.Strategy{}, "n03"))
	wantCode(t, err, protocol.Conflict)
	_, err = dora.ask(protocol.Deploy, dora.rollRequest(t, "d5", 5, protocol.Strategy{OnFailure: protocol.RollbackOnFailure}, "n03"))
	must(t, err)
	dora.stands(t, "d5", protocol.RolloutDone)
	_, err = dora.ask(protocol.Deploy, dora.rollRequest(t, "d5-back", 7, protocol.Strategy{}, "n03"))
	wantCode(t, err, protocol.Conflict)
}

func TestSteering(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, dora := r.person("anna", protocol.Admin), r.person("dora", protocol.Deployer)
	s := r.squad(admin, "n1", "n2", "n3")
	dora.roll(t, "d1", 1, protocol.Strategy{Batch: "1"}, "n1", "n2", "n3")
	s.await("d1", "n1")
	steer := func(v protocol.Verb) protocol.RolloutStatus {
		t.Helper()
		return asked[protocol.Deployment](t, dora, protocol.SteerRollout, protocol.RolloutOrder{ID: "d1", Verb: v}).Rollout
	}
	if got := steer(protocol.PauseRollout); got.State != protocol.RolloutPaused || got.By != "dora" {
		t.Errorf("%+v", got)
	}
	steer(protocol.PauseRollout) // is so already
	s.finish("n1", "d1", 1, protocol.Confirmed)
	dora.roll(t, "e1", 2, protocol.Strategy{}, "n1") // is released after what d1 does about n1, if it does anything
	s.await("e1", "n1")
	s.await("d1", "n1")
	steer(protocol.ResumeRollout)
	s.await("d1", "n1", "n2")
	if got := steer(protocol.AbortRollout); got.State != protocol.RolloutAborted {
		t.Errorf("%+v", got)
	}
	s.finish("n2", "d1", 1, protocol.Confirmed)
	d := dora.show(t, "d1")
	if n := d.Nodes["n3"]; n.Released || n.Note == "" || d.Rollout.State != protocol.RolloutAborted {
		t.Errorf("%+v", d)
	}
	_, err := dora.ask(protocol.SteerRollout, protocol.RolloutOrder{ID: "d9", Verb: protocol.PauseRollout})
	wantCode(t, err, protocol.Unknown)
	item, _ := dora.signedManifest(t, "n1", "dry", 0, protocol.DryActivate, "tried dry")
	asked[protocol.Deployment](t, dora, protocol.Deploy, protocol.DeployRequest{Deployment: "dry", Mode: protocol.DryActivate, Items: []protocol.DeployItem{item}})
	_, err = dora.ask(protocol.SteerRollout, protocol.RolloutOrder{ID: "dry", Verb: protocol.PauseRollout})
	wantCode(t, err, protocol.Unknown)
}

// Nodes that are away hold nobody up, and follow.
func TestOfflineNodesFollow(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	s := r.squad(admin, "n1", "n3")
	s.end(always(protocol.Confirmed))
	n2 := r.node(admin, "n2")
	admin.roll(t, "d1", 1, protocol.Strategy{Batch: "1"}, "n1", "n2", "n3")
	d := admin.stands(t, "d1", protocol.RolloutTrailing)
	s.await("d1", "n1", "n3")
	if n := d.Nodes["n2"]; n.Released || n.Failed || n.Note == "" {
		t.Errorf("%+v", n)
	}
	s.join(n2)
	s.await("d1", "n1", "n2", "n3")
	admin.stands(t, "d1", protocol.RolloutDone)
	records := r.auditRecords(t)
	if !slices.ContainsFunc(records, func(a protocol.AuditRecord) bool { return a.Reason == "released after their wave: n2" }) {
		t.Error("that n2 got it later is not on record")
	}
}

func TestNewerDeploymentTakesNodes(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	s := r.squad(admin, "n1", "n2", "n3")
	admin.roll(t, "d1", 1, protocol.Strategy{Batch: "1"}, "n1", "n2", "n3")
	s.await("d1", "n1")
	// d2 has n1, which is on its way with d1, and n2, which waits for it; and holds both back itself.
	later := protocol.Strategy{At: time.Now().Add(time.Hour)}
	if d := admin.roll(t, "d2", 2, later, "n1", "n2"); d.Rollout.State != protocol.RolloutScheduled || d.Rollout.Next.IsZero() {
		eventually(t, "d2 says when it begins", func() bool { return !admin.show(t, "d2").Rollout.Next.IsZero() })
	}
	s.await("d1", "n1", "n3")
	s.finish("n3", "d1", 1, protocol.Confirmed)
	d := admin.stands(t, "d1", protocol.RolloutDone)
	if a, b := d.Nodes["n1"], d.Nodes["n2"]; a.Superseded != "d2" || !a.Released || b.Superseded != "d2" || b.Released || d.Count["superseded"] != 2 {
		t.Errorf("%+v", d)
	}
	s.await("d2")
	_, err := admin.ask(protocol.Deploy, admin.rollRequest(t, "d3", 2, protocol.Strategy{}, "n2"))
	wantCode(t, err, protocol.Conflict)
	s.end(always(protocol.Confirmed))
	admin.roll(t, "d3", 3, protocol.Strategy{}, "n1", "n2")
	admin.stands(t, "d3", protocol.RolloutDone)
	admin.stands(t, "d2", protocol.RolloutDone) // nobody is left to whom it could go
	s.await("d2")
}

// A node that was removed is out, and one that is further by its own account does not hold a wave up.
func TestNodesThatAreOut(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	s := r.squad(admin, "n1", "n2", "n3", "n4")
	admin.roll(t, "d1", 1, protocol.Strategy{Batch: "1"}, "n1", "n2", "n3", "n4")
	s.await("d1", "n1")
	s.nodes["n3"].beat(t, protocol.Beat{Interval: 120, Serial: 7, Deployment: "by-hand", Phase: protocol.Confirmed})
	eventually(t, "the beat is known", func() bool { return r.state(t, admin, "n3").Beat.Serial == 7 })
	for _, n := range []string{"n2", "n1"} {
		asked[struct{}](t, admin, protocol.RemoveNode, protocol.NameRequest{Name: n})
	}
	s.await("d1", "n1", "n4")
	s.finish("n4", "d1", 1, protocol.Confirmed)
	admin.stands(t, "d1", protocol.RolloutDone)
}

func TestLocks(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, dora, vera := r.person("anna", protocol.Admin), r.person("dora", protocol.Deployer), r.person("vera", protocol.Viewer)
	s := r.squad(admin, "n1", "n2")
	lock := func(p *person, node, reason string) (protocol.Reply, error) {
		return p.ask(protocol.LockNode, protocol.LockRequest{Node: node, Reason: reason})
	}
	_, err := lock(dora, "n9", "x")
	wantCode(t, err, protocol.Unknown)
	if _, err := lock(vera, "n1", "x"); err == nil {
		t.Error("a viewer locked a node")
	}
	_, err = lock(dora, "n1", "two\nlines")
	wantCode(t, err, protocol.Invalid)
	_, err = lock(dora, "n2", "disk is being copied")
	must(t, err)
	_, err = admin.ask(protocol.Deploy, admin.rollRequest(t, "d1", 1, protocol.Strategy{}, "n1", "n2"))
	wantCode(t, err, protocol.Conflict)
	if !strings.Contains(err.Error(), "n2 is locked by dora: disk is being copied") {
		t.Error(err)
	}
	// Neither enrolling it again nor tagging it takes the lock away, and enrolling does not make one.
	again := r.record("n2", s.nodes["n2"].signer)
	again.Lock = &protocol.Lock{Reason: "mine"}
	asked[protocol.NodeRecord](t, admin, protocol.PutNode, again)
	tagged := asked[protocol.NodeRecord](t, dora, protocol.TagNode, protocol.TagsRequest{Node: "n2", Tags: []string{"web"}})
	if l := tagged.Lock; l == nil || l.By != "dora" || l.Reason != "disk is being copied" || l.At.IsZero() {
		t.Errorf("%+v", l)
	}
	item, _ := dora.signedManifest(t, "n2", "dry", 0, protocol.DryActivate, "tried dry")
	asked[protocol.Deployment](t, dora, protocol.Deploy, protocol.DeployRequest{Deployment: "dry", Mode: protocol.DryActivate, Items: []protocol.DeployItem{item}})

	// One that is locked while a rollout is under way is passed over until it is unlocked.
	_, err = lock(dora, "n2", "")
	must(t, err)
	admin.roll(t, "d2", 2, protocol.Strategy{Batch: "1"}, "n1", "n2")
	s.await("d2", "n1")
	_, err = lock(admin, "n2", "not now")
	must(t, err)
	s.end(always(protocol.Confirmed))
	s.finish("n1", "d2", 2, protocol.Confirmed)
	if d := admin.stands(t, "d2", protocol.RolloutTrailing); d.Nodes["n2"].Released || d.Nodes["n2"].Note == "" {
		t.Errorf("%+v", d.Nodes["n2"])
	}
	_, err = lock(dora, "n2", "")
	must(t, err)
	s.await("d2", "n1", "n2")
	admin.stands(t, "d2", protocol.RolloutDone)
}

// A closure that one node went back from is not given to others.
func TestQuarantineElsewhere(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	s := r.squad(admin, "n1", "n2", "n3")
	closure := &protocol.Closure{Path: "/nix/store/00000000000000000000000000000000-system", Caches: []string{}, Keys: []string{}}
	request := protocol.DeployRequest{Deployment: "d1", Mode: protocol.Switch, Strategy: protocol.Strategy{Canary: "1"}}
	for _, n := range []string{"n1", "n2"} {
		m := wayBack(n, "x", 0)
		m.Deployment, m.Rollback, m.Closure = "d1", nil, closure
		request.Items = append(request.Items, protocol.DeployItem{Node: n, Serial: 1, Digest: admin.upload(t, value[[]byte](t)(admin.Signer.Manifest(m)))})
	}
	asked[protocol.Deployment](t, admin, protocol.Deploy, request)
	s.await("d1", "n1")
	s.nodes["n3"].beat(t, protocol.Beat{Interval: 120, Quarantine: []string{closure.Path}})
	d := admin.stands(t, "d1", protocol.RolloutStopped)
	if n := d.Nodes["n2"]; n.Released || !n.Failed || n.Note == "" || d.Rollout.Failures != 1 {
		t.Errorf("%+v", d)
	}
}

// Whatever is wrong with a way back is found before anything is taken over.
func TestWaysBackAreVerified(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin, dora := r.person("anna", protocol.Admin), r.person("dora", protocol.Deployer)
	r.online(admin, "n1", "n2")
	request := dora.rollRequest(t, "d1", 1, protocol.Strategy{OnFailure: protocol.RollbackOnFailure}, "n1")
	back := func(p *person, change func(*protocol.Manifest)) string {
		m := wayBack("n1", "d1", 1)
		change(m)
		return p.upload(t, value[[]byte](t)(p.Signer.Manifest(m)))
	}
	for name, c := range map[string]struct {
		back string
		want protocol.Code
	}{
		"none":             {"", protocol.Invalid},
		"not uploaded":     {protocol.Digest([]byte("x")), protocol.Unknown},
		"other signer":     {back(admin, func(*protocol.Manifest) {}), protocol.Invalid},
		"other node":       {back(dora, func(m *protocol.Manifest) { m.Node, m.Attr = "n2", protocol.SystemAttr("n2") }), protocol.Misaddressed},
		"other deployment": {back(dora, func(m *protocol.Manifest) { m.Deployment = "d1-forth" }), protocol.Invalid},
		"other serial":     {back(dora, func(m *protocol.Manifest) { m.Serial = 3 }), protocol.Invalid},
		"other mode":       {back(dora, func(m *protocol.Manifest) { m.Mode = protocol.Test }), protocol.Invalid},
		"elsewhere":        {back(dora, func(m *protocol.Manifest) { m.Rollback = &protocol.Rollback{Before: "d0"} }), protocol.Invalid},
		"no rollback": {back(dora, func(m *protocol.Manifest) {
			m.Rollback, m.Closure = nil, &protocol.Closure{Path: "/nix/store/00000000000000000000000000000000-x", Caches: []string{}, Keys: []string{}}
		}), protocol.Invalid},
		"the manifest": {request.Items[0].Digest, protocol.Invalid},
	} {
		bad := request
		bad.Items = []protocol.DeployItem{request.Items[0]}
		bad.Items[0].Back = c.back
		_, err := dora.ask(protocol.Deploy, bad)
		if err == nil {
			t.Fatalf("%s was accepted", name)
		}
		t.Log(name, ":", err)
		wantCode(t, err, c.want)
	}
	asked[protocol.Deployment](t, dora, protocol.Deploy, request)
}

// What a killed controller remembered and did not do yet, the next one does, and once.
func TestGoesOnAfterAKill(t *testing.T) {
	t.Parallel()
	r := startRig(t)
	admin := r.person("anna", protocol.Admin)
	later := protocol.Strategy{At: time.Now().Add(time.Hour)}
	s := r.squad(admin, "n1", "n2", "n3", "n4")
	admin.roll(t, "d1", 1, later, "n1", "n2")
	admin.roll(t, "d2", 1, protocol.Strategy{OnFailure: protocol.RollbackOnFailure}, "n3", "n4")
	s.await("d2", "n3", "n4")
	s.finish("n3", "d2", 1, protocol.Confirmed)
	eventually(t, "n3 is known to have it", func() bool { return admin.show(t, "d2").Count[protocol.Confirmed] == 1 })
	put := func(id, state string) {
		_, err := r.c.Store().Client().Put(context.Background(), "/nix-infra/rollouts/"+id, fmt.Sprintf(`{"strategy":{},"state":%q,"since":"2026-01-02T03:04:05Z","wave":1}`, state))
		must(t, err)
	}
	put("d1", "running")     // wave 1 has begun, and nobody has it yet
	put("d2", "rolled-back") // and there is no way back yet
	s.end(always(protocol.Confirmed))
	for range 2 {
		s.rest()
		r.restart()
		admin = r.person("anna", protocol.Admin)
		for name, n := range s.nodes {
			n.nc = r.dial(n.signer, protocol.InboxPrefix(name))
			s.join(n)
		}
		s.await("d1", "n1", "n2")
		s.await("d2-back", "n3", "n4")
		admin.stands(t, "d1", protocol.RolloutDone)
		admin.stands(t, "d2-back", protocol.RolloutDone)
	}
	list := asked[protocol.DeploymentList](t, admin, protocol.ListDeployments, nil)
	if len(list.Deployments) != 3 {
		t.Errorf("%+v", list)
	}
	if g := value[*clientv3.GetResponse](t)(r.c.Store().Client().Get(context.Background(), "/nix-infra/rollouts/", clientv3.WithPrefix())); len(g.Kvs) != 3 {
		t.Errorf("%d rollouts", len(g.Kvs))
	}
}
