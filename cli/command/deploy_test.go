package command

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

func TestDeploy(t *testing.T) {
	s, f := newFleet(t)
	for _, n := range []string{"web1", "web2"} {
		f.Add(n, "web")
	}
	f.Add("db1")
	out := s.must("deploy", "@web")
	if !strings.Contains(out, "web1: confirmed") || !strings.Contains(out, ": 2 confirmed\n") || strings.Contains(out, "db1") {
		t.Errorf("not what was asked for:\n%s", out)
	}
	if got := f.Tree("web1")["flake.nix"]; got != s.read("flake.nix") {
		t.Errorf("web1 has another flake.nix: %q", got)
	}
	m := f.Manifest("web1")
	if m.Serial != 1 || m.Mode != protocol.Switch || m.Timeout != 300 || m.BuildTimeout != 7200 || m.Settle != 5 || m.Attr != protocol.SystemAttr("web1") {
		t.Errorf("manifest %+v", m)
	}
	// What web1 and web2 share was uploaded once, and is not uploaded again.
	uploads := f.Uploads()
	distinct := map[string]bool{}
	for _, n := range []string{"web1", "web2"} {
		for _, file := range f.Manifest(n).Files {
			distinct[file.SHA256] = true
		}
	}
	if want := len(distinct) + 2; uploads != want {
		t.Errorf("%d blobs were uploaded, %d are needed: the distinct files and two manifests", uploads, want)
	}
	s.must("deploy", "web1,", "web2")
	if again := f.Uploads(); again != 2 {
		t.Errorf("a deploy of the same files uploaded %d blobs, want the two manifests", again)
	}
	if m := f.Manifest("web2"); m.Serial != 2 {
		t.Errorf("serial %d after the second deploy", m.Serial)
	}
}

// The controller may have lost its state, or the node its disk: the serial is above what either knows.
func TestNextSerial(t *testing.T) {
	for _, c := range []struct {
		desired, beat uint64
		mode          protocol.Mode
		want          uint64
	}{{0, 0, protocol.Switch, 1}, {4, 4, protocol.Switch, 5}, {4, 2, protocol.Boot, 5}, {2, 4, protocol.Test, 5}, {4, 4, protocol.DryActivate, 0},
		{4, 1<<64 - 1, protocol.Switch, 5}} {
		n := &protocol.NodeState{}
		if c.desired > 0 {
			n.Desired = &protocol.Desired{Serial: c.desired}
		}
		if c.beat > 0 {
			n.Beat = &protocol.Beat{Serial: c.beat}
		}
		if got, err := nextSerial(n, c.mode, time.Now()); got != c.want || err != nil {
			t.Errorf("desired %d, beat %d, %s: serial %d, want %d (%v)", c.desired, c.beat, c.mode, got, c.want, err)
		}
	}
	// A controller that was broken into has no manifest signed that would be the node's last one.
	now := time.Now()
	most := plausibleSerial(now)
	for _, n := range []*protocol.NodeState{{Serial: 1<<64 - 2}, {Serial: most}, {Desired: &protocol.Desired{Serial: 1<<64 - 1}}} {
		if got, err := nextSerial(n, protocol.Switch, now); err == nil || !strings.Contains(err.Error(), "either the controller, or this machine's clock, is not right") {
			t.Errorf("%+v: serial %d, %v", n, got, err)
		}
	}
	last, err := nextSerial(&protocol.NodeState{Serial: most - 1}, protocol.Switch, now)
	if next, err2 := nextSerial(&protocol.NodeState{Serial: last}, protocol.Switch, now.Add(time.Second)); err != nil || err2 != nil || next != last+1 {
		t.Errorf("after the highest that was believed, %d: %d, %v, %v", last, next, err, err2)
	}
}

func TestDeployThatFails(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	f.Add("web2").Script(fleettest.Script{Lines: []string{"building\x1b[2J things"}, Ends: func(*protocol.Manifest) protocol.Report {
		return protocol.Report{Phase: protocol.RolledBack, Reason: "unit web.service failed", Log: "first\nweb.service: \x1b[31mexit 1\n"}
	}})
	f.Add("db1").Script(fleettest.Script{Lines: []string{"error: attribute missing"}, Ends: func(*protocol.Manifest) protocol.Report {
		return protocol.Report{Phase: protocol.FailedPhase, Reason: "the build failed"}
	}})
	r := s.run("deploy", "all")
	if r.status != SomeFailed {
		t.Errorf("status %d", r.status)
	}
	for _, want := range []string{"1 confirmed, 1 failed, 1 rolled-back", "web2 rolled-back: unit web.service failed", "    web.service: exit 1", "db1 failed: the build failed", "    error: attribute missing"} {
		if !strings.Contains(r.out, want) {
			t.Errorf("no %q in:\n%s", want, r.out)
		}
	}
	if strings.Contains(r.out+r.stderr, "\x1b") {
		t.Error("a node's escape sequence reached the terminal")
	}
	if !strings.Contains(r.stderr, "2 nodes did not confirm: db1 web2") {
		t.Errorf("stderr: %s", r.stderr)
	}
}

func TestDeployToOfflineNodes(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	f.Register("web2")
	f.Add("db1").Vanish()
	started := time.Now()
	r := s.run("deploy", "all")
	if r.status != Unanswered || !strings.Contains(r.out, "1 confirmed, 2 pending") {
		t.Errorf("status %d\n%s%s", r.status, r.out, r.stderr)
	}
	if time.Since(started) > time.Minute {
		t.Error("it waited for nodes that are offline")
	}
	d := f.Deployments()[0]
	if d.Nodes["web2"].Released || d.Nodes["db1"].Released || d.Rollout.State != protocol.RolloutTrailing {
		t.Errorf("it does not wait for those that are offline: %+v", d)
	}
}

// A node that was just switched off still counts as online, and one may go while it builds.
func TestDeployToNodesThatGo(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for nodes that don't come")
	}
	for name, c := range map[string]struct {
		goes   func(*fleettest.Node)
		within time.Duration
	}{
		"before it":       {(*fleettest.Node).Silence, silentAfter + time.Minute},
		"while it builds": {func(n *fleettest.Node) { n.Script(fleettest.Script{Dies: protocol.Building}) }, onlineEvery + lostGrace + time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			s, f := newFleet(t)
			f.Add("web1")
			c.goes(f.Add("web2"))
			started := time.Now()
			r := s.run("deploy", "all")
			if took := time.Since(started); took > c.within {
				t.Errorf("it waited for %s", took)
			}
			if r.status != Unanswered || !strings.Contains(r.stderr, "offline: web2 (pending, until they come back)") || !strings.Contains(r.out, "1 confirmed") {
				t.Errorf("status %d\n%s%s", r.status, r.out, r.stderr)
			}
			if f.Record("web2").Desired == nil {
				t.Error("nothing is wanted of it")
			}
		})
	}
}

func TestWhoIsWaitedFor(t *testing.T) {
	now := time.Now()
	ago := func(d time.Duration) time.Time { return now.Add(-d) }
	released := protocol.NodeResult{Released: true}
	for name, c := range map[string]struct {
		f    follow
		want bool
	}{
		"works":                   {follow{awaited: true, phase: protocol.Building, beatAt: ago(time.Hour)}, true},
		"settled":                 {follow{awaited: true, phase: protocol.Confirmed, settled: true}, false},
		"has yet to get it":       {follow{awaited: true, result: protocol.NodeResult{Wave: 2}}, false},
		"was off all the time":    {follow{beatAt: now, lostAt: ago(time.Second), result: released}, false},
		"pending, just beat":      {follow{awaited: true, beatAt: ago(time.Second), result: released}, true},
		"pending, silent":         {follow{awaited: true, beatAt: ago(silentAfter), result: released}, false},
		"lost a moment ago":       {follow{awaited: true, phase: protocol.Building, lostAt: ago(time.Second)}, true},
		"lost while it built":     {follow{awaited: true, phase: protocol.Building, lostAt: ago(lostGrace)}, false},
		"lost while it switches":  {follow{awaited: true, phase: protocol.Activating, lostAt: ago(time.Hour)}, true},
		"lost while it reboots":   {follow{awaited: true, phase: protocol.Rebooting, lostAt: ago(time.Hour)}, true},
		"should have rolled back": {follow{awaited: true, phase: protocol.Checking, lostAt: ago(time.Hour), result: protocol.NodeResult{Released: true, Failed: true}}, false},
		"taken out of the fleet":  {follow{awaited: true, phase: protocol.Activating, gone: true}, false},
	} {
		c.f.silence = silentAfter
		if got := c.f.waitedFor(now); got != c.want {
			t.Errorf("%s: waited for: %v", name, got)
		}
	}
}

func TestDeployJSON(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1").Script(fleettest.Script{Lines: []string{"one", "two"}})
	f.Register("web2")
	r := s.run("deploy", "web1", "web2", "--json")
	if r.status != Unanswered {
		t.Fatalf("status %d: %s", r.status, r.stderr)
	}
	docs := documents(t, r.out)
	events := map[string]int{}
	outcomes := map[any]any{}
	for _, d := range docs {
		events[d["event"].(string)]++
		if d["event"] == "result" {
			outcomes[d["node"]] = d["outcome"]
		}
	}
	if docs[0]["event"] != "deployment" || events["deployment"] != 1 || events["result"] != 2 || outcomes["web1"] != "confirmed" || outcomes["web2"] != "pending" {
		t.Errorf("documents:\n%s", r.out)
	}
}

func TestDryActivate(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1").Script(fleettest.Script{Ends: func(m *protocol.Manifest) protocol.Report {
		return protocol.Report{Phase: protocol.Confirmed, Log: fmt.Sprintf("would restart web.service, serial %d", m.Serial)}
	}})
	out := s.must("deploy", "web1", "--mode", "dry-activate")
	if !strings.Contains(out, "web1 would:\n    would restart web.service, serial 0") {
		t.Errorf("what would change is not shown:\n%s", out)
	}
	if f.Record("web1").Desired != nil {
		t.Error("a dry run is wanted")
	}
}

func TestInterruptedWatching(t *testing.T) {
	s, f := newFleet(t)
	hold := make(chan struct{})
	t.Cleanup(func() { close(hold) })
	f.Add("web1").Script(fleettest.Script{Ends: func(*protocol.Manifest) protocol.Report {
		<-hold
		return protocol.Report{Phase: protocol.Confirmed}
	}})
	ctx, interrupt := context.WithCancel(t.Context())
	go func() {
		for ctx.Err() == nil {
			if slices.Contains(f.Requests(), protocol.ShowDeployment) { // so it watches
				interrupt()
			}
			time.Sleep(5 * time.Millisecond)
		}
	}()
	r := s.runContext(ctx, &bytes.Buffer{}, "deploy", "web1")
	id := f.Record("web1").Desired.Deployment
	if r.status != Interrupted || !strings.Contains(r.stderr, "the deployment goes on: nix-infra rollout watch "+id) {
		t.Errorf("status %d: %s", r.status, r.stderr)
	}
}

func TestInterruptedBeforePublishing(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	ctx, interrupt := context.WithCancel(t.Context())
	interrupt()
	r := s.runContext(ctx, &bytes.Buffer{}, "deploy", "web1")
	if r.status != Interrupted || !strings.Contains(r.stderr, "nix-infra: interrupted") {
		t.Errorf("status %d: %s", r.status, r.stderr)
	}
	if f.Record("web1").Desired != nil {
		t.Error("something is wanted of web1 all the same")
	}
}

func TestDetach(t *testing.T) {
	s, f := newFleet(t)
	f.Register("web1")
	out := s.must("deploy", "web1", "--detach")
	id := f.Deployments()[0].ID
	if !strings.Contains(out, "nix-infra rollout watch "+id) {
		t.Errorf("it does not say how to come back:\n%s", out)
	}
	if out := s.must("deployments"); !strings.Contains(out, id) || !strings.Contains(out, "1 pending") {
		t.Errorf("deployments:\n%s", out)
	}
	for _, name := range []string{id, id[:len(id)-1], "last"} {
		if out := s.must("deployment", "show", name); !strings.Contains(out, id) {
			t.Errorf("deployment show %s:\n%s", name, out)
		}
	}
	docs := documents(t, s.must("deployment", "show", id, "--json"))
	if len(docs) != 2 || docs[0]["deployment"] != id || docs[1]["node"] != "web1" || docs[1]["outcome"] != "pending" {
		t.Errorf("deployment show: %v", docs)
	}
	s.expect(Refused, "there is no deployment", "deployment", "show", "nope")
}

func TestDeployToUnknownNodes(t *testing.T) {
	s, f := newFleet(t)
	f.Add("web1")
	f.Requests()
	for _, selector := range []string{"web9", "@nobody", "web1 web9"} {
		s.expect(Refused, "", "deploy", "--target", selector)
	}
	if slices.Contains(f.Requests(), protocol.Deploy) {
		t.Error("something was deployed")
	}
}

// All that is wrong with the files is said at once, and nothing is uploaded.
func TestDeployOfBrokenFiles(t *testing.T) {
	s, f := newFleet(t)
	s.write("nodes/web1.nix", "{ a = \"[%%no-such-thing%%]\"; }\n")
	s.write("nodes/db1.nix", "{ a = \"[%%no-such-thing%%]\"; }\n")
	for _, n := range []string{"web1", "web2", "db1"} {
		f.Add(n)
	}
	f.Requests()
	r := s.run("deploy", "all")
	for _, want := range []string{"nix-infra: 2 nodes can't be composed; nothing was deployed:\n", "\n  db1: ", "\n  web1: "} {
		if r.status != Refused || !strings.Contains(r.stderr, want) || strings.Count(r.stderr, "\n") != 3 {
			t.Errorf("status %d, not three lines with %q:\n%s", r.status, want, r.stderr)
		}
	}
	if requests := f.Requests(); len(requests) != 1 {
		t.Errorf("more than the nodes was asked for: %v", requests)
	}
	s.expect(Refused, "db1: ", "deploy", "db1")
	many := &errorList{"broken:", slices.Repeat([]error{errors.New("a\nb")}, 25)}
	if got := strings.Split(message(many), "\n"); len(got) != 22 || got[1] != "  a; b" || got[21] != "  and 5 more" {
		t.Errorf("%q", got)
	}
}

// A manifest that somebody else's came before is a conflict; the whole deployment is refused then.
func TestConflict(t *testing.T) {
	p := &plan{}
	err := p.explain(t.Context(), protocol.Refuse(protocol.Conflict, "web1 has serial 7 already"))
	if got := message(err); !strings.Contains(got, "run it again") || !strings.Contains(got, "web1 has serial 7") || status(t.Context(), err) != Refused {
		t.Errorf("%q", got)
	}
}
