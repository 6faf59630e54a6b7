package command

import (
	"bytes"
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/nix-infra/nix-infra/cli/client/fleettest"
	"github.com/nix-infra/nix-infra/protocol"
)

// statesOf are nodes in all conditions, with nothing that changes from run to run.
func statesOf(f *fleettest.Fleet) {
	seen := time.Date(2026, 3, 4, 5, 6, 7, 0, time.UTC)
	for _, n := range []string{"fresh", "gone", "web1", "web2"} {
		f.Register(n, "web")
	}
	f.Change("gone", func(n *protocol.NodeState) {
		n.LastSeen, n.Beat = &seen, &protocol.Beat{Version: 1, Serial: 1, Deployment: "d1", Phase: protocol.Confirmed}
	})
	f.Change("web1", func(n *protocol.NodeState) {
		n.Online, n.LastSeen, n.Key, n.XKey = true, &seen, "UKEY", "XKEY"
		n.Desired = &protocol.Desired{Serial: 4, Deployment: "d4", Mode: protocol.Switch}
		n.Beat = &protocol.Beat{
			Version: 1, Interval: 10, Serial: 4, Deployment: "d4", Phase: protocol.RolledBack, Reason: "unit web.service failed",
			Closure: "/nix/store/3c2kb1yx8vhqpz0y4l5m6n7p8q9r0s1t-nixos-system-web1-25.11", Generation: 7, FailedUnits: []string{"web.service"},
			RebootNeeded: true, Kernel: "6.12.1", NixOS: "25.11", System: "x86_64-linux", BootID: "b1", Agent: "v1.0.0",
			Vitals: protocol.Vitals{Uptime: 60, Load: [3]float64{0.5, 0.25, 0}, MemTotal: 1 << 30, MemAvailable: 1 << 29, DiskTotal: 1 << 34, DiskFree: 1 << 33},
		}
	})
	f.Change("web2", func(n *protocol.NodeState) {
		n.Online, n.LastSeen = true, &seen
		n.Desired = &protocol.Desired{Serial: 5, Deployment: "d5", Mode: protocol.Switch}
		n.Beat = &protocol.Beat{Version: 1, Serial: 4, Deployment: "d4", Phase: protocol.Confirmed}
	})
}

func TestStatusJSON(t *testing.T) {
	s, f := newFleet(t)
	statesOf(f)
	golden(t, "json/status.jsonl", s.must("status", "--json"))
	golden(t, "json/nodes.jsonl", s.must("nodes", "--json"))
	for _, d := range documents(t, s.must("status", "--json")) {
		for _, field := range []string{"node", "state", "generation", "closure", "deployment", "serial", "last_seen", "failed_units"} {
			if _, ok := d[field]; !ok {
				t.Errorf("%v has no %s", d["node"], field)
			}
		}
	}
}

func TestStatus(t *testing.T) {
	s, f := newFleet(t)
	if out := s.must("status"); !strings.Contains(out, "no nodes yet") {
		t.Errorf("an empty fleet: %s", out)
	}
	statesOf(f)
	out := lines(s.must("status"))
	for i, want := range [][]string{{"NODE", "STATE"}, {"fresh", "new", "never"}, {"gone", "lost"}, {"web1", "rolled-back", "3c2kb1yx", "web.service", "unit web.service failed"}, {"web2", "pending"}} {
		for _, w := range want {
			if !strings.Contains(out[i], w) {
				t.Errorf("line %d has no %q: %s", i, w, out[i])
			}
		}
	}
	if out := lines(s.must("status", "state=lost,", "web2")); len(out) != 3 {
		t.Errorf("selected: %v", out)
	}
	if out := lines(s.must("nodes", "not", "web1", "fresh")); len(out) == 0 || strings.Contains(strings.Join(out, ""), "web1") {
		t.Errorf("selected: %v", out)
	}
}

// watched is an output that tells when something was written.
type watched struct {
	mu   sync.Mutex
	buf  bytes.Buffer
	seen chan struct{}
	want string
}

func (w *watched) Write(p []byte) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	n, err := w.buf.Write(p)
	if w.seen != nil && strings.Contains(w.buf.String(), w.want) {
		close(w.seen)
		w.seen = nil
	}
	return n, err
}

// await returns once it was written.
func (w *watched) await(text string) {
	w.mu.Lock()
	seen := make(chan struct{})
	if strings.Contains(w.buf.String(), text) {
		close(seen)
	} else {
		w.seen, w.want = seen, text
	}
	w.mu.Unlock()
	<-seen
}

func (w *watched) String() string {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.buf.String()
}

func TestStatusWatchSaysWhatChanged(t *testing.T) {
	s, f := newFleet(t)
	statesOf(f)
	ctx, interrupt := context.WithCancel(t.Context())
	seen := make(chan struct{})
	first := &watched{seen: seen, want: `"node":"web2"`}
	go func() {
		<-seen
		f.Change("gone", func(n *protocol.NodeState) { n.Online = true })
	}()
	go func() {
		for ctx.Err() == nil && strings.Count(first.String(), "\n") < 5 {
			time.Sleep(10 * time.Millisecond)
		}
		interrupt()
	}()
	r := s.runContext(ctx, first, "status", "--watch", "--json")
	docs := documents(t, r.out)
	if r.status != Interrupted || len(docs) != 5 || docs[4]["node"] != "gone" || docs[4]["state"] != "confirmed" {
		t.Errorf("status %d:\n%s", r.status, r.out)
	}
}

func TestNode(t *testing.T) {
	s, f := newFleet(t)
	statesOf(f)
	out := s.must("node", "show", "web1")
	for _, want := range []string{"rolled-back", "512.0 MiB available of 1.0 GiB", "d4, serial 4", "needed", "UKEY"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	s.expect(Refused, "there is no node", "node", "show", "nobody")
	s.must("node", "tag", "web1", "db", "eu")
	if r := f.Record("web1"); fmt.Sprint(r.Tags) != "[db eu]" {
		t.Errorf("tags %v", r.Tags)
	}
	s.expect(Refused, "tag", "node", "tag", "web1", "No Tag")
	s.expect(Refused, "there is no node", "node", "tag", "nobody", "x")
	s.must("node", "remove", "web1")
	if f.Record("web1") != nil {
		t.Error("web1 is still there")
	}
	s.expect(Refused, "there is no node", "node", "remove", "web1")
}

func TestRelease(t *testing.T) {
	s, f := newFleet(t)
	n := f.Add("web1")
	asked := make(chan string, 1)
	n.Script(fleettest.Script{Answers: func(o *protocol.Verified) (any, error) {
		r, err := protocol.Decode[protocol.NameRequest](o.Payload)
		asked <- r.Name
		return nil, err
	}})
	s.must("node", "release", "web1", "/nix/store/x")
	if got := <-asked; got != "/nix/store/x" {
		t.Errorf("asked to release %q", got)
	}
	s.expect(Refused, "there is no node", "node", "release", "nobody")
	n.Vanish()
	s.expect(Unanswered, "no answer", "node", "release", "web1")
}

func TestPing(t *testing.T) {
	s, f := newFleet(t)
	for i := range broadcastFrom + 2 {
		f.Add(fmt.Sprintf("n%02d", i), "all-of-them")
	}
	if out := s.must("ping", "@all-of-them"); !strings.Contains(out, "18 of 18 answered") {
		t.Errorf("broadcast:\n%s", out)
	}
	if out := s.must("ping", "n01", "n02"); !strings.Contains(out, "2 of 2 answered") || strings.Contains(out, "n03") {
		t.Errorf("asked one by one:\n%s", out)
	}
	f.Register("off")
	s.expect(Unanswered, "no answer from off", "ping", "n01", "off")
	r := s.run("ping", "--json", "--timeout", "5s")
	docs := documents(t, r.out)
	if r.status != Unanswered || len(docs) != 19 || docs[18]["node"] != "off" || docs[18]["answered"] != false {
		t.Errorf("status %d:\n%s", r.status, r.out)
	}
	for name, off := range map[string]time.Duration{"early": time.Hour, "late": -time.Hour} {
		f.Add(name).Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) {
			return protocol.Pong{Agent: "v9\x1b[2J", Time: time.Now().Add(off)}, nil
		}})
	}
	out := s.must("ping", "early", "late", "n01")
	for _, want := range []string{"ms, agent v9, its clock is 1h0m0s ahead of ours", "ms, agent v9, its clock is 1h0m0s behind ours", "ms, agent test\n"} {
		if !strings.Contains(out, want) {
			t.Errorf("no %q in:\n%s", want, out)
		}
	}
	f.Add("grumpy").Script(fleettest.Script{Answers: func(*protocol.Verified) (any, error) {
		return nil, protocol.Refuse(protocol.Revoked, "you were revoked")
	}})
	if r := s.run("ping", "grumpy"); r.status != SomeFailed || !strings.Contains(r.out, "grumpy: refused: you were revoked") {
		t.Errorf("status %d:\n%s", r.status, r.out)
	}
}

func TestControllerThatHangs(t *testing.T) {
	if testing.Short() {
		t.Skip("waits for an answer that does not come")
	}
	s, f := newFleet(t)
	f.Deafen()
	s.expect(Unanswered, "no answer from the controller", "status")
}
